"""The schema as SQLAlchemy Core tables: what `alembic check` compares the database with, and what lists are
built on.

Functions, views, partitions and storage settings are in `migrations/`; this module declares columns, keys and
indexes.
"""

from __future__ import annotations

from functools import cache
from typing import Any

from sqlalchemy import (
    BigInteger,
    Boolean,
    CheckConstraint,
    Column,
    DateTime,
    Double,
    Identity,
    Index,
    Integer,
    Interval,
    MetaData,
    PrimaryKeyConstraint,
    Sequence,
    SmallInteger,
    Table,
    Text,
    Uuid,
    text,
)
from sqlalchemy.dialects.postgresql import ARRAY, JSONB, OID
from sqlalchemy.types import TypeEngine

_TIME = DateTime(timezone=True)
_WORD = Text(collation="C")
_NOW = text("clock_timestamp()")


def _column(
    name: str, kind: TypeEngine[Any] | type[TypeEngine[Any]], default: str | None = None
) -> Column[Any]:
    """A NOT NULL column, with a server default if one is given."""
    return Column(name, kind, nullable=False, server_default=None if default is None else text(default))


def _optional(name: str, kind: TypeEngine[Any] | type[TypeEngine[Any]]) -> Column[Any]:
    return Column(name, kind, nullable=True)


@cache
def metadata_for(schema: str = "pgqueue") -> MetaData:
    """All tables of one queue schema. Ask for one as `metadata_for(schema).tables[f"{schema}.jobs"]`."""
    metadata = MetaData(schema=schema)
    position = Sequence("jobs_position_seq", metadata=metadata)
    Table(
        "meta",
        metadata,
        _column("only_row", Boolean, "true"),
        _column("install_id", Uuid, "gen_random_uuid()"),
        _column("created_at", _TIME, "now()"),
        _column("oldest_code_revision", _WORD, "'0001'"),
        _column("paused", JSONB, "'{}'"),
        PrimaryKeyConstraint("only_row", name="meta_pkey"),
        CheckConstraint("only_row", name="meta_only_row_check"),
    )
    Table(
        "jobs",
        metadata,
        _column("id", Uuid),
        _column("state", _WORD, "'ready'"),
        _column("queue", _WORD, "'default'"),
        _column("task", _WORD),
        _column("args", JSONB, "'[]'"),
        _column("kwargs", JSONB, "'{}'"),
        _column("priority", SmallInteger, "5"),
        Column("position", BigInteger, position, nullable=False, server_default=position.next_value()),
        _optional("eta", _TIME),
        _optional("expires_at", _TIME),
        _column("attempt", Integer, "0"),
        _column("retries", Integer, "0"),
        _optional("max_retries", Integer),
        _column("crashes", Integer, "0"),
        _column("rescues", Integer, "0"),
        _optional("cancel_requested_at", _TIME),
        _optional("worker_id", _WORD),
        _optional("claimed_at", _TIME),
        Column("enqueued_at", _TIME, nullable=False, server_default=_NOW),
        Column("enqueued_by", Text, nullable=False, server_default=text("SESSION_USER")),
        _optional("unique_key", _WORD),
        _column("headers", JSONB, "'{}'"),
        PrimaryKeyConstraint("id", name="jobs_pkey"),
        CheckConstraint("state IN ('blocked', 'scheduled', 'ready', 'running')", name="jobs_state_known"),
        CheckConstraint("state <> 'scheduled' OR eta IS NOT NULL", name="jobs_scheduled_has_eta"),
        CheckConstraint("priority BETWEEN 0 AND 9", name="jobs_priority_range"),
        CheckConstraint(
            "greatest(attempt, retries, crashes, rescues) <= 1000000000", name="jobs_counts_range"
        ),
        CheckConstraint("position BETWEEN 0 AND 4611686018427387903", name="jobs_position_range"),
        CheckConstraint("worker_id <> ''", name="jobs_worker_named"),
        CheckConstraint("length(queue) BETWEEN 1 AND 63", name="jobs_queue_length"),
        Index("jobs_ready", "queue", "priority", "position", postgresql_where=text("state = 'ready'")),
        Index("jobs_scheduled", "eta", postgresql_where=text("state = 'scheduled'")),
        Index("jobs_running", "worker_id", postgresql_where=text("state = 'running'")),
        Index(
            "jobs_unique_key",
            "task",
            "unique_key",
            unique=True,
            postgresql_where=text("unique_key IS NOT NULL"),
        ),
    )
    Table(
        "finished_jobs",
        metadata,
        _column("id", Uuid),
        _column("state", _WORD),
        _column("queue", _WORD),
        _column("task", _WORD),
        _column("args", JSONB),
        _column("kwargs", JSONB),
        _column("priority", SmallInteger),
        _optional("eta", _TIME),
        _optional("expires_at", _TIME),
        _column("attempt", Integer),
        _column("retries", Integer),
        _column("crashes", Integer),
        _column("rescues", Integer),
        _optional("worker_id", _WORD),
        _column("enqueued_at", _TIME),
        _column("enqueued_by", Text),
        _optional("claimed_at", _TIME),
        _optional("started_at", _TIME),
        Column("finished_at", _TIME, nullable=False, server_default=_NOW),
        _optional("unique_key", _WORD),
        _column("headers", JSONB),
        _optional("result", JSONB),
        _optional("result_error", Text),
        CheckConstraint("state IN ('succeeded', 'cancelled', 'expired')", name="finished_jobs_state_known"),
        Index("finished_jobs_id", "id"),
        Index(
            "finished_jobs_correlation_id",
            text("(headers ->> 'correlation_id')"),
            postgresql_using="hash",
            postgresql_where=text("headers ->> 'correlation_id' IS NOT NULL"),
        ),
        Index(
            "finished_jobs_tags",
            text("(headers -> 'tags')"),
            postgresql_using="gin",
            postgresql_with={"fastupdate": "off"},
            postgresql_where=text("headers -> 'tags' IS NOT NULL"),
        ),
        postgresql_partition_by="RANGE (finished_at)",
    )
    Table(
        "failures",
        metadata,
        _column("job_id", Uuid),
        _column("attempt", Integer),
        _column("task", _WORD),
        _column("queue", _WORD),
        _column("kind", _WORD),
        _optional("error_class", Text),
        _optional("error_message", Text),
        _optional("traceback", Text),
        _optional("worker_id", _WORD),
        Column("failed_at", _TIME, nullable=False, server_default=_NOW),
        CheckConstraint("kind IN ('failed', 'crashed')", name="failures_kind_known"),
        Index("failures_job_id", "job_id"),
        postgresql_partition_by="RANGE (failed_at)",
    )
    Table(
        "dead_letters",
        metadata,
        _column("id", Uuid),
        _column("queue", _WORD),
        _column("task", _WORD),
        _column("args", JSONB),
        _column("kwargs", JSONB),
        _column("priority", SmallInteger),
        _optional("eta", _TIME),
        _optional("expires_at", _TIME),
        _column("attempt", Integer),
        _column("retries", Integer),
        _optional("max_retries", Integer),
        _column("crashes", Integer),
        _column("rescues", Integer),
        _optional("worker_id", _WORD),
        _optional("claimed_at", _TIME),
        _column("enqueued_at", _TIME),
        _column("enqueued_by", Text),
        _optional("unique_key", _WORD),
        _column("headers", JSONB),
        _column("dead_letter_queue", _WORD),
        _column("reason", _WORD),
        _optional("error_class", Text),
        _optional("error_message", Text),
        _optional("traceback", Text),
        Column("died_at", _TIME, nullable=False, server_default=_NOW),
        PrimaryKeyConstraint("id", name="dead_letters_pkey"),
        Index("dead_letters_listing", "dead_letter_queue", "died_at"),
        Index("dead_letters_died_at", "died_at"),
    )
    Table(
        "canvases",
        metadata,
        _column("id", Uuid),
        _column("output", Uuid),
        _column("jobs", Integer),
        _column("begun_by", BigInteger, "((pg_current_xact_id())::text)::bigint"),
        Column("enqueued_at", _TIME, nullable=False, server_default=_NOW),
        Column("enqueued_by", Text, nullable=False, server_default=text("SESSION_USER")),
        _optional("state", _WORD),
        _optional("ended_at", _TIME),
        _column("failed", Boolean, "false"),
        PrimaryKeyConstraint("id", name="canvases_pkey"),
        Index("canvases_ended", "failed", "ended_at", postgresql_where=text("ended_at IS NOT NULL")),
        Index("canvases_enqueued", "enqueued_at"),
    )
    Table(
        "canvas_nodes",
        metadata,
        _column("id", Uuid),
        _column("canvas_id", Uuid),
        _column("nth", Integer),
        _column("is_join", Boolean, "false"),
        _optional("after", Uuid),
        _optional("member_of", Uuid),
        _column("takes_result", Boolean, "false"),
        _column("keeps_result", Boolean, "false"),
        _column("skips_failed", Boolean, "false"),
        _optional("countdown", Double),
        _optional("expires_in", Double),
        _optional("dead_letter_queue", _WORD),
        _optional("on_error", JSONB),
        _optional("state", _WORD),
        _optional("cause", Uuid),
        _optional("error", Text),
        _column("released", Boolean, "false"),
        _column("passed_on", Boolean, "false"),
        _optional("size", Integer),
        _optional("result", JSONB),
        PrimaryKeyConstraint("id", name="canvas_nodes_pkey"),
        CheckConstraint(
            "state IN ('succeeded', 'cancelled', 'expired', 'dead')", name="canvas_nodes_state_known"
        ),
        Index("canvas_nodes_canvas", "canvas_id", "nth"),
        Index(
            "canvas_nodes_waiting",
            "after",
            "nth",
            postgresql_where=text("NOT released AND after IS NOT NULL"),
        ),
        Index("canvas_nodes_members", "member_of", "nth", postgresql_where=text("member_of IS NOT NULL")),
        Index(
            "canvas_nodes_open",
            "member_of",
            "nth",
            postgresql_where=text("state IS NULL AND member_of IS NOT NULL"),
        ),
        Index("canvas_nodes_ended", "id", postgresql_where=text("state IS NOT NULL AND NOT passed_on")),
    )
    Table(
        "workers",
        metadata,
        _column("id", _WORD),
        _column("host", Text),
        _column("pid", Integer),
        _column("queues", ARRAY(Text)),
        _column("pool", Text),
        _column("concurrency", Integer),
        _column("version", Text),
        _column("started_at", _TIME, "now()"),
        _column("heartbeat", BigInteger, "0"),
        _column("heartbeat_at", _TIME, "now()"),
        _column("fenced", Boolean, "false"),
        _column("running", ARRAY(Uuid), "'{}'"),
        _column("stats", JSONB, "'{}'"),
        _column("schedules", ARRAY(Text), "'{}'"),
        _column("tasks", ARRAY(Text), "'{}'"),
        _column("conf", JSONB, "'{}'"),
        PrimaryKeyConstraint("id", name="workers_pkey"),
    )
    Table(
        "wake",
        metadata,
        _column("queue", _WORD),
        _column("wake_until", _TIME),
        _column("next_eta", _TIME, "'infinity'"),
        PrimaryKeyConstraint("queue", name="wake_pkey"),
    )
    Table(
        "schedules",
        metadata,
        _column("name", _WORD),
        _column("source", _WORD),
        _column("task", _WORD),
        _optional("cron", Text),
        _optional("every", Interval),
        _column("timezone", Text, "'UTC'"),
        _column("args", JSONB, "'[]'"),
        _column("kwargs", JSONB, "'{}'"),
        _column("queue", _WORD, "'default'"),
        _column("priority", SmallInteger, "5"),
        _optional("max_retries", Integer),
        _optional("expires_in", Interval),
        _column("headers", JSONB, "'{}'"),
        _column("catch_up", _WORD, "'latest'"),
        _column("overlap", _WORD, "'allow'"),
        _column("jitter", Interval, "'0'"),
        _column("paused", Boolean, "false"),
        _column("last_tick", _TIME, "clock_timestamp()"),
        _optional("next_tick", _TIME),
        _column("held", ARRAY(_TIME), "'{}'"),
        _column("recent_jobs", ARRAY(Uuid), "'{}'"),
        _column("fired", BigInteger, "0"),
        _column("missed", BigInteger, "0"),
        _column("skipped", BigInteger, "0"),
        _column("version", BigInteger, "0"),
        Column("created_at", _TIME, nullable=False, server_default=_NOW),
        Column("created_by", Text, nullable=False, server_default=text("SESSION_USER")),
        Column("changed_at", _TIME, nullable=False, server_default=_NOW),
        PrimaryKeyConstraint("name", name="schedules_pkey"),
        CheckConstraint("length(name) BETWEEN 1 AND 255", name="schedules_name_length"),
        CheckConstraint("source IN ('code', 'database')", name="schedules_source_known"),
        CheckConstraint("num_nonnulls(cron, every) = 1", name="schedules_one_cadence"),
        CheckConstraint("catch_up IN ('latest', 'all', 'none')", name="schedules_catch_up_known"),
        CheckConstraint("overlap IN ('allow', 'skip', 'queue')", name="schedules_overlap_known"),
        CheckConstraint("priority BETWEEN 0 AND 9", name="schedules_priority_range"),
        CheckConstraint("length(queue) BETWEEN 1 AND 63", name="schedules_queue_length"),
    )
    Table(
        "retention",
        metadata,
        _column("what", _WORD),
        _column("scope", _WORD),
        _column("name", _WORD),
        _column("keep", Interval),
        Column("set_at", _TIME, nullable=False, server_default=_NOW),
        Column("set_by", Text, nullable=False, server_default=text("SESSION_USER")),
        PrimaryKeyConstraint("what", "scope", "name", name="retention_pkey"),
        CheckConstraint("what IN ('finished', 'failures', 'dead_letters')", name="retention_what_known"),
        CheckConstraint("scope IN ('task', 'queue')", name="retention_scope_known"),
        CheckConstraint("keep BETWEEN interval '0' AND interval '36500 days'", name="retention_keep_range"),
    )
    Table(
        "retention_walks",
        metadata,
        _column("part", _WORD),
        _column("general", Boolean),
        _column("keep", Interval),
        _optional("node", OID),
        Column("block", BigInteger, nullable=True, server_default=text("0")),
        Column("walked_at", _TIME, nullable=False, server_default=_NOW),
        PrimaryKeyConstraint("part", name="retention_walks_pkey"),
    )
    Table(
        "audit_log",
        metadata,
        Column("id", BigInteger, Identity(always=True), nullable=False),
        Column("at", _TIME, nullable=False, server_default=_NOW),
        Column("actor", Text, nullable=False, server_default=text("SESSION_USER")),
        _column("action", Text),
        _optional("job_id", Uuid),
        _optional("queue", _WORD),
        _optional("reason", Text),
        _column("details", JSONB, "'{}'"),
        PrimaryKeyConstraint("id", name="audit_log_pkey"),
        Index("audit_log_job_id", "job_id"),
        Index("audit_log_at", "at"),
    )
    return metadata
