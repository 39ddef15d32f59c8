"""`AsyncResult`: what became of a job."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Iterator
from contextvars import copy_context
from typing import Any
from uuid import uuid4

import psycopg
import pytest

from pgqueue import (
    AsyncResult,
    JobCancelled,
    JobExpired,
    JobFailed,
    JobNotFound,
    PgQueue,
    Request,
    ResultUnavailable,
    Task,
)
from pgqueue import result as module
from pgqueue.job import current_request


@pytest.fixture
def app(db: str) -> Iterator[PgQueue]:
    app = PgQueue("tests", dsn=db)
    app.task(name="tests.note")(lambda number: None)
    yield app
    app.close()


@pytest.fixture
def note(app: PgQueue) -> Task[..., Any]:
    return app.find_task("tests.note")


def run(dsn: str, statement: str, *parameters: object) -> None:
    with psycopg.connect(dsn, autocommit=True) as connection:
        connection.execute(statement, parameters)


def finish(dsn: str, state: str = "succeeded", result: str | None = "null", error: str | None = None) -> None:
    run(
        dsn,
        "with gone as (delete from pgqueue.jobs returning *)"
        " insert into pgqueue.finished_jobs (id, state, queue, task, args, kwargs, priority, attempt,"
        " retries, crashes, rescues, enqueued_at, enqueued_by, headers, result, result_error)"
        " select id, %s, queue, task, args, kwargs, priority, 1, 0, 0, 0, enqueued_at, enqueued_by, headers,"
        " %s::jsonb, %s from gone",
        state,
        result,
        error,
    )


def bury(dsn: str) -> None:
    run(
        dsn,
        "with gone as (delete from pgqueue.jobs returning *)"
        " insert into pgqueue.dead_letters (id, queue, task, args, kwargs, priority, attempt, retries,"
        " crashes, rescues, enqueued_at, enqueued_by, headers, dead_letter_queue, reason, error_class,"
        " error_message, traceback) select id, queue, task, args, kwargs, priority, 1, 0, 0, 0, enqueued_at,"
        " enqueued_by, headers, queue, 'not_retryable', 'builtins.ValueError', 'no such order',"
        " 'Traceback: …' from gone",
    )


def test_a_live_job(db: str, note: Any) -> None:
    result = note.delay(1)
    assert (result.state, result.ready(), result.successful(), result.failed()) == (
        "ready",
        False,
        False,
        False,
    )
    assert (result.result, result.traceback) == (None, None)
    assert note.apply_async((1,), countdown=60).state == "scheduled"
    with pytest.raises(TimeoutError, match=r"is ready after 0\.02 s"):
        result.get(timeout=0.02)
    with pytest.raises(TimeoutError):
        asyncio.run(result.aget(timeout=0))


@pytest.mark.parametrize(("text", "value"), [('{"a": [1, 2.5, "x"]}', {"a": [1, 2.5, "x"]}), ("null", None)])
def test_a_job_that_succeeded(db: str, note: Any, text: str, value: object) -> None:
    result = note.delay(1)
    finish(db, result=text)
    assert result.get() == result.result == asyncio.run(result.aget()) == value
    assert (result.state, result.ready(), result.successful(), result.failed()) == (
        "succeeded",
        True,
        True,
        False,
    )


def test_success_is_final_and_read_once(db: str, app: PgQueue, note: Any) -> None:
    result = note.delay(1)
    finish(db, result="1")
    assert result.get() == 1
    run(db, "truncate pgqueue.finished_jobs")
    assert (result.get(), result.state) == (1, "succeeded")
    assert app.AsyncResult(result.id).state == "unknown"


def test_a_dead_letter(db: str, note: Any) -> None:
    result = note.delay(1)
    bury(db)
    with pytest.raises(JobFailed) as caught:
        result.get()
    error = caught.value
    assert str(error) == f"job {result.id} failed (not_retryable): builtins.ValueError: no such order"
    assert (error.job_id, error.reason, error.error_class) == (
        result.id,
        "not_retryable",
        "builtins.ValueError",
    )
    assert (error.error_message, error.remote_traceback) == ("no such order", "Traceback: …")
    assert isinstance(result.result, JobFailed)
    assert (result.state, result.failed(), result.ready()) == ("dead", True, True)
    assert result.traceback == "Traceback: …"
    with pytest.raises(JobFailed):
        asyncio.run(result.aget())


@pytest.mark.parametrize(("state", "error"), [("cancelled", JobCancelled), ("expired", JobExpired)])
def test_a_job_that_never_succeeded(db: str, note: Any, state: str, error: type[Exception]) -> None:
    result = note.delay(1)
    finish(db, state=state, result=None)
    with pytest.raises(error, match=result.id):
        result.get()
    assert (result.state, result.ready(), result.successful(), result.failed()) == (state, True, False, False)
    assert isinstance(result.result, error)


def test_a_result_that_was_not_stored(db: str, note: Any) -> None:
    result = note.delay(1)
    finish(db, result=None, error="the result must be at most 1,048,576 bytes")
    with pytest.raises(ResultUnavailable, match="succeeded, its result was not stored: the result must be"):
        result.get()
    assert result.successful()


def test_an_unknown_id(db: str, app: PgQueue, monkeypatch: pytest.MonkeyPatch) -> None:
    result = app.AsyncResult(uuid4())
    assert (result.state, result.ready()) == ("unknown", False)
    with pytest.raises(TimeoutError, match="is unknown"):
        result.get(timeout=0.01)
    monkeypatch.setattr(module, "UNKNOWN_FOR", 0.05)
    with pytest.raises(JobNotFound, match=f"no job {result.id}") as caught:
        result.get(timeout=10)
    assert caught.value.job_id == result.id
    with pytest.raises(JobNotFound):
        asyncio.run(result.aget())


def test_unknown_for_less_than_that_is_waited_for(db: str, note: Any) -> None:
    with psycopg.connect(db) as connection:
        result = note.on(connection).delay(1)
        assert result.state == "unknown"

        def commit_and_finish() -> None:
            time.sleep(0.1)
            connection.commit()
            finish(db, result="7")

        thread = threading.Thread(target=commit_and_finish)
        thread.start()
        assert result.get(timeout=10) == 7
        thread.join()


def test_polls_get_rarer(db: str, note: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0.0]
    pauses: list[float] = []

    def sleep(seconds: float) -> None:
        pauses.append(seconds)
        clock[0] += seconds

    monkeypatch.setattr(module.time, "monotonic", lambda: clock[0])
    monkeypatch.setattr(module.time, "sleep", sleep)
    with pytest.raises(TimeoutError):
        note.delay(1).get(timeout=30)
    assert pauses[0] == 0.005
    assert max(pauses) == 0.5
    assert pauses[:-1] == sorted(pauses[:-1])
    assert sum(pauses) == pytest.approx(30)


def test_a_task_must_not_wait_for_a_job(db: str, app: PgQueue, note: Any) -> None:
    result = note.delay(1)
    caught: list[RuntimeError] = []

    @app.task(name="tests.waits")
    def waits() -> None:
        try:
            result.get()
        except RuntimeError as error:
            caught.append(error)

    context = copy_context()
    context.run(current_request.set, Request(id=str(uuid4()), task="tests.waits"))
    context.run(waits)
    assert "must not wait for another job" in str(caught[0])
    finish(db)
    waits()
    assert len(caught) == 1
    assert result.get() is None


@pytest.mark.parametrize("spelling", [str.upper, "{{{}}}".format, "urn:uuid:{}".format])
def test_an_id_in_another_spelling(db: str, app: PgQueue, note: Any, spelling: Any) -> None:
    result = note.delay(1)
    same: AsyncResult[Any] = app.AsyncResult(spelling(result.id))
    assert same == result
    assert hash(same) == hash(result)
    assert same.state == "ready"


def test_an_id_that_is_none(app: PgQueue) -> None:
    with pytest.raises(
        ValueError, match="job_id must be a UUID, got 'mine'; a key of your own is unique_key"
    ):
        app.AsyncResult("mine")
