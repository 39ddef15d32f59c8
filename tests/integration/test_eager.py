"""`app.eager()`: jobs run where they are enqueued, and end as a worker would end them."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextvars import ContextVar
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from typing import Any

import psycopg
import pytest

from pgqueue import (
    JobCancelled,
    JobExpired,
    JobFailed,
    PayloadError,
    PgQueue,
    Progress,
    Reject,
    Snooze,
    TaskCancelled,
    chain,
    chord,
    group,
)
from pgqueue.context import TaskContext
from pgqueue.hooks import TaskFailed, TaskRetried, TaskSucceeded

app = PgQueue("eager")
runs: list[tuple[Any, ...]] = []
where: ContextVar[str] = ContextVar("where", default="outside")


@app.task
def add(a: int, b: Decimal = Decimal(0)) -> Decimal:
    runs.append((a, b))
    return a + b


@app.task(bind=True, autoretry_for=(ConnectionError,), max_retries=2)
def flaky(self: TaskContext, failures: int) -> int:
    runs.append((self.request.attempt, self.request.retries))
    if self.request.retries < failures:
        raise ConnectionError(f"failure {self.request.retries + 1}")
    return self.request.attempt


@app.task(bind=True, max_retries=None)
def forever(self: TaskContext) -> None:
    self.retry()


@app.task(bind=True)
def ends(self: TaskContext, how: str) -> None:
    runs.append((how,))
    if how == "reject":
        raise Reject("no")
    if how == "snooze" and self.request.attempt < 3:
        raise Snooze(3600)
    if how == "cancel":
        raise TaskCancelled("enough")
    if how == "error":
        raise ZeroDivisionError("by zero")
    if how == "progress":
        self.progress(1, 2)


@app.task
async def coroutine(n: int) -> int:
    await asyncio.sleep(0)
    return n * 2


@app.task
def parent(n: int) -> str:
    return add.delay(n).id


@app.task(ignore_result=True)
def silent() -> int:
    return 5


@app.task(bind=True, transactional=True)
def charge(self: TaskContext) -> int:
    (one,) = self.connection.execute("SELECT 1").fetchone()
    return int(one)


@pytest.fixture(autouse=True)
def eager() -> Iterator[None]:
    runs.clear()
    with app.eager():
        yield


def test_a_call_runs_at_once_through_the_codec() -> None:
    job = add.delay(1, b=Decimal("2.5"))
    assert runs == [(1, Decimal("2.5"))]
    assert (job.state, job.ready(), job.successful(), job.failed()) == ("succeeded", True, True, False)
    assert job.get() == job.result == "3.5", "as JSON values, as ever"
    assert job.cancel() == "too_late"
    assert job.progress is None


def test_arguments_that_do_not_fit_are_refused_at_the_call() -> None:
    with pytest.raises(PayloadError, match="a must be int, got str 'x'"):
        add.delay("x")  # type: ignore[arg-type]
    with pytest.raises(PayloadError):
        add.apply_async((1,), {"b": object()})
    assert runs == []


def test_every_way_of_enqueueing() -> None:
    jobs = [add.delay(1), add.apply_async((2,), countdown=60, priority=9), app.send_task(add.name, (3,))]
    assert [job.get() for job in jobs] == ["1", "2", "3"]
    ids = app.enqueue_many([add.s(4), add.s(5).set(queue="high")])
    assert [app.AsyncResult(job).get() for job in ids] == ["4", "5"]


async def each_awaited() -> list[Any]:
    jobs = [await add.adelay(1), await coroutine.aapply_async((2,)), await app.asend_task(add.name, (3,))]
    ids = await app.aenqueue_many([coroutine.s(4)])
    return [await job.aget() for job in [*jobs, *(app.AsyncResult(job) for job in ids)]]


def test_the_async_twins() -> None:
    assert asyncio.run(each_awaited()) == ["1", 4, "3", 8]


def test_async_tasks_from_sync_code_below_a_loop_too() -> None:
    assert coroutine.delay(4).get() == 8

    async def below() -> int:
        return coroutine.delay(5).get()

    assert asyncio.run(below()) == 10


def test_retries_do_not_wait() -> None:
    assert flaky.delay(2).get() == 3
    assert runs == [(1, 0), (2, 1), (3, 2)]


def test_retries_end() -> None:
    job = flaky.delay(3)
    assert len(runs) == 3
    assert job.failed()
    with pytest.raises(JobFailed, match=r"retries_exhausted\): ConnectionError: failure 3") as caught:
        job.get()
    assert "Traceback" in str(caught.value.remote_traceback)
    assert flaky.apply_async((3,), max_retries=5).get() == 4


def test_one_that_retries_for_ever_is_left_scheduled() -> None:
    assert forever.delay().state == "scheduled"


@pytest.mark.parametrize(
    ("how", "state", "times"),
    [("reject", "dead", 1), ("snooze", "succeeded", 3), ("cancel", "cancelled", 1), ("error", "dead", 1),
     ("progress", "succeeded", 1)],
)  # fmt: skip
def test_ends(how: str, state: str, times: int) -> None:
    job = ends.delay(how)
    assert (job.state, len(runs)) == (state, times)


def test_what_get_raises() -> None:
    with pytest.raises(JobCancelled):
        ends.delay("cancel").get()
    with pytest.raises(JobFailed, match=r"\(rejected\)"):
        ends.delay("reject").get()
    past = datetime.now(UTC) - timedelta(seconds=1)
    with pytest.raises(JobExpired):
        add.apply_async((1,), expires=past).get()
    assert runs == [("cancel",), ("reject",)]


def test_names_that_nobody_knows() -> None:
    with pytest.raises(JobFailed, match=r"\(unknown_task\)"):
        app.send_task("elsewhere.task").get()


def test_jobs_of_jobs() -> None:
    job = parent.delay(7)
    assert runs == [(7, Decimal(0))]
    assert app.AsyncResult(job.get()).get() == "7"


def test_results_that_are_not_stored() -> None:
    assert silent.delay().get() is None


def test_propagate() -> None:
    with app.eager(propagate=True), pytest.raises(ZeroDivisionError):
        ends.delay("error")
    ends.delay("error")


def test_results_outlive_the_block() -> None:
    with app.eager():
        job = add.delay(1)
    assert job.get() == "1"


def test_a_job_sees_nothing_of_its_callers_request() -> None:
    token = where.set("caller")
    try:
        assert add.delay(1).get() == "1", "get() is not inside a task here"
    finally:
        where.reset(token)


def test_on_a_connection_nothing_is_written(db: str) -> None:
    with psycopg.connect(db) as connection:
        assert add.on(connection).delay(1).get() == "1"
        assert charge.on(connection).delay().get() == 1
        row = connection.execute("select count(*) from pgqueue.jobs").fetchone()
        assert row == (0,)


def test_a_transactional_task_needs_the_callers() -> None:
    with pytest.raises(JobFailed, match=r"self.connection inside app.eager\(\) is what the job was enq"):
        charge.delay().get()


def test_hooks_and_middleware_take_part() -> None:
    own = PgQueue("own")
    told: list[object] = []
    for name in ("task_succeeded", "task_retried", "task_failed"):
        own.hook(name)(told.append)  # type: ignore[arg-type]

    @own.middleware
    def around(context: TaskContext) -> Iterator[None]:
        told.append(f"before {context.name}")
        yield
        told.append("after")

    @own.task(name="t", autoretry_for=(OSError,), max_retries=1)
    def task(fails: bool) -> int:
        if fails:
            raise OSError("no")
        return 1

    with own.eager():
        task.delay(False)
        assert told[:2] == ["before t", "after"]
        assert isinstance(told[2], TaskSucceeded)
        assert told[2].result == 1
        told.clear()
        task.delay(True)
    assert [type(each) for each in told] == [str, TaskRetried, str, TaskFailed]
    told.clear()
    assert task(False) == 1
    assert told == [], "called directly it is a function like any other"


def test_canvases_end_as_in_a_worker() -> None:
    app = PgQueue("canvas")

    @app.task
    def number(value: int = 1) -> int:
        return value

    @app.task
    def unstorable() -> object:
        return object()

    @app.task
    def boom() -> None:
        raise LookupError("boom")

    @app.task(bind=True)
    def cancelled(self: TaskContext) -> None:
        raise TaskCancelled

    @app.task
    def collect(*args: Any) -> list[Any]:
        return list(args)

    told: list[str] = []

    @app.task
    def tell(job_id: str) -> None:
        told.append(job_id)

    with app.eager():
        nested = chain(number.s(), group(number.si(2), group(number.si(3))), collect.s("x")).delay()
        assert nested.get() == [[2, [3]], "x"]
        assert nested.progress == Progress(4, 4)
        assert group(number.s(), unstorable.s(), on_member_failure="skip").delay().get() == [1]
        assert chain(unstorable.s(), collect.s()).delay().state == "dead"
        assert chain(unstorable.s(), collect.si()).delay().get() == []
        assert group(cancelled.s(), cancelled.s()).link_error(tell.s()).delay().state == "cancelled"
        assert chain(cancelled.s(), number.s()).link_error(tell.s()).delay().state == "dead"
        assert told == []
        failed = chord([number.s(), boom.s()], collect.s()).link_error(tell.s()).delay()
        with pytest.raises(JobFailed, match="LookupError: boom"):
            failed.get()
        assert [child.state for child in failed.children] == ["succeeded", "dead", "dead"]
        assert told == [failed.children[1].id]
        job = number.apply_async((5,), link=collect.s("linked"))
        assert job.get() == 5
