"""A caller's connection: what it is, whether it has a transaction the caller ends, and how we use it.

What to say to the database is written once, as a generator that yields steps and is sent their rows; `drive`
runs it with plain calls, `adrive` with awaits. A connection is recognised by the name of its class's module,
and its driver is imported only then: who never enqueues through SQLAlchemy never imports it.

Nothing here commits, rolls back, flushes or changes a setting of the caller's connection.
"""

from __future__ import annotations

import io
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Generator, Mapping
from functools import cache
from typing import Any, Final, Protocol, TypeAlias, TypeVar
from weakref import WeakKeyDictionary

import msgspec

from pgqueue.database.queries import query
from pgqueue.errors import DatabaseUnavailable, NotInTransaction, UnsupportedConnection, WrongDatabase

T = TypeVar("T")
Rows: TypeAlias = list[Any]
"""Sequences of column values, whatever the driver calls its rows."""


class Statement(msgspec.Struct, frozen=True):
    """Run the query of this name; the answer is its rows."""

    name: str
    parameters: Mapping[str, object]


class Copy(msgspec.Struct, frozen=True):
    """Load rows in COPY's text format, in UTF-8. Never the first step: see `SqlalchemyChannel`."""

    table: str
    columns: tuple[str, ...]
    payload: bytes

    def text(self, schema: str) -> str:
        # ENCODING, because the caller's client_encoding need not be UTF-8.
        columns = ", ".join(self.columns)
        return f"COPY {schema}.{self.table} ({columns}) FROM STDIN (FORMAT text, ENCODING 'UTF8')"


class Pause(msgspec.Struct, frozen=True):
    """Wait. Only for generators above single plans, which hold no connection between their steps."""

    seconds: float


class ConnectionLost(DatabaseUnavailable):
    """A connection of our own broke while a statement was under way: it may or may not have taken effect."""


class NotReplicated(DatabaseUnavailable):
    """A commit of our own was done here, but its wait for synchronous standbys was cut short."""


class Refused(DatabaseUnavailable):
    """The database did nothing, and may do it in a moment: starting, read-only, or in a conflict."""


Step: TypeAlias = Statement | Copy
Steps: TypeAlias = Generator[Step, Rows, T]


class Channel(Protocol):
    """One connection with an open transaction, ready to run steps.

    Attributes:
        schema: Where the queue's tables are.
        physical: The driver's own connection object: lives as long as the session on the server.
        can_copy: Whether COPY works here now.
    """

    schema: str

    @property
    def physical(self) -> object: ...

    @property
    def can_copy(self) -> bool: ...


Plan: TypeAlias = Callable[[Channel], Steps[T]]


class SyncChannel(Channel, Protocol):
    def perform(self, step: Step) -> Rows: ...


class AsyncChannel(Channel, Protocol):
    async def perform(self, step: Step) -> Rows: ...


def drive(steps: Generator[Any, Any, T], perform: Callable[[Any], Any]) -> T:
    """Run a generator to its end; what `perform` raises is raised at its `yield`."""
    try:
        step = next(steps)
        while True:
            try:
                answer = perform(step)
            except Exception as error:
                step = steps.throw(error)
            else:
                step = steps.send(answer)
    except StopIteration as end:
        value: T = end.value
        return value


async def adrive(steps: Generator[Any, Any, T], perform: Callable[[Any], Awaitable[Any]]) -> T:
    """`drive` with an async `perform`."""
    try:
        step = next(steps)
        while True:
            try:
                answer = await perform(step)
            except Exception as error:
                step = steps.throw(error)
            else:
                step = steps.send(answer)
    except StopIteration as end:
        value: T = end.value
        return value


def sqlstate_of(error: BaseException) -> str | None:
    """The server's code for an error, whichever driver or wrapper of one it went through; None for others."""
    for each in (error, getattr(error, "orig", None), error.__cause__):
        for name in ("sqlstate", "pgcode"):
            state = getattr(each, name, None)
            if isinstance(state, str):
                return state
    return None


class _SyncConnection(Protocol):
    """Any accepted sync connection, to a type checker."""

    def commit(self) -> None: ...


class _AsyncConnection(Protocol):
    """SQLAlchemy's and psycopg's async connections, to a type checker."""

    def commit(self) -> Coroutine[Any, Any, None]: ...


class _AsyncpgConnection(Protocol):
    """asyncpg's, which commits through its transactions only."""

    def is_in_transaction(self) -> bool: ...


SyncConnection = _SyncConnection
AsyncConnection = _AsyncConnection | _AsyncpgConnection


class SyncCaller:
    """A caller's sync connection, recognised but not yet touched."""

    is_async: Final = False

    def __init__(self, connection: Any, opener: Callable[[Any, str], SyncChannel]) -> None:
        self.connection = connection
        self._opener = opener

    def run(self, schema: str, plan: Plan[T]) -> T:
        """Run a plan in the caller's open transaction; NotInTransaction if there is none."""
        channel = self._opener(self.connection, schema)
        return drive(plan(channel), channel.perform)


class AsyncCaller:
    """A caller's async connection, recognised but not yet touched."""

    is_async: Final = True

    def __init__(self, connection: Any, runner: Callable[[Any, str, Plan[Any]], Awaitable[Any]]) -> None:
        self.connection = connection
        self._runner = runner

    async def run(self, schema: str, plan: Plan[T]) -> T:
        """Run a plan in the caller's open transaction; NotInTransaction if there is none."""
        result: T = await self._runner(self.connection, schema, plan)
        return result


def recognise(connection: object) -> SyncCaller | AsyncCaller:
    """What kind of connection this is; UnsupportedConnection if we cannot use it."""
    kind = type(connection)
    found = _known.get(kind)
    if found is None:
        found = _known[kind] = _look_up(kind)
    if found in _SYNC:
        return SyncCaller(connection, _SYNC[found])
    return AsyncCaller(connection, _ASYNC[found])


def recognise_sync(connection: object, call: str) -> SyncCaller:
    """`recognise`, for a call that cannot await."""
    caller = recognise(connection)
    if isinstance(caller, AsyncCaller):
        raise UnsupportedConnection(
            f"{call}() cannot use an async connection ({_name(connection)}); await a{call}() instead"
        )
    return caller


def recognise_async(connection: object, call: str) -> AsyncCaller:
    """`recognise`, for a call that awaits."""
    caller = recognise(connection)
    if isinstance(caller, SyncCaller):
        raise UnsupportedConnection(
            f"{call}() needs an async connection, got {_name(connection)}; "
            f"use {call.removeprefix('a')}() instead"
        )
    return caller


def _look_up(kind: type) -> str:
    for base in kind.__mro__:
        name = f"{base.__module__}.{base.__qualname__}"
        if name in _SYNC or name in _ASYNC:
            return name
        if name in _REFUSED:
            raise UnsupportedConnection(
                f"{kind.__module__}.{kind.__qualname__} is not a connection: {_REFUSED[name]}"
            )
    raise UnsupportedConnection(
        "a connection is psycopg's, SQLAlchemy's (Session, Connection or their async twins), asyncpg's or "
        f"Django's, got {kind.__module__}.{kind.__qualname__}"
    )


def _name(connection: object) -> str:
    return f"{type(connection).__module__}.{type(connection).__qualname__}"


_installs: WeakKeyDictionary[Any, dict[str, str]] = WeakKeyDictionary()


def check_install(channel: Channel, home: str | None) -> Steps[None]:
    """Raise WrongDatabase unless the queue lives at the other end; asks once per physical connection.

    Args:
        channel: The connection in question.
        home: The install found through the application's own DSN, None when that is unknown.
    """
    physical = channel.physical
    try:
        remembered = _installs.setdefault(physical, {})
    except TypeError:  # an object that takes no weak references: ask again next time
        remembered = {}
    install = remembered.get(channel.schema)
    if install is None:
        install = read_install((yield Statement("find_install", {"schema": channel.schema})))
        if install is None:
            raise WrongDatabase(
                f"the connection's database has no schema {channel.schema!r} of pgqueue: "
                "pass a connection to the queue's database, or run `pgqueue migrate` on this one"
            )
        remembered[channel.schema] = install
    if home is not None and install != home:
        raise WrongDatabase(
            "the connection is on another database than the queue's dsn, whose workers would never see the "
            "job: pass a connection to that database, or enqueue without .on()"
        )


def find_install(channel: Channel) -> Steps[str | None]:
    """The install id of the queue on this connection, None if there is none."""
    return read_install((yield Statement("find_install", {"schema": channel.schema})))


def read_install(rows: Rows) -> str | None:
    comment = rows[0][0]
    return comment if isinstance(comment, str) and comment.startswith("pgqueue ") else None


@cache
def _psycopg() -> Any:
    """The driver, imported when there is a connection of it; an import statement on each use is slower."""
    import psycopg

    return psycopg


class _Psycopg:
    """What both kinds of psycopg connection share."""

    def __init__(self, connection: Any, schema: str) -> None:
        self.connection = connection
        self.schema = schema

    @property
    def physical(self) -> object:
        return self.connection

    @property
    def in_pipeline(self) -> bool:
        return bool(self.connection.pgconn.pipeline_status)

    @property
    def can_copy(self) -> bool:
        return not self.in_pipeline

    def may_be_idle(self) -> bool:
        if not self.connection.autocommit:
            return False
        status = _psycopg().pq.TransactionStatus
        return self.connection.pgconn.transaction_status in (status.IDLE, status.ACTIVE)

    def require_transaction(self) -> None:
        if self.may_be_idle():
            raise NotInTransaction(
                "the connection is in autocommit mode and has no open transaction: enqueue inside "
                "`with connection.transaction():`, or without .on()"
            )


class PsycopgChannel(_Psycopg):
    """A psycopg connection. Its cursors are ours: the caller's row and cursor factories do not apply."""

    def perform(self, step: Step) -> Rows:
        psycopg = _psycopg()
        cursor = psycopg.Cursor(self.connection, row_factory=psycopg.rows.tuple_row)
        if isinstance(step, Copy):
            with cursor.copy(step.text(self.schema)) as copy:
                copy.write(step.payload)
            return []
        rows: Rows = cursor.execute(query(step.name, self.schema).text, step.parameters).fetchall()
        return rows


class AsyncPsycopgChannel(_Psycopg):
    """`PsycopgChannel` for an AsyncConnection."""

    async def perform(self, step: Step) -> Rows:
        psycopg = _psycopg()
        cursor = psycopg.AsyncCursor(self.connection, row_factory=psycopg.rows.tuple_row)
        if isinstance(step, Copy):
            async with cursor.copy(step.text(self.schema)) as copy:
                await copy.write(step.payload)
            return []
        await cursor.execute(query(step.name, self.schema).text, step.parameters)
        rows: Rows = await cursor.fetchall()
        return rows


def _open_psycopg(connection: Any, schema: str) -> PsycopgChannel:
    channel = PsycopgChannel(connection, schema)
    if channel.may_be_idle() and channel.in_pipeline:
        with connection.pipeline():  # a sync: a BEGIN still under way shows in the status after it
            pass
    channel.require_transaction()
    return channel


async def _run_async_psycopg(connection: Any, schema: str, plan: Plan[T]) -> T:
    channel = AsyncPsycopgChannel(connection, schema)
    if channel.may_be_idle() and channel.in_pipeline:
        async with connection.pipeline():
            pass
    channel.require_transaction()
    return await adrive(plan(channel), channel.perform)


class AsyncpgChannel:
    """An asyncpg connection, or the proxy its pool hands out."""

    can_copy: Final = True

    def __init__(self, connection: Any, schema: str) -> None:
        self.connection = connection
        self.schema = schema

    @property
    def physical(self) -> object:
        # A pool makes a new proxy for each checkout.
        return getattr(self.connection, "_con", None) or self.connection

    async def perform(self, step: Step) -> Rows:
        if isinstance(step, Copy):
            await _copy_by_asyncpg(self.connection, self.schema, step)
            return []
        from asyncpg import Record

        statement = query(step.name, self.schema, "numeric")
        values = [step.parameters[name] for name in statement.parameters]
        rows: Rows = await self.connection.fetch(statement.text, *values, record_class=Record)
        return rows


async def _copy_by_asyncpg(connection: Any, schema: str, step: Copy) -> None:
    async def payload() -> AsyncIterator[bytes]:
        yield step.payload

    await connection.copy_to_table(
        step.table,
        schema_name=schema,
        columns=step.columns,
        source=payload(),
        format="text",
        encoding="utf8",
    )


async def _run_asyncpg(connection: Any, schema: str, plan: Plan[T]) -> T:
    if not connection.is_in_transaction():
        raise NotInTransaction(
            "the asyncpg connection has no open transaction: enqueue inside "
            "`async with connection.transaction():`, or without .on()"
        )
    channel = AsyncpgChannel(connection, schema)
    return await adrive(plan(channel), channel.perform)


class SqlalchemyChannel:
    """A SQLAlchemy Connection on psycopg, psycopg2 or asyncpg; async ones run through SQLAlchemy's greenlet.

    Statements go by SQLAlchemy's own execute, because its BEGIN is lazy: a COPY on the raw connection as the
    first act ran outside the transaction and survived its rollback. They are driver SQL, not `text()`, which
    for asyncpg puts casts of its own (`$1::TIMESTAMP WITHOUT TIME ZONE`) around ours.
    """

    def __init__(self, connection: Any, schema: str) -> None:
        self.connection = connection
        self.schema = schema
        self.driver: str = connection.dialect.driver
        if connection.dialect.name != "postgresql" or self.driver not in ("psycopg", "psycopg2", "asyncpg"):
            raise UnsupportedConnection(
                "a SQLAlchemy connection must be on PostgreSQL by psycopg, psycopg2 or asyncpg, "
                f"got {connection.dialect.name}+{self.driver}"
            )
        if connection.connection.dbapi_connection.autocommit:
            raise NotInTransaction(
                "the SQLAlchemy connection is at isolation level AUTOCOMMIT and has no transaction: "
                "use one at another level, or enqueue without .on()"
            )

    @property
    def physical(self) -> object:
        return self.connection.connection.driver_connection

    @property
    def can_copy(self) -> bool:
        return (
            self.driver != "psycopg"
            or not self.connection.connection.driver_connection.pgconn.pipeline_status
        )

    def perform(self, step: Step) -> Rows:
        if isinstance(step, Copy):
            self._copy(step)
            return []
        statement = query(step.name, self.schema, "numeric" if self.driver == "asyncpg" else "pyformat")
        parameters: object = step.parameters
        if self.driver == "asyncpg":
            parameters = tuple(step.parameters[name] for name in statement.parameters)
        rows: Rows = self.connection.exec_driver_sql(
            statement.text, parameters, execution_options={"stream_results": False}
        ).fetchall()
        return rows

    def _copy(self, step: Copy) -> None:
        proxied = self.connection.connection
        if not self.connection.dialect.is_async:
            _copy_by_driver(proxied.driver_connection, self.schema, step)
        elif self.driver == "asyncpg":
            proxied.dbapi_connection.run_async(lambda raw: _copy_by_asyncpg(raw, self.schema, step))
        else:
            proxied.dbapi_connection.run_async(
                lambda raw: AsyncPsycopgChannel(raw, self.schema).perform(step)
            )


def _copy_by_driver(raw: Any, schema: str, step: Copy) -> None:
    """COPY on a psycopg or psycopg2 connection whose transaction is open."""
    if not type(raw).__module__.startswith("psycopg2"):
        PsycopgChannel(raw, schema).perform(step)
        return
    from psycopg2.extensions import cursor

    with raw.cursor(cursor_factory=cursor) as plain:
        plain.copy_expert(step.text(schema), io.BytesIO(step.payload))


def _open_scoped_session(registry: Any, schema: str) -> SqlalchemyChannel:
    return _open_session(registry(), schema)


def _open_session(session: Any, schema: str) -> SqlalchemyChannel:
    from sqlalchemy.orm import Session

    # Which of several databases it would pick for our statement is a guess: the caller knows.
    if (
        getattr(session, "binds", None)
        or getattr(session, "_Session__binds", None)  # what it was called before SQLAlchemy 2.1
        or type(session).get_bind is not Session.get_bind
        or "get_bind" in vars(session)
    ):
        raise UnsupportedConnection(
            "the session chooses among several databases (binds= or its own get_bind): pass the right "
            "connection, .on(session.connection(bind_arguments={'mapper': YourModel}))"
        )
    return SqlalchemyChannel(session.connection(), schema)


async def _run_async_sqlalchemy(connection: Any, schema: str, plan: Plan[T]) -> T:
    def inside(sync_connection: Any) -> T:
        channel = SqlalchemyChannel(sync_connection, schema)
        return drive(plan(channel), channel.perform)

    result: T = await connection.run_sync(inside)
    return result


async def _run_async_session(session: Any, schema: str, plan: Plan[T]) -> T:
    from sqlalchemy.ext.asyncio import AsyncSession

    if type(session).get_bind is not AsyncSession.get_bind:
        raise UnsupportedConnection(
            "the session chooses among several databases (its own get_bind): pass the right connection, "
            ".on(await session.connection(bind_arguments={'mapper': YourModel}))"
        )

    def inside(sync_session: Any) -> T:
        channel = _open_session(sync_session, schema)
        return drive(plan(channel), channel.perform)

    result: T = await session.run_sync(inside)
    return result


async def _run_async_scoped_session(registry: Any, schema: str, plan: Plan[T]) -> T:
    return await _run_async_session(registry(), schema, plan)


class DjangoChannel:
    """A Django database connection with the PostgreSQL backend, on psycopg or psycopg2."""

    def __init__(self, connection: Any, schema: str) -> None:
        self.connection = connection
        self.schema = schema
        if connection.vendor != "postgresql":
            raise UnsupportedConnection(
                f"the Django connection {connection.alias!r} is on {connection.vendor}, not on PostgreSQL"
            )
        if connection.get_autocommit():
            raise NotInTransaction(
                f"the Django connection {connection.alias!r} is outside transaction.atomic(): enqueue inside "
                "it, or without .on()"
            )

    @property
    def physical(self) -> object:
        return self.connection.connection

    @property
    def can_copy(self) -> bool:
        pgconn = getattr(self.connection.connection, "pgconn", None)
        return not (pgconn and pgconn.pipeline_status)

    def perform(self, step: Step) -> Rows:
        if isinstance(step, Copy):
            _copy_by_driver(self.connection.connection, self.schema, step)
            return []
        with self.connection.cursor() as cursor:
            cursor.execute(query(step.name, self.schema).text, step.parameters)
            rows: Rows = cursor.fetchall()
            return rows


_SYNC: Final[dict[str, Callable[[Any, str], SyncChannel]]] = {
    "psycopg.Connection": _open_psycopg,
    "sqlalchemy.orm.session.Session": _open_session,
    "sqlalchemy.orm.scoping.scoped_session": _open_scoped_session,
    "sqlalchemy.engine.base.Connection": SqlalchemyChannel,
    "django.db.backends.base.base.BaseDatabaseWrapper": DjangoChannel,
    "django.utils.connection.ConnectionProxy": DjangoChannel,
}
_ASYNC: Final[dict[str, Callable[[Any, str, Plan[Any]], Awaitable[Any]]]] = {
    "psycopg.AsyncConnection": _run_async_psycopg,
    "sqlalchemy.ext.asyncio.session.AsyncSession": _run_async_session,
    "sqlalchemy.ext.asyncio.scoping.async_scoped_session": _run_async_scoped_session,
    "sqlalchemy.ext.asyncio.engine.AsyncConnection": _run_async_sqlalchemy,
    "asyncpg.connection.Connection": _run_asyncpg,
    "asyncpg.pool.PoolConnectionProxy": _run_asyncpg,
}
_REFUSED: Final = {
    "sqlalchemy.engine.base.Engine": "pass `engine.connect()` or a Session",
    "sqlalchemy.ext.asyncio.engine.AsyncEngine": "pass `engine.connect()` or an AsyncSession",
    "sqlalchemy.orm.session.sessionmaker": "pass a session it made",
    "sqlalchemy.ext.asyncio.session.async_sessionmaker": "pass a session it made",
    "psycopg_pool.base.BasePool": "pass a connection from the pool",
    "asyncpg.pool.Pool": "pass a connection from the pool",
    "psycopg.Cursor": "pass the cursor's connection",
    "psycopg.AsyncCursor": "pass the cursor's connection",
    "psycopg2.extensions.connection": "psycopg2 is used through SQLAlchemy or Django; on its own use psycopg",
    "django.db.utils.ConnectionHandler": "pass `django.db.connection`",
}
_known: dict[type, str] = {}
