"""Enqueueing in the caller's transaction, on every kind of connection: jobs and data share one fate."""

from __future__ import annotations

import asyncio
import contextlib
import os
import subprocess
import sys
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any
from uuid import uuid4

import asyncpg
import django
import psycopg
import psycopg2
import pytest
import sqlalchemy
from django.conf import settings
from psycopg.conninfo import conninfo_to_dict
from psycopg.rows import dict_row
from sqlalchemy.ext.asyncio import AsyncSession, async_scoped_session, async_sessionmaker, create_async_engine
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column, scoped_session, sessionmaker

import pgqueue.enqueue
from pgqueue import (
    DuplicateJob,
    NotInTransaction,
    PgQueue,
    Task,
    UniqueWaitTimeout,
    UnsupportedConnection,
    WrongDatabase,
)
from pgqueue.database.migrate import upgrade

NAMES = (
    "psycopg",
    "psycopg-async",
    "session-psycopg",
    "session-psycopg2",
    "scoped-session",
    "connection-psycopg",
    "connection-psycopg2",
    "async-session-psycopg",
    "async-session-asyncpg",
    "async-scoped-session",
    "async-connection-psycopg",
    "async-connection-asyncpg",
    "asyncpg",
    "asyncpg-pool",
    "django",
    "django-proxy",
)


class Handle:
    """One connection with an open transaction. Calls are plain, whatever the driver: async ones run on a
    loop.
    """

    connection: Any
    is_async = False

    def on(self, task: Task[..., Any]) -> Any:
        return task.on(self.connection)

    def delay(self, task: Task[..., Any], *args: object) -> str:
        return str(self.on(task).delay(*args).id)

    def apply_async(self, task: Task[..., Any], args: tuple[object, ...], **options: Any) -> str:
        return str(self.on(task).apply_async(args, **options).id)

    def many(self, app: PgQueue, signatures: list[Any]) -> list[str]:
        return app.enqueue_many(signatures, connection=self.connection)

    def sql(self, text: str) -> list[tuple[Any, ...]]:
        raise NotImplementedError

    def commit(self) -> None:
        self.connection.commit()

    def rollback(self) -> None:
        self.connection.rollback()

    def in_savepoint_rolled_back(self, act: Any) -> None:
        raise NotImplementedError


class AsyncHandle(Handle):
    is_async = True

    def __init__(self, runner: asyncio.Runner, connection: Any) -> None:
        self.run = runner.run
        self.connection = connection

    def delay(self, task: Task[..., Any], *args: object) -> str:
        return str(self.run(self.on(task).adelay(*args)).id)

    def apply_async(self, task: Task[..., Any], args: tuple[object, ...], **options: Any) -> str:
        return str(self.run(self.on(task).aapply_async(args, **options)).id)

    def many(self, app: PgQueue, signatures: list[Any]) -> list[str]:
        return self.run(app.aenqueue_many(signatures, connection=self.connection))

    def commit(self) -> None:
        self.run(self.connection.commit())

    def rollback(self) -> None:
        self.run(self.connection.rollback())


class Psycopg(Handle):
    def __init__(self, connection: psycopg.Connection[Any]) -> None:
        self.connection = connection

    def sql(self, text: str) -> list[tuple[Any, ...]]:
        return list(self.connection.execute(text))

    def in_savepoint_rolled_back(self, act: Any) -> None:
        self.sql("select 1")
        with self.connection.transaction(force_rollback=True):
            act()


class AsyncPsycopg(AsyncHandle):
    def sql(self, text: str) -> list[tuple[Any, ...]]:
        async def fetch() -> list[tuple[Any, ...]]:
            return await (await self.connection.execute(text)).fetchall()

        return self.run(fetch())

    def in_savepoint_rolled_back(self, act: Any) -> None:
        self.sql("select 1")
        savepoint = self.connection.transaction(force_rollback=True)
        self.run(savepoint.__aenter__())
        act()
        self.run(savepoint.__aexit__(None, None, None))


class Sqlalchemy(Handle):
    """A Session or a Connection: they share what is used here."""

    def __init__(self, connection: Any) -> None:
        self.connection = connection

    def sql(self, text: str) -> list[tuple[Any, ...]]:
        return [tuple(row) for row in self.connection.execute(sqlalchemy.text(text))]

    def in_savepoint_rolled_back(self, act: Any) -> None:
        savepoint = self.connection.begin_nested()
        act()
        savepoint.rollback()


class AsyncSqlalchemy(AsyncHandle):
    def sql(self, text: str) -> list[tuple[Any, ...]]:
        return [tuple(row) for row in self.run(self.connection.execute(sqlalchemy.text(text)))]

    def in_savepoint_rolled_back(self, act: Any) -> None:
        async def begin() -> Any:
            return await self.connection.begin_nested()

        savepoint = self.run(begin())
        act()
        self.run(savepoint.rollback())


class Asyncpg(AsyncHandle):
    def __init__(self, runner: asyncio.Runner, connection: Any) -> None:
        super().__init__(runner, connection)
        self.begin()

    def begin(self) -> None:
        self.transaction = self.connection.transaction()
        self.run(self.transaction.start())

    def sql(self, text: str) -> list[tuple[Any, ...]]:
        return [tuple(row) for row in self.run(self.connection.fetch(text))]

    def commit(self) -> None:
        self.run(self.transaction.commit())
        self.begin()

    def rollback(self) -> None:
        self.run(self.transaction.rollback())
        self.begin()

    def in_savepoint_rolled_back(self, act: Any) -> None:
        savepoint = self.connection.transaction()
        self.run(savepoint.start())
        act()
        self.run(savepoint.rollback())


class Django(Handle):
    def __init__(self, connection: Any) -> None:
        self.connection = connection
        self.begin()

    def begin(self) -> None:
        from django.db import transaction

        self.atomic = transaction.atomic()
        self.atomic.__enter__()

    def sql(self, text: str) -> list[tuple[Any, ...]]:
        with self.connection.cursor() as cursor:
            cursor.execute(text)
            return list(cursor.fetchall())

    def commit(self) -> None:
        self.atomic.__exit__(None, None, None)
        self.begin()

    def rollback(self) -> None:
        from django.db import transaction

        transaction.set_rollback(True)
        self.commit()

    def in_savepoint_rolled_back(self, act: Any) -> None:
        from django.db import transaction

        with transaction.atomic():
            act()
            transaction.set_rollback(True)


def sync_engine(dsn: str, driver: str, **options: Any) -> sqlalchemy.Engine:
    connect: Any = psycopg.connect if driver == "psycopg" else psycopg2.connect
    return sqlalchemy.create_engine(
        f"postgresql+{driver}://", creator=lambda: connect(dsn), poolclass=sqlalchemy.NullPool, **options
    )


def async_engine(dsn: str, driver: str, **options: Any) -> Any:
    async def connect() -> Any:
        if driver == "psycopg":
            return await psycopg.AsyncConnection.connect(dsn)
        return await asyncpg.connect(dsn)

    return create_async_engine(
        f"postgresql+{driver}://", async_creator=connect, poolclass=sqlalchemy.NullPool, **options
    )


def point_django_at(dsn: str) -> Any:
    """Django's default connection, on this database."""
    if not settings.configured:
        settings.configure()
        django.setup()
    from django.db import connections
    from django.db.backends.postgresql.base import DatabaseWrapper

    parts = conninfo_to_dict(dsn)
    wanted = {
        "ENGINE": "django.db.backends.postgresql",
        "NAME": parts["dbname"],
        "USER": parts.get("user", ""),
        "PASSWORD": parts.get("password", ""),
        "HOST": parts.get("host", ""),
        "PORT": parts.get("port", ""),
    }
    template = connections.configure_settings({"default": wanted})["default"]
    connections["default"] = DatabaseWrapper(template, "default")
    return connections["default"]


@contextlib.contextmanager
def opened(name: str, dsn: str) -> Iterator[Handle]:
    """A connection of this kind, rolled back and closed at the end."""
    with contextlib.ExitStack() as stack:
        kind, _, driver = name.rpartition("-")
        if name == "psycopg":
            yield Psycopg(stack.enter_context(contextlib.closing(psycopg.connect(dsn))))
        elif kind == "session":
            yield Sqlalchemy(stack.enter_context(Session(sync_engine(dsn, driver))))
        elif name == "scoped-session":
            registry = scoped_session(sessionmaker(sync_engine(dsn, "psycopg")))
            stack.callback(registry.remove)
            yield Sqlalchemy(registry)
        elif kind == "connection":
            yield Sqlalchemy(stack.enter_context(sync_engine(dsn, driver).connect()))
        elif name.startswith("django"):
            wrapper = point_django_at(dsn)
            stack.callback(wrapper.close)
            handle = Django(django.db.connection if name == "django-proxy" else wrapper)
            try:
                yield handle
            finally:
                django.db.transaction.set_rollback(True)
                handle.atomic.__exit__(None, None, None)
        else:
            yield from opened_async(stack, name, dsn)


def opened_async(stack: contextlib.ExitStack, name: str, dsn: str) -> Iterator[AsyncHandle]:
    runner = stack.enter_context(asyncio.Runner())
    kind, _, driver = name.rpartition("-")
    if name == "psycopg-async":
        connection = runner.run(psycopg.AsyncConnection.connect(dsn))
        stack.callback(lambda: runner.run(connection.close()))
        yield AsyncPsycopg(runner, connection)
    elif kind == "async-session":
        session = AsyncSession(async_engine(dsn, driver))
        stack.callback(lambda: runner.run(session.close()))
        yield AsyncSqlalchemy(runner, session)
    elif name == "async-scoped-session":
        maker = async_sessionmaker(async_engine(dsn, "asyncpg"))
        registry = async_scoped_session(maker, scopefunc=lambda: 1)
        stack.callback(lambda: runner.run(registry.remove()))
        yield AsyncSqlalchemy(runner, registry)
    elif kind == "async-connection":
        connection = async_engine(dsn, driver).connect()
        runner.run(connection.start())
        stack.callback(lambda: runner.run(connection.close()))
        yield AsyncSqlalchemy(runner, connection)
    elif name == "asyncpg":
        raw = runner.run(asyncpg.connect(dsn))
        stack.callback(lambda: runner.run(raw.close()))
        yield Asyncpg(runner, raw)
    else:

        async def make_pool() -> Any:
            return await asyncpg.create_pool(dsn, min_size=1, max_size=1)

        async def acquire() -> Any:
            return await pool.acquire()

        async def release() -> None:
            await pool.release(proxy)

        pool = runner.run(make_pool())
        stack.callback(lambda: runner.run(pool.close()))
        proxy = runner.run(acquire())
        stack.callback(lambda: runner.run(release()))
        handle = Asyncpg(runner, proxy)
        try:
            yield handle
        finally:
            runner.run(handle.transaction.rollback())


@pytest.fixture(params=NAMES)
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def handle(name: str, db: str) -> Iterator[Handle]:
    with opened(name, db) as handle:
        yield handle


@pytest.fixture
def app(db: str) -> Iterator[PgQueue]:
    app = PgQueue("tests", dsn=db)

    @app.task(name="tests.note")
    def note(number: int, text: str = "") -> None: ...

    yield app
    app.close()


@pytest.fixture(scope="module")
def other_dsn(postgres: Any) -> Iterator[str]:
    """A database with two queues, neither of them the one under test."""
    created = postgres.create_database()
    try:
        upgrade(created.dsn)
        upgrade(created.dsn, schema="shop_jobs")
        yield created.dsn
    finally:
        postgres.drop_database(created)


@pytest.fixture
def note(app: PgQueue) -> Task[..., Any]:
    return app.find_task("tests.note")


def committed(dsn: str, columns: str = "id::text", schema: str = "pgqueue") -> list[Any]:
    """What another connection sees, in the order of position."""
    with psycopg.connect(dsn) as connection:
        rows = connection.execute(f"select {columns} from {schema}.jobs order by position").fetchall()
    return [row[0] if len(row) == 1 else row for row in rows]


def test_rollback_leaves_no_job(handle: Handle, app: PgQueue, note: Any, db: str) -> None:
    handle.delay(note, 1)
    handle.apply_async(note, (2,), countdown=60)
    handle.many(app, [note.s(3), note.s(4)])
    handle.rollback()
    assert committed(db) == []


def test_commit_leaves_exactly_the_jobs_that_were_enqueued(
    handle: Handle, app: PgQueue, note: Any, db: str
) -> None:
    ids = [handle.delay(note, 1), handle.apply_async(note, (2,), priority=9)]
    ids += handle.many(app, [note.s(3), note.s(4)])
    assert committed(db) == []
    handle.commit()
    assert committed(db) == ids


def test_data_and_jobs_share_one_fate(handle: Handle, note: Any, db: str) -> None:
    with psycopg.connect(db, autocommit=True) as connection:
        connection.execute("create table orders (id int)")
    try:
        for number, end in ((1, handle.rollback), (2, handle.commit)):
            handle.sql(f"insert into orders values ({number}) returning id")
            handle.delay(note, number)
            end()
        with psycopg.connect(db) as connection:
            assert connection.execute("select id from orders").fetchall() == [(2,)]
        assert committed(db, "args->0") == [2]
    finally:
        handle.rollback()
        with psycopg.connect(db, autocommit=True) as connection:
            connection.execute("drop table orders")


def test_a_savepoint_rolled_back_takes_its_jobs_along(
    handle: Handle, app: PgQueue, note: Any, db: str
) -> None:
    before = handle.delay(note, 1)

    def inside() -> None:
        handle.delay(note, 2)
        handle.many(app, [note.s(3)])

    handle.in_savepoint_rolled_back(inside)
    after = handle.delay(note, 4)
    handle.commit()
    assert committed(db) == [before, after]


@pytest.mark.parametrize("end", ["commit", "rollback"])
def test_a_bulk_load_as_the_first_act(
    handle: Handle, app: PgQueue, note: Any, db: str, end: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pgqueue.enqueue, "_jobs_json", lambda *_: pytest.fail("not by COPY"))
    ids = handle.many(app, [note.s(number) for number in range(3)])
    assert committed(db) == []
    getattr(handle, end)()
    assert committed(db) == (ids if end == "commit" else [])


AWKWARD = 'back\\slash \\N tab\there "quoted" new\nline snow \u2603 \U0001f600 \u2028 %s $1 :name'


def test_values_arrive_as_they_were_given(handle: Handle, app: PgQueue, note: Any, db: str) -> None:
    eta = datetime(2040, 2, 3, 4, 5, 6, 789012, tzinfo=UTC).astimezone()
    options: dict[str, Any] = {
        "eta": eta,
        "expires": eta + timedelta(days=1),
        "priority": 9,
        "queue": "a.b:c-d",
        "max_retries": 7,
        "headers": {"tags": [AWKWARD]},
    }
    handle.apply_async(note, (1, AWKWARD), **options)
    handle.many(app, [note.s(1, AWKWARD).set(**options)])
    handle.commit()
    columns = "state, queue, task, args, kwargs, priority, eta, expires_at, max_retries, headers, attempt"
    single, bulk = committed(db, columns)
    assert single == bulk
    assert single == (
        "scheduled", "a.b:c-d", "tests.note", [1, AWKWARD], {}, 9, eta, eta + timedelta(days=1), 7,
        {"tags": [AWKWARD]}, 0,
    )  # fmt: skip


def test_times_from_now_count_from_the_databases_clock(
    handle: Handle, app: PgQueue, note: Any, db: str
) -> None:
    for seconds in (90, -90, 0):
        handle.apply_async(note, (1,), countdown=seconds, expires=600.5)
        handle.many(app, [note.s(1).set(countdown=seconds, expires=600.5)])
    handle.commit()
    rows = committed(
        db, "state, extract(epoch from eta - enqueued_at), extract(epoch from expires_at - enqueued_at)"
    )
    assert [state for state, _, _ in rows] == ["scheduled"] * 2 + ["ready"] * 4
    assert [float(late) for _, late, _ in rows] == pytest.approx([90, 90, -90, -90, 0, 0], abs=0.5)
    assert [float(expires) for _, _, expires in rows] == pytest.approx([600.5] * 6, abs=0.5)


def test_a_given_id_is_enqueued_once(handle: Handle, app: PgQueue, note: Any, db: str) -> None:
    if handle.sql("show transaction_isolation") != [("read committed",)]:
        pytest.skip("needs READ COMMITTED")
    mine = str(uuid4())
    assert handle.apply_async(note, (1,), job_id=mine) == mine
    assert handle.apply_async(note, (2,), job_id=mine) == mine
    assert handle.many(app, [note.s(3).set(job_id=mine), note.s(4)])[0] == mine
    handle.commit()
    assert committed(db, "id::text, args->0")[0] == (mine, 1)
    assert committed(db, "args->0") == [1, 4]


def test_on_offers_only_calls_of_its_kind(handle: Handle, app: PgQueue, note: Any) -> None:
    calls = handle.on(note)
    offered = [call for call in ("delay", "apply_async", "adelay", "aapply_async") if hasattr(calls, call)]
    assert offered == (["adelay", "aapply_async"] if handle.is_async else ["delay", "apply_async"])
    connection: Any = handle.connection
    if handle.is_async:
        wrong = [
            lambda: app.enqueue_many([note.s(1)], connection=connection),
            lambda: app.send_task("tests.note", [1], connection=connection),
            lambda: note.apply_async((1,), connection=connection),
        ]
    else:
        wrong = [
            lambda: asyncio.run(app.aenqueue_many([note.s(1)], connection=connection)),
            lambda: asyncio.run(app.asend_task("tests.note", [1], connection=connection)),
            lambda: asyncio.run(note.aapply_async((1,), connection=connection)),
        ]
    for call in wrong:
        with pytest.raises(UnsupportedConnection, match="async connection"):
            call()


def test_connection_is_another_spelling_of_on(handle: Handle, note: Any, db: str) -> None:
    if isinstance(handle, AsyncHandle):
        result = handle.run(note.aapply_async((1,), connection=handle.connection))
    else:
        result = note.apply_async((1,), connection=handle.connection)
    assert committed(db) == []
    handle.commit()
    assert committed(db) == [result.id]


def test_a_database_without_the_queue_is_refused_and_the_transaction_lives(
    name: str, fresh_dsn: str, note: Any
) -> None:
    with opened(name, fresh_dsn) as handle:
        handle.sql("select 1")
        with pytest.raises(WrongDatabase, match="no schema 'pgqueue'"):
            handle.delay(note, 1)
        assert [tuple(row) for row in handle.sql("select 2")] == [(2,)]


def test_another_queues_database_is_refused(name: str, other_dsn: str, app: PgQueue, note: Any) -> None:
    with opened(name, other_dsn) as handle:
        with pytest.raises(WrongDatabase, match="another database than the queue's dsn"):
            handle.delay(note, 1)
        with pytest.raises(WrongDatabase, match="another database than the queue's dsn"):
            handle.many(app, [note.s(1)])
        handle.commit()
    assert committed(other_dsn) == []


def test_a_schema_of_another_name(name: str, other_dsn: str) -> None:
    app = PgQueue("tests", schema="shop_jobs")
    note = app.task(name="tests.note")(lambda number: None)
    with opened(name, other_dsn) as handle:
        ids = [handle.delay(note, 1), *handle.many(app, [note.s(2), note.s(3)])]
        handle.commit()
    assert committed(other_dsn, schema="shop_jobs")[-3:] == ids


def test_a_failed_transaction_gives_the_drivers_own_error(handle: Handle, note: Any) -> None:
    handle.delay(note, 1)
    with pytest.raises(Exception, match="does not exist"):
        handle.sql("select * from no_such_table")
    with pytest.raises(Exception, match=r"aborted|rolled back|until the end of the 'atomic' block") as caught:
        handle.delay(note, 2)
    assert not type(caught.value).__module__.startswith("pgqueue")
    handle.rollback()


def test_the_install_is_looked_up_once_per_connection(
    handle: Handle, app: PgQueue, note: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from pgqueue.database import connection as module

    looks = []
    read = module.read_install
    monkeypatch.setattr(module, "read_install", lambda rows: looks.append(1) or read(rows))
    for number in range(3):
        handle.delay(note, number)
        handle.many(app, [note.s(number)])
        handle.rollback()
    # Once for the DSN, once for the connection; SQLAlchemy's engine here opens a new one after each rollback.
    reconnects = handle.connection.__class__.__module__.startswith("sqlalchemy.orm") or "session" in str(
        type(handle.connection)
    )
    assert len(looks) == (4 if reconnects else 2)


# What is special to one kind of connection.


def test_an_idle_psycopg_connection_in_autocommit_is_refused(db: str, app: PgQueue, note: Any) -> None:
    with psycopg.connect(db, autocommit=True) as connection:
        for call in (
            lambda: note.on(connection).delay(1),
            lambda: app.enqueue_many([note.s(1)], connection=connection),
        ):
            with pytest.raises(NotInTransaction, match="autocommit"):
                call()
            with connection.pipeline(), pytest.raises(NotInTransaction, match="autocommit"):
                call()
        with connection.transaction():
            note.on(connection).delay(1)
        with connection.transaction(), connection.pipeline():
            note.on(connection).delay(2)
        with connection.pipeline(), connection.transaction():
            note.on(connection).delay(3)
            app.enqueue_many([note.s(4)], connection=connection)
        with connection.pipeline():
            connection.execute("begin")  # still under way: the status does not show it yet
            note.on(connection).delay(5)
            connection.execute("commit")
    assert committed(db, "args->0") == [1, 2, 3, 4, 5]


def test_an_idle_async_psycopg_connection_in_autocommit_is_refused(db: str, note: Any) -> None:
    async def main() -> None:
        async with await psycopg.AsyncConnection.connect(db, autocommit=True) as connection:
            with pytest.raises(NotInTransaction, match="autocommit"):
                await note.on(connection).adelay(1)
            async with connection.pipeline():
                with pytest.raises(NotInTransaction, match="autocommit"):
                    await note.on(connection).adelay(1)
            async with connection.pipeline(), connection.transaction():
                await note.on(connection).adelay(2)
            async with connection.pipeline():
                await connection.execute("begin")
                await note.on(connection).adelay(3)
                await connection.execute("commit")

    asyncio.run(main())
    assert committed(db, "args->0") == [2, 3]


def test_asyncpg_outside_a_transaction_is_refused(db: str, note: Any) -> None:
    async def main() -> None:
        connection = await asyncpg.connect(db)
        with pytest.raises(NotInTransaction, match="asyncpg"):
            await note.on(connection).adelay(1)
        await connection.close()

    asyncio.run(main())
    assert committed(db) == []


@pytest.mark.parametrize("name", ["django", "django-proxy"])
def test_django_outside_atomic_is_refused(name: str, db: str, note: Any) -> None:
    wrapper = point_django_at(db)
    try:
        with pytest.raises(NotInTransaction, match="atomic"):
            note.on(django.db.connection if name == "django-proxy" else wrapper).delay(1)
    finally:
        wrapper.close()
    assert committed(db) == []


@pytest.mark.parametrize("driver", ["psycopg", "psycopg2"])
def test_sqlalchemy_at_autocommit_is_refused(driver: str, db: str, note: Any) -> None:
    engine = sync_engine(db, driver)
    with engine.execution_options(isolation_level="AUTOCOMMIT").connect() as connection:
        with pytest.raises(NotInTransaction, match="AUTOCOMMIT"):
            note.on(connection).delay(1)
    with Session(sync_engine(db, driver, isolation_level="AUTOCOMMIT")) as session:
        with pytest.raises(NotInTransaction, match="AUTOCOMMIT"):
            note.on(session).delay(1)
    with engine.connect() as connection:
        connection.execution_options(isolation_level="AUTOCOMMIT")
        with pytest.raises(NotInTransaction, match="AUTOCOMMIT"):
            note.on(connection).delay(1)
    assert committed(db) == []


@pytest.mark.parametrize("driver", ["psycopg", "asyncpg"])
def test_async_sqlalchemy_at_autocommit_is_refused(driver: str, db: str, note: Any) -> None:
    async def main() -> None:
        async with async_engine(db, driver, isolation_level="AUTOCOMMIT").connect() as connection:
            with pytest.raises(NotInTransaction, match="AUTOCOMMIT"):
                await note.on(connection).adelay(1)
        async with AsyncSession(async_engine(db, driver, isolation_level="AUTOCOMMIT")) as session:
            with pytest.raises(NotInTransaction, match="AUTOCOMMIT"):
                await note.on(session).adelay(1)

    asyncio.run(main())
    assert committed(db) == []


@pytest.mark.parametrize("driver", ["psycopg", "asyncpg"])
def test_a_sync_session_inside_run_sync(driver: str, db: str, app: PgQueue, note: Any) -> None:
    async def main() -> None:
        async with AsyncSession(async_engine(db, driver)) as session:
            await session.run_sync(lambda inner: note.on(inner).delay(1))
            await session.run_sync(lambda inner: app.enqueue_many([note.s(2)], connection=inner))
            await session.commit()

    asyncio.run(main())
    assert committed(db, "args->0") == [1, 2]


class Base(DeclarativeBase):
    pass


class Order(Base):
    __tablename__ = "no_such_table"
    id: Mapped[int] = mapped_column(primary_key=True)


def test_a_session_is_neither_flushed_nor_committed(db: str, app: PgQueue, note: Any) -> None:
    with Session(sync_engine(db, "psycopg")) as session:
        session.add(Order(id=1))  # a flush would fail: there is no such table
        note.on(session).delay(1)
        app.enqueue_many([note.s(2)], connection=session)
        assert len(session.new) == 1
        assert session.in_transaction()
        session.expunge_all()
    assert committed(db) == []


def test_a_session_with_several_databases_is_refused_with_the_way_out(db: str, note: Any) -> None:
    engine = sync_engine(db, "psycopg")

    class Routing(Session):
        def get_bind(self, *args: Any, **kwargs: Any) -> Any:
            return engine

    for session in (Session(engine, binds={Order: engine}), Routing()):
        with session, pytest.raises(UnsupportedConnection, match=r"session\.connection\(bind_arguments="):
            note.on(session).delay(1)
        with session:
            note.on(session.connection(bind_arguments={"mapper": Order})).delay(1)
            session.commit()
    assert len(committed(db)) == 2


def test_an_async_session_with_several_databases_is_refused(db: str, note: Any) -> None:
    engine = async_engine(db, "psycopg")

    class Routing(AsyncSession):
        def get_bind(self, *args: Any, **kwargs: Any) -> Any:
            return engine.sync_engine

    class SyncRouting(Session):
        def get_bind(self, *args: Any, **kwargs: Any) -> Any:
            return engine.sync_engine

    async def main() -> None:
        sessions = (
            AsyncSession(engine, binds={Order: engine}),
            Routing(),
            AsyncSession(sync_session_class=SyncRouting),
        )
        for session in sessions:
            async with session:
                with pytest.raises(UnsupportedConnection, match=r"session\.connection\(bind_arguments="):
                    await note.on(session).adelay(1)
                if isinstance(session, Routing):
                    continue
                connection = await session.connection(bind_arguments={"mapper": Order})
                await note.on(connection).adelay(1)
                await session.commit()

    asyncio.run(main())
    assert len(committed(db)) == 2


def test_the_callers_factories_do_not_apply(db: str, app: PgQueue, note: Any) -> None:
    for options in (
        {"row_factory": dict_row, "prepare_threshold": None},
        {"cursor_factory": psycopg.ClientCursor, "prepare_threshold": 0},
        {"cursor_factory": psycopg.RawCursor},
    ):
        with psycopg.connect(db, **options) as connection:  # type: ignore[arg-type]
            ids = [note.on(connection).delay(1).id]
            ids += app.enqueue_many([note.s(2)], connection=connection)
        assert committed(db)[-2:] == ids


def test_other_client_encodings_carry_every_character(db: str, app: PgQueue, note: Any) -> None:
    with psycopg.connect(db, client_encoding="latin1") as connection:
        app.enqueue_many([note.s(1, AWKWARD)], connection=connection)
    assert committed(db, "args->>1") == [AWKWARD]


def test_a_pipeline_enqueues_without_copy(db: str, app: PgQueue, note: Any) -> None:
    with psycopg.connect(db) as connection:
        with connection.pipeline():
            ids = app.enqueue_many([note.s(number) for number in range(2_500)], connection=connection)
    assert committed(db) == ids


def test_a_given_id_needs_read_committed(db: str, app: PgQueue, note: Any) -> None:
    with psycopg.connect(db) as connection:
        connection.isolation_level = psycopg.IsolationLevel.REPEATABLE_READ
        note.on(connection).delay(1)
        app.enqueue_many([note.s(2)], connection=connection)
        with pytest.raises(psycopg.errors.FeatureNotSupported, match=r"READ COMMITTED.*REPEATABLE READ"):
            note.on(connection).apply_async((3,), job_id=uuid4())
        connection.rollback()
        with pytest.raises(psycopg.errors.FeatureNotSupported, match=r"READ COMMITTED.*REPEATABLE READ"):
            app.enqueue_many([note.s(3).set(job_id=str(uuid4()))], connection=connection)
        connection.rollback()


def test_what_is_not_a_connection_is_refused_with_a_hint(db: str, note: Any) -> None:
    engine = sync_engine(db, "psycopg")
    with contextlib.closing(psycopg2.connect(db)) as old, psycopg.connect(db) as new:
        for value, hint in (
            (engine, r"engine\.connect\(\)"),
            (sessionmaker(engine), "a session it made"),
            (async_engine(db, "asyncpg"), "AsyncSession"),
            (new.cursor(), "the cursor's connection"),
            (old, "psycopg2 is used through SQLAlchemy or Django"),
            (db, "got builtins.str"),
        ):
            with pytest.raises(UnsupportedConnection, match=hint):
                note.on(value)


def test_sqlalchemy_on_another_database_is_refused(note: Any) -> None:
    engine = sqlalchemy.create_engine("sqlite://", poolclass=sqlalchemy.NullPool)
    with engine.connect() as connection:
        with pytest.raises(UnsupportedConnection, match="got sqlite"):
            note.on(connection).delay(1)


def test_a_dsn_that_cannot_be_reached_does_not_stop_an_enqueue_in_a_transaction(db: str) -> None:
    app = PgQueue("tests", dsn="postgresql://127.0.0.1:1/nowhere")
    note = app.task(name="tests.note")(lambda number: None)
    with psycopg.connect(db) as connection:
        note.on(connection).delay(1)
    assert len(committed(db)) == 1


DJANGO_ON_PSYCOPG2 = """
import sys
sys.modules["psycopg"] = None  # as where it is not installed: Django falls back to psycopg2
import django
from django.conf import settings
from psycopg2.extensions import parse_dsn
parts = parse_dsn(sys.argv[1])
settings.configure(DATABASES={"default": {"ENGINE": "django.db.backends.postgresql", "NAME": parts["dbname"],
    "USER": parts.get("user", ""), "PASSWORD": parts.get("password", ""), "HOST": parts.get("host", ""),
    "PORT": parts.get("port", "")}})
django.setup()
from django.db import connection, transaction
from pgqueue import NotInTransaction, PgQueue
app = PgQueue("tests")
note = app.task(name="tests.note")(lambda number: None)
try:
    note.on(connection).delay(0)
except NotInTransaction:
    pass
with transaction.atomic():
    app.enqueue_many([note.s(1)], connection=connection)
    note.on(connection).delay(2)
    with transaction.atomic():
        app.enqueue_many([note.s(3)], connection=connection)
        note.on(connection).delay(4)
        transaction.set_rollback(True)
with transaction.atomic():
    app.enqueue_many([note.s(5)], connection=connection)
    transaction.set_rollback(True)
print(type(connection.connection).__module__)
connection.close()
"""


def test_django_on_psycopg2(db: str) -> None:
    environ = {key: value for key, value in os.environ.items() if not key.startswith("PGQUEUE_")}
    done = subprocess.run(
        [sys.executable, "-c", DJANGO_ON_PSYCOPG2, db],
        capture_output=True,
        text=True,
        timeout=60,
        cwd=Path(pgqueue.__file__).parent.parent,
        env=environ,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "psycopg2.extensions"
    assert committed(db, "args->0") == [1, 2]


class TestUniqueKeys:
    def test_the_second_is_the_first(self, handle: Handle, note: Any, db: str) -> None:
        first = handle.apply_async(note, (1,), unique_key="a")
        assert handle.apply_async(note, (2,), unique_key="a") == first
        other = handle.apply_async(note, (3,), unique_key="b")
        handle.commit()
        assert committed(db, "id::text, args->0, unique_key") == [(first, 1, "a"), (other, 3, "b")]

    def test_asked_to_raise_it_does_and_the_transaction_goes_on(
        self, handle: Handle, note: Any, db: str
    ) -> None:
        first = handle.apply_async(note, (1,), unique_key="a", on_conflict="raise")
        with pytest.raises(DuplicateJob, match=f"job {first} of tests.note has the unique_key 'a'") as caught:
            handle.apply_async(note, (2,), unique_key="a", on_conflict="raise")
        assert caught.value.job_id == first
        last = handle.delay(note, 3)
        handle.commit()
        assert committed(db) == [first, last]

    def test_a_waiting_one_is_replaced(self, handle: Handle, note: Any, db: str) -> None:
        first = handle.apply_async(note, (1,), unique_key="a", countdown=3600, headers={"x": 1})
        again = handle.apply_async(
            note, (2,), unique_key="a", on_conflict="replace", priority=9, max_retries=7, queue="high"
        )
        handle.commit()
        assert again == first
        columns = "id::text, args->0, state, priority, max_retries, queue, eta, headers::text"
        assert committed(db, columns) == [(first, 2, "ready", 9, 7, "high", None, "{}")]

    def test_the_lock_timeout_is_what_it_was(self, handle: Handle, note: Any, db: str) -> None:
        handle.sql("select set_config('lock_timeout', '7s', true)")
        for on_conflict in ("return", "replace"):
            handle.apply_async(note, (1,), unique_key="a", on_conflict=on_conflict)
            assert handle.sql("select current_setting('lock_timeout')")[0][0] == "7s"
        handle.rollback()

    def test_it_waits_a_second_for_an_open_transaction(self, handle: Handle, note: Any, db: str) -> None:
        with psycopg.connect(db) as holder:
            note.apply_async((1,), unique_key="a", connection=holder)
            with pytest.raises(UniqueWaitTimeout, match="open for over a second, has enqueued"):
                handle.apply_async(note, (2,), unique_key="a")
            handle.rollback()
            holder.rollback()
        second = handle.apply_async(note, (2,), unique_key="a")
        handle.commit()
        assert committed(db) == [second]

    def test_in_bulk(self, handle: Handle, app: PgQueue, note: Any, db: str) -> None:
        first = handle.apply_async(note, (1,), unique_key="a")
        calls = [note.s(2).set(unique_key="b"), note.s(3).set(unique_key="a"), note.s(4)]
        ids = handle.many(app, [*calls, note.s(5).set(unique_key="b")])
        assert (ids[1], ids[3], len(set(ids))) == (first, ids[0], 3)
        handle.commit()
        assert set(committed(db, "args->0")) == {1, 2, 4}
        with pytest.raises(ValueError, match="enqueue_many takes on_conflict='return' only, got 'replace'"):
            handle.many(app, [note.s(1).set(unique_key="a", on_conflict="replace")])
        handle.rollback()
