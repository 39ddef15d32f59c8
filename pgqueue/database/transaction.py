"""The transaction that a run of a transactional task happens in, and that records the job's end.

The body's writes and the job's end, the same fenced statement that acks any job, are one transaction: both
are there, or neither is. So whatever dies in between, the effect on this database happens exactly once:

- before the COMMIT: nothing of the run is there, and the job is still running in this worker's name;
- after it: the job is gone from `jobs`, and whoever tries to end or to rescue it finds nothing;
- in doubt, the connection having broken while the COMMIT was under way: giving the job back, fenced as ever,
  settles it. If it had ended nothing is found; if not, it runs again.

A run whose job was given to somebody else finds no row to end, and is rolled back. Nothing of the job is
locked before the body has returned, so a run that hangs keeps nobody from rescuing the job.

Not covered: what the body does elsewhere, and what it does after ending the transaction by a COMMIT of its
own in SQL, which is an error unless it begins another.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import AsyncExitStack, ExitStack, contextmanager, suppress
from random import Random
from typing import Any, Final

import psycopg
from psycopg.pq import TransactionStatus
from psycopg.rows import tuple_row
from psycopg.sql import SQL, Composed, Literal

from pgqueue.database.dsn import connect_options, cut, is_pooled, one_line, retry_delay
from pgqueue.database.queries import query
from pgqueue.database.store import Outcome, ack_calls
from pgqueue.errors import ConfigError
from pgqueue.failpoints import failpoint

_CHECK_INTERVAL: Final = "SET client_connection_check_interval = '2s'"
"""A server busy with a statement notices within this time that the process which sent it was killed."""


class NotBegun(Exception):
    """There was no transaction to be had; the body has not run."""


class ConnectionLost(Exception):
    """The connection broke while the body ran: nothing of the run is there. The body's error is the cause."""


class AnswerLost(Exception):
    """The connection broke while the COMMIT was under way: all of the run is there, or nothing."""


class JobLost(Exception):
    """The job was somebody else's when its run ended: nothing of the run is there."""


class Transaction:
    """What a transactional body sees: `self.connection` and `self.session`."""

    def __init__(self, connection: Any, make_session: Callable[[], Any]) -> None:
        self.connection = connection
        self.made: Any = None
        self._make_session = make_session

    @property
    def session(self) -> Any:
        """A SQLAlchemy session in this transaction, made when it is first asked for."""
        if self.made is None:
            self.made = self._make_session()
        return self.made


class _Transactions:
    """What both kinds share: one connection, kept between jobs and opened again after it broke.

    Args:
        session_factory: Makes SQLAlchemy sessions; None where there are none.
        tell: Gets the process id of the server's end while a transaction is open, then 0.
    """

    def __init__(
        self,
        dsn: str,
        schema: str,
        session_factory: Callable[..., Any] | None,
        tell: Callable[[int], None],
    ) -> None:
        self._dsn = dsn
        self._schema = schema
        self._factory = session_factory
        self._tell = tell
        self._random = Random()
        self._failures = 0
        self._since = 0.0  # when the transaction began, which is its now()
        self._ended = False
        self._pooled = False
        self._connection: Any = None
        self._engine: Any = None

    def finish(self) -> None:
        """Close the connection, without awaiting."""
        connection, self._connection, self._engine = self._connection, None, None
        if connection is not None:
            connection.pgconn.finish()

    def _options(self) -> dict[str, Any]:
        options = connect_options(self._dsn, application_name="pgqueue transaction")
        return {"row_factory": tuple_row, **options}

    def _look_for_pooler(self, connection: Any, pid: int) -> None:
        self._pooled = is_pooled(pid, connection)
        if self._pooled:
            connection.prepare_threshold = None

    def _begun(self) -> None:
        self._failures = 0
        self._tell(0 if self._pooled else self._connection.info.backend_pid)

    def _wait(self) -> float:
        """Seconds until a job that could not begin is given back."""
        self._failures += 1
        return retry_delay(self._failures, self._random)

    def _end_call(self, outcome: Outcome) -> tuple[str, Any]:
        ((call, _),) = ack_calls([outcome], self._since)
        return query(call.name, self._schema).text, call.parameters

    @contextmanager
    def _in_our_words(self) -> Iterator[None]:
        """What a broken connection means for the job; every other error comes through."""
        self._ended = False
        try:
            yield
        except Exception as error:
            if not self._connection.broken:
                raise
            raise (AnswerLost if self._ended else ConnectionLost)(one_line(error)) from error

    def _check_ended(self, rows: list[tuple[Any, ...]], outcome: Outcome) -> None:
        """The answer to the statement that ends the job; JobLost if there was none to end."""
        ((done, _),) = rows
        if not done:
            raise JobLost(f"job {outcome.id}, attempt {outcome.attempt}")
        self._ended = True
        failpoint("transaction_before_commit", lambda: cut(self._connection))

    def _usable(self) -> bool:
        """Whether the connection can serve the next job."""
        connection = self._connection
        self._tell(0)
        if connection is None or connection.closed:
            return False
        connection.row_factory = tuple_row  # whatever the body has made of it
        return bool(connection.info.transaction_status == TransactionStatus.IDLE)


class Transactions(_Transactions):
    """For bodies that are plain functions."""

    def run(
        self, body: Callable[[Transaction], Outcome], *, limit: float | None, clock: Callable[[], float]
    ) -> None:
        """Run the body in a transaction, which ends with the job's end.

        Args:
            body: Returns what to record.
            limit: Seconds after which the run is killed: the server ends by itself what is idle for longer.
            clock: Of the outcome's times.

        Raises:
            NotBegun, ConnectionLost, AnswerLost, JobLost: See there. Whatever the body raises comes through.
        """
        block = self._begin(limit, clock)
        connection = self._connection
        transaction = Transaction(connection, lambda: self._make_session(connection))
        try:
            with self._in_our_words(), block:
                block.callback(lambda: _close(transaction.made))
                outcome = body(transaction)
                if transaction.made is not None:
                    transaction.made.commit()
                _check_open(connection)
                text, parameters = self._end_call(outcome)
                self._check_ended(connection.execute(text.encode(), parameters).fetchall(), outcome)
            failpoint("transaction_after_commit", lambda: cut(connection))
        finally:
            if not self._usable():
                self._close()

    def _begin(self, limit: float | None, clock: Callable[[], float]) -> ExitStack:
        """Open the transaction, on a new connection if need be."""
        for fresh in (False, True):
            stack = ExitStack()
            try:
                if fresh or self._connection is None:
                    self._open()
                self._since = clock()
                stack.enter_context(self._connection.transaction())
                if limit:
                    self._connection.execute(_idle_limit(limit))
                self._begun()
                return stack
            except BaseException as error:
                self._close()
                if not isinstance(error, psycopg.Error):
                    raise
                if fresh:
                    time.sleep(self._wait())
                    raise NotBegun(one_line(error)) from error
        raise AssertionError

    def _open(self) -> None:
        self._connection = connection = psycopg.connect(self._dsn, **self._options())
        connection.isolation_level = psycopg.IsolationLevel.READ_COMMITTED
        ((pid,),) = connection.execute("SELECT pg_backend_pid()", prepare=False).fetchall()
        self._look_for_pooler(connection, pid)
        if not self._pooled:
            with suppress(psycopg.Error):  # not on every platform
                connection.execute(_CHECK_INTERVAL)
                connection.commit()
        connection.rollback()

    def _close(self) -> None:
        connection, self._connection, self._engine = self._connection, None, None
        if connection is not None:
            connection.close()

    def _make_session(self, connection: Any) -> Any:
        factory = _factory_for(self._factory, wants_async=False)
        if self._engine is None:
            from sqlalchemy import StaticPool, create_engine

            self._engine = create_engine(
                "postgresql+psycopg://", creator=lambda: connection, poolclass=StaticPool
            )
            _leave_the_transaction_alone(self._engine)
        bind = self._engine.connect()
        bind.begin()
        return factory(bind=bind, join_transaction_mode="create_savepoint")


class AsyncTransactions(_Transactions):
    """For bodies that are coroutines, on the loop that runs."""

    _loop: asyncio.AbstractEventLoop | None = None

    async def run(
        self,
        body: Callable[[Transaction], Awaitable[Outcome]],
        *,
        limit: float | None,
        clock: Callable[[], float],
    ) -> None:
        """As `Transactions.run`."""
        block = await self._begin(limit, clock)
        connection = self._connection
        try:
            with self._in_our_words():
                async with block:
                    made = await self._make_session(connection)
                    transaction = Transaction(connection, lambda: _or_raise(made))
                    block.push_async_callback(_aclose, made)
                    outcome = await body(transaction)
                    if transaction.made is not None:
                        await transaction.made.commit()
                    _check_open(connection)
                    text, parameters = self._end_call(outcome)
                    cursor = await connection.execute(text.encode(), parameters)
                    self._check_ended(await cursor.fetchall(), outcome)
            failpoint("transaction_after_commit", lambda: cut(connection))
        finally:
            if not self._usable():
                await self._close()

    async def _begin(self, limit: float | None, clock: Callable[[], float]) -> AsyncExitStack:
        if self._loop is not asyncio.get_running_loop():  # the body has closed the last one
            self._loop = asyncio.get_running_loop()
            await self._close()
        for fresh in (False, True):
            stack = AsyncExitStack()
            try:
                if fresh or self._connection is None:
                    await self._open()
                self._since = clock()
                await stack.enter_async_context(self._connection.transaction())
                if limit:
                    await self._connection.execute(_idle_limit(limit))
                self._begun()
                return stack
            except BaseException as error:
                await self._close()
                if not isinstance(error, psycopg.Error):
                    raise
                if fresh:
                    await asyncio.sleep(self._wait())
                    raise NotBegun(one_line(error)) from error
        raise AssertionError

    async def _open(self) -> None:
        self._connection = connection = await psycopg.AsyncConnection.connect(self._dsn, **self._options())
        await connection.set_isolation_level(psycopg.IsolationLevel.READ_COMMITTED)
        cursor = await connection.execute("SELECT pg_backend_pid()", prepare=False)
        ((pid,),) = await cursor.fetchall()
        self._look_for_pooler(connection, pid)
        if not self._pooled:
            with suppress(psycopg.Error):
                await connection.execute(_CHECK_INTERVAL)
                await connection.commit()
        await connection.rollback()

    async def _close(self) -> None:
        connection, self._connection, self._engine = self._connection, None, None
        if connection is not None:
            await connection.close()

    async def _make_session(self, connection: Any) -> Any:
        """A session, or what to raise when one is asked for: making one awaits, asking cannot."""
        try:
            factory = _factory_for(self._factory, wants_async=True)
        except (RuntimeError, ConfigError) as error:
            return error
        if self._engine is None:
            from sqlalchemy import StaticPool
            from sqlalchemy.ext.asyncio import create_async_engine

            async def hand_out() -> Any:
                return connection

            self._engine = create_async_engine(
                "postgresql+psycopg://", async_creator=hand_out, poolclass=StaticPool
            )
            _leave_the_transaction_alone(self._engine.sync_engine)
        bind = await self._engine.connect()
        await bind.begin()
        return factory(bind=bind, join_transaction_mode="create_savepoint")


def _idle_limit(limit: float) -> Composed:
    # A literal: unlike set_config() it leaves the isolation level open to the body.
    return SQL("SET LOCAL idle_in_transaction_session_timeout = {}").format(
        Literal(min(max(int(limit * 1000), 1), 2**31 - 1))
    )


def _check_open(connection: Any) -> None:
    """RuntimeError if the body has ended the transaction itself: then its end would not be in it."""
    if connection.info.transaction_status == TransactionStatus.IDLE:
        raise RuntimeError(
            "the task has ended its transaction by a COMMIT or ROLLBACK in SQL; leave that to pgqueue, "
            "and use self.connection.transaction() for savepoints"
        )


def _factory_for(factory: Callable[..., Any] | None, *, wants_async: bool) -> Callable[..., Any]:
    """The session factory; RuntimeError if there is none, or it makes sessions of the other kind."""
    if factory is None:
        raise RuntimeError(
            "self.session needs PgQueue(session_factory=sessionmaker()); self.connection is psycopg's"
        )
    made = getattr(factory, "class_", factory)
    if not isinstance(made, type):
        return factory
    from sqlalchemy.ext.asyncio import AsyncSession

    if issubclass(made, AsyncSession) is not wants_async:
        kind, other = ("async def", "async_sessionmaker") if wants_async else ("plain", "sessionmaker")
        raise RuntimeError(
            f"self.session of {kind} tasks needs a session_factory like {other}(), this one makes "
            f"{made.__name__}; use self.connection, or a function that makes what fits its bind="
        )
    return factory


def _leave_the_transaction_alone(engine: Any) -> None:
    """It is ours to end, whatever becomes of SQLAlchemy's own idea of one."""
    for name in ("do_begin", "do_commit", "do_rollback"):
        setattr(engine.dialect, name, lambda _: None)


def _or_raise(made: Any) -> Any:
    if issubclass(type(made), Exception):
        raise made
    return made


def _close(session: Any) -> None:
    if session is not None:
        with suppress(Exception):  # the connection may be gone, and what ended the run counts
            bind = session.bind
            session.close()
            bind.close()


async def _aclose(session: Any) -> None:
    if not issubclass(type(session), Exception):
        with suppress(Exception):
            bind = session.bind
            await session.close()
            await bind.close()
