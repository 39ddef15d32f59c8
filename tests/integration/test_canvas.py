"""What becomes of a canvas when its jobs end, one way or another: the statements, without a worker."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from typing import Any

import psycopg
import pytest
from psycopg.rows import dict_row

from pgqueue import JobCancelled, JobFailed, PgQueue, Progress, SchemaMismatch, chain, chord, group
from pgqueue.database import canvases, dead, jobs
from pgqueue.database.link import Call, Link
from pgqueue.database.migrate import downgrade, upgrade
from pgqueue.database.session import Session, open_session
from pgqueue.database.store import Outcome, ack_calls
from pgqueue.result import AsyncResult, CanvasResult

Row = dict[str, Any]
WORKER = "canvas:1:test"


class Queue:
    """The tables, and a worker's statements without the worker."""

    def __init__(self, dsn: str) -> None:
        self.dsn = dsn
        self.connection: psycopg.Connection[Row] = psycopg.connect(dsn, autocommit=True, row_factory=dict_row)
        self.app = PgQueue("tests", dsn=dsn)

    def close(self) -> None:
        self.connection.close()
        self.app.close()

    def sql(self, text: str, *parameters: object) -> list[Row]:
        cursor = self.connection.execute(text.encode(), parameters)
        return cursor.fetchall() if cursor.description else []

    def states(self, canvas: CanvasResult[Any]) -> list[str]:
        return [child.state for child in canvas.children]

    def args(self, job: str) -> Any:
        return self.sql("select args from pgqueue.all_jobs where id = %s", job)[0]["args"]

    def end(self, job: AsyncResult[Any], result: object = None, **how: Any) -> None:
        """A run of the job ends, and what waits for it is told, as a worker does it."""
        self.finish(job, result, **how)
        self.settle(job.id)

    def finish(self, job: AsyncResult[Any], result: object = None, **how: Any) -> None:
        """A run of the job ends, and its worker is killed then."""
        (row,) = self.sql(
            "update pgqueue.jobs set state = 'running', attempt = attempt + 1, worker_id = %s where id = %s"
            " and state = 'ready' returning attempt",
            WORKER,
            job.id,
        )
        facts: Any = {"verb": "finish", "result": json.dumps(result), **how}
        outcome = Outcome(job.id, row["attempt"], WORKER, **facts)
        ((call, _),) = ack_calls([outcome], 0.0)
        assert self.run(call) == [(1, None)]

    def settle(self, *ids: str) -> None:
        """Pass on the ends of these, and of what follows, or of all that nobody has passed on."""
        left_over = self.settle_once(*ids)
        for _ in range(100):
            if not left_over:
                return
            left_over = self.settle_once(*left_over)
        pytest.fail(f"there is always something left over: {left_over}")

    def settle_once(self, *ids: str) -> list[str]:
        wanted = "{" + ",".join(ids) + "}" if ids else None
        ((_, left_over, _),) = self.run(Call("settle_canvases", {"ids": wanted}))
        return left_over.strip("{}").split(",") if left_over else []

    def run(self, call: Call) -> list[tuple[Any, ...]]:
        async def run() -> list[tuple[Any, ...]]:
            link = Link(self.dsn, schema="pgqueue", name="test")
            try:
                return (await link.run([call]))[0][0]
            finally:
                await link.close()

        return asyncio.run(run())

    def s(self, name: str = "t", *args: object, **options: Any) -> Any:
        return self.app.signature(name, args, **options)


@pytest.fixture
def queue(db: str) -> Iterator[Queue]:
    queue = Queue(db)
    queue.sql(
        "insert into pgqueue.workers (id, host, pid, queues, pool, concurrency, version)"
        " values (%s, 'h', 1, '{}', 'prefork', 1, '0')",
        WORKER,
    )
    yield queue
    queue.close()


@pytest.fixture
def session(db: str) -> Iterator[Session]:
    with open_session(db) as session:
        yield session


BURY = {"verb": "bury", "result": None, "error_class": "ValueError", "error_message": "boom"}


def succeed(which: str, result: str) -> str:
    """A statement that ends jobs, as SQL expressions say."""
    columns = "queue, task, args, kwargs, priority, attempt, retries, crashes, rescues, enqueued_at, "
    columns += "enqueued_by, headers"
    return (
        f"with gone as (delete from pgqueue.jobs where {which} returning *) insert into pgqueue.finished_jobs"
        f" (id, state, {columns}, result) select id, 'succeeded', {columns}, {result} from gone"
    )


class TestChain:
    def test_each_step_gets_the_result_of_the_one_before(self, queue: Queue) -> None:
        canvas = chain(queue.s("a", 1), queue.s("b", 2), queue.s("c", 3, immutable=True)).delay()
        first, second, third = canvas.children
        assert queue.states(canvas) == ["ready", "blocked", "blocked"]
        assert (canvas.state, canvas.progress) == ("ready", Progress(0, 3))
        queue.end(first, {"x": [1]})
        assert queue.states(canvas) == ["succeeded", "ready", "blocked"]
        assert (canvas.state, canvas.progress) == ("running", Progress(1, 3))
        assert queue.args(second.id) == [{"x": [1]}, 2]
        queue.end(second, 5)
        assert queue.args(third.id) == [3]
        queue.end(third, "done")
        assert canvas.get(timeout=0) == "done"
        assert (canvas.state, canvas.progress) == ("succeeded", Progress(3, 3))

    def test_a_result_of_none_is_handed_on(self, queue: Queue) -> None:
        canvas = chain(queue.s(), queue.s()).delay()
        queue.end(canvas.children[0], None)
        assert queue.args(canvas.children[1].id) == [None]

    def test_a_released_job_waits_from_its_release_on(self, queue: Queue) -> None:
        canvas = chain(queue.s(), queue.s().set(countdown=100, expires=500)).delay()
        first, second = canvas.children
        queue.sql("update pgqueue.jobs set enqueued_at = now() - interval '1 day'")
        queue.end(first)
        (row,) = queue.sql(
            "select state, extract(epoch from eta - now())::float8 as eta,"
            " extract(epoch from expires_at - now())::float8 as expires from pgqueue.jobs where id = %s",
            second.id,
        )
        assert row["state"] == "scheduled"
        assert 90 < row["eta"] <= 100
        assert 490 < row["expires"] <= 500

    def test_what_waits_in_the_queue_is_counted_from_the_release_on(self, queue: Queue) -> None:
        canvas = chain(queue.s(), queue.s()).delay()
        queue.sql("update pgqueue.jobs set enqueued_at = now() - interval '1 day'")
        queue.end(canvas.children[0])
        (row,) = queue.sql(
            "select ready, blocked, now() - oldest_ready < '1 minute' as recent from pgqueue.queue_stats"
        )
        assert row == {"ready": 1, "blocked": 0, "recent": True}

    def test_a_worker_killed_after_its_ack_is_made_good_by_the_next_look(self, queue: Queue) -> None:
        canvas = chain(queue.s(), queue.s()).delay()
        queue.finish(canvas.children[0], 7)
        assert queue.states(canvas) == ["succeeded", "blocked"]
        queue.settle()
        assert queue.states(canvas) == ["succeeded", "ready"]
        assert queue.args(canvas.children[1].id) == [7]

    def test_passed_on_twice_changes_nothing(self, queue: Queue) -> None:
        canvas = chain(queue.s(), queue.s(), queue.s()).delay()
        queue.end(canvas.children[0], 7)
        for _ in range(3):
            queue.settle(canvas.children[0].id)
            queue.settle()
        assert queue.states(canvas) == ["succeeded", "ready", "blocked"]
        assert queue.args(canvas.children[1].id) == [7]

    def test_a_retry_is_no_end(self, queue: Queue) -> None:
        canvas = chain(queue.s(), queue.s()).delay()
        queue.finish(canvas.children[0], verb="retry", delay=100.0)
        queue.settle(canvas.children[0].id)
        queue.settle()
        assert queue.states(canvas) == ["scheduled", "blocked"]


class TestChord:
    def test_the_body_gets_the_results_in_order(self, queue: Queue) -> None:
        canvas = chord([queue.s("m", n) for n in range(3)], queue.s("body", "x")).delay()
        one, two, three, body = canvas.children
        queue.end(three, "c")
        queue.end(one, "a")
        assert queue.states(canvas)[3] == "blocked"
        queue.end(two, "b")
        assert queue.args(body.id) == [["a", "b", "c"], "x"]

    def test_members_that_end_at_the_same_time(self, queue: Queue) -> None:
        """Neither transaction sees the other: whoever looks after the later commit sees both."""
        canvas = chord([queue.s(), queue.s()], queue.s()).delay()
        one, two, body = canvas.children
        queue.sql(
            "update pgqueue.jobs set state = 'running', attempt = 1, worker_id = %s where state = 'ready'",
            WORKER,
        )
        ack = succeed("id = %s", "'1'")
        with psycopg.connect(queue.dsn) as first, psycopg.connect(queue.dsn) as second:
            first.execute(ack.encode(), (one.id,))
            second.execute(ack.encode(), (two.id,))
            first.commit()
            queue.settle(one.id)
            assert body.state == "blocked"
            second.commit()
        queue.settle(two.id)
        assert queue.args(body.id) == [[1, 1]]

    def test_two_that_settle_the_last_member_release_the_body_once(self, queue: Queue) -> None:
        canvas = chord([queue.s(), queue.s()], queue.s()).delay()
        one, two, body = canvas.children
        queue.finish(one, 1)
        queue.finish(two, 2)
        settle = "select * from pgqueue.settle_canvases(%s::uuid[])"
        with psycopg.connect(queue.dsn) as first:
            first.execute(settle, ([one.id],))
            assert body.state == "blocked"
            assert queue.sql(settle, [one.id]) == [{"released": 0, "left_over": [], "more": False}], (
                "it is in somebody's hands"
            )
            with psycopg.connect(queue.dsn, autocommit=True) as second:
                second.execute("set lock_timeout = '200ms'")
                with pytest.raises(psycopg.errors.LockNotAvailable):
                    second.execute(settle, ([two.id],))
            first.commit()
        queue.settle(two.id)
        assert queue.args(body.id) == [[1, 2]]

    def test_nested_results(self, queue: Queue) -> None:
        canvas = chord([group(queue.s(), chain(queue.s(), queue.s())), queue.s()], queue.s()).delay()
        one, first, second, last, body = canvas.children
        queue.end(last, "last")
        queue.end(first, "first")
        queue.end(one, "one")
        queue.end(second, "second")
        assert queue.args(body.id) == [[["one", "second"], "last"]]

    def test_a_thousand_and_more_released_by_one(self, queue: Queue) -> None:
        canvas = chain(queue.s(), group(queue.s("m", n) for n in range(2_500)), queue.s()).delay()
        first = canvas.children[0]
        queue.finish(first, "x")
        assert queue.settle_once(first.id) == [first.id]
        assert queue.sql("select count(*) as n from pgqueue.jobs where state = 'ready'") == [{"n": 1_000}]
        queue.settle(first.id)
        rows = queue.sql(
            "select args, count(*) over () as count from pgqueue.jobs where state = 'ready' order by position"
        )
        assert rows[0]["count"] == 2_500
        assert [row["args"] for row in rows] == [["x", n] for n in range(2_500)], (
            "in order, and with the result"
        )


class TestFailure:
    def test_what_waits_for_a_dead_job_is_dead_and_says_why(self, queue: Queue) -> None:
        canvas = chain(queue.s("a"), queue.s("b"), queue.s("c")).delay()
        first, _second, _third = canvas.children
        queue.end(first, **BURY)
        assert queue.states(canvas) == ["dead"] * 3
        letters = queue.sql(
            "select task, reason, error_message as why from pgqueue.dead_letters order by task"
        )
        assert [letter["reason"] for letter in letters] == ["not_retryable", "member_failed", "member_failed"]
        why = f"what it waits for did not succeed: job {first.id} of a is dead: not_retryable"
        assert [letter["why"] for letter in letters] == ["boom", why, why]
        assert canvas.state == "dead"
        with pytest.raises(
            JobFailed, match=f"canvas {canvas.id} failed .not_retryable.: ValueError: boom"
        ) as raised:
            canvas.get(timeout=0)
        assert raised.value.job_id == first.id

    def test_a_chord_waits_for_its_other_members(self, queue: Queue) -> None:
        canvas = chord([queue.s("a"), queue.s("b"), queue.s("c")], queue.s("body")).delay()
        one, two, three, body = canvas.children
        queue.end(two, **BURY)
        queue.end(one)
        assert (canvas.state, body.state) == ("running", "blocked")
        queue.end(three)
        assert (canvas.state, body.state) == ("dead", "dead")
        (letter,) = queue.sql("select * from pgqueue.dead_letters where id = %s", body.id)
        assert letter["reason"] == "member_failed"
        assert letter["error_message"] == (
            f"1 of the 3 members that it waits for did not succeed; the first: job {two.id} of b is dead: "
            "not_retryable"
        )

    def test_skip(self, queue: Queue) -> None:
        members = [queue.s("a"), queue.s("b"), queue.s("c")]
        canvas = chord(members, queue.s("body"), on_member_failure="skip").delay()
        one, two, three, body = canvas.children
        queue.end(one, 1)
        queue.end(two, **BURY)
        queue.end(three, 3)
        assert queue.args(body.id) == [[1, 3]]
        assert two.state == "dead"

    def test_skip_all(self, queue: Queue) -> None:
        canvas = group([queue.s(), queue.s()], on_member_failure="skip").delay()
        for child in canvas.children:
            queue.end(child, **BURY)
        assert canvas.get(timeout=0) == []

    @pytest.mark.parametrize("how", ["expired", "cancelled"])
    def test_a_member_that_is_cancelled_or_expires(self, queue: Queue, how: Any) -> None:
        canvas = chord([queue.s(), queue.s()], queue.s("body")).delay()
        one, two, body = canvas.children
        queue.end(one, verb="finish", state=how)
        queue.end(two)
        assert body.state == "dead"
        (letter,) = queue.sql("select error_message from pgqueue.dead_letters where id = %s", body.id)
        said = "was cancelled" if how == "cancelled" else "expired"
        assert letter["error_message"].endswith(f"the first: job {one.id} {said}")

    def test_a_member_deleted_by_hand(self, queue: Queue) -> None:
        canvas = chord([queue.s(), queue.s()], queue.s("body")).delay()
        one, two, body = canvas.children
        queue.sql("delete from pgqueue.jobs where id = %s", one.id)
        queue.end(two)
        assert body.state == "dead"
        (letter,) = queue.sql("select error_message from pgqueue.dead_letters where id = %s", body.id)
        assert "was cancelled: it was deleted" in letter["error_message"]

    def test_a_result_that_was_not_stored(self, queue: Queue) -> None:
        """What takes it cannot run; what does not goes on."""
        canvas = chain(queue.s("a").link(queue.s("side", immutable=True)), queue.s("b")).delay()
        first, side, second = canvas.children
        queue.end(first, verb="finish", result=None, result_error="too large")
        assert (side.state, second.state) == ("ready", "dead")
        (letter,) = queue.sql("select reason, error_message from pgqueue.dead_letters")
        assert letter["reason"] == "member_failed"
        assert letter["error_message"].endswith(f"job {first.id} succeeded without a result: too large")

    def test_results_that_do_not_fit_into_the_arguments(self, queue: Queue) -> None:
        canvas = chord([queue.s("m", n) for n in range(20)], queue.s("body").link(queue.s("after"))).delay()
        *members, body, after = canvas.children
        # A million different digits each: compression does not help.
        big = "(select to_jsonb(string_agg(md5(n::text || id::text), '')) from generate_series(1, 31250) n)"
        queue.sql(succeed("task = 'm'", big))
        queue.settle(*(member.id for member in members))
        queue.settle()
        (letter,) = queue.sql("select * from pgqueue.dead_letters where id = %s", body.id)
        assert letter["reason"] == "member_failed"
        assert letter["error_message"].startswith(
            "it cannot be released with the results of what it waits for"
        )
        assert "fit into the arguments" in letter["error_message"]
        assert after.state == "dead"
        assert queue.sql("select 1 from pgqueue.canvas_nodes where not passed_on") == []

    def test_labels(self, queue: Queue) -> None:
        app = PgQueue("labels", dsn=queue.dsn, task_routes={"b": {"dead_letter_queue": "failed_b"}})
        canvas = chain(app.signature("a"), app.signature("b"), app.signature("c", queue="slow")).delay()
        queue.end(canvas.children[0], **BURY)
        rows = queue.sql("select task, dead_letter_queue as label from pgqueue.dead_letters order by task")
        assert [row["label"] for row in rows] == ["default", "failed_b", "slow"]
        app.close()


class TestRequeue:
    def test_the_canvas_goes_on_when_the_dead_member_has_succeeded(
        self, queue: Queue, session: Session
    ) -> None:
        canvas = chain(chord([queue.s("a"), queue.s("b")], queue.s("body")), queue.s("last")).delay()
        one, two, body, last = canvas.children
        queue.end(one, 1)
        queue.end(two, **BURY)
        assert queue.states(canvas) == ["succeeded", "dead", "dead", "dead"]
        assert dead.requeue(session, [two.id]).ids == [two.id]
        assert queue.states(canvas) == ["succeeded", "ready", "blocked", "blocked"]
        assert canvas.state == "running"
        queue.end(two, 2)
        assert queue.states(canvas) == ["succeeded", "succeeded", "ready", "blocked"]
        assert queue.args(body.id) == [[1, 2]]
        queue.end(body, 3)
        queue.end(last, "end")
        assert canvas.get(timeout=0) == "end"
        assert queue.sql("select 1 from pgqueue.dead_letters") == []

    def test_it_stays_dead_while_another_member_is(self, queue: Queue, session: Session) -> None:
        canvas = chord([queue.s("a"), queue.s("b")], queue.s("body")).delay()
        one, two, body = canvas.children
        queue.end(one, **BURY)
        queue.end(two, **BURY)
        dead.requeue(session, [one.id])
        assert body.state == "blocked"
        queue.end(one, 1)
        assert body.state == "dead"
        dead.requeue(session, [two.id])
        queue.end(two, **BURY)
        assert body.state == "dead"
        dead.requeue(session, [two.id])
        queue.end(two, 2)
        assert queue.args(body.id) == [[1, 2]]

    @pytest.mark.parametrize("in_sql", [False, True])
    def test_what_could_not_run_is_not_requeued_by_itself(
        self, queue: Queue, session: Session, in_sql: bool
    ) -> None:
        canvas = chain(queue.s("a"), queue.s("b")).delay()
        first, second = canvas.children
        queue.end(first, **BURY)
        if in_sql:
            assert queue.sql("select requeued from pgqueue.requeue(array[%s]::uuid[])", second.id) == [
                {"requeued": False}
            ]
        else:
            (refusal,) = dead.requeue(session, [second.id]).refused
            assert refusal.why == (
                "it waits for a job of its canvas that failed: requeue that one, and this comes back by "
                "itself"
            )
        assert second.state == "dead"

    def test_requeued_with_the_function_in_sql(self, queue: Queue) -> None:
        canvas = chain(queue.s("a"), queue.s("b")).delay()
        first, second = canvas.children
        queue.end(first, **BURY)
        queue.sql("select pgqueue.requeue(array[%s, %s]::uuid[])", first.id, second.id)
        queue.end(first, 5)
        assert queue.args(second.id) == [5]

    def test_a_letter_purged_meanwhile_is_gone(self, queue: Queue, session: Session) -> None:
        canvas = chain(queue.s("a"), queue.s("b"), queue.s("c")).delay()
        first, second, _third = canvas.children
        queue.end(first, **BURY)
        dead.purge(session, [second.id])
        dead.requeue(session, [first.id])
        queue.end(first, 5)
        assert queue.states(canvas) == ["succeeded", "unknown", "dead"]

    def test_buried_while_somebody_requeues_the_member(self, queue: Queue, session: Session) -> None:
        """The look at the join came before the requeue, the burial after it: the release brings it back."""
        canvas = chord([queue.s("a"), queue.s("b")], queue.s("body")).delay()
        one, two, body = canvas.children
        queue.end(one, **BURY)
        dead.requeue(session, [one.id])
        queue.sql("update pgqueue.canvas_nodes set state = 'dead', cause = %s where is_join", one.id)
        queue.settle()
        assert queue.states(canvas) == ["ready", "ready", "dead"]
        queue.end(one, 1)
        queue.end(two, 2)
        assert queue.args(body.id) == [[1, 2]]


class TestErrorLinks:
    def test_it_gets_the_id_of_the_job_at_fault(self, queue: Queue) -> None:
        canvas = (
            chord([queue.s("a"), queue.s("b")], queue.s("body")).link_error(queue.s("handle", "x")).delay()
        )
        one, two, _ = canvas.children
        queue.end(one, **BURY)
        queue.end(two)
        (row,) = queue.sql("select args, state from pgqueue.jobs where task = 'handle'")
        assert row == {"args": [one.id, "x"], "state": "ready"}
        queue.settle()
        queue.settle(one.id, two.id)
        assert len(queue.sql("select 1 from pgqueue.jobs where task = 'handle'")) == 1

    def test_one_of_a_job_is_not_for_what_it_waits_for(self, queue: Queue) -> None:
        canvas = chain(
            queue.s("a").link_error(queue.s("of_a", immutable=True)), queue.s("b").link_error(queue.s("of_b"))
        ).delay()
        queue.end(canvas.children[0], **BURY)
        assert queue.sql("select task, args from pgqueue.jobs") == [{"task": "of_a", "args": []}]

    def test_none_after_a_success_or_a_cancel(self, queue: Queue) -> None:
        for _ in range(2):
            canvas = chain(queue.s("a"), queue.s("b")).link_error(queue.s("handle")).delay()
        queue.end(canvas.children[0])
        queue.end(canvas.children[1])
        assert canvas.state == "succeeded"
        canvas = chain(queue.s("a"), queue.s("b")).link_error(queue.s("handle")).delay()
        canvas.cancel()
        assert canvas.state == "cancelled"
        assert queue.sql("select 1 from pgqueue.jobs where task = 'handle'") == []

    def test_of_a_single_job(self, queue: Queue) -> None:
        @queue.app.task(name="single")
        def single(number: int) -> int:
            return number

        job = single.apply_async(
            (1,), link=[queue.s("good"), queue.s("more")], link_error=queue.s("bad", queue="errors")
        )
        assert job.state == "ready"
        queue.end(job, **BURY)
        rows = queue.sql("select task, queue, args from pgqueue.jobs")
        assert rows == [{"task": "bad", "queue": "errors", "args": [job.id]}]
        job = queue.app.send_task("single", (2,), link=queue.s("good"), queue="own", priority=9)
        assert queue.sql("select queue, priority from pgqueue.jobs order by task") == [
            {"queue": "errors", "priority": 5},
            {"queue": "default", "priority": 5},
            {"queue": "own", "priority": 9},
        ]
        queue.end(job, 7)
        assert queue.sql("select args from pgqueue.jobs where task = 'good'") == [{"args": [7]}]


class TestCancel:
    def test_what_is_left_of_it_is_cancelled(self, queue: Queue, session: Session) -> None:
        canvas = chain(
            group([queue.s("a"), queue.s("b").set(countdown=100), queue.s("c")]), queue.s("d")
        ).delay()
        one, _, three, _ = canvas.children
        queue.end(one)
        queue.sql(
            "update pgqueue.jobs set state = 'running', attempt = 1, worker_id = %s where id = %s",
            WORKER,
            three.id,
        )
        done = canvases.cancel_canvas(session, canvas.id, by="ann", reason="withdrawn")
        assert (done.answer, done.cancelled, done.requested) == ("requested", 2, 1)
        assert queue.states(canvas) == ["succeeded", "cancelled", "running", "cancelled"]
        acts = queue.sql("select action, reason, by, details from pgqueue.audit_trail order by job_id")
        assert [(act["action"], act["reason"], act["by"]) for act in acts] == [
            ("cancel", "withdrawn", "ann")
        ] * 3
        assert all(act["details"]["canvas"] == canvas.id for act in acts)
        (row,) = queue.sql("select cancel_requested_at is not null as told from pgqueue.jobs")
        assert row["told"]
        with pytest.raises(JobCancelled, match=f"canvas {canvas.id} was cancelled"):
            canvas.get(timeout=0)

    def test_too_late(self, queue: Queue) -> None:
        canvas = group(queue.s()).delay()
        queue.end(canvas.children[0])
        assert canvas.cancel() == "too_late"
        assert queue.app.CanvasResult("018f0000-0000-7000-8000-000000000000").cancel() == "too_late"

    def test_a_group_has_ended_with_the_call(self, queue: Queue) -> None:
        canvas = group(queue.s(), queue.s()).delay()
        assert canvas.cancel("why") == "cancelled"
        assert (canvas.state, canvas.progress) == ("cancelled", Progress(2, 2))
        (row,) = queue.sql("select ended_at is not null as ended from pgqueue.canvases")
        assert row["ended"]

    def test_one_blocked_job(self, queue: Queue, session: Session) -> None:
        canvas = chain(queue.s("a"), queue.s("b"), queue.s("c")).delay()
        first, second, _third = canvas.children
        assert second.cancel() == "cancelled"
        queue.settle()
        assert queue.states(canvas) == ["ready", "cancelled", "dead"]
        assert jobs.retry_job(session, first.id) == "it is ready already"
        queue.end(first)
        assert queue.states(canvas) == ["succeeded", "cancelled", "dead"]

    def test_while_somebody_releases_its_jobs(self, queue: Queue) -> None:
        canvas = chain(queue.s("a"), queue.s("b"), queue.s("c")).delay()
        queue.finish(canvas.children[0], 1)
        with psycopg.connect(queue.dsn) as settling:
            settling.execute("select pgqueue.settle_canvases(%s::uuid[])", ([canvas.children[0].id],))
            with psycopg.connect(queue.dsn, autocommit=True) as cancelling:
                cancelling.execute("set lock_timeout = '100ms'")
                with pytest.raises(psycopg.errors.LockNotAvailable):
                    cancelling.execute("select pgqueue.cancel_canvas(%s)", (canvas.id,))
            settling.commit()
        assert canvas.cancel() == "cancelled"
        assert queue.states(canvas) == ["succeeded", "cancelled", "cancelled"]


class TestEnqueue:
    def test_with_the_callers_transaction_or_not_at_all(self, queue: Queue) -> None:
        with psycopg.connect(queue.dsn) as connection:
            canvas = chain(queue.s("a"), queue.s("b")).on(connection).delay()
            assert canvas.state == "unknown"
            connection.rollback()
        assert queue.sql("select 1 from pgqueue.jobs union all select 1 from pgqueue.canvas_nodes") == []
        with psycopg.connect(queue.dsn) as connection:
            canvas = group(queue.s("a"), queue.s("b")).apply_async(connection=connection)
        assert queue.states(canvas) == ["ready", "ready"]

    def test_async(self, queue: Queue) -> None:
        async def enqueue() -> list[CanvasResult[Any]]:
            connection = await psycopg.AsyncConnection.connect(queue.dsn)
            async with connection:
                canvas = chain(queue.s("a"), queue.s("b"))
                made = [
                    await canvas.on(connection).adelay(),
                    await canvas.aapply_async(connection=connection, priority=9),
                ]
            made.append(await canvas.adelay())
            assert [await each.aprogress() for each in made] == [Progress(0, 2)] * 3
            assert await made[2].acancel() == "cancelled"
            with pytest.raises(JobCancelled):
                await made[2].aget(timeout=0)
            assert len(await made[2].achildren()) == 2
            await queue.app.aclose()
            return made

        made = asyncio.run(enqueue())
        assert [each.state for each in made] == ["ready", "ready", "cancelled"]

    def test_sent_twice_it_is_there_once(self, queue: Queue) -> None:
        canvas = chain(queue.s("a"), queue.s("b"))
        app, request = canvas.request((), {}, {})
        app.client.enqueue_canvas(request, None)
        queue.end(app.canvas_result_of(request.id).children[0])
        app.client.enqueue_canvas(request, None)
        assert queue.states(app.canvas_result_of(request.id)) == ["succeeded", "ready"]

    def test_nodes_are_added_by_who_began_it_only(self, queue: Queue) -> None:
        canvas = group(queue.s("a")).delay()
        with pytest.raises(
            psycopg.errors.ObjectNotInPrerequisiteState, match="was not begun in this transaction"
        ):
            queue.sql("select pgqueue.enqueue_canvas_nodes(%s, '[]')", canvas.id)

    def test_an_older_schema(self, queue: Queue, fresh_dsn: str) -> None:
        upgrade(fresh_dsn, revision="0010")
        app = PgQueue("older", dsn=fresh_dsn)
        with pytest.raises(SchemaMismatch, match="a canvas needs revision 0011 of the schema"):
            group(app.signature("a")).delay()
        app.close()

    def test_an_own_header_of_somebody_else_harms_nothing(self, queue: Queue) -> None:
        queue.sql("select pgqueue.enqueue('t', headers => '{\"pgqueue\": {\"canvas\": [1]}}')")
        (row,) = queue.sql("select id::text from pgqueue.jobs")
        queue.end(AsyncResult(row["id"], lambda: queue.app.client.database))
        assert queue.sql("select 1 from pgqueue.jobs") == []


class TestHousekeeping:
    def prune(self, queue: Queue) -> int:
        (row,) = queue.sql("select pgqueue.prune_canvases('7 days', '90 days') as pruned")
        return int(row["pruned"])

    def test_what_has_ended_long_ago_is_forgotten(self, queue: Queue) -> None:
        succeeded, failed, cancelled, open_ = (chain(queue.s("a"), queue.s("b")).delay() for _ in range(4))
        for child in succeeded.children:
            queue.end(child)
        queue.end(failed.children[0], **BURY)
        cancelled.cancel()
        assert self.prune(queue) == 0
        queue.sql("update pgqueue.canvases set ended_at = ended_at - interval '8 days'")
        assert self.prune(queue) == 2
        assert [each.state for each in (succeeded, failed, cancelled, open_)] == [
            "unknown", "dead", "unknown", "ready",
        ]  # fmt: skip
        queue.sql("update pgqueue.canvases set ended_at = ended_at - interval '90 days'")
        assert self.prune(queue) == 1
        assert len(queue.sql("select 1 from pgqueue.canvas_nodes")) == 2

    def test_one_with_a_live_job_stays(self, queue: Queue) -> None:
        canvas = chain(queue.s("a").link(queue.s("side")), queue.s("b")).delay()
        first, side, second = canvas.children
        queue.end(first)
        queue.end(second)
        queue.sql("update pgqueue.canvases set ended_at = ended_at - interval '99 days'")
        assert self.prune(queue) == 0
        queue.end(side)
        assert self.prune(queue) == 1

    def test_downgrade_and_back(self, queue: Queue, fresh_dsn: str) -> None:
        upgrade(fresh_dsn)
        app = PgQueue("down", dsn=fresh_dsn)
        chain(app.signature("a"), app.signature("b")).delay()
        with psycopg.connect(fresh_dsn, autocommit=True) as connection:
            connection.execute(
                "insert into pgqueue.dead_letters (id, queue, task, args, kwargs, priority, attempt, retries,"
                " crashes, rescues, enqueued_at, enqueued_by, headers, dead_letter_queue, reason)"
                " values (gen_random_uuid(), 'q', 't', '[]', '{}', 5, 0, 0, 0, 0, now(), 'me', '{}', 'q',"
                " 'member_failed')"
            )
        downgrade(fresh_dsn, "0010")
        with psycopg.connect(fresh_dsn, autocommit=True) as connection:
            rows = connection.execute(
                "select task, state, reason from pgqueue.all_jobs order by task"
            ).fetchall()
        assert rows == [("a", "ready", None), ("b", "cancelled", None), ("t", "dead", "rejected")]
        upgrade(fresh_dsn)
        assert chain(app.signature("a"), app.signature("b")).delay().state == "ready"
        app.close()


class TestLists:
    def test_list_and_show(self, queue: Queue, session: Session) -> None:
        good = group(queue.s("a")).delay()
        queue.end(good.children[0], 1)
        bad = chord([queue.s("a"), queue.s("b")], queue.s("body")).delay()
        one, two, body = bad.children
        queue.end(one, 1)
        queue.end(two, **BURY)
        found = canvases.list_canvases(session)
        assert [(each.id, each.state, each.jobs, each.succeeded, each.dead, each.left) for each in found] == [
            (bad.id, "dead", 3, 1, 2, 0),
            (good.id, "succeeded", 1, 1, 0, 0),
        ]
        assert [each.id for each in canvases.list_canvases(session, state="dead")] == [bad.id]
        assert len(canvases.list_canvases(session, limit=1)) == 1
        shown = canvases.show_canvas(session, bad.id)
        assert shown is not None
        assert (shown["reason"], shown["error"], shown["fault"]) == ("not_retryable", "boom", two.id)
        assert [(each["id"], each["state"]) for each in shown["members"]] == [
            (two.id, "dead"), (body.id, "dead"), (one.id, "succeeded"),
        ]  # fmt: skip
        assert canvases.show_canvas(session, one.id) is None
