"""Bring a database to the schema revision this pgqueue works with, and check that it may be worked on.

Old and new releases work side by side on one database: expand, deploy, contract. A release accepts the
revisions from `OLDEST_REVISION` to its own head, so it can be deployed before or after its migration. And the
database says which releases may still work on it (`meta.oldest_code_revision`, since 0002), so an older
release goes on beside a newer one until a migration takes away what it needs.

All migrations of one call run in one transaction under an advisory lock, so two calls at once are safe and a
failed or killed one leaves nothing behind. Postgres runs DDL inside transactions. A table is locked only if
that takes moments; otherwise everything is rolled back and tried again, because whoever enqueues meanwhile
would queue up behind us.
"""

from __future__ import annotations

import io
import json
import re
import time
from collections.abc import Callable
from contextlib import closing
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from pgqueue.database.dsn import connect_options, one_line, unreachable
from pgqueue.database.queries import query
from pgqueue.errors import ConfigError, DatabaseError, DatabaseUnavailable, SchemaMismatch

if TYPE_CHECKING:
    from alembic.config import Config
    from sqlalchemy import Engine

VERSION_TABLE = "alembic_version"
_PARTITION = re.compile(r"_((p|kept_)\d{8}|default)$")
OLDEST_REVISION: Final = "0001"
"""The oldest revision this release works on: its statements use nothing that a later one has made. Raise it
when one of them does, one release after the revision that made it: then every database has been migrated."""

PATIENCE: Final = 60.0
"""Seconds a migration tries to lock the tables, and waits for another migration."""
LOCK_TIMEOUT: Final = 0.03
"""Seconds it waits for one lock: so long an enqueue that comes meanwhile is held up."""
STUBBORN_LOCK_TIMEOUT: Final = 1.0
"""The same in the second half of `PATIENCE`, against transactions that are short but always there."""
LOCK_PAUSE: Final = 0.5
"""Seconds between two attempts."""

_LOCK_KEY = 0x7067_7175_6575_65
"""'pgqueue' in ASCII; one migration at a time in a database, whatever its schema."""

_PREAMBLE = """
SELECT pg_advisory_xact_lock({key});
SET LOCAL lock_timeout = '1s';
CREATE SCHEMA IF NOT EXISTS {schema};
"""

# Whoever keeps us from a table has held a lock in the schema for longer than we waited.
_HOLDERS = """
SELECT DISTINCT a.pid, a.usename, a.application_name, a.state,
       round(extract(epoch FROM clock_timestamp() - a.xact_start))::bigint AS seconds
FROM pg_locks l JOIN pg_class c ON c.oid = l.relation JOIN pg_stat_activity a ON a.pid = l.pid
WHERE l.database = (SELECT oid FROM pg_database WHERE datname = current_database())
  AND c.relnamespace = to_regnamespace(%s) AND l.granted AND l.pid <> pg_backend_pid()
  AND (a.xact_start < clock_timestamp() - make_interval(secs => %s) OR a.state IS NULL)  -- hidden from us
ORDER BY seconds DESC NULLS LAST, a.pid
"""


def migrations_folder() -> Path:
    """Where the Alembic environment is: inside the package in a wheel, at the top level in a checkout."""
    package = Path(__file__).resolve().parent.parent
    inside = package / "migrations"
    return inside if inside.is_dir() else package.parent / "migrations"


@cache
def revisions() -> tuple[str, ...]:
    """All revisions this release knows, the oldest first: the files in `migrations/versions`."""
    files = (migrations_folder() / "versions").glob("[0-9]*.py")
    return tuple(sorted(path.name.split("_", 1)[0] for path in files))


def head_revision() -> str:
    """The newest revision this release knows: what `upgrade` brings a database to."""
    return revisions()[-1]


def check_schema_name(schema: str) -> str:
    """The schema's name; ConfigError unless it needs no quoting anywhere."""
    if not re.fullmatch(r"[a-z_][a-z0-9_]{0,47}", schema) or schema.startswith("pg_"):
        raise ConfigError(
            f"schema must be lower-case letters, digits and '_', not starting with pg_, got {schema!r}"
        )
    return schema


def check_revision(revision: str) -> str:
    """The revision; ConfigError unless this release knows it."""
    if revision not in revisions():
        raise ConfigError(
            f"this pgqueue knows the revisions {revisions()[0]} to {head_revision()}, got {revision!r}"
        )
    return revision


def upgrade(
    dsn: str,
    *,
    schema: str = "pgqueue",
    revision: str = "head",
    tell: Callable[[str], None] | None = None,
    by: str | None = None,
) -> str | None:
    """Migrate up to `revision`; returns the revision the database was at before, None for an empty one.

    Idempotent, and safe to run twice at once. A database beyond it is left as it is. Needs the CREATE right
    on the database the first time.

    Args:
        tell: Called with one line whenever there is news of what it waits for.
        by: Who asks for it, noted in the audit log beside the database role.

    Raises:
        SchemaMismatch: The database is at a newer revision which this release may not work on.
        DatabaseError: It could not lock the tables for a minute, or a statement was refused.
        DatabaseUnavailable: The database cannot be reached.
    """
    from alembic import command

    wanted = head_revision() if revision == "head" else revision

    def run(config: Config, before: str | None) -> None:
        if before is None or before < wanted:
            command.upgrade(config, revision)
            _note(config, before, wanted, by)

    return _online(dsn, schema, run, tell)


def downgrade(
    dsn: str,
    revision: str,
    *,
    schema: str = "pgqueue",
    tell: Callable[[str], None] | None = None,
    by: str | None = None,
) -> str | None:
    """Migrate down to `revision` (`base`: drop all tables with their jobs); returns the revision before.

    Raises as `upgrade` does, and SchemaMismatch when the database is at a revision this release does not
    know: only the release that made it knows the way back.
    """
    from alembic import command

    def run(config: Config, before: str | None) -> None:
        if before is not None and before not in revisions():
            raise SchemaMismatch(
                f"database is at revision {before}, this pgqueue knows {revisions()[0]} to"
                f" {head_revision()}; migrate down with the release that made it"
            )
        command.downgrade(config, revision)
        if before is not None and revision != "base":
            _note(config, before, revision, by)

    return _online(dsn, schema, run, tell)


def _note(config: Config, before: str | None, after: str, by: str | None) -> None:
    """Write a migration that was made into the audit log."""
    changes = {"before": {"revision": before}, "after": {"revision": after}}
    details = json.dumps(changes if by is None else {"by": by, **changes})
    cursor = config.attributes["connection"].connection.driver_connection.cursor()
    parameters = {"action": "migrate", "reason": None, "details": details}
    cursor.execute(query("note_act", config.attributes["schema"]).text, parameters)


def check_drift(dsn: str, *, schema: str = "pgqueue") -> None:
    """Raise alembic's AutogenerateDiffsDetected when the database differs from `tables.py`."""
    from alembic import command

    _online(dsn, schema, lambda config, _: command.check(config))


def compare_options(schema: str) -> dict[str, Any]:
    """What alembic is to compare a database with, and what it leaves out."""
    from pgqueue.database.tables import metadata_for

    def is_ours(name: str | None, kind: str, parents: object) -> bool:
        # Day partitions are made by a function, so only their parents are compared.
        return name == schema if kind == "schema" else kind != "table" or not _PARTITION.search(name or "")

    return {
        "target_metadata": metadata_for(schema),
        "version_table": VERSION_TABLE,
        "version_table_schema": schema,
        "include_schemas": True,
        "include_name": is_ours,
    }


def upgrade_sql(*, schema: str = "pgqueue", since: str | None = None, to: str = "head") -> str:
    """The upgrade of an empty database, or of one at the revision `since`, as one SQL script."""
    from alembic import command

    out = io.StringIO()
    config = _config(schema, out)
    command.upgrade(config, f"{check_revision(since)}:{to}" if since is not None else to, sql=True)
    return out.getvalue()


def current_revision(dsn: str, *, schema: str = "pgqueue") -> str | None:
    """The revision the database is at, None when it was never migrated."""
    import psycopg

    try:
        with closing(psycopg.connect(dsn, **connect_options(dsn))) as connection:
            return _read_revision(connection, schema)[0]
    except psycopg.OperationalError as error:
        raise unreachable(error) from error


def require_revision(found: str | None, oldest_code: str | None = None, *, schema: str = "pgqueue") -> None:
    """Raise SchemaMismatch, with the way out, unless this release may work on the database.

    Args:
        found: The revision the database is at, None when it was never migrated.
        oldest_code: What it says of the releases that may work on it; None when it does not say.
    """
    ours = head_revision()
    if found is None:
        raise SchemaMismatch(f"the database has no schema {schema!r} of pgqueue; run `pgqueue migrate`")
    if found < OLDEST_REVISION:
        works = OLDEST_REVISION if ours == OLDEST_REVISION else f"{OLDEST_REVISION} to {ours}"
        raise SchemaMismatch(
            f"database is at revision {found}, this pgqueue works with {works}; run `pgqueue migrate`"
        )
    if found > ours and oldest_code is None:
        raise SchemaMismatch(
            f"database is at revision {found}, newer than this pgqueue, which is of {ours}; upgrade pgqueue"
        )
    if found > ours and ours < str(oldest_code):
        raise SchemaMismatch(
            f"database is at revision {found} and needs a pgqueue of {oldest_code} or newer, this one is of"
            f" {ours}; upgrade pgqueue"
        )


def _config(schema: str, output: io.StringIO | None = None) -> Config:
    from alembic.config import Config

    check_schema_name(schema)
    config = Config(output_buffer=output) if output is not None else Config()
    config.set_main_option("script_location", str(migrations_folder()).replace("%", "%%"))
    config.set_main_option("path_separator", "os")
    config.attributes["schema"] = schema
    config.attributes["preamble"] = _PREAMBLE.format(key=_LOCK_KEY, schema=schema)
    return config


def open_engine(dsn: str) -> Engine:
    """SQLAlchemy's way to the database, for what alembic does; it keeps no connections."""
    import psycopg
    import sqlalchemy

    options = connect_options(dsn)
    return sqlalchemy.create_engine(
        "postgresql+psycopg://",
        creator=lambda: psycopg.connect(dsn, prepare_threshold=None, **options),
        poolclass=sqlalchemy.NullPool,
        isolation_level="READ COMMITTED",
    )


def _online(
    dsn: str,
    schema: str,
    run: Callable[[Config, str | None], object],
    tell: Callable[[str], None] | None = None,
) -> str | None:
    """Run an alembic command in one locked transaction, again until it gets its locks.

    Returns the revision before it.
    """
    import psycopg
    import sqlalchemy

    config = _config(schema)
    engine = open_engine(dsn)
    started = time.monotonic()
    told: set[int] = set()
    try:
        while True:
            waited = time.monotonic() - started
            lock_timeout = LOCK_TIMEOUT if waited < PATIENCE / 2 else STUBBORN_LOCK_TIMEOUT
            try:
                return _attempt(engine, config, schema, run, lock_timeout, tell)
            except sqlalchemy.exc.OperationalError as error:
                if not isinstance(error.orig, psycopg.errors.LockNotAvailable):
                    raise
                pids, holders = _holders(engine, schema, lock_timeout)
                if time.monotonic() - started >= PATIENCE:
                    raise DatabaseError(
                        f"cannot migrate: the tables cannot be locked for {PATIENCE:g} s, in use by "
                        f"{holders or 'short transactions'}; end them, or try again when there is less to do"
                    ) from error
            if tell is not None and not pids <= told:
                tell(f"waiting for a lock; open transactions on the tables: {holders}")
            told |= pids
            time.sleep(LOCK_PAUSE)
    except sqlalchemy.exc.DBAPIError as error:
        kind = DatabaseUnavailable if isinstance(error, sqlalchemy.exc.OperationalError) else DatabaseError
        raise kind(f"cannot migrate: {one_line(error.orig or error)}") from error


def _attempt(
    engine: Engine,
    config: Config,
    schema: str,
    run: Callable[[Config, str | None], object],
    lock_timeout: float,
    tell: Callable[[str], None] | None,
) -> str | None:
    """One try at `_online`; OperationalError when a lock is not to be had in `lock_timeout` seconds."""
    import psycopg
    import sqlalchemy

    with engine.begin() as connection:
        driver_sql = connection.execution_options(no_parameters=True).exec_driver_sql
        if not driver_sql(f"SELECT pg_try_advisory_xact_lock({_LOCK_KEY})").scalar():
            if tell is not None:
                tell("waiting for another migration of this database")
            driver_sql(f"SET LOCAL lock_timeout = '{PATIENCE:g}s'")
            try:
                driver_sql(f"SELECT pg_advisory_xact_lock({_LOCK_KEY})")
            except sqlalchemy.exc.OperationalError as error:
                if not isinstance(error.orig, psycopg.errors.LockNotAvailable):
                    raise
                raise DatabaseError(
                    f"cannot migrate: another migration of this database goes on for over {PATIENCE:g} s;"
                    " try again when it has ended"
                ) from error
        driver_sql(f"SET LOCAL lock_timeout = '{round(1000 * lock_timeout)}ms'")
        # Killed in the middle of a long statement, it must not keep its locks until the end of that.
        driver_sql("SET LOCAL client_connection_check_interval = '500ms'")
        before, oldest_code = _read_revision(connection.connection.driver_connection, schema)
        if before is None:
            driver_sql(f"CREATE SCHEMA IF NOT EXISTS {schema}")
        elif before > head_revision():
            require_revision(before, oldest_code, schema=schema)
        config.attributes["connection"] = connection
        run(config, before)
        return before


def _holders(engine: Engine, schema: str, seconds: float) -> tuple[set[int], str]:
    """The sessions that have used the tables for so long: their pids, and what they are in words."""
    with engine.begin() as connection:
        cursor = connection.connection.driver_connection.cursor()  # type: ignore[union-attr]
        rows = cursor.execute(_HOLDERS, [schema, seconds]).fetchall()
    found = [
        f"session {pid} ("
        + ", ".join(filter(None, (user, application, state, None if age is None else f"for {age} s")))
        + ")"
        for pid, user, application, state, age in rows
    ]
    words = ", ".join(found[:3]) + (f" and {len(found) - 3} more" if len(found) > 3 else "")
    return {row[0] for row in rows}, words


def _read_revision(connection: Any, schema: str) -> tuple[str | None, str | None]:
    """The database's revision, and what it says of the oldest release that may work on it."""
    check_schema_name(schema)
    cursor = connection.cursor()
    row = cursor.execute(
        "SELECT to_regclass(%s), to_regclass(%s)", [f"{schema}.{VERSION_TABLE}", f"{schema}.meta"]
    ).fetchone()
    if row is None or None in row:
        return None, None
    row = cursor.execute(
        "SELECT version_num, (SELECT to_jsonb(meta) ->> 'oldest_code_revision'"  # noqa: S608
        f" FROM {schema}.meta) FROM {schema}.{VERSION_TABLE}"
    ).fetchone()
    return (None, None) if row is None else (str(row[0]), row[1])
