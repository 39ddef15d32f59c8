"""`pgqueue.testing`: what a test of an application can do with its queue."""

from __future__ import annotations

import asyncio
import contextlib
import re
import threading
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from typing import Any, NoReturn

import psycopg
import pytest
from psycopg.conninfo import conninfo_to_dict
from sqlalchemy import create_engine
from sqlalchemy.ext.asyncio import AsyncSession, create_async_engine
from sqlalchemy.orm import Session

from pgqueue import (
    DeadFilter,
    JobFailed,
    PayloadError,
    PermissionDenied,
    PgQueue,
    Progress,
    Reject,
    Signature,
    Snooze,
    TaskContext,
    UnsupportedConnection,
    chain,
    chord,
    group,
)
from pgqueue.database.temporary import url_of
from pgqueue.hooks import TaskFailed, TaskSucceeded
from pgqueue.testing import Drained, QueueTester, Workbench, open_database, open_workbench, queue_tester

app = PgQueue("testing")
seen: list[Any] = []


class Flaky(Exception):
    """Worth another try."""


@app.task
def note(what: str, times: int = 1) -> str:
    seen.append(what)
    return what * times


@app.task(priority=9, queue="fast")
def urgent(what: str) -> None:
    seen.append(what)


@app.task
def collect(*parts: Any) -> list[Any]:
    return list(parts)


@app.task
def fan_out(count: int) -> None:
    app.enqueue_many([note.s(f"child {number}") for number in range(count)])


@app.task(bind=True, autoretry_for=(Flaky,), retry_kwargs={"max_retries": 2, "countdown": 60})
def flaky(self: TaskContext) -> int:
    seen.append(self.request.attempt)
    raise Flaky(f"attempt {self.request.attempt}")


@app.task(bind=True, max_retries=3)
def polite(self: TaskContext) -> NoReturn:
    self.retry(countdown=30)


@app.task(dead_letter_queue="graveyard")
def broken() -> None:
    raise ZeroDivisionError("as ever")


@app.task
def rejected() -> None:
    raise Reject("no such order")


@app.task(bind=True)
def snoozes(self: TaskContext, times: int) -> int:
    if self.request.attempt <= times:
        raise Snooze(3600)
    return self.request.attempt


@app.task
def forever() -> None:
    forever.delay()


@app.task(bind=True, max_retries=None)
def hasty(self: TaskContext) -> NoReturn:
    self.retry(countdown=0)


@app.task(bind=True)
def steps(self: TaskContext) -> None:
    self.progress(1, 4, "one")
    self.progress(3, 4, "three")


@app.task(bind=True)
def cancels_itself(self: TaskContext) -> None:
    seen.append(self.cancelled())
    seen.append(app.AsyncResult(self.request.id).cancel())
    seen.append(self.cancelled())
    raise Flaky("is not retried, and no dead letter")


@app.task
async def loop_of() -> int:
    await asyncio.sleep(0)
    return id(asyncio.get_running_loop())


@app.task
def thread_of() -> int:
    return threading.get_ident()


@app.task(bind=True, transactional=True)
def writes(self: TaskContext, what: str, fails: bool = False) -> None:
    self.connection.execute("insert into notes values (%s)", [what])
    note.on(self.connection).delay(f"after {what}")
    if fails:
        raise Flaky(what)


@app.task(bind=True, transactional=True)
async def awrites(self: TaskContext, what: str) -> None:
    await self.connection.execute("insert into notes values (%s)", [what])


@app.task(expires=1800)
def tick() -> None: ...


@app.task
def interrupted() -> NoReturn:
    raise KeyboardInterrupt


@pytest.fixture(scope="module")
def workbench(server_dsn: str) -> Iterator[Workbench]:
    with open_database(server=server_dsn) as database, open_workbench(app, database) as made:
        with psycopg.connect(database.dsn, autocommit=True) as connection:
            connection.execute("create table notes (what text)")
        yield made


@pytest.fixture
def queue(workbench: Workbench) -> Iterator[QueueTester]:
    seen.clear()
    with workbench.test() as tester:
        yield tester


@pytest.fixture
def notes(queue: QueueTester) -> Iterator[psycopg.Connection[Any]]:
    with psycopg.connect(queue.dsn, autocommit=True) as connection:
        connection.execute("delete from notes")
        yield connection


def ends(drained: Drained) -> list[str]:
    return [run.end for run in drained.runs]


def test_drain_runs_what_is_ready_and_what_that_enqueues(queue: QueueTester) -> None:
    job, child = note.delay("x", times=3), fan_out.delay(2)
    drained = queue.drain()
    assert drained.counts == {"succeeded": 4}
    assert drained.left == {}
    assert seen == ["x", "child 0", "child 1"]
    assert job.get(timeout=1) == "xxx"
    assert child.state == "succeeded"
    assert [run.result for run in drained.of(note)] == ["xxx", "child 0", "child 1"]
    assert drained.of("nothing") == []
    assert queue.runs == drained.runs
    assert str(drained).splitlines()[0] == "4 succeeded; left: nothing"


def test_an_empty_queue_says_so(queue: QueueTester) -> None:
    assert str(queue.drain()) == "nothing was ready; left: nothing"


def test_larger_priorities_run_first_then_the_oldest(queue: QueueTester) -> None:
    note.delay("first")
    note.delay("second")
    urgent.delay("urgent")
    queue.drain()
    assert seen == ["urgent", "first", "second"]


def test_a_retry_waits_until_time_travels(queue: QueueTester) -> None:
    job = flaky.delay()
    drained = queue.drain()
    assert (drained.counts, drained.left) == ({"retried": 1}, {"scheduled": 1})
    assert (drained.runs[0].delay, str(drained.runs[0].error)) == (60, "attempt 1")
    assert queue.drain().runs == []
    queue.travel(seconds=59)
    assert queue.drain().runs == []
    queue.travel(seconds=1)
    assert ends(queue.drain()) == ["retried"]
    queue.travel(minutes=1)
    (run,) = queue.drain().runs
    assert (run.end, run.reason, run.attempt) == ("dead", "retries_exhausted", 3)
    assert seen == [1, 2, 3]
    with pytest.raises(JobFailed, match="attempt 3"):
        job.get(timeout=1)
    assert str(run) == f"{flaky.name} dead, attempt 3, retries_exhausted: Flaky: attempt 3"


def test_drain_can_wait_for_what_waits(queue: QueueTester) -> None:
    flaky.delay()
    snoozes.delay(2)
    before = queue.now
    note.apply_async(("later",), countdown=86_400)
    drained = queue.drain(with_scheduled=True)
    assert drained.counts == {"retried": 2, "snoozed": 2, "succeeded": 2, "dead": 1}
    assert drained.left == {}
    assert seen[-1] == "later"
    assert timedelta(days=1) <= queue.now - before < timedelta(days=1, minutes=1)


def test_drain_until_a_time(queue: QueueTester) -> None:
    flaky.delay()
    note.apply_async(("later",), countdown=3600)
    start = queue.now
    assert ends(queue.drain(until=timedelta(minutes=1))) == ["retried", "retried"]
    assert queue.now - start >= timedelta(minutes=1)
    assert ends(queue.drain(until=start + timedelta(hours=2))) == ["dead", "succeeded"]
    assert queue.now >= start + timedelta(hours=2)


@pytest.mark.parametrize(
    ("call", "error", "says"),
    [
        (
            lambda queue: queue.drain(until=timedelta(1), with_scheduled=True),
            ValueError,
            "exclude each other",
        ),
        (lambda queue: queue.drain(until=timedelta(-1)), ValueError, "forward only, got -86400 seconds"),
        (lambda queue: queue.travel(seconds=-1), ValueError, "forward only, got -1 seconds"),
        (lambda queue: queue.travel_to(datetime(2020, 1, 1, tzinfo=UTC)), ValueError, "forward only: it is"),
        (lambda queue: queue.travel_to(datetime(2020, 1, 1)), ValueError, "when must have a timezone"),
        (lambda queue: queue.travel_to("noon"), TypeError, "when must be a datetime"),
        (lambda queue: queue.enqueued(3), TypeError, "a task is one of @app.task, or its name, got 3"),
        (lambda queue: queue.travel(3600), TypeError, "a timedelta, or hours=, minutes= and so on, got 3600"),
        (lambda queue: queue.drain(until=3600), TypeError, "until must be a datetime with a timezone, or a"),
        (lambda queue: queue.drain(until=datetime(2099, 1, 1)), ValueError, "until must have a timezone"),
        (lambda queue: queue.assert_enqueued(note, what="x"), TypeError, "unknown 'what': a job is matched"),
        (lambda queue: queue.assert_not_enqueued(note, args="x"), TypeError, "args must be a list or tuple"),
        (lambda queue: queue.assert_not_enqueued(note, tags="x"), TypeError, "tags must be a list, tuple or"),
        (
            lambda queue: queue.assert_not_enqueued(note, eta=5),
            TypeError,
            "eta must be a datetime, a timedelta",
        ),
        (lambda queue: queue.assert_not_enqueued(eta=datetime.now()), ValueError, "eta must have a timezone"),
        (
            lambda queue: queue.assert_not_enqueued(note, kwargs={"nothing": 3}),
            TypeError,
            "note can be like this: got an unexpected keyword argument 'nothing'",
        ),
        (
            lambda queue: queue.assert_not_enqueued(note, args=(1, 2, 3)),
            TypeError,
            "note can be like this: too many positional arguments",
        ),
        (lambda queue: queue.assert_enqueued(note, count=0), ValueError, "use assert_not_enqueued"),
    ],
)
def test_wrong_calls_say_what_is_wrong(queue: QueueTester, call: Any, error: Any, says: str) -> None:
    with pytest.raises(error, match=says):
        call(queue)


def test_ends_are_those_of_a_worker(queue: QueueTester, notes: psycopg.Connection[Any]) -> None:
    broken.delay()
    rejected.delay()
    app.send_task("nobody.has_this")
    notes.execute("select pgqueue.enqueue('" + note.name + b"', '[[1]]')".decode())
    drained = queue.drain()
    assert ends(drained) == ["dead"] * 4
    reasons = ["not_retryable", "rejected", "unknown_task", "bad_payload"]
    assert [run.reason for run in drained.runs] == reasons
    assert {letter.reason for letter in app.dead_letters.list(DeadFilter())} == set(reasons)
    (letter,) = app.dead_letters.list(DeadFilter(queue="graveyard"))
    assert letter.error_class == "ZeroDivisionError"
    failures = notes.execute("select count(*) from pgqueue.failures").fetchone()
    assert failures == (4,)


def test_errors_are_raised_when_asked_and_recorded_before(queue: QueueTester) -> None:
    job = broken.delay()
    with pytest.raises(ZeroDivisionError, match="as ever") as caught:
        queue.drain(raise_errors=True)
    assert job.state == "dead"
    assert caught.value.__notes__ == [f"raised by {broken.name}, job {job.id}, attempt 1: dead"]
    assert caught.traceback[-1].name == "broken"

    job = flaky.delay()
    with pytest.raises(Flaky):
        queue.run_one(raise_errors=True)
    assert job.state == "scheduled"


def test_what_is_no_error_is_not_raised(queue: QueueTester) -> None:
    polite.delay()
    snoozes.delay(1)
    drained = queue.drain(raise_errors=True)
    assert ends(drained) == ["retried", "snoozed"]
    assert [run.error for run in drained.runs] == [None, None]


@pytest.mark.parametrize("task", [forever, hasty])
def test_an_endless_loop_is_found(queue: QueueTester, task: Any) -> None:
    task.delay()
    says = rf"drain\(\) has run 20 jobs and more are ready \({re.escape(task.name)} 20 times\)"
    with pytest.raises(RuntimeError, match=says):
        queue.drain(limit=20)


def test_what_waits_for_ever_is_an_endless_loop_too(queue: QueueTester) -> None:
    snoozes.delay(10**6)
    with pytest.raises(RuntimeError, match="retry or snooze for ever"):
        queue.drain(with_scheduled=True, limit=20)
    assert len(queue.runs) == 20


def test_exactly_the_limit_is_no_loop(queue: QueueTester) -> None:
    fan_out.delay(4)
    assert len(queue.drain(limit=5).runs) == 5


def test_run_one_runs_one(queue: QueueTester) -> None:
    note.delay("a")
    urgent.delay("b")
    note.apply_async(("c",), queue="other")
    assert queue.run_one(queue="nothing_here") is None
    run = queue.run_one(queue="other")
    assert run is not None
    assert (run.result, run.queue, run.end) == ("c", "other", "succeeded")
    run = queue.run_one(note)
    assert run is not None
    assert run.result == "a"
    assert queue.run_one(note.name) is None
    assert len(queue.enqueued(urgent)) == 1


def test_a_canvas_is_run_to_its_end(queue: QueueTester) -> None:
    result = chord([note.s("a"), note.s("b")], collect.s("!")).delay()
    assert queue.drain().left == {}
    assert result.get(timeout=0) == [["a", "b"], "!"]


def test_run_one_releases_what_waits(queue: QueueTester) -> None:
    chain(note.s("a"), note.s(2)).delay()
    assert [each.state for each in queue.enqueued()] == ["ready", "blocked"]
    queue.run_one()
    queue.assert_enqueued(note, args=("a", 2), state="ready")


def test_a_canvas_with_a_transactional_task_and_one_that_fails(
    queue: QueueTester, notes: psycopg.Connection[Any]
) -> None:
    result = chain(awrites.si("x"), Signature("unknown.task"), note.s()).delay()
    assert queue.drain().counts == {"succeeded": 1, "dead": 1}
    assert [child.state for child in result.children] == ["succeeded", "dead", "dead"]


def test_what_the_test_cancels_is_passed_on(queue: QueueTester) -> None:
    result = group(note.s("a"), note.s("b")).link(collect.s()).link_error(note.s()).delay()
    for child in result.children[:2]:
        child.cancel()
    drained = queue.drain()
    assert (drained.runs, drained.left) == ([], {})
    assert result.state == "cancelled"


def test_a_paused_queue_is_left_alone(queue: QueueTester) -> None:
    app.queues.pause("fast")
    urgent.delay("x")
    drained = queue.drain(with_scheduled=True)
    assert (drained.runs, drained.left) == ([], {"ready": 1})
    app.queues.resume("fast")
    assert ends(queue.drain()) == ["succeeded"]


def test_unique_keys_and_large_arguments_are_the_databases(queue: QueueTester) -> None:
    first = note.apply_async(("x" * 20_000,), unique_key="k")
    assert note.apply_async(("y",), unique_key="k").id == first.id
    (run,) = queue.drain().runs
    assert len(run.result) == 20_000


# What is enqueued.


def test_assert_enqueued_matches_what_is_given(queue: QueueTester) -> None:
    eta = queue.now + timedelta(hours=1)
    note.apply_async(("x",), {"times": 2}, eta=eta, headers={"tenant": "a", "x": 1}, correlation_id="c")
    urgent.apply_async(("y",), tags=["vip", "eu"], unique_key="k")
    job = queue.assert_enqueued(note, args=("x",))
    assert (job.args, job.kwargs, job.call, job.state) == (["x"], {"times": 2}, "'x', times=2", "scheduled")
    queue.assert_enqueued(note.name, args=("x", 2))
    queue.assert_enqueued(note, kwargs={"what": "x", "times": 2})
    queue.assert_enqueued(note, eta=eta)
    queue.assert_enqueued(note, eta=timedelta(hours=1), headers={"tenant": "a"}, correlation_id="c")
    queue.assert_enqueued(urgent, priority=9, queue="fast", tags=["eu"], unique_key="k", eta=None)
    queue.assert_enqueued(count=2)
    queue.assert_not_enqueued(broken)
    queue.assert_not_enqueued(note, kwargs={"times": 3})
    queue.assert_not_enqueued(note, headers={"tenant": "b"})
    queue.assert_not_enqueued(note, eta=eta + timedelta(seconds=6))
    queue.assert_enqueued(note, eta=eta + timedelta(seconds=6), tolerance=7)
    queue.assert_not_enqueued(state="running")
    assert [each.task for each in queue.enqueued()] == [note.name, urgent.name]


def test_a_failed_assertion_lists_what_there_is(queue: QueueTester) -> None:
    note.apply_async(("x",), countdown=60)
    urgent.delay("y" * 100)
    with pytest.raises(AssertionError) as caught:
        queue.assert_enqueued(note, args=("z",), queue="email")
    lines = str(caught.value).splitlines()
    assert lines[0] == f"no job of {note.name} with args=('z',), queue='email' is enqueued; enqueued are:"
    rows = [re.split(r"  +", line.strip()) for line in lines[1:]]
    assert rows == [
        ["task", "arguments", "queue", "priority", "state", "differs in"],
        [note.name, "'x'", "default", "5", "scheduled, due in 60 s", "arguments, queue"],
        [urgent.name, "'" + "y" * 58 + "…", "fast", "9", "ready", "task"],
    ]


def test_a_failed_assertion_says_when_it_was_run_or_nothing_is_there(queue: QueueTester) -> None:
    with pytest.raises(AssertionError, match=r"no job is enqueued; nothing is enqueued$"):
        queue.assert_enqueued()
    note.delay("x")
    queue.drain()
    with pytest.raises(AssertionError, match=rf"run in this test: 1 x {re.escape(note.name)} succeeded$"):
        queue.assert_enqueued(note)


def test_printed_it_shows_what_was_run_and_what_is_there(queue: QueueTester) -> None:
    assert str(queue) == "run:\n  nothing\nenqueued:\n  nothing"
    note.delay("x")
    queue.drain()
    urgent.delay("y")
    lines = [re.split(r"  +", line.strip()) for line in str(queue).splitlines()]
    assert lines == [
        ["run:"],
        [f"{note.name} succeeded"],
        ["enqueued:"],
        ["task", "arguments", "queue", "priority", "state"],
        [urgent.name, "'y'", "fast", "9", "ready"],
    ]


def test_a_wrong_number_and_an_unwanted_job(queue: QueueTester) -> None:
    note.delay("x")
    note.delay("y")
    with pytest.raises(AssertionError, match=r"^3 x job of \S+ must be enqueued, got 2; enqueued are:\n"):
        queue.assert_enqueued(note, count=3)
    with pytest.raises(AssertionError, match=r"^no job of \S+ may be enqueued, got 2:\n  task +arguments"):
        queue.assert_not_enqueued(note)


def test_only_the_transaction_sees_what_it_has_enqueued(queue: QueueTester) -> None:
    with psycopg.connect(queue.dsn) as connection:
        note.on(connection).delay("x")
        queue.assert_not_enqueued(note)
        queue.assert_enqueued(note, connection=connection)
        assert queue.drain().runs == []
        with pytest.raises(AssertionError, match="nothing is enqueued\na transaction is open: what it has"):
            queue.assert_enqueued(note)
        connection.rollback()
    assert queue.enqueued() == []


def test_a_session_that_never_commits(queue: QueueTester) -> None:
    """SQLAlchemy's recipe for tests: an outer transaction that is rolled back, whatever the session does."""
    engine = create_engine(queue.dsn.replace("postgresql://", "postgresql+psycopg://"))
    with engine.connect() as connection, connection.begin() as outer:
        with Session(bind=connection, join_transaction_mode="create_savepoint") as session:
            note.on(session).delay("x")
            session.commit()
            queue.assert_not_enqueued(note)
            queue.assert_enqueued(note, args=("x",), connection=session)
        outer.rollback()
    engine.dispose()
    assert queue.enqueued() == []


def test_an_async_session_sees_what_it_has_enqueued(queue: QueueTester) -> None:
    async def test() -> None:
        engine = create_async_engine(queue.dsn.replace("postgresql://", "postgresql+asyncpg://"))
        async with AsyncSession(engine) as session:
            await note.on(session).adelay("x")
            assert [job.args for job in await queue.aenqueued(note, connection=session)] == [["x"]]
            assert await queue.aenqueued(broken, connection=session) == []
            with pytest.raises(UnsupportedConnection, match=r"await aenqueued\(\) instead"):
                queue.assert_enqueued(note, connection=session)  # type: ignore[arg-type]
        await engine.dispose()

    asyncio.run(test())


def test_jobs_of_unknown_tasks_are_seen(queue: QueueTester) -> None:
    app.send_task("other.task", (1, 2), {"x": 3})
    queue.assert_enqueued("other.task", args=(1,), kwargs={"x": 3})
    queue.assert_not_enqueued("other.task", args=(2,))


# What a task can do.


def test_transactional_tasks_commit_with_their_jobs(
    queue: QueueTester, notes: psycopg.Connection[Any]
) -> None:
    writes.delay("kept")
    writes.delay("lost", fails=True)
    awrites.delay("async")
    drained = queue.drain()
    assert drained.counts == {"succeeded": 3, "dead": 1}
    assert notes.execute("select what from notes order by 1").fetchall() == [("async",), ("kept",)]
    assert seen == ["after kept"]


def test_async_tasks_run_on_the_loop_of_the_test(queue: QueueTester) -> None:
    async def test() -> None:
        here = id(asyncio.get_running_loop())
        await loop_of.adelay()
        await thread_of.adelay()
        await awrites.adelay("x")
        drained = await queue.adrain()
        assert drained.counts == {"succeeded": 3}
        assert drained.of(loop_of)[0].result == here
        assert drained.of(thread_of)[0].result != threading.get_ident()
        await loop_of.adelay()
        run = await queue.arun_one()
        assert run is not None
        assert run.result == here
        await loop_of.adelay()
        await thread_of.adelay()
        drained = queue.drain()  # on a loop of its own, and in this thread
        assert drained.of(loop_of)[0].result != here
        assert drained.of(thread_of)[0].result == threading.get_ident()
        await app.aclose()

    asyncio.run(test())
    loop_of.delay()
    assert queue.drain().counts == {"succeeded": 1}


def test_a_test_that_is_cancelled_ends(queue: QueueTester) -> None:
    started: list[bool] = []

    @app.task(name="testing.hangs")
    async def hangs() -> None:
        started.append(True)
        await asyncio.Event().wait()

    async def test() -> None:
        hangs.delay()
        async with asyncio.timeout(0.05):
            await queue.adrain()

    with pytest.raises(TimeoutError):
        asyncio.run(test())
    assert started == [True]


def test_hooks_and_middleware_take_part(queue: QueueTester) -> None:
    hooked = PgQueue("hooked", dsn="postgresql://nowhere")
    told: list[Any] = []

    @hooked.task
    def works() -> int:
        told.append("body")
        return 1

    @hooked.task
    def fails() -> None:
        raise Flaky

    @hooked.middleware
    def around(context: TaskContext) -> Iterator[None]:
        told.append(f"before {context.request.headers['tenant']}")
        yield

    @hooked.hook("before_enqueue")
    def tenant(event: Any) -> None:
        event.headers["tenant"] = "a"

    hooked.hook("task_succeeded")(told.append)
    hooked.hook("task_failed")(told.append)
    with queue_tester(hooked, queue.dsn) as other:
        works.delay()
        fails.delay()
        other.drain()
    assert told[:2] == ["before a", "body"]
    assert isinstance(told[2], TaskSucceeded)
    assert told[3] == "before a"
    assert isinstance(told[4], TaskFailed)
    assert told[4].request.worker


def test_progress_and_cancelling(queue: QueueTester) -> None:
    steps.delay()
    (run,) = queue.drain().runs
    assert run.progress == Progress(3, 4, "three")

    job = note.delay("x")
    assert job.cancel() == "cancelled"
    assert queue.drain().runs == []

    job = cancels_itself.delay()
    (run,) = queue.drain().runs
    assert seen == [False, "requested", True]
    assert (run.end, job.state) == ("cancelled", "cancelled")


def test_ctrl_c_in_a_task_ends_the_test_and_not_only_the_job(queue: QueueTester) -> None:
    job = interrupted.delay()
    with pytest.raises(KeyboardInterrupt):
        queue.drain()
    assert job.state == "dead"


def test_a_failed_assertion_of_pytest_in_a_task_ends_the_test(queue: QueueTester) -> None:
    @app.task(name="testing.gives_up")
    def gives_up() -> None:
        pytest.fail("time is over")

    gives_up.delay()
    with pytest.raises(BaseException, match="time is over") as caught:
        queue.drain()
    assert type(caught.value).__name__ == "Failed"


def test_a_task_cannot_drain(queue: QueueTester) -> None:
    @app.task(name="testing.drains")
    def drains() -> None:
        queue.drain()

    drains.delay()
    (run,) = queue.drain().runs
    assert "was called in a task" in str(run.error)


# Time.


def test_expiry_counts_by_the_tests_time(queue: QueueTester) -> None:
    note.apply_async(("a",), expires=600)
    note.apply_async(("b",), expires=queue.now + timedelta(hours=1))
    queue.travel(minutes=10)
    assert ends(queue.drain()) == ["expired", "succeeded"]
    assert seen == ["b"]


def test_what_is_enqueued_after_a_journey_counts_from_there(queue: QueueTester) -> None:
    queue.travel(days=10)
    note.apply_async(("a",), countdown=60, expires=120)
    app.enqueue_many([note.s("b").set(countdown=60)])
    with psycopg.connect(queue.dsn) as connection:
        note.on(connection).apply_async(("c",), countdown=60)
    assert queue.drain().runs == []
    assert queue.assert_enqueued(note, args=("a",), eta=timedelta(seconds=60))
    queue.travel(seconds=60)
    assert ends(queue.drain()) == ["succeeded"] * 3
    assert sorted(seen) == ["a", "b", "c"]


def test_history_has_the_tests_time(queue: QueueTester, notes: psycopg.Connection[Any]) -> None:
    now = queue.travel(days=3)
    note.delay("x")
    queue.drain()
    row = notes.execute("select finished_at from pgqueue.finished_jobs").fetchone()
    assert row is not None
    assert timedelta(0) <= row[0] - now < timedelta(minutes=1)


@pytest.fixture
def scheduled(queue: QueueTester) -> Iterator[tuple[PgQueue, QueueTester]]:
    """An application with schedules, in a schema of its own."""
    other = PgQueue("scheduled", dsn="postgresql://nowhere")

    @other.periodic(every=timedelta(minutes=15), expires=600)
    @other.task(bind=True, name="quarter")
    def quarter(self: TaskContext) -> str:
        assert self.request.tick is not None
        return f"{self.request.tick:%M}"

    @other.periodic(every=timedelta(minutes=1), overlap="skip")
    @other.task(name="skips")
    def skips() -> None: ...

    @other.periodic(every=timedelta(minutes=1), overlap="queue")
    @other.task(name="queues")
    def queues() -> None: ...

    with queue_tester(other, queue.dsn) as tester:
        for name in ("skips", "queues"):
            other.schedules.pause(name)
        yield other, tester


def test_schedules_fire_at_each_tick_on_the_way(scheduled: tuple[PgQueue, QueueTester]) -> None:
    _, queue = scheduled
    assert queue.enqueued() == []
    for _ in range(3):  # whatever time it is, an hour has four quarters
        queue.travel(hours=1)
        assert len(queue.enqueued("quarter")) == 4
        drained = queue.drain()
        # Those of the last ten minutes are run, the others have expired: no worker was there for them.
        assert set(ends(drained)) <= {"succeeded", "expired"}
        assert ends(drained).count("expired") >= 3


def test_with_a_worker_there_each_tick_is_run_in_time(scheduled: tuple[PgQueue, QueueTester]) -> None:
    app, queue = scheduled
    drained = queue.drain(until=timedelta(hours=1))
    assert ends(drained) == ["succeeded"] * 4
    assert sorted(run.result for run in drained.runs) == ["00", "15", "30", "45"]
    assert app.AsyncResult(drained.runs[-1].job_id).get(timeout=1) == drained.runs[-1].result
    assert queue.drain(until=timedelta(minutes=15)).counts == {"succeeded": 1}


def test_ticks_can_pass_unnoticed(
    scheduled: tuple[PgQueue, QueueTester], monkeypatch: pytest.MonkeyPatch
) -> None:
    _, queue = scheduled
    queue.travel_to(datetime(2099, 1, 1, 12, 1, tzinfo=UTC), ticks=False)
    assert queue.enqueued() == []
    queue.travel_to(datetime(2099, 1, 1, 12, 31, tzinfo=UTC))
    assert [job.headers["tick"] for job in queue.enqueued()] == [
        "2099-01-01T12:15:00Z",
        "2099-01-01T12:30:00Z",
    ]
    monkeypatch.setattr("pgqueue.testing.timeline.MOST_TICKS", 20)
    with pytest.raises(RuntimeError, match="there are over 20 ticks of schedules on the way"):
        queue.travel(days=365)


def test_overlap_is_that_of_the_schedule(scheduled: tuple[PgQueue, QueueTester]) -> None:
    app, queue = scheduled
    app.schedules.pause("quarter")
    app.schedules.resume("skips")
    queue.travel(minutes=3)
    assert len(queue.enqueued("skips")) == 1
    assert queue.drain(until=timedelta(minutes=2)).counts == {"succeeded": 3}
    app.schedules.pause("skips")
    app.schedules.resume("queues")
    queue.travel(minutes=3)
    assert len(queue.enqueued("queues")) == 1
    assert queue.drain().counts == {"succeeded": 3}


def test_schedules_added_in_a_test_count_from_there(queue: QueueTester) -> None:
    queue.travel(days=2)
    app.schedules.add("hourly", tick, every=timedelta(hours=1))
    assert queue.drain(until=timedelta(hours=3)).counts == {"succeeded": 3}
    app.schedules.run_now("hourly")
    queue.assert_enqueued(tick)


# Tests among each other, and the application afterwards.


def test_a_test_leaves_nothing_to_the_next(workbench: Workbench) -> None:
    with workbench.test() as queue:
        broken.delay()
        flaky.delay()
        queue.drain()
        note.delay("ready")
        note.apply_async(("later",), countdown=60)
        app.queues.pause("fast")
        app.schedules.add("hourly", tick, every=timedelta(hours=1))
        app.retention.set(task="x", finished=timedelta(days=1))
        queue.travel(days=1)
        with psycopg.connect(queue.dsn, autocommit=True) as connection:
            worker = connection.execute("select id from pgqueue.workers").fetchall()
            connection.execute("update pgqueue.workers set fenced = true")
            connection.execute("update pgqueue.jobs set state = 'running', worker_id = 'gone'")
            connection.execute(
                "insert into pgqueue.workers (id, host, pid, queues, pool, concurrency, version)"
                " values ('other', 'h', 1, '{}', 'prefork', 1, '1')"
            )
    with workbench.test() as queue:
        assert queue.enqueued() == []
        assert queue.drain(until=timedelta(hours=2)).runs == []
        assert app.dead_letters.list(DeadFilter()) == []
        assert app.schedules.list() == []
        assert app.queues.list() == []
        assert queue.runs == []
        with psycopg.connect(queue.dsn, autocommit=True) as connection:
            for table in ("finished_jobs", "failures", "audit_log", "retention", "wake"):
                assert connection.execute(f"select count(*) from pgqueue.{table}").fetchone() == (0,), table
            assert connection.execute("select id from pgqueue.workers").fetchall() == worker
        urgent.delay("not paused")
        assert abs(queue.now - timedelta(hours=2) - datetime.now(UTC)) < timedelta(minutes=1)
        assert queue.drain().counts == {"succeeded": 1}


def test_an_open_transaction_of_the_test_before_is_named(workbench: Workbench) -> None:
    with workbench.test() as queue:
        note.delay("x")
        with psycopg.connect(queue.dsn) as connection:
            connection.execute("select * from pgqueue.jobs for update")
            says = r"is ready and cannot be claimed: an open transaction"
            with pytest.raises(RuntimeError, match=says):
                queue.drain()
            with pytest.raises(RuntimeError, match="an earlier one has left open"), workbench.test():
                pass


def test_the_application_is_put_back(workbench: Workbench) -> None:
    other = PgQueue("other", dsn="postgresql://real", schema="mine")
    config, client = other.config, other.client
    fresh = PgQueue("fresh", dsn="postgresql://real")
    with workbench.test() as queue:
        with queue_tester(other, queue.dsn) as tester, queue_tester(fresh, queue.dsn) as another:
            assert tester.schema.startswith("pgqueue_test_")
            assert tester.schema != another.schema
            assert (other.dsn, other.schema) == (tester.dsn, tester.schema)
        with psycopg.connect(queue.dsn) as connection:
            left = connection.execute(
                "select nspname from pg_namespace where nspname like 'pgqueue\\_test\\_%'"
            ).fetchall()
    assert left == []
    assert other.config is config
    assert other.client is client
    fresh.configure(priority=3)  # was not in use before, and is not now
    assert fresh.dsn == "postgresql://real"


def test_eager_holds_inside(queue: QueueTester) -> None:
    with app.eager():
        assert note.delay("x").get() == "x"
    assert queue.enqueued() == []


def test_who_may_not_create_what_is_needed_is_told(server_dsn: str, queue: QueueTester) -> None:
    role = "pgqueue_testing_weak"
    with psycopg.connect(server_dsn, autocommit=True) as connection:
        connection.execute(f"drop role if exists {role}")
        connection.execute(f"create role {role} login password 'secret'")
        try:
            weak = url_of(server_dsn, user=role, password="secret")
            with pytest.raises(PermissionDenied, match=f"role '{role}' may not create a database"):
                enter(open_database(server=weak))
            shared = url_of(queue.dsn, user=role, password="secret")
            with pytest.raises(PermissionDenied, match=f"role '{role}' may not create a schema"):
                enter(queue_tester(PgQueue("weak"), shared))
        finally:
            connection.execute(f"drop role {role}")


def enter(manager: contextlib.AbstractContextManager[object]) -> None:
    with manager:
        pass


@pytest.mark.parametrize(
    "dsn",
    [
        "postgresql://u:p%40%2F@h:5433/d?application_name=a%20b",
        "host=h port=5433 user=u password='p@/' dbname=d application_name='a b'",
        "postgresql://u@/d?host=/var/run/postgresql",
        "host=a,b port=1,2 dbname=d target_session_attrs=any",
        "postgresql://[::1]:5432/d",
        "dbname=d",
    ],
)
def test_a_dsn_as_a_url_means_the_same(dsn: str) -> None:
    assert conninfo_to_dict(url_of(dsn)) == conninfo_to_dict(dsn)
    assert conninfo_to_dict(url_of(dsn, dbname="o'x"))["dbname"] == "o'x"


def test_arguments_that_do_not_fit_are_refused_as_ever(queue: QueueTester) -> None:
    with pytest.raises(PayloadError):
        note.delay(7)  # type: ignore[arg-type]
