"""Our own connections when the server is slow, silent, read-only, starting, or less durable than it says.

Synchronous replication is played by a server that waits for a standby called `nobody`.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from typing import Any
from urllib.parse import quote, urlsplit, urlunsplit
from uuid import uuid4

import psutil
import psycopg
import pytest

from pgqueue import DatabaseError, DatabaseUnavailable, EnqueueUncertain, PermissionDenied, PgQueue, Task
from pgqueue.database import listener, patient, pool
from pgqueue.database.dsn import connect_options
from pgqueue.database.link import Call, Link
from pgqueue.database.listener import Listener
from pgqueue.database.queries import query
from tests.acceptance.workers import eventually
from tests.faults.relay import Relay
from tests.servers import Server, own_server

WAITS = "select pid from pg_stat_activity where wait_event = 'SyncRep' and datname = current_database()"


def make_app(dsn: str) -> PgQueue:
    app = PgQueue("tests", dsn=dsn)
    app.task(name="tests.note")(lambda number: None)
    return app


@pytest.fixture
def app(db: str) -> Iterator[PgQueue]:
    with closing(make_app(db)) as app:
        yield app


@pytest.fixture
def note(app: PgQueue) -> Task[..., Any]:
    return app.find_task("tests.note")


def rows(dsn: str, statement: str, *parameters: object) -> list[Any]:
    with psycopg.connect(dsn, autocommit=True) as connection:
        cursor = connection.execute(statement, parameters or None)
        return cursor.fetchall() if cursor.description else []


def shown(app: PgQueue, *names: str) -> list[str]:
    """Settings of a connection of our own."""

    def look(channel: Any) -> Any:
        return [channel.connection.execute(f"show {name}").fetchone()[0] for name in names]
        yield

    return app.client.database.run(look)


def with_options(dsn: str, options: str) -> str:
    return dsn + ("&" if "?" in dsn else "?") + "options=" + quote(options)


@contextlib.contextmanager
def database_setting(dsn: str, name: str, value: str) -> Iterator[None]:
    """A default of the database, for sessions that begin in the block."""
    database = urlsplit(dsn).path.removeprefix("/")
    server = urlunsplit(urlsplit(dsn)._replace(path="/postgres"))
    rows(server, f"alter database {database} set {name} = {value}")
    try:
        yield
    finally:
        rows(server, f"alter database {database} reset {name}")


class Calling(threading.Thread):
    """A call under way in a thread."""

    def __init__(self, call: Callable[[], Any]) -> None:
        super().__init__()
        self._call = call
        self.answer: Any = None
        self.error: BaseException | None = None
        self.start()

    def run(self) -> None:
        try:
            self.answer = self._call()
        except BaseException as error:
            self.error = error

    def end(self, within: float = 30) -> Calling:
        self.join(within)
        assert not self.is_alive(), "the call did not return"
        return self


class TestTimeouts:
    def test_a_locked_table_is_an_error_with_a_way_out(
        self, db: str, app: PgQueue, note: Any, monkeypatch: Any
    ) -> None:
        monkeypatch.setattr(pool, "LOCK_TIMEOUT", "200ms")
        with psycopg.connect(db) as locker:
            locker.execute("lock table pgqueue.jobs, pgqueue.finished_jobs in access exclusive mode")
            for call in (
                lambda: note.delay(1),
                lambda: app.enqueue_many([note.s(1)]),
                lambda: asyncio.run(note.adelay(1)),
                lambda: app.AsyncResult(uuid4()).state,
            ):
                with pytest.raises(DatabaseError, match=r"locks a table .*; nothing was done: .*lock"):
                    call()
        note.delay(2)
        assert len(rows(db, "select 1 from pgqueue.jobs")) == 1

    def test_a_slow_statement_is_an_error_with_a_way_out(self, db: str, monkeypatch: Any) -> None:
        with closing(make_app(with_options(db, "-c statement_timeout=200"))) as app:
            with psycopg.connect(db) as locker:
                locker.execute("lock table pgqueue.jobs in access exclusive mode")
                with pytest.raises(DatabaseError, match=r"cancelled the statement, .* statement_timeout"):
                    app.find_task("tests.note").delay(1)

    def test_what_is_set_and_what_is_left(self, db: str) -> None:
        both = ("statement_timeout", "lock_timeout")
        for dsn, expected in (
            (db, ["30s", "10s"]),
            (with_options(db, "-c statement_timeout=4321"), ["4321ms", "10s"]),
            (with_options(db, "-c statement_timeout=0 -c lock_timeout=0"), ["0", "0"]),
        ):
            with closing(make_app(dsn)) as app:
                assert shown(app, *both) == expected
        with database_setting(db, "lock_timeout", "'3s'"), closing(make_app(db)) as app:
            assert shown(app, *both) == ["30s", "3s"]

    def test_a_server_that_accepts_and_stays_silent(self, db: str) -> None:
        with socket.create_server(("127.0.0.1", 0)) as silent:
            port = silent.getsockname()[1]
            app = make_app(f"postgresql://x@127.0.0.1:{port}/x?connect_timeout=2")
            for call in (
                lambda: app.find_task("tests.note").delay(1),
                lambda: asyncio.run(app.find_task("tests.note").adelay(1)),
            ):
                start = time.monotonic()
                with pytest.raises(DatabaseUnavailable, match="cannot reach the database"):
                    call()
                assert 1 < time.monotonic() - start < 10

    def test_a_look_in_the_callers_transaction_waits_less(self, db: str, monkeypatch: Any) -> None:
        monkeypatch.setattr(pool, "LOOK_TIMEOUT", 2)
        monkeypatch.setattr(pool, "CONNECT_TIMEOUT", 60)
        with socket.create_server(("127.0.0.1", 0)) as silent:
            app = make_app(f"postgresql://x@127.0.0.1:{silent.getsockname()[1]}/x")
            start = time.monotonic()
            with psycopg.connect(db) as connection:
                app.find_task("tests.note").on(connection).delay(1)
            assert time.monotonic() - start < 10
        assert len(rows(db, "select 1 from pgqueue.jobs")) == 1

    @pytest.mark.parametrize("kind", ["one", "async", "many"])
    def test_a_frozen_server_process_is_given_up_for_another(
        self, replicated: Server, kind: str, monkeypatch: Any
    ) -> None:
        # No timeout of the server's reaches it, and its machine answers keepalives.
        monkeypatch.setattr(patient, "ANSWER_PATIENCE", 0.5)
        dsn = replicated.new_database()
        ours = with_options(dsn, "-c statement_timeout=500")
        idle = "select state from pg_stat_activity where pid = %s"

        async def twice(app: PgQueue) -> list[str]:
            note = app.find_task("tests.note")
            first = await note.adelay(1)
            freeze()
            return [first.id, (await note.adelay(2)).id]

        def freeze() -> None:
            process = replicated.backend("pgqueue", dsn)
            eventually(lambda: rows(dsn, idle, process.pid) == [("idle",)], "it holds no lock of it")
            frozen.append(process)
            process.suspend()

        frozen: list[psutil.Process] = []
        with closing(make_app(ours)) as app:
            note = app.find_task("tests.note")
            try:
                if kind == "async":
                    ids = asyncio.run(twice(app))
                else:
                    ids = [note.delay(1).id]
                    freeze()
                    ids += app.enqueue_many([note.s(2)]) if kind == "many" else [note.delay(2).id]
            finally:
                for process in frozen:
                    process.resume()
            psutil.wait_procs(frozen, timeout=20)
            assert frozen
            assert enqueued(dsn) == ids

    def test_a_listener_gives_up_a_server_that_does_not_answer(
        self, db: str, monkeypatch: Any, caplog: pytest.LogCaptureFixture
    ) -> None:
        monkeypatch.setattr(listener, "ANSWER_WITHIN", 0.3)
        heard: list[str] = []

        async def main(relay: Relay) -> None:
            listening = asyncio.Event()
            task = asyncio.ensure_future(listen(relay.dsn, heard, listening))
            await asyncio.to_thread(
                eventually, lambda: "database_unavailable connection=listen" in caplog.text, "it gives up"
            )
            relay.is_silent = False
            await asyncio.wait_for(listening.wait(), 20)
            rows(db, "select pg_notify('pgqueue', 'default')")
            await asyncio.to_thread(eventually, lambda: heard, "it hears")
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)

        with Relay(db) as relay:
            relay.is_silent = True
            asyncio.run(main(relay))
        assert heard == ["default"]


async def listen(dsn: str, heard: list[str], listening: asyncio.Event) -> None:
    from random import Random

    await Listener(
        dsn,
        "pgqueue",
        notify_dsn=dsn,
        on_notify=heard.append,
        on_control=heard.append,
        on_listen=listening.set,
        on_deaf=lambda: None,
        random=Random(),
    ).run()


class TestRights:
    @pytest.fixture
    def poor(self, db: str) -> Iterator[str]:
        """URL for a role without any right."""
        name = f"poor_{uuid4().hex[:8]}"
        rows(db, f"create role {name} login password 'secret'")
        url = urlsplit(db)
        try:
            yield urlunsplit(url._replace(netloc=f"{name}:secret@{url.hostname}:{url.port}"))
        finally:
            rows(db, f"drop owned by {name}")
            rows(db, f"drop role {name}")

    def test_a_role_without_rights_is_told_which(self, db: str, poor: str) -> None:
        with closing(make_app(poor)) as app:
            note = app.find_task("tests.note")
            role = urlsplit(poor).username
            for right, call in (
                ("schema pgqueue", lambda: note.delay(1)),
                ("schema pgqueue", lambda: asyncio.run(note.adelay(1))),
                ("schema pgqueue", lambda: app.AsyncResult(uuid4()).state),
            ):
                with pytest.raises(PermissionDenied, match=f"role '{role}' lacks .*{right}; grant it"):
                    call()
            rows(db, f"grant usage on schema pgqueue to {role}")
            with pytest.raises(PermissionDenied, match="permission denied for function enqueue"):
                note.delay(1)
            rows(db, f"grant execute on all functions in schema pgqueue to {role}")
            job = note.delay(1)
            with pytest.raises(PermissionDenied, match="permission denied for table"):
                _ = job.state
            with pytest.raises(PermissionDenied, match="permission denied for table"):
                job.get(timeout=1)


class TestDurability:
    @pytest.mark.parametrize(
        ("default", "used"), [("off", "on"), ("local", "local"), ("remote_apply", "remote_apply")]
    )
    def test_only_off_is_raised(self, db: str, default: str, used: str) -> None:
        with database_setting(db, "synchronous_commit", default):
            with closing(make_app(db)) as app:
                assert shown(app, "synchronous_commit") == [used]
            with psycopg.connect(db) as connection:
                for name in ("begin_work", "set_timeouts"):
                    assert connection.execute("show synchronous_commit").fetchone() == (default,)
                    connection.execute(query(name).text, {"statement_timeout": "1s", "lock_timeout": "1s"})
                    assert connection.execute("show synchronous_commit").fetchone() == (used,)
                    connection.rollback()

    def test_the_callers_transaction_is_left_alone(self, db: str, note: Any) -> None:
        with database_setting(db, "synchronous_commit", "off"), psycopg.connect(db) as connection:
            note.on(connection).delay(1)
            names = ("synchronous_commit", "statement_timeout", "lock_timeout")
            assert [connection.execute(f"show {name}").fetchone() for name in names] == [
                ("off",),
                ("0",),
                ("0",),
            ]


@pytest.fixture(scope="module")
def replicated() -> Iterator[Server]:
    """A server whose commits wait for a standby that is not there, in databases made by `synchronous`."""
    with own_server() as server:
        yield server


@pytest.fixture
def synchronous(replicated: Server) -> Iterator[str]:
    """URL of a queue whose commits wait for ever."""
    dsn = replicated.new_database()
    wait_for_standby(replicated, "nobody")
    yield dsn
    wait_for_standby(replicated, "")


def wait_for_standby(server: Server, names: str) -> None:
    with server.connect() as connection:
        connection.execute("set synchronous_commit = local")
        connection.execute(f"alter system set synchronous_standby_names = '{names}'".encode())
        connection.execute("select pg_reload_conf()")
        eventually(lambda: rows(server.dsn, "show synchronous_standby_names") == [(names,)], "it is reloaded")


def enqueued(dsn: str) -> list[str]:
    return [row[0] for row in rows(dsn, "select id::text from pgqueue.jobs order by position")]


class TestSynchronousReplication:
    @pytest.mark.parametrize("how", ["pg_cancel_backend", "pg_terminate_backend"])
    @pytest.mark.parametrize("kind", ["one", "async", "many"])
    def test_a_wait_that_was_cut_short_is_no_success(
        self, replicated: Server, synchronous: str, how: str, kind: str
    ) -> None:
        with closing(make_app(synchronous)) as app:
            note = app.find_task("tests.note")
            calls: dict[str, Callable[[], Any]] = {
                "one": lambda: note.delay(1),
                "async": lambda: asyncio.run(note.adelay(1)),
                "many": lambda: app.enqueue_many([note.s(1), note.s(2)]),
            }
            call = Calling(calls[kind])
            ((pid,),) = eventually(lambda: rows(synchronous, WAITS), "the commit waits")
            rows(synchronous, f"select {how}(%s)", pid)
            call.end()
            assert isinstance(call.error, EnqueueUncertain), (call.answer, call.error)
            assert "synchronous replication" in str(call.error)
            assert "repeat the call with this job_id" in str(call.error)
            assert call.error.job_id == enqueued(synchronous)[0]
            assert rows(synchronous, WAITS) == []

    def test_a_repeat_waits_for_the_standby_too(self, replicated: Server, synchronous: str) -> None:
        # The job is there, so the repeat has nothing to write of its own, and nothing to wait for.
        with closing(make_app(synchronous)) as app:
            note = app.find_task("tests.note")
            first = Calling(lambda: note.delay(1))
            ((pid,),) = eventually(lambda: rows(synchronous, WAITS), "the commit waits")
            rows(synchronous, "select pg_cancel_backend(%s)", pid)
            first.end()
            assert isinstance(first.error, EnqueueUncertain)
            mine = first.error.job_id
            for repeat in (
                lambda: note.apply_async((1,), job_id=mine).id,
                lambda: app.enqueue_many([note.s(1).set(job_id=mine)])[0],
            ):
                wait_for_standby(replicated, "nobody")
                again = Calling(repeat)
                eventually(lambda: rows(synchronous, WAITS) or not again.is_alive(), "the repeat waits")  # noqa: B023
                assert again.is_alive(), "it returned before the job was replicated"
                wait_for_standby(replicated, "")
                assert again.end().answer == mine
            assert enqueued(synchronous) == [mine]

    @pytest.mark.parametrize("kind", ["one", "async"])
    def test_a_standby_that_stays_away_leaves_it_uncertain(
        self, replicated: Server, synchronous: str, kind: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(pool, "LOCK_TIMEOUT", "100ms")
        monkeypatch.setattr(patient, "ANSWER_PATIENCE", 0.5)
        with closing(make_app(with_options(synchronous, "-c statement_timeout=500"))) as app:
            note = app.find_task("tests.note")
            call = Calling((lambda: note.delay(1)) if kind == "one" else lambda: asyncio.run(note.adelay(1)))
            error = call.end().error
            assert isinstance(error, EnqueueUncertain), error
            wait_for_standby(replicated, "")
            eventually(lambda: enqueued(synchronous) == [error.job_id], "it was enqueued")

    def test_a_connection_lost_in_the_wait(self, replicated: Server, synchronous: str) -> None:
        with Relay(synchronous) as relay, closing(make_app(relay.dsn)) as app:
            call = Calling(lambda: app.find_task("tests.note").delay(1).id)
            ((pid,),) = eventually(lambda: rows(synchronous, WAITS), "the commit waits")
            relay.cut()
            rows(synchronous, "select pg_terminate_backend(%s)", pid)

            def another() -> bool:
                return any(row[0] != pid for row in rows(synchronous, WAITS)) or not call.is_alive()

            eventually(another, "the repeat waits")
            assert call.is_alive(), f"it returned before the job was replicated: {call.answer or call.error}"
            wait_for_standby(replicated, "")
            assert enqueued(synchronous) == [call.end().answer]

    def test_a_repeat_that_is_refused_settles_nothing(
        self, replicated: Server, synchronous: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        # The first attempt still waits, and holds the id: whether it will be there is not known.
        monkeypatch.setattr(pool, "LOCK_TIMEOUT", "100ms")
        with Relay(synchronous) as relay, closing(make_app(relay.dsn)) as app:
            call = Calling(lambda: app.find_task("tests.note").delay(1).id)
            eventually(lambda: rows(synchronous, WAITS), "the commit waits")
            relay.cut()
            error = call.end().error
            assert isinstance(error, EnqueueUncertain), error
            wait_for_standby(replicated, "")
            eventually(lambda: enqueued(synchronous) == [error.job_id], "it was enqueued")

    def test_a_worker_says_so_in_its_log(self, synchronous: str, caplog: pytest.LogCaptureFixture) -> None:
        async def main() -> None:
            link = Link(synchronous, schema="pgqueue", name="claim")
            registration = {
                "worker": "w", "host": "h", "pid": 1, "queues": ["q"], "pool": "prefork", "concurrency": 1,
                "version": "0",
            }  # fmt: skip
            call = asyncio.ensure_future(link.run([Call("register_worker", registration)]))
            found = await asyncio.to_thread(eventually, lambda: rows(synchronous, WAITS), "it waits")
            rows(synchronous, "select pg_cancel_backend(%s)", found[0][0])
            await call
            await link.close()

        with caplog.at_level(logging.WARNING):
            asyncio.run(main())
        assert caplog.messages == ["commit_not_replicated connection=claim"]


STARTING = ("57P03", "the database system is starting up")


class TestRefusals:
    """The database refuses before anything took effect, for a reason that passes."""

    @pytest.mark.parametrize("asynchronous", [False, True])
    def test_a_server_that_is_starting_is_asked_again(self, db: str, asynchronous: bool) -> None:
        with Relay(db) as relay, closing(make_app(relay.dsn)) as app:
            note = app.find_task("tests.note")
            relay.refusals = [STARTING, STARTING]
            job_id = asyncio.run(note.adelay(1)).id if asynchronous else note.delay(1).id
            assert relay.connections == 3
        assert [row[0] for row in rows(db, "select id::text from pgqueue.jobs")] == [job_id]

    def test_a_server_that_starts_too_long_is_unavailable(self, db: str) -> None:
        with Relay(db) as relay, closing(make_app(relay.dsn)) as app:
            relay.refusals = [STARTING] * 100
            start = time.monotonic()
            with pytest.raises(DatabaseUnavailable, match="starting up") as caught:
                app.find_task("tests.note").delay(1)
            assert 1.5 < time.monotonic() - start < 15
            assert not isinstance(caught.value, EnqueueUncertain)

    def test_other_refusals_are_told_at_once(self, db: str) -> None:
        with Relay(db) as relay, closing(make_app(relay.dsn)) as app:
            relay.refusals = [("28P01", "password authentication failed")] * 3
            with pytest.raises(DatabaseUnavailable, match="password authentication failed"):
                app.find_task("tests.note").delay(1)
            assert relay.connections == 1

    @pytest.mark.parametrize("asynchronous", [False, True])
    def test_a_server_that_is_read_only_for_a_moment(self, db: str, asynchronous: bool) -> None:
        with Relay(db) as relay, closing(make_app(relay.dsn)) as app:
            note = app.find_task("tests.note")

            async def several() -> list[str]:
                return [each.id for each in await asyncio.gather(*(note.adelay(n) for n in range(4)))]

            with database_setting(db, "default_transaction_read_only", "on"):
                call = Calling(
                    (lambda: asyncio.run(several())) if asynchronous else lambda: [note.delay(1).id]
                )
                wanted = 4 if asynchronous else 2
                eventually(lambda: relay.connections >= wanted, "it tries again, on a new connection")
            ids = call.end().answer
            assert call.error is None
        assert {row[0] for row in rows(db, "select id::text from pgqueue.jobs")} == set(ids)

    def test_a_server_that_stays_read_only(self, db: str) -> None:
        with database_setting(db, "default_transaction_read_only", "on"), closing(make_app(db)) as app:
            with pytest.raises(DatabaseUnavailable, match=r"read-only: .*the dsn must lead to the primary"):
                app.find_task("tests.note").delay(1)
            assert not app.client.database._idle

    @pytest.mark.parametrize("sqlstate", ["40001", "40P01"])
    def test_a_conflict_is_repeated(self, db: str, app: PgQueue, note: Any, sqlstate: str) -> None:
        rows(db, "create sequence conflicts")
        rows(
            db,
            f"""create function conflict() returns trigger language plpgsql as $$ begin
                if nextval('public.conflicts') < 3 then raise 'conflict' using errcode = '{sqlstate}'; end if;
                return new; end $$""",
        )
        rows(db, "create trigger conflict before insert on pgqueue.jobs execute function conflict()")
        try:
            job_id = note.delay(1).id
            assert app.enqueue_many([note.s(1)])
            rows(db, "alter sequence conflicts restart")
            assert asyncio.run(note.adelay(1)).id
        finally:
            rows(db, "drop trigger conflict on pgqueue.jobs")
            rows(db, "drop function conflict")
            rows(db, "drop sequence conflicts")
        assert rows(db, "select count(*) from pgqueue.jobs where id = %s", job_id) == [(1,)]
        assert rows(db, "select count(*) from pgqueue.jobs") == [(3,)]


class TestSeveralHosts:
    @pytest.mark.parametrize(
        ("dsn", "expected"),
        [
            ("postgresql://a,b/x", "read-write"),
            ("host=a,b dbname=x", "read-write"),
            ("hostaddr=127.0.0.1,127.0.0.2", "read-write"),
            ("postgresql://a/x", None),
            ("dbname=x", None),
            ("postgresql://a,b/x?target_session_attrs=any", None),  # the DSN's own
        ],
    )
    def test_the_one_that_takes_writes_is_wanted(self, dsn: str, expected: str | None) -> None:
        assert connect_options(dsn).get("target_session_attrs") == expected

    def test_hosts_of_the_environment(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("PGHOST", "a,b")
        assert connect_options("dbname=x")["target_session_attrs"] == "read-write"
        assert "target_session_attrs" not in connect_options("host=c")
        monkeypatch.setenv("PGTARGETSESSIONATTRS", "any")
        assert "target_session_attrs" not in connect_options("dbname=x")
