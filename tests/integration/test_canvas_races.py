"""Canvases where others are about: several who settle, who cancel, and what stands in the way."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Any

import psycopg
import pytest
from psycopg.types.json import Jsonb

from pgqueue import DatabaseError, JobFailed, PgQueue, chain, chord, group
from pgqueue.database import queues
from pgqueue.database.queues import Waiting
from pgqueue.database.session import open_session
from pgqueue.result import AsyncResult
from tests.integration.test_canvas import BURY, Queue, queue, succeed

__all__ = ["queue"]
SETTLE = b"select * from pgqueue.settle_canvases(%s::uuid[])"


def settle_at_once(queue: Queue, *batches: list[str]) -> None:
    """Workers settle at the same time: none has committed when the next one looks."""
    connections = [psycopg.connect(queue.dsn) for _ in batches]
    for connection, ids in zip(connections, batches, strict=True):
        connection.execute(SETTLE, (ids,))
    for connection in connections:
        connection.commit()
        connection.close()
    for _ in range(3):
        queue.settle()  # and maintenance looks, as often as it likes


def test_two_inner_groups_complete_at_the_same_time(queue: Queue) -> None:
    inner = [group(queue.s("a"), queue.s("b")), group(queue.s("c"), queue.s("d"))]
    canvas = chord(inner, queue.s("body")).delay()
    a, b, c, d, body = canvas.children
    for job in (a, b, c, d):
        queue.finish(job, 1)
    settle_at_once(queue, [a.id, b.id], [c.id, d.id])
    assert body.state == "ready"


def test_two_chains_of_a_group_fail_at_the_same_time(queue: Queue) -> None:
    canvas = group(chain(queue.s("a"), queue.s("b")), chain(queue.s("c"), queue.s("d"))).delay()
    a, _, c, _ = canvas.children
    queue.finish(a, **BURY)
    queue.finish(c, **BURY)
    settle_at_once(queue, [a.id], [c.id])
    assert canvas.state == "dead"


def test_in_a_savepoint(queue: Queue) -> None:
    with psycopg.connect(queue.dsn) as connection:
        connection.execute("select 1")
        with connection.transaction():
            canvas = chain(queue.s("a"), queue.s("b")).on(connection).delay()
    assert queue.states(canvas) == ["ready", "blocked"]


def test_a_cancel_that_is_not_committed_does_not_hold_up_other_canvases(queue: Queue) -> None:
    one, other = (chain(queue.s("a"), queue.s("b")).delay() for _ in range(2))
    queue.finish(one.children[0], 1)
    queue.finish(other.children[0], 1)
    with psycopg.connect(queue.dsn) as cancelling:
        cancelling.execute("select pgqueue.cancel_canvas(%s)", (one.id,))
        queue.settle()
        assert queue.states(other) == ["succeeded", "ready"]


def test_a_release_that_is_refused_for_good_ends(queue: Queue) -> None:
    """Somebody's own CHECK, or a letter buried in the race with a requeue, see the next test."""
    queue.sql("alter table pgqueue.jobs add constraint mine check (state = 'blocked' or task <> 'bad')")
    try:
        canvas = chain(queue.s("a"), queue.s("bad", immutable=True)).delay()
        queue.finish(canvas.children[0], 1)
        queue.settle(canvas.children[0].id)
        assert queue.states(canvas) == ["succeeded", "dead"]
    finally:
        queue.sql("alter table pgqueue.jobs drop constraint mine")


def test_results_too_large_for_a_letter_buried_in_the_race_with_a_requeue(queue: Queue) -> None:
    canvas = chord([queue.s("m") for _ in range(20)], queue.s("body")).delay()
    *members, _ = canvas.children
    queue.end(members[0], **BURY)
    queue.sql("select pgqueue.requeue(array[%s]::uuid[])", members[0].id)
    queue.sql("update pgqueue.canvas_nodes set state = 'dead', cause = %s where is_join", members[0].id)
    queue.settle()
    big = "(select to_jsonb(string_agg(md5(n::text || id::text), '')) from generate_series(1, 31250) n)"
    queue.sql(succeed("task = 'm'", big))
    queue.settle(*(member.id for member in members))
    (letter,) = queue.sql("select error_message from pgqueue.dead_letters where task = 'body'")
    assert "fit into the arguments" in letter["error_message"]


def test_one_canvas_that_cannot_be_settled_leaves_the_others(queue: Queue) -> None:
    """Somebody's own trigger refuses the burial: the node is tried again, and stops nobody."""
    refuse = "begin if new.task = 'bad' then raise 'no burials here'; end if; return new; end"
    queue.sql(f"create function refuse() returns trigger language plpgsql as $$ {refuse} $$")
    queue.sql(
        "create trigger refuse before insert on pgqueue.dead_letters for each row execute function refuse()"
    )
    try:
        bad = chain(queue.s("a"), queue.s("bad")).delay()
        other = chain(queue.s("a"), queue.s("b")).delay()
        queue.finish(bad.children[0], **BURY)
        queue.finish(other.children[0], 1)
        queue.settle()
        assert queue.states(other) == ["succeeded", "ready"]
        assert queue.states(bad) == ["dead", "blocked"]
    finally:
        queue.sql("drop trigger refuse on pgqueue.dead_letters")
        queue.sql("drop function refuse")
    queue.settle()
    assert queue.states(bad) == ["dead", "dead"]


def test_what_lacks_its_result_is_not_requeued(queue: Queue) -> None:
    canvas = chain(queue.s("a"), queue.s("b", 5)).delay()
    first, second = canvas.children
    queue.end(first, None, result_error="too large")
    queue.sql("select pgqueue.requeue(array[%s]::uuid[])", second.id)
    assert queue.sql("select args from pgqueue.jobs") == []  # it would be b(5) instead of b(result, 5)


def test_a_producer_cannot_attach_jobs_to_nodes_of_others(queue: Queue) -> None:
    victim = group(queue.s("secret")).delay()
    (ids,) = queue.sql("select pgqueue.uuid7()::text as canvas, pgqueue.uuid7()::text as node")
    spy: dict[str, Any] = {
        "id": ids["node"], "nth": 0, "task": "spy", "queue": "q", "args": [], "kwargs": {}, "priority": 5,
        "headers": {}, "after": victim.children[0].id, "takes_result": True,
    }  # fmt: skip
    with psycopg.connect(
        queue.dsn
    ) as connection:  # as one with EXECUTE on these two and no right on any table
        connection.execute("select pgqueue.enqueue_canvas(%s, %s, 1)", (ids["canvas"], ids["node"]))
        with pytest.raises(psycopg.errors.InvalidParameterValue, match="nodes of the same canvas"):
            connection.execute("select pgqueue.enqueue_canvas_nodes(%s, %s)", (ids["canvas"], Jsonb([spy])))
        connection.rollback()


def test_a_side_branch_that_failed_can_go_on_as_long_as_its_letter_is_kept(queue: Queue) -> None:
    canvas = chain(queue.s("a").link(chain(queue.s("s1"), queue.s("s2"))), queue.s("b")).delay()
    first, side, after_side, second = canvas.children
    queue.end(first, 1)
    queue.end(second, 2)
    queue.end(side, **BURY)
    queue.sql("update pgqueue.canvases set ended_at = now() - interval '8 days'")
    queue.sql("select pgqueue.prune_canvases('7 days', '90 days')")
    queue.sql("select pgqueue.requeue(array[%s]::uuid[])", side.id)
    queue.end(side, 5)
    assert after_side.state == "ready"


def test_a_cancel_that_cannot_have_a_job_cancels_nothing(queue: Queue) -> None:
    canvas = group(queue.s("a"), queue.s("b")).delay()
    with psycopg.connect(queue.dsn) as connection:
        connection.execute("select from pgqueue.jobs where id = %s for update", (canvas.children[1].id,))
        with pytest.raises(DatabaseError, match="another session holds a job of canvas"):
            canvas.cancel()
    assert queue.states(canvas) == ["ready", "ready"]


def test_options_of_a_single_call_are_not_for_what_is_linked(queue: Queue) -> None:
    @queue.app.task(name="send")
    def send(number: int) -> int:
        return number

    @queue.app.task(name="log", queue="logs", priority=1)
    def log(*args: Any) -> None: ...

    send.apply_async((1,), queue="emails", priority=9, max_retries=0, link=log.s())
    (row,) = queue.sql("select queue, priority, max_retries from pgqueue.jobs where task = 'log'")
    assert row == {"queue": "logs", "priority": 1, "max_retries": None}


def test_state_of_a_group_with_very_large_results(queue: Queue) -> None:
    canvas = group(queue.s("m") for _ in range(300)).delay()
    queue.sql("delete from pgqueue.jobs where task = 'm'")
    queue.sql(
        "update pgqueue.canvas_nodes set state = 'succeeded', error = null, cause = null,"
        " passed_on = false, result = to_jsonb(repeat('x', 1000000)) where member_of is not null"
    )
    queue.settle()
    assert canvas.state == "succeeded"


def test_a_purged_fault_is_not_called_cancelled(queue: Queue) -> None:
    canvas = chain(queue.s("a"), queue.s("b")).delay()
    queue.finish(canvas.children[0], **BURY)
    queue.sql("delete from pgqueue.dead_letters")
    queue.settle()
    (letter,) = queue.sql("select error_message from pgqueue.dead_letters")
    assert "was cancelled" not in letter["error_message"]


def test_links_of_a_header_group_survive_on_member_failure() -> None:
    app = PgQueue("links")
    header = group(app.signature("a")).link_error(app.signature("h"))
    assert len(chord(header, app.signature("b"), on_member_failure="skip").header.error_links) == 1


def test_the_open_member_is_looked_for_from_the_end(queue: Queue) -> None:
    """Over the index entries of a thousand that have ended, which a held snapshot keeps."""
    canvas = group(queue.s("m") for _ in range(1_000)).delay()
    (join,) = queue.sql("select id from pgqueue.canvas_nodes where canvas_id = %s and is_join", canvas.id)
    (row,) = queue.sql("select prosrc from pg_proc where proname = 'settle_canvases'")
    start = row["prosrc"].index("(SELECT m.id FROM canvas_nodes m WHERE m.member_of = joined")
    look = row["prosrc"][start : row["prosrc"].index("IS NOT NULL;", start)].replace(
        "joined", f"'{join['id']}'"
    )
    queue.sql("set enable_seqscan = off")
    queue.sql("set search_path = pgqueue")
    plan = "\n".join(str(each) for each in queue.sql(f"explain (analyze, buffers) select {look}"))
    assert "Index Scan Backward using canvas_nodes_open" in plan, plan


def test_a_call_on_a_connection_gives_the_result_of_its_job(queue: Queue) -> None:
    with psycopg.connect(queue.dsn) as connection:
        assert type(queue.s("a").on(connection).delay()) is AsyncResult


def test_nothing_is_passed_on_while_its_canvas_is_being_cancelled(queue: Queue) -> None:
    canvas = chain(queue.s("a"), queue.s("b"), queue.s("c")).delay()
    queue.finish(canvas.children[0], 1)
    with psycopg.connect(queue.dsn) as cancelling:
        cancelling.execute(
            "select pg_advisory_xact_lock(hashtextextended('pgqueue canvas ' || %s, 0))", (canvas.id,)
        )
        queue.settle()
        assert queue.states(canvas) == ["succeeded", "blocked", "blocked"]
    queue.settle()
    assert queue.states(canvas) == ["succeeded", "ready", "blocked"]


def test_an_ack_of_long_ago_brings_its_result(queue: Queue) -> None:
    """A worker that could not reach the database keeps outcomes until it can."""
    canvas = chain(queue.s("a"), queue.s("b")).delay()
    queue.end(canvas.children[0], 7, finished=-20_000.0)
    assert queue.args(canvas.children[1].id) == [7]


def test_times_of_jobs_that_wait(queue: Queue) -> None:
    eta = datetime.now(UTC) + timedelta(hours=1)
    canvas = chain(queue.s("a"), queue.s("b").set(eta=eta)).delay()
    queue.end(canvas.children[0], 7)
    (row,) = queue.sql("select state, eta from pgqueue.jobs")
    assert row == {"state": "scheduled", "eta": eta}


def test_a_job_for_an_error_has_its_own_times(queue: Queue) -> None:
    handler = queue.s("handle").set(countdown=100, expires=500, priority=8)
    chain(queue.s("a"), queue.s("b")).link_error(handler).delay()
    (row,) = queue.sql("select id::text from pgqueue.jobs where task = 'a'")
    queue.end(AsyncResult(row["id"], lambda: queue.app.client.database), verb="finish", state="expired")
    (row,) = queue.sql(
        "select state, priority, extract(epoch from eta - now())::float8 as eta,"
        " extract(epoch from expires_at - now())::float8 as expires from pgqueue.jobs where task = 'handle'"
    )
    assert (row["state"], row["priority"]) == ("scheduled", 8)
    assert 90 < row["eta"] <= 100
    assert 490 < row["expires"] <= 500


def test_a_cancelled_member_calls_nobody(queue: Queue) -> None:
    canvas = chord([queue.s("a"), queue.s("b")], queue.s("body")).link_error(queue.s("handle")).delay()
    one, two, body = canvas.children
    one.cancel()
    queue.end(two)
    queue.settle()
    assert body.state == "dead"
    assert queue.sql("select 1 from pgqueue.jobs where task = 'handle'") == []


def test_the_first_member_is_the_one_at_fault(queue: Queue) -> None:
    canvas = group(queue.s("a"), queue.s("b"), queue.s("c")).delay()
    for child in reversed(canvas.children):
        queue.end(child, **BURY)
    with pytest.raises(JobFailed) as raised:
        canvas.get(timeout=0)
    assert raised.value.job_id == canvas.children[0].id


def test_a_member_without_a_result_fails_the_group(queue: Queue) -> None:
    canvas = group(queue.s("a"), queue.s("b")).delay()
    one, two = canvas.children
    queue.end(one, None, result_error="too large")
    queue.end(two, 2)
    assert canvas.state == "dead"


def test_it_ends_again_after_a_requeue(queue: Queue) -> None:
    canvas = chain(queue.s("a"), queue.s("b")).delay()
    first, second = canvas.children
    queue.end(first, **BURY)
    ended = "select state, ended_at is not null as ended from pgqueue.canvases"
    assert queue.sql(ended) == [{"state": "dead", "ended": True}]
    queue.sql("select pgqueue.requeue(array[%s]::uuid[])", first.id)
    assert queue.sql(ended) == [{"state": None, "ended": False}]
    queue.end(first, 1)
    queue.end(second, 2)
    assert queue.sql(ended) == [{"state": "succeeded", "ended": True}]


def test_who_sleeps_on_the_queue_is_told(queue: Queue) -> None:
    canvas = chain(
        queue.s("a"), queue.s("b").set(queue="slow"), queue.s("c").set(queue="late", countdown=9)
    ).delay()
    first, second, _ = canvas.children
    with psycopg.connect(queue.dsn, autocommit=True) as sleeper:
        sleeper.execute("listen pgqueue")
        queue.sql("insert into pgqueue.wake values ('slow', now() + '5 s'), ('late', now() + '5 s')")
        queue.end(first)
        assert [each.payload for each in sleeper.notifies(timeout=5, stop_after=1)] == ["slow"]
        queue.end(second)
        assert [each.payload for each in sleeper.notifies(timeout=5, stop_after=1)] == ["late"]


def test_jobs_that_wait_for_others_are_moved_and_purged_with_their_queue(queue: Queue) -> None:
    canvas = chain(queue.s("a"), queue.s("b"), queue.s("c").set(queue="other")).delay()
    with open_session(queue.dsn) as session:
        assert queues.move_jobs(session, Waiting("default"), "elsewhere") == 2
        assert [row["queue"] for row in queue.sql("select queue from pgqueue.jobs order by task")] == [
            "elsewhere", "elsewhere", "other",
        ]  # fmt: skip
        assert queues.purge_queue(session, Waiting("elsewhere", state="blocked")) == 1
    assert queue.states(canvas) == ["ready", "cancelled", "blocked"]


def test_more_says_whether_there_is_more_to_do(queue: Queue) -> None:
    """Not for ever of the same that nobody can pass on: a worker would never rest."""
    group(queue.s("m") for _ in range(1_200)).delay()
    queue.sql("delete from pgqueue.jobs")
    settle = "select more from pgqueue.settle_canvases()"
    assert [queue.sql(settle)[0]["more"] for _ in range(2)] == [True, False]
    for _ in range(1_000):
        queue.app.client.enqueue_canvas(chain(queue.s("a"), queue.s("b")).request((), {}, {})[1], None)
    queue.sql("delete from pgqueue.jobs where state = 'ready'")
    lock = (
        "select count(pg_advisory_xact_lock(hashtextextended('pgqueue canvas ' || c.id, 0)))"
        " from pgqueue.canvases c"
    )
    with psycopg.connect(queue.dsn) as cancelling:
        cancelling.execute(lock.encode())
        assert queue.sql(settle) == [{"more": False}]


def test_an_older_release_cannot_requeue_what_could_not_run(queue: Queue) -> None:
    """It moves letters whatever their reason is: the row does not come to be, and the letter stays."""
    canvas = chain(queue.s("a"), queue.s("b", 5)).delay()
    first, second = canvas.children
    queue.end(first, **BURY)
    queue.sql("update pgqueue.dead_letters set enqueued_at = enqueued_at - interval '1 minute'")
    columns = (
        "id, queue, task, args, kwargs, priority, attempt, max_retries, enqueued_at, enqueued_by, headers"
    )
    move = (
        f"with moved as (insert into pgqueue.jobs ({columns}) select {columns} from pgqueue.dead_letters"
        " where id = any(%s::uuid[]) on conflict do nothing returning id)"
        " delete from pgqueue.dead_letters where id in (select id from moved) returning id::text"
    )
    assert queue.sql(move, [first.id, second.id]) == [{"id": first.id}]
    assert queue.states(canvas) == ["ready", "blocked"]
