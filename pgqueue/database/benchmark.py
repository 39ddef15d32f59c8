"""What a benchmark asks a database: how fast it answers, commits, and can claim and delete jobs at best.

All of it in a schema of the benchmark's own: tables of others are neither read nor written.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass
from typing import Any, Final

import psycopg
from psycopg.rows import tuple_row
from psycopg.sql import SQL, Identifier

from pgqueue.database.queries import query
from pgqueue.database.session import Session, connect
from pgqueue.errors import DatabaseError, DatabaseUnavailable, PermissionDenied

PREFIX: Final = "pgqueue_bench_"
"""Of the schemas that are made here."""

BATCH: Final = 500
"""Jobs of one claim, as many as a worker takes at most."""

Tick = Callable[[int], None]
"""Told of progress in small steps; what it raises ends the measure."""

_TOLD_EVERY: Final = 0.05
"""Seconds between two ticks: one for each look would be measured along."""


@dataclass(frozen=True)
class Speed:
    """How many jobs went through in how many seconds."""

    jobs: int
    seconds: float

    @property
    def rate(self) -> float:
        """Jobs per second."""
        return self.jobs / self.seconds


@dataclass(frozen=True)
class Server:
    """What was measured, and the settings that decide when a commit is done."""

    version: str
    database: str
    fsync: str
    synchronous_commit: str


def new_schema_name() -> str:
    """One that nobody has."""
    return f"{PREFIX}{secrets.token_hex(4)}"


def require_right(dsn: str) -> None:
    """Ask whether the role may make a schema.

    Raises:
        DatabaseUnavailable: The database cannot be reached.
        PermissionDenied: It may not; the message says what to grant.
    """
    with closing(connect(dsn)) as connection:
        (row,) = Session(connection, "").run("may_create")
    if not row["allowed"]:
        role, database = (Identifier(row[name]).as_string() for name in ("role", "database"))
        raise PermissionDenied(
            f"role {role} may not create a schema in database {database}, and a benchmark makes one of its"
            f" own; GRANT CREATE ON DATABASE {database} TO {role}, or name another database"
        )


def drop_schema(dsn: str, schema: str) -> None:
    """Drop it, if it is there.

    Raises:
        DatabaseError: Somebody uses it; the message says what is left.
        DatabaseUnavailable: The database is gone, and the same.
    """
    try:
        with closing(connect(dsn)) as connection:
            connection.execute("SET lock_timeout = '10s'")
            connection.execute(SQL("DROP SCHEMA IF EXISTS {} CASCADE").format(Identifier(schema)))
    except (psycopg.Error, DatabaseError) as error:
        gone = isinstance(error, psycopg.OperationalError | DatabaseUnavailable)
        raise (DatabaseUnavailable if gone else DatabaseError)(
            f"the benchmark's schema is left behind: {error}; DROP SCHEMA IF EXISTS {schema} CASCADE"
        ) from error


def describe(session: Session) -> Server:
    """Which server it is."""
    (row,) = session.run("describe_server")
    wanted = ["fsync", "synchronous_commit"]
    settings = {each["name"]: each["setting"] for each in session.run("list_settings", names=wanted)}
    return Server(row["version"], row["database"], **settings)


def settle(session: Session) -> None:
    """Let commits wait for the disk, as those of the queue do."""
    pid = session.connection.info.backend_pid
    session.run("settle_session", statement_timeout=None, lock_timeout=None, pid=pid)


def for_seconds(seconds: float, tick: Tick) -> Iterator[None]:
    """Go on for so long; ticks are milliseconds."""
    began = told = time.perf_counter()
    while (now := time.perf_counter()) < began + seconds:
        if now - told >= _TOLD_EVERY:
            tick(round((now - told) * 1000))
            told = now
        yield


def round_trips(session: Session, seconds: float, tick: Tick) -> list[float]:
    """Seconds that a statement takes which does nothing."""
    return [_seconds_of(lambda: session.connection.execute("SELECT 1")) for _ in for_seconds(seconds, tick)]


def commits(session: Session, seconds: float, tick: Tick) -> list[float]:
    """Seconds from COMMIT to its answer, of transactions with a few bytes for the log."""
    found = []
    for _ in for_seconds(seconds, tick):
        with session.connection.transaction():
            session.run("flush_log")
            began = time.perf_counter()
        found.append(time.perf_counter() - began)
    return found


def fill(session: Session, jobs: int, task: str) -> None:
    """Empty tables, then so many ready jobs, with statistics that fit."""
    truncate(session)
    session.run("fill_queue", jobs=jobs, task=task)
    _do(session, "VACUUM ANALYZE {schema}.jobs")


def truncate(session: Session) -> None:
    """Forget all jobs."""
    _do(session, query("truncate_jobs", session.schema).text)


def bare_loop(session: Session, tick: Tick) -> Speed:
    """Claim and delete what there is, with nothing in between; ticks are jobs."""
    claim, delete = (query(name, session.schema).text for name in ("claim_bare_jobs", "delete_bare_jobs"))
    began, after, jobs = time.perf_counter(), 0, 0
    with session.connection.cursor(row_factory=tuple_row) as cursor:
        while rows := cursor.execute(claim.encode(), {"after": after, "batch": BATCH}).fetchall():
            after = max(position for _, position in rows)
            ids = ",".join(job for job, _ in rows)
            cursor.execute(delete.encode(), {"ids": f"{{{ids}}}"})
            jobs += len(rows)
            tick(len(rows))
    return Speed(jobs, time.perf_counter() - began)


def live_jobs(session: Session) -> int:
    """How many have not ended."""
    return sum(row["jobs"] for row in session.run("count_live_jobs"))


def _seconds_of(act: Callable[[], Any]) -> float:
    began = time.perf_counter()
    act()
    return time.perf_counter() - began


def _do(session: Session, text: str) -> None:
    session.connection.execute(text.replace("{schema}", session.schema).encode())
