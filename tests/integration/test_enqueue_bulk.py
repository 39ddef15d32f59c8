"""`enqueue_many`: all or none, in order, by COPY where that is possible; and who is woken."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from typing import Any

import psycopg
import pytest

import pgqueue.enqueue
from pgqueue import PayloadError, PgQueue, Signature, Task
from pgqueue.database.connection import PsycopgChannel


@pytest.fixture
def app(db: str) -> Iterator[PgQueue]:
    app = PgQueue("tests", dsn=db, task_routes={"elsewhere.*": {"queue": "far", "priority": 2}})

    @app.task(name="tests.note", queue="notes", priority=7, expires=3600)
    def note(number: int) -> None: ...

    yield app
    app.close()


@pytest.fixture
def note(app: PgQueue) -> Task[..., Any]:
    return app.find_task("tests.note")


@pytest.fixture(params=["copy", "function"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Both ways must do the same; each fails if it turns out to be the other one."""
    if request.param == "copy":
        monkeypatch.setattr(pgqueue.enqueue, "_jobs_json", lambda *_: pytest.fail("not by COPY"))
    else:
        monkeypatch.setattr(pgqueue.enqueue, "_copy_jobs", lambda *_: pytest.fail("by COPY"))
        monkeypatch.setattr(PsycopgChannel, "can_copy", False)
    return str(request.param)


def rows(dsn: str, query: str) -> list[Any]:
    with psycopg.connect(dsn, autocommit=True) as connection:
        return connection.execute(query).fetchall()


def test_ids_come_back_in_order_and_so_do_the_jobs(
    db: str, app: PgQueue, note: Any, way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pgqueue.enqueue, "CHUNK", 100)
    monkeypatch.setattr(pgqueue.enqueue, "COPY_CHUNK", 100)
    ids = app.enqueue_many(note.s(number) for number in range(250))
    assert len(set(ids)) == 250
    found = rows(db, "select id::text, (args->>0)::int from pgqueue.jobs order by position")
    assert found == list(zip(ids, range(250), strict=True))


def test_each_job_has_its_own_options(db: str, app: PgQueue, note: Any, way: str) -> None:
    eta = datetime.now(UTC).replace(microsecond=1) + timedelta(hours=1)
    app.enqueue_many(
        [
            note.s(0),
            note.s(1).set(queue="other", priority=0, max_retries=-1, headers={"a": 1}),
            note.s(2).set(eta=eta, expires=eta),
            note.s(3).set(eta=eta).set(eta=None, countdown=-5),
            Signature("elsewhere.task", (4,), {"b": "x"}),
        ]
    )
    columns = "task, args, kwargs, state, queue, priority, eta, max_retries, headers, expires_at is null"
    assert rows(db, f"select {columns} from pgqueue.jobs where (args->>0)::int <> 3 order by args") == [
        ("tests.note", [0], {}, "ready", "notes", 7, None, None, {}, False),
        ("tests.note", [1], {}, "ready", "other", 0, None, -1, {"a": 1}, False),
        ("tests.note", [2], {}, "scheduled", "notes", 7, eta, None, {}, False),
        ("elsewhere.task", [4], {"b": "x"}, "ready", "far", 2, None, None, {}, True),
    ]
    (state, due) = rows(db, "select state, eta < now() from pgqueue.jobs where (args->>0)::int = 3")[0]
    assert (state, due) == ("ready", True)


def test_one_bad_call_leaves_no_job(db: str, app: PgQueue, note: Any) -> None:
    with pytest.raises(PayloadError, match="number"):
        app.enqueue_many([note.s(1), note.s("two")])
    with pytest.raises(ValueError, match="timezone"):
        app.enqueue_many([note.s(1), note.s(2).set(eta=datetime(2030, 1, 1))])
    assert rows(db, "select from pgqueue.jobs") == []


def test_no_jobs_are_no_work(db: str, app: PgQueue) -> None:
    assert app.enqueue_many([]) == []
    assert asyncio.run(app.aenqueue_many(iter(()))) == []
    with psycopg.connect(db) as connection:
        assert app.enqueue_many([], connection=connection) == []


def test_given_ids_go_by_the_function_and_once(db: str, app: PgQueue, note: Any) -> None:
    mine = app.enqueue_many([note.s(1)])[0]
    again = app.enqueue_many([note.s(2).set(job_id=mine), note.s(3), note.s(4).set(job_id=mine)])
    assert (again[0], again[2]) == (mine, mine)
    assert rows(db, "select (args->>0)::int from pgqueue.jobs order by position") == [(1,), (3,)]


def test_a_producer_without_rights_on_tables(db: str, app: PgQueue, note: Any) -> None:
    with psycopg.connect(db) as connection:
        connection.execute("create role tests_producer")
        connection.execute("grant usage on schema pgqueue to tests_producer")
        connection.execute("grant execute on all functions in schema pgqueue to tests_producer")
        connection.execute("set local role tests_producer")
        ids = [note.on(connection).delay(0).id]
        ids += app.enqueue_many([note.s(number) for number in (1, 2)], connection=connection)
        connection.execute("set local role none")
        found = connection.execute("select id::text from pgqueue.jobs order by position").fetchall()
        assert [row[0] for row in found] == ids
        connection.rollback()


@pytest.mark.parametrize(
    "grant", ["insert on pgqueue.jobs", "insert on pgqueue.jobs, usage on sequence pgqueue.jobs_position_seq"]
)
def test_copy_needs_the_right_on_the_sequence_too(db: str, app: PgQueue, note: Any, grant: str) -> None:
    with psycopg.connect(db) as connection:
        connection.execute("create role tests_producer")
        connection.execute("grant usage on schema pgqueue to tests_producer")
        connection.execute("grant execute on all functions in schema pgqueue to tests_producer")
        for each in grant.split(", "):
            connection.execute(f"grant {each} to tests_producer")
        connection.execute("set local role tests_producer")
        assert len(app.enqueue_many([note.s(1)], connection=connection)) == 1
        connection.rollback()


@pytest.mark.parametrize(
    ("options", "woken"),
    [
        ({}, ["notes"]),
        ({"countdown": 60}, ["notes"]),
        ({"countdown": 7200}, []),  # the sleeper wakes for an earlier job anyway
        ({"queue": "unserved"}, []),
    ],
)
def test_sleeping_workers_are_woken(
    db: str, app: PgQueue, note: Any, way: str, options: dict[str, Any], woken: list[str]
) -> None:
    with psycopg.connect(db, autocommit=True) as listener:
        listener.execute("listen pgqueue")
        listener.execute(
            "insert into pgqueue.wake values ('notes', now() + interval '9 s', now() + interval '1 h')"
        )
        for enqueue in (
            lambda: app.enqueue_many([note.s(number).set(**options) for number in range(3)]),
            lambda: note.apply_async((4,), **options),
        ):
            enqueue()
            heard = listener.notifies(timeout=5 if woken else 0.2, stop_after=1)
            assert [notify.payload for notify in heard] == woken


def test_a_hint_that_is_over_wakes_nobody(db: str, app: PgQueue, note: Any, way: str) -> None:
    with psycopg.connect(db, autocommit=True) as listener:
        listener.execute("listen pgqueue")
        listener.execute("insert into pgqueue.wake values ('notes', now() - interval '1 s')")
        app.enqueue_many([note.s(1)])
        note.delay(2)
        assert list(listener.notifies(timeout=0.2)) == []
