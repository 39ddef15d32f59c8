"""Enqueueing without a caller's transaction: on connections of our own."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
import threading
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote
from uuid import uuid4

import psycopg
import pytest

import pgqueue
from pgqueue import ConfigError, DatabaseUnavailable, PgQueue, SchemaMismatch, Task
from pgqueue.database.pool import SIZE

ISOLATION_LEVELS = ("read committed", "repeatable read", "serializable")


def make_app(dsn: str | None) -> PgQueue:
    app = PgQueue("tests", dsn=dsn)
    app.task(name="tests.note")(lambda number: None)
    return app


@pytest.fixture
def app(db: str) -> Iterator[PgQueue]:
    app = make_app(db)
    yield app
    app.close()


@pytest.fixture
def note(app: PgQueue) -> Task[..., Any]:
    return app.find_task("tests.note")


def rows(dsn: str, query: str) -> list[Any]:
    with psycopg.connect(dsn, autocommit=True) as connection:
        return connection.execute(query).fetchall()


def enqueued(dsn: str) -> list[str]:
    return [row[0] for row in rows(dsn, "select id::text from pgqueue.jobs order by position")]


def sessions(dsn: str) -> list[int]:
    """Backends of our own connections."""
    query = (
        "select pid from pg_stat_activity where datname = current_database() and application_name = 'pgqueue'"
    )
    return [row[0] for row in rows(dsn, query)]


def with_setting(dsn: str, name: str, value: str) -> str:
    return dsn + ("&" if "?" in dsn else "?") + "options=" + quote(f"-c {name}={value}")


def test_a_job_is_there_when_delay_returns(db: str, app: PgQueue, note: Any) -> None:
    ids = [note.delay(1).id, note.apply_async((2,), queue="q").id, app.send_task("elsewhere.task", [3]).id]
    ids += app.enqueue_many([note.s(4), note.s(5)])
    assert enqueued(db) == ids


def test_the_async_calls_do_the_same(db: str, app: PgQueue, note: Any) -> None:
    async def main() -> list[str]:
        ids = [(await note.adelay(1)).id, (await note.aapply_async((2,), priority=1)).id]
        ids += [(await app.asend_task("elsewhere.task", [3])).id]
        return ids + await app.aenqueue_many([note.s(4), note.s(5)])

    ids = asyncio.run(main())
    assert enqueued(db) == ids
    assert sessions(db) == []


def test_one_connection_serves_calls_one_after_the_other(db: str, app: PgQueue, note: Any) -> None:
    for number in range(10):
        note.delay(number)
    app.enqueue_many([note.s(1)])
    assert len(sessions(db)) == 1
    app.close()
    note.delay(11)
    assert len(enqueued(db)) == 12


def test_threads_share_a_few_connections(db: str, note: Any) -> None:
    def enqueue() -> None:
        for number in range(20):
            note.delay(number)

    threads = [threading.Thread(target=enqueue) for _ in range(3 * SIZE)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(enqueued(db)) == 60 * SIZE
    assert 1 <= len(sessions(db)) <= SIZE


def test_coroutines_share_a_few_connections(db: str, app: PgQueue, note: Any) -> None:
    async def main() -> int:
        await asyncio.gather(*(note.adelay(number) for number in range(40)))
        count = len(sessions(db))
        await app.aclose()
        return count

    assert 1 <= asyncio.run(main()) <= SIZE
    assert len(enqueued(db)) == 40


def test_every_event_loop_has_its_own(db: str, note: Any) -> None:
    for number in range(3):
        asyncio.run(note.adelay(number))
        assert sessions(db) == []
    assert len(enqueued(db)) == 3


def test_a_loop_that_nobody_shuts_down_leaves_nothing_behind(db: str, app: PgQueue, note: Any) -> None:
    loop = asyncio.new_event_loop()
    loop.run_until_complete(note.adelay(1))
    loop.close()
    assert len(sessions(db)) == 1
    asyncio.run(note.adelay(2))
    assert sessions(db) == []


def test_a_cancelled_call_spoils_nothing(db: str, app: PgQueue, note: Any) -> None:
    async def main() -> None:
        await note.adelay(0)
        with psycopg.connect(db) as blocker:
            blocker.execute("lock table pgqueue.jobs in access exclusive mode")
            with pytest.raises(TimeoutError):
                await asyncio.wait_for(note.adelay(1), 0.1)
        await note.adelay(2)

    asyncio.run(main())
    assert len(enqueued(db)) == 2


def test_a_connection_with_an_open_transaction_is_not_kept(db: str, app: PgQueue) -> None:
    def leave_it_open(channel: Any) -> Any:
        channel.connection.execute("begin")
        return
        yield

    async def leave_it_open_too() -> list[int]:
        from pgqueue.database.connection import Statement

        def begin(channel: Any) -> Any:
            channel.connection.pgconn.exec_(b"begin")
            yield Statement("read_clock", {"schema": "pgqueue"})

        await app.client.database.arun(begin)
        return sessions(db)

    app.client.database.run(leave_it_open)
    assert sessions(db) == []
    assert asyncio.run(leave_it_open_too()) == []


@pytest.mark.parametrize("level", ISOLATION_LEVELS)
def test_the_databases_isolation_level_does_not_matter(db: str, level: str) -> None:
    app = make_app(with_setting(db, "default_transaction_isolation", level.replace(" ", "\\ ")))
    note = app.find_task("tests.note")
    mine = str(uuid4())
    with psycopg.connect(app.dsn) as connection:
        assert connection.execute("show transaction_isolation").fetchone() == (level,)
    note.delay(1)
    assert note.apply_async((2,), job_id=mine).id == mine
    assert note.apply_async((3,), job_id=mine).id == mine
    assert app.enqueue_many([note.s(4).set(job_id=mine), note.s(5)])[0] == mine

    async def main() -> None:
        await note.adelay(6)
        await note.aapply_async((7,), job_id=mine)

    asyncio.run(main())
    app.close()
    arguments = rows(db, "select args->0 from pgqueue.jobs order by position")
    assert [row[0] for row in arguments] == [1, 2, 5, 6]


@pytest.mark.parametrize("level", ISOLATION_LEVELS)
def test_transactions_of_our_own_are_read_committed(db: str, level: str) -> None:
    app = make_app(with_setting(db, "default_transaction_isolation", level.replace(" ", "\\ ")))
    from pgqueue.database.connection import PsycopgChannel

    def look(channel: Any) -> Any:
        assert isinstance(channel, PsycopgChannel)
        return channel.connection.execute("show transaction_isolation").fetchone()
        yield

    assert app.client.database.run(look, atomic=True) == ("read committed",)
    app.close()


def test_the_dsns_own_settings_win(db: str) -> None:
    separator = "&" if "?" in db else "?"
    app = make_app(f"{db}{separator}application_name=shop&options={quote('-c statement_timeout=4321')}")

    def look(channel: Any) -> Any:
        query = "select current_setting('application_name'), current_setting('statement_timeout')"
        return channel.connection.execute(query).fetchone()
        yield

    assert app.client.database.run(look) == ("shop", "4321ms")
    app.close()


def test_a_database_that_cannot_be_reached_is_one_line() -> None:
    note = make_app("postgresql://127.0.0.1:1,127.0.0.1:2/nowhere").find_task("tests.note")
    with pytest.raises(DatabaseUnavailable, match="cannot reach the database: ") as caught:
        note.delay(1)
    assert "\n" not in str(caught.value)
    with pytest.raises(DatabaseUnavailable, match="cannot reach the database: "):
        asyncio.run(note.adelay(1))


def test_a_database_that_was_not_migrated_names_the_command(fresh_dsn: str) -> None:
    app = make_app(fresh_dsn)
    note = app.find_task("tests.note")
    for call in (
        lambda: note.delay(1),
        lambda: app.enqueue_many([note.s(1)]),
        lambda: asyncio.run(note.adelay(1)),
        lambda: app.AsyncResult(uuid4()).state,
    ):
        with pytest.raises(SchemaMismatch, match="no schema 'pgqueue' of pgqueue; run `pgqueue migrate`"):
            call()
    app.close()


def test_a_dsn_that_is_none_is_refused_without_its_password() -> None:
    app = make_app("postgres:/user:secret@host/db")
    with pytest.raises(ConfigError, match="dsn must be a PostgreSQL URL") as caught:
        app.find_task("tests.note").delay(1)
    assert "secret" not in "".join(traceback.format_exception(caught.value))


def test_without_a_dsn_the_ways_out_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PGQUEUE_DSN", raising=False)
    app = make_app(None)
    with pytest.raises(ConfigError) as caught:
        app.find_task("tests.note").delay(1)
    assert (
        str(caught.value) == "no database: pass dsn=, or set PGQUEUE_DSN, or enqueue through .on(connection)"
    )


def test_the_dsn_comes_from_the_environment(db: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PGQUEUE_DSN", db)
    app = make_app(None)
    app.find_task("tests.note").delay(1)
    app.close()
    assert len(enqueued(db)) == 1


def run_python(code: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """A process of its own, where every warning is an error."""
    environ = {key: value for key, value in os.environ.items() if not key.startswith("PGQUEUE_")}
    return subprocess.run(
        [sys.executable, "-X", "dev", "-W", "error", "-c", code, *arguments],
        capture_output=True,
        text=True,
        timeout=60,
        cwd=Path(pgqueue.__file__).parent.parent,
        env=environ,
    )


FORKING = """
import json, os, sys
from pgqueue import PgQueue
app = PgQueue("tests", dsn=sys.argv[1])
note = app.task(name="tests.note")(lambda number: None)
def backend():
    connection = app.client.database._idle[-1]
    return connection.info.backend_pid
note.delay(1)
before = backend()
child = os.fork()
if not child:
    note.delay(2)
    assert backend() != before
    sys.exit(0)
_, status = os.waitpid(child, 0)
bystander = os.fork()
if not bystander:
    sys.exit(0)
_, other = os.waitpid(bystander, 0)
note.delay(3)
print(json.dumps([status, other, backend() == before]))
"""


def test_a_forked_child_leaves_its_parents_connections_alone(db: str) -> None:
    done = run_python(FORKING, db)
    assert done.stderr == ""
    assert json.loads(done.stdout) == [0, 0, True]
    assert len(enqueued(db)) == 3


LEAVING = """
import asyncio, sys
from pgqueue import PgQueue
app = PgQueue("tests", dsn=sys.argv[1])
note = app.task(name="tests.note")(lambda number: None)
note.delay(1)
async def main():
    await note.adelay(2)
asyncio.run(main())
loop = asyncio.new_event_loop()
loop.run_until_complete(note.adelay(3))
loop.close()
if len(sys.argv) > 2:
    import gc
    del app, note
    gc.collect()
"""


@pytest.mark.parametrize("forgotten", [[], ["collected before the end"]])
def test_a_process_that_closes_nothing_ends_in_silence(db: str, forgotten: list[str]) -> None:
    done = run_python(LEAVING, db, *forgotten)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert len(enqueued(db)) == 3
