"""The queue's own database, on connections of this process: for enqueues without a caller's transaction.

Connections are psycopg's, in autocommit, opened when first needed and kept, a few per process and per event
loop. There are no threads, unlike in psycopg_pool: a connection that cannot be made fails the call that
needed it, with the reason, and a process that has enqueued may still fork.

- Fork: a child starts with none, and never says a word on its parent's connections.
- Lost connection: `ConnectionLost`. Whether the statement under way took effect is unknown. All idle
  connections are dropped with it: what broke one has broken the others.
- Standby instead of primary: `Refused`, and all connections are dropped too.
- Nothing waits for ever: statements and locks have timeouts, unless the DSN or the role has its own, and a
  connection whose server is silent for five seconds longer is given up as lost (not behind a pooler, where
  statements may have to queue).
- Commits are on disk when they are acknowledged, whatever the database's default.
- Pooler: found out per connection. Nothing is prepared there and no setting outlives its transaction.
- End of process or event loop: idle connections are closed.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import weakref
from collections import deque
from collections.abc import AsyncGenerator, Sequence
from queue import SimpleQueue
from typing import TYPE_CHECKING, Any, Final, TypeVar

from pgqueue.database.connection import (
    AsyncPsycopgChannel,
    ConnectionLost,
    NotReplicated,
    Plan,
    PsycopgChannel,
    Refused,
    Statement,
    adrive,
    drive,
    find_install,
)
from pgqueue.database.dsn import comes_soon, connect_options, one_line, unreachable
from pgqueue.errors import DatabaseError, DatabaseUnavailable, PermissionDenied, SchemaMismatch

if TYPE_CHECKING:
    import psycopg

    from pgqueue.database.patient import AsyncConnection, Connection

T = TypeVar("T")

STATEMENT_TIMEOUT: Final = "30s"
LOCK_TIMEOUT: Final = "10s"

SIZE: Final = 4
"""Connections per process, and per event loop. An enqueue takes under a millisecond of one."""

CONNECT_TIMEOUT: Final = 10
LOOK_TIMEOUT: Final = 3
"""Seconds to connect for a look that an enqueue in the caller's open transaction waits for."""


class Database:
    """The database behind a DSN."""

    def __init__(self, dsn: str, schema: str) -> None:
        self.dsn = dsn
        self.schema = schema
        self._options: dict[str, Any] | None = None
        self._settings: dict[str, Any] = {}
        self._idle: deque[Any] = deque()
        self._slots = _slots()
        self._loops: dict[asyncio.AbstractEventLoop, _LoopPool] = {}
        weakref.finalize(self, _finish_all, self._idle, self._loops)
        _databases.add(self)

    def run(self, plan: Plan[T], *, atomic: bool = False) -> T:
        """Run a plan on a connection of our own.

        Args:
            plan: Without `atomic`, one statement.
            atomic: In a READ COMMITTED transaction, whatever the database's default.

        Raises:
            DatabaseUnavailable: No connection could be made; nothing was sent.
            ConnectionLost: It broke after something was sent.
            NotReplicated: Somebody cut the wait for a synchronous standby short.
            Refused: Nothing took effect, and the reason is likely to pass.
            SchemaMismatch: The database was not migrated.
            DatabaseError: The database refused a statement; nothing took effect.
        """
        slots = self._slots
        slots.get()
        try:
            connection = self._take(self._idle) or self._connect()
            state = connection.state
            state.cut_short = False
            try:
                with connection.transaction() if atomic or state.is_pooled else _NOTHING:
                    channel = PsycopgChannel(connection, self.schema)
                    if state.is_pooled:
                        channel.perform(self._settle(connection))
                    result = drive(plan(channel), channel.perform)
                if state.cut_short:
                    raise _not_replicated()
                return result
            except Exception as error:
                self._explain(error, connection, self._idle)
                raise
            finally:
                if _is_idle(connection):
                    self._idle.append(connection)
                else:
                    connection.close()
        finally:
            slots.put(None)

    async def arun(self, plan: Plan[T], *, atomic: bool = False) -> T:
        """`run` on the running event loop."""
        pool = await self._loop_pool()
        async with pool.slots:
            connection = self._take(pool.idle) or await self._aconnect()
            state = connection.state
            state.cut_short = False
            try:
                async with connection.transaction() if atomic or state.is_pooled else _NOTHING:
                    channel = AsyncPsycopgChannel(connection, self.schema)
                    if state.is_pooled:
                        await channel.perform(self._settle(connection))
                    result = await adrive(plan(channel), channel.perform)
                if state.cut_short:
                    raise _not_replicated()
                return result
            except Exception as error:
                self._explain(error, connection, pool.idle)
                raise
            finally:
                if _is_idle(connection):
                    pool.idle.append(connection)
                else:
                    await connection.close()

    def find_install(self) -> str | None:
        """The install id of this database's queue, on a connection that is closed again."""
        connection = self._connect(LOOK_TIMEOUT)
        try:
            channel = PsycopgChannel(connection, self.schema)
            return drive(find_install(channel), channel.perform)
        except Exception as error:
            self._explain(error, connection, deque())
            raise
        finally:
            connection.close()

    async def afind_install(self) -> str | None:
        """`find_install` on the running event loop."""
        connection = await self._aconnect(LOOK_TIMEOUT)
        try:
            channel = AsyncPsycopgChannel(connection, self.schema)
            return await adrive(find_install(channel), channel.perform)
        except Exception as error:
            self._explain(error, connection, deque())
            raise
        finally:
            await connection.close()

    def close(self) -> None:
        """Close the idle connections of this process. A later call opens new ones."""
        _finish_all(self._idle, self._loops)

    async def aclose(self) -> None:
        """Close the idle connections of the running event loop, and the sync ones."""
        self.close()

    def _connect(self, timeout: int = CONNECT_TIMEOUT) -> Connection:
        import psycopg

        from pgqueue.database.patient import Connection

        try:
            connection = Connection.connect(self.dsn, autocommit=True, **self._connect_options(timeout))
        except psycopg.OperationalError as error:
            raise _unreachable(error) from error
        try:
            connection.isolation_level = psycopg.IsolationLevel.READ_COMMITTED
            self._watch_notices(connection)
            rows = PsycopgChannel(connection, self.schema).perform(self._settle(connection))
            self._settled(connection, rows[0])
        except psycopg.Error as error:
            connection.close()
            raise _unreachable(error) from error
        except BaseException:
            connection.close()
            raise
        return connection

    async def _aconnect(self, timeout: int = CONNECT_TIMEOUT) -> AsyncConnection:
        import psycopg

        from pgqueue.database.patient import AsyncConnection

        try:
            connection = await AsyncConnection.connect(
                self.dsn, autocommit=True, **self._connect_options(timeout)
            )
        except psycopg.OperationalError as error:
            raise _unreachable(error) from error
        try:
            await connection.set_isolation_level(psycopg.IsolationLevel.READ_COMMITTED)
            self._watch_notices(connection)
            rows = await AsyncPsycopgChannel(connection, self.schema).perform(self._settle(connection))
            self._settled(connection, rows[0])
        except psycopg.Error as error:
            await connection.close()
            raise _unreachable(error) from error
        except BaseException:
            connection.pgconn.finish()
            raise
        return connection

    def _connect_options(self, timeout: int) -> dict[str, Any]:
        if self._options is None:
            self._options = connect_options(self.dsn)
            chosen = _server_options(self.dsn)
            self._settings = {
                "statement_timeout": None if "statement_timeout" in chosen else STATEMENT_TIMEOUT,
                "lock_timeout": None if "lock_timeout" in chosen else LOCK_TIMEOUT,
            }
        if "connect_timeout" not in self._options:  # the DSN has its own
            return self._options
        return self._options | {"connect_timeout": timeout}

    def _settle(self, connection: Any) -> Statement:
        """Timeouts and durability: for the session, or behind a pooler for the open transaction."""
        return Statement("settle_session", {**self._settings, "pid": connection.info.backend_pid})

    def _watch_notices(self, connection: Connection | AsyncConnection) -> None:
        from pgqueue.database.patient import State

        connection.state = State()
        connection.add_notice_handler(connection.state.on_notice)

    def _settled(self, connection: Connection | AsyncConnection, row: Sequence[Any]) -> None:
        """Take in what `_settle` has found out about a new connection."""
        from pgqueue.database.patient import ANSWER_PATIENCE

        is_pooled, statement_timeout, *_ = row
        connection.state.is_pooled = is_pooled
        connection.patience = None
        if is_pooled:
            connection.prepare_threshold = None
        elif statement_timeout:
            connection.patience = statement_timeout + ANSWER_PATIENCE

    @staticmethod
    def _take(idle: deque[Any]) -> Any:
        """The connection used last, so that a burst's extra ones age at the bottom; None if there is none."""
        with contextlib.suppress(IndexError):
            return idle.pop()
        return None

    def _explain(self, error: Exception, connection: Any, idle: deque[Any]) -> None:
        """Raise an error of ours in place of the driver's."""
        import psycopg

        if isinstance(error, psycopg.Error):
            raise self._explained(error, connection, idle) from error

    def _explained(self, error: psycopg.Error, connection: Any, idle: deque[Any]) -> DatabaseError:
        import psycopg

        errors = psycopg.errors
        what = error.diag.message_primary or one_line(error)
        if connection.closed:
            _finish(idle)
            if connection.state.cut_short:
                return _not_replicated()
            return ConnectionLost(f"the connection to the database broke: {what}")
        if isinstance(error, errors.ReadOnlySqlTransaction):
            # The primary has become a standby, or the way leads to one now: all connections are as bad.
            connection.pgconn.finish()
            _finish(idle)
            return Refused(f"the database is read-only: {what}; the dsn must lead to the primary")
        if isinstance(error, (errors.SerializationFailure, errors.DeadlockDetected)):
            return Refused(f"the database reports a conflict: {what}; try again")
        missing = (errors.InvalidSchemaName, errors.UndefinedFunction, errors.UndefinedTable)
        if isinstance(error, missing) and self.schema in what:  # else it is a trigger's
            return SchemaMismatch(
                f"the database has no schema {self.schema!r} of pgqueue; run `pgqueue migrate`"
            )
        if isinstance(error, errors.InsufficientPrivilege):
            return PermissionDenied(
                f"role {connection.info.user!r} lacks a right on the queue: {what}; grant it, see "
                "'Privileges' in docs/transactions.md"
            )
        if isinstance(error, errors.LockNotAvailable):
            return DatabaseError(
                "another session locks a table of the queue, or hangs as it notifies; nothing was done: "
                f"{what}; try again, or raise lock_timeout in the dsn's options"
            )
        if isinstance(error, errors.QueryCanceled):
            return DatabaseError(
                f"the database cancelled the statement, nothing was done: {what}; do less at a time, or "
                "raise statement_timeout in the dsn's options"
            )
        if (error.sqlstate or "").startswith("53"):
            return DatabaseUnavailable(f"the database is short of something, nothing was done: {what}")
        return DatabaseError(f"the database refused: {what}")

    async def _loop_pool(self) -> _LoopPool:
        loop = asyncio.get_running_loop()
        pool = self._loops.get(loop)
        if pool is None:
            for other in [other for other in self._loops if other.is_closed()]:
                _finish(self._loops.pop(other).idle)
            pool = self._loops[loop] = _LoopPool()
            await anext(pool.keeper)
        return pool

    def _forget_inherited(self) -> None:
        self._slots = _slots()
        for connections in (self._idle, *(pool.idle for pool in self._loops.values())):
            _silence(connections)
        self._loops.clear()


def _unreachable(error: psycopg.Error) -> DatabaseUnavailable:
    return unreachable(error, Refused if comes_soon(error) else DatabaseUnavailable)


def _not_replicated() -> NotReplicated:
    return NotReplicated("the wait for synchronous replication was cut short")


def _server_options(dsn: str) -> str:
    """What the DSN or the environment sets on the server, as `-c name=value`."""
    from psycopg.conninfo import conninfo_to_dict

    return str(conninfo_to_dict(dsn).get("options") or os.environ.get("PGOPTIONS", ""))


def _slots() -> SimpleQueue[None]:
    """A semaphore: what is in it may be taken. One of `threading` is Python, and five times slower."""
    slots: SimpleQueue[None] = SimpleQueue()
    for _ in range(SIZE):
        slots.put(None)
    return slots


class _LoopPool:
    """The idle connections of one event loop."""

    def __init__(self) -> None:
        self.idle: deque[Any] = deque()
        self.slots = asyncio.Semaphore(SIZE)
        self.keeper = self._until_the_loop_ends()

    async def _until_the_loop_ends(self) -> AsyncGenerator[None, None]:
        # asyncio.run() closes open async generators as its last act: here ends what belongs to its loop.
        try:
            yield
        finally:
            _finish(self.idle)


class _Nothing:
    """A context manager that does nothing, cheaper than contextlib's, for `with` and `async with`."""

    def __enter__(self) -> None: ...

    def __exit__(self, *exc: object) -> None: ...

    async def __aenter__(self) -> None: ...

    async def __aexit__(self, *exc: object) -> None: ...


_NOTHING: Final = _Nothing()


def _is_idle(connection: Any) -> bool:
    """Whether it is open and between transactions; one interrupted half-way is neither reset nor kept."""
    return bool(connection.pgconn.transaction_status == 0)  # PQTRANS_IDLE; UNKNOWN once closed


def _finish(connections: deque[Any]) -> None:
    """Close connections, sync and async ones alike, without awaiting."""
    while connections:
        try:
            connection = connections.pop()
        except IndexError:  # another thread took it
            return
        connection.pgconn.finish()


def _finish_all(idle: deque[Any], loops: dict[asyncio.AbstractEventLoop, _LoopPool]) -> None:
    for connections in (idle, *[pool.idle for pool in loops.values()]):
        _finish(connections)


_databases: weakref.WeakSet[Database] = weakref.WeakSet()


def _silence(connections: deque[Any]) -> None:
    """Close a forked child's copies.

    Closing says goodbye to the server, which would end the parent's session: so the child's descriptor
    is first pointed elsewhere.
    """
    while connections:
        connection = connections.pop()
        nowhere = os.open(os.devnull, os.O_RDWR)
        os.dup2(nowhere, connection.pgconn.socket)
        os.close(nowhere)
        connection.pgconn.finish()


def _after_fork() -> None:
    for database in list(_databases):
        database._forget_inherited()


os.register_at_fork(after_in_child=_after_fork)
