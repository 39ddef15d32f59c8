"""An operator's connection: opened for one command, on the right schema revision, and never waiting for ever.

Every statement runs in a short READ COMMITTED transaction with timeouts, whatever the database's defaults. A
connection that breaks ends the command: the transactions before it are committed, the one under way may or
may not be.
"""

from __future__ import annotations

import contextlib
from collections.abc import Generator, Iterator
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import TYPE_CHECKING, Any

import psycopg
from psycopg.rows import dict_row

from pgqueue.database.dsn import connect_options, one_line, unreachable
from pgqueue.database.migrate import require_revision
from pgqueue.database.queries import query
from pgqueue.errors import DatabaseError, DatabaseUnavailable, PermissionDenied, SchemaMismatch

if TYPE_CHECKING:
    from sqlalchemy import ColumnElement, Select

Row = dict[str, Any]

_NOT_THERE = (
    psycopg.errors.UndefinedTable,
    psycopg.errors.UndefinedColumn,
    psycopg.errors.UndefinedFunction,
)
STATEMENT_TIMEOUT = "30s"
LOCK_TIMEOUT = "1s"


@dataclass(frozen=True, slots=True)
class Session:
    """An open connection to a migrated queue; made by `open_session`.

    Attributes:
        connection: psycopg's, in autocommit, with rows as dicts.
        schema: Where the queue's tables are.
        statement_timeout: What a statement may take, as Postgres writes it.
        lock_timeout: What a statement may wait for a lock.
    """

    connection: psycopg.Connection[Row]
    schema: str
    statement_timeout: str = STATEMENT_TIMEOUT
    lock_timeout: str = LOCK_TIMEOUT

    @contextlib.contextmanager
    def transaction(self, *, by_index: bool = False) -> Iterator[None]:
        """A READ COMMITTED transaction with timeouts.

        Args:
            by_index: Talk the planner out of reading whole tables, to which old statistics lead it.
        """
        settings = "begin_work" if by_index else "set_timeouts"
        with self.connection.transaction():
            self.run(settings, statement_timeout=self.statement_timeout, lock_timeout=self.lock_timeout)
            yield

    def read_revision(self) -> tuple[str | None, str | None]:
        """The revision the schema is at, None when there is none, and what it says of the oldest release that
        may work on it.
        """
        with self.transaction():
            rows = self.run("read_revision") if self.run("read_revision_table")[0]["found"] else []
        return (rows[0]["version_num"], rows[0]["oldest_code_revision"]) if rows else (None, None)

    @contextlib.contextmanager
    def transaction_since(self, revision: str, what: str) -> Iterator[None]:
        """A transaction for something that the schema has since this revision; SchemaMismatch before it.

        Args:
            what: It, and its verb: `purging needs`.
        """
        try:
            with self.transaction():
                yield
        except _NOT_THERE as error:
            raise SchemaMismatch(
                f"{what} revision {revision} of the schema; run `pgqueue migrate`"
            ) from error

    def wake(self, queues: list[str]) -> None:
        """Notify sleeping workers, in a transaction of its own: others that notify wait for its commit.

        Without a notification a worker finds the jobs at its next look, so a failure is none.
        """
        if queues:
            with contextlib.suppress(psycopg.Error), self.transaction():
                self.run("wake_workers", queues=queues, eta=None)

    def run(self, name: str, /, **parameters: object) -> list[Row]:
        """Run one statement of `sql/` in the open transaction; its rows."""
        return self.execute(query(name, self.schema).text, parameters)

    def fetch(self, statement: Select[Any]) -> list[Row]:
        """Run a select() in a transaction of its own; its rows."""
        with self.transaction():
            return self.select(statement)

    def select(self, statement: Select[Any]) -> list[Row]:
        """Run a select() in the open transaction; its rows."""
        from sqlalchemy.dialects.postgresql.psycopg import PGDialect_psycopg

        dialect: Any = PGDialect_psycopg()  # type: ignore[no-untyped-call]
        compiled = statement.compile(dialect=dialect, compile_kwargs={"render_postcompile": True})
        return self.execute(str(compiled), dict(compiled.params))

    def execute(self, text: str, parameters: dict[str, Any]) -> list[Row]:
        """Run any statement in the open transaction; its rows."""
        # Our own text, with psycopg's placeholders.
        return self.connection.execute(text.encode(), parameters).fetchall()


def time_of(since: datetime | timedelta) -> ColumnElement[Any]:
    """In a select(): this time, or so long before its transaction began."""
    from sqlalchemy import func, literal

    return func.now() - literal(since) if isinstance(since, timedelta) else literal(since)


@contextlib.contextmanager
def open_session(dsn: str, *, schema: str = "pgqueue") -> Generator[Session, None, None]:
    """A session that is closed at the end of the block.

    Raises:
        ConfigError: The DSN cannot be read.
        DatabaseUnavailable: The database cannot be reached, or the connection broke.
        SchemaMismatch: It was not migrated, or to a revision this release does not work with.
        DatabaseError: It refused a statement.
    """
    connection = connect(dsn)
    try:
        session = Session(connection, schema)
        found, oldest_code = session.read_revision()
        require_revision(found, oldest_code, schema=schema)
        yield session
    except psycopg.Error as error:
        raise _explained(error, connection) from error
    finally:
        connection.close()


def connect(dsn: str) -> psycopg.Connection[Row]:
    """A connection for a `Session`; whoever calls this closes it.

    Raises:
        ConfigError: The DSN cannot be read.
        DatabaseUnavailable: The database cannot be reached.
    """
    options = connect_options(dsn)
    try:
        connection = psycopg.connect(
            dsn, autocommit=True, prepare_threshold=None, row_factory=dict_row, **options
        )
    except psycopg.OperationalError as error:
        raise unreachable(error) from error
    connection.isolation_level = psycopg.IsolationLevel.READ_COMMITTED
    return connection


def _explained(error: psycopg.Error, connection: psycopg.Connection[Row]) -> DatabaseError:
    if connection.closed:
        return DatabaseUnavailable(f"the connection to the database broke: {one_line(error)}")
    if isinstance(error, psycopg.errors.LockNotAvailable):
        return DatabaseError(f"another session holds a row for over {LOCK_TIMEOUT}; try again")
    if isinstance(error, psycopg.errors.QueryCanceled):
        return DatabaseError(f"the database took over {STATEMENT_TIMEOUT}; ask for less")
    if isinstance(error, psycopg.errors.InsufficientPrivilege):
        return PermissionDenied(
            f"role {connection.info.user!r} lacks a right on the queue: {one_line(error)}; grant it, see "
            "'Privileges' in docs/operations.md"
        )
    return DatabaseError(f"the database refused: {one_line(error)}")
