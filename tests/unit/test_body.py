"""One run of a job, without a process around it."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from typing import Any

import pytest

from pgqueue import PgQueue, Reject, Snooze, TaskContext
from pgqueue.job import ClaimedJob, current_request, new_id
from pgqueue.worker.body import Body
from pgqueue.worker.interrupts import Alarm
from pgqueue.worker.wire import Failed, Snoozed, Succeeded


@pytest.fixture
def app() -> PgQueue:
    return PgQueue("tests")


@pytest.fixture
def body(app: PgQueue) -> Iterator[Body]:
    body = Body(app, Alarm())
    yield body
    if body._runner is not None:
        body._runner.close()


def job(task: Any, args: str = "[]", headers: str = "{}") -> ClaimedJob:
    of_the_row = (new_id(), "default", 5, 1, task.name, args, "{}", headers, 1, 0, None, 0, None)
    return ClaimedJob(*of_the_row, expired=False, cancelled=False, worker="w", number=1)


def test_the_request_is_current_while_it_runs(app: PgQueue, body: Body) -> None:
    seen = []

    @app.task
    def look() -> None:
        seen.append(current_request.get())
        raise ValueError("boom")

    asked = job(look)
    outcome = body.run(asked)
    assert isinstance(outcome, Failed)
    assert outcome.error_message == "boom"
    assert [request.id for request in seen] == [asked.id]
    assert current_request.get() is None


def test_it_is_current_in_a_coroutine_and_its_tasks(app: PgQueue, body: Body) -> None:
    @app.task(bind=True)
    async def look(self: TaskContext) -> list[bool]:
        async def inner() -> bool:
            await asyncio.sleep(0)
            return current_request.get() is self.request

        return await asyncio.gather(inner(), inner())

    outcome = body.run(job(look))
    assert isinstance(outcome, Succeeded)
    assert outcome.result == "[true,true]"


def test_what_a_plain_function_returns_is_awaited(app: PgQueue, body: Body) -> None:
    async def answer() -> int:
        return 42

    @app.task
    def ask() -> Any:
        return answer()

    outcome = body.run(job(ask))
    assert isinstance(outcome, Succeeded)
    assert outcome.result == "42"


def test_ignored_results_are_not_even_encoded(app: PgQueue, body: Body) -> None:
    @app.task(ignore_result=True)
    def answer() -> object:
        return object()

    outcome = body.run(job(answer))
    assert isinstance(outcome, Succeeded)
    assert (outcome.result, outcome.result_error) == (None, None)


def test_reject_and_snooze(app: PgQueue, body: Body) -> None:
    @app.task(autoretry_for=BaseException)
    def rejects() -> None:
        raise Reject("no such order")

    @app.task(max_retries=0)
    def snoozes() -> None:
        try:
            raise Snooze(30)
        except Exception:
            pytest.fail("swallowed")

    rejected, snoozed = body.run(job(rejects)), body.run(job(snoozes))
    assert isinstance(rejected, Failed)
    assert (rejected.reason, rejected.delay, rejected.error_message) == ("rejected", None, "no such order")
    assert isinstance(snoozed, Snoozed)
    assert snoozed.delay == 30


def test_our_part_of_the_headers_is_not_shown(app: PgQueue, body: Body) -> None:
    @app.task(bind=True)
    def look(self: TaskContext) -> object:
        return self.request.headers

    outcome = body.run(job(look, headers='{"trace": 1, "pgqueue": {"time_limit": 5}}'))
    assert isinstance(outcome, Succeeded)
    assert outcome.result == '{"trace":1}'
