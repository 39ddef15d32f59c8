"""Two sessions at one job: whoever comes second finds nothing, and no job is run by two or lost between them.

Every race is forced: one session holds its transaction open, and the other is seen waiting, or not to wait.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import threading
import time
from collections.abc import Callable, Coroutine, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import psycopg
import pytest

from pgqueue.database.link import Call, GroupFailed, Link
from pgqueue.database.queries import query
from pgqueue.database.store import Outcome, Verb, ack_calls, decode_claim
from pgqueue.errors import DatabaseUnavailable
from pgqueue.job import ClaimedJob, new_id

ME, OTHER = "host:1:aaaa", "host:2:bbbb"
END = 2**63 - 1
DEADLINE = 20.0
VERBS: tuple[Verb, ...] = ("finish", "retry", "snooze", "bury", "release")
TIMEOUTS = {"statement_timeout": "20s", "lock_timeout": "20s"}

Connection = psycopg.Connection[Any]
Connect = Callable[[], Connection]


@pytest.fixture
def connect(db: str) -> Iterator[Connect]:
    """Opens sessions on an empty queue with two live workers."""
    with contextlib.ExitStack() as stack:

        def opened() -> Connection:
            return stack.enter_context(psycopg.connect(db, autocommit=True))

        connection = opened()
        for worker in (ME, OTHER):
            register(connection, worker)
        yield opened


@pytest.fixture
def pool() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor() as pool:
        yield pool


@contextlib.contextmanager
def transaction(connection: Connection) -> Iterator[None]:
    """A worker's transaction: it stays open as long as the test wants."""
    with connection.transaction():
        connection.execute("set transaction isolation level read committed")
        connection.execute(query("begin_work").text, TIMEOUTS)
        yield


def run(connection: Connection, call: Call) -> Any:
    """The only row of a statement's answer, None if there is none."""
    rows = connection.execute(query(call.name).text, call.parameters).fetchall()
    assert len(rows) <= 1
    return rows[0] if rows else None


def do(connection: Connection, call: Call) -> Any:
    with transaction(connection):
        return run(connection, call)


def register(connection: Connection, worker: str) -> None:
    facts = dict(host="h", pid=1, queues=["default"], pool="prefork", concurrency=1, version="1")
    do(connection, Call("register_worker", {"worker": worker, **facts}))


def add(connection: Connection, count: int = 1) -> list[str]:
    """Ready jobs; returns their ids in order."""
    ids = [new_id() for _ in range(count)]
    connection.execute("insert into pgqueue.jobs (id, task) select unnest(%s::uuid[]), 't'", [ids])
    return sorted(ids)


def claim_call(worker: str = ME, batch: int = 100) -> Call:
    lane = {
        "queues": ["default"],
        "priorities": [5],
        "after": [0],
        "upto": [END],
        "most": [batch],
        "bare": False,
        "tasks": None,
        "but": False,
    }
    return Call("claim_jobs", {**lane, "batch": batch, "worker": worker})


def claimed(row: Any) -> list[ClaimedJob]:
    return decode_claim([row], ME).jobs


def ack_call(verb: Verb, *ids: str, attempt: int = 1, worker: str = ME, **facts: Any) -> Call:
    (call, _), *rest = ack_calls([Outcome(job_id, attempt, worker, verb, **facts) for job_id in ids], 0.0)
    assert not rest
    return call


def rescue_call(batch: int = 100) -> Call:
    return Call(
        "rescue_jobs",
        {
            "batch": batch,
            "max_crashes": 3,
            "max_rescues": 10,
            "dead_letter_queues": "{}",
            "task_max_crashes": "{}",
            "once": [],
        },
    )


def fence_call(worker: str = ME) -> Call:
    return Call("fence_worker", {"worker": worker, "heartbeat": 0})


def beat_call(worker: str = ME) -> Call:
    return Call("beat_heart", {"worker": worker, "running": "{}", "stats": "{}"})


def states(connection: Connection) -> list[tuple[str, int, str | None]]:
    """State, attempt and worker of each live job, in order of id."""
    rows = connection.execute("select state, attempt, worker_id from pgqueue.jobs order by id").fetchall()
    return [(state, attempt, worker) for state, attempt, worker in rows]


def count(connection: Connection, table: str) -> int:
    row = connection.execute(f"select count(*) from pgqueue.{table}".encode()).fetchone()
    assert row is not None
    return int(row[0])


def wait_until(condition: Callable[[], object], what: str) -> None:
    deadline = time.monotonic() + DEADLINE
    while not condition():
        assert time.monotonic() < deadline, f"waited in vain until {what}"
        time.sleep(0.005)


def wait_for_loser(watcher: Connection, loser: Connection, doing: Future[Any]) -> None:
    """Until the session waits for a lock."""

    def waits() -> bool:
        assert not doing.done(), doing.result()
        row = watcher.execute(
            "select wait_event_type = 'Lock' from pg_stat_activity where pid = %s", [loser.info.backend_pid]
        ).fetchone()
        return bool(row and row[0])

    wait_until(waits, "the other session waits for a lock")


# Stale acks


@pytest.mark.parametrize("verb", VERBS)
def test_the_ack_of_a_zombie_is_discarded_whatever_it_says(connect: Connect, verb: Verb) -> None:
    one, two = connect(), connect()
    (job_id,) = add(one)
    assert [job.attempt for job in claimed(do(one, claim_call(ME)))] == [1]
    assert do(two, fence_call(ME)) == (ME,)
    assert do(two, rescue_call()) == (1, ["default"], 0)
    assert do(one, ack_call(verb, job_id)) == (0, None), "rescued, and waiting"
    assert [job.attempt for job in claimed(do(two, claim_call(OTHER)))] == [2]

    assert do(one, ack_call(verb, job_id, attempt=1, worker=ME)) == (0, None)
    assert do(one, ack_call(verb, job_id, attempt=1, worker=OTHER)) == (0, None), "an older attempt"
    assert do(one, ack_call(verb, job_id, attempt=2, worker=ME)) == (0, None), "another worker"
    assert do(one, ack_call(verb, job_id, attempt=3, worker=OTHER)) == (0, None), "an attempt to come"

    assert states(two) == [("running", 2, OTHER)]
    assert [count(two, table) for table in ("finished_jobs", "dead_letters", "failures")] == [0, 0, 0]
    assert do(two, ack_call("finish", job_id, attempt=2, worker=OTHER)) == (1, None)


def test_of_a_batch_only_the_stale_ones_are_discarded_and_the_answer_says_which(connect: Connect) -> None:
    one, two = connect(), connect()
    ids = add(one, 10)
    assert len(claimed(do(one, claim_call()))) == 10
    two.execute("update pgqueue.jobs set worker_id = 'gone' where id = any(%s::uuid[])", [ids[3:7]])
    assert do(two, rescue_call()) == (4, ["default"], 0)
    done, done_ids = do(one, ack_call("finish", *ids))
    assert (done, sorted(done_ids)) == (6, ids[:3] + ids[7:])
    assert states(one) == [("ready", 1, None)] * 4


# An ack and a rescue of one job


@pytest.mark.parametrize("verb", VERBS)
def test_an_ack_that_meets_a_rescue_waits_and_finds_nothing(
    connect: Connect, pool: ThreadPoolExecutor, verb: Verb
) -> None:
    watcher, one, two = connect(), connect(), connect()
    (job_id,) = add(one)
    do(one, claim_call())
    do(two, fence_call())
    with transaction(two):
        assert run(two, rescue_call()) == (1, ["default"], 0)
        acking = pool.submit(do, one, ack_call(verb, job_id))
        wait_for_loser(watcher, one, acking)
    assert acking.result(DEADLINE) == (0, None)
    assert states(one) == [("ready", 1, None)]
    assert [count(one, table) for table in ("finished_jobs", "dead_letters", "failures")] == [0, 0, 0]


@pytest.mark.parametrize("verb", VERBS)
def test_an_ack_that_meets_a_rescue_and_a_new_claim_finds_nothing(
    connect: Connect, pool: ThreadPoolExecutor, verb: Verb
) -> None:
    watcher, one, two = connect(), connect(), connect()
    (job_id,) = add(one)
    do(one, claim_call(ME))
    do(two, fence_call(ME))
    with transaction(two):
        assert run(two, rescue_call()) == (1, ["default"], 0)
        assert [job.attempt for job in claimed(run(two, claim_call(OTHER)))] == [2]
        acking = pool.submit(do, one, ack_call(verb, job_id))
        wait_for_loser(watcher, one, acking)
    assert acking.result(DEADLINE) == (0, None)
    assert states(one) == [("running", 2, OTHER)]


@pytest.mark.parametrize("verb", VERBS)
def test_a_rescue_that_meets_an_ack_passes_it_by(connect: Connect, verb: Verb) -> None:
    one, two = connect(), connect()
    acked, lost = add(one, 2)
    do(one, claim_call())
    do(two, fence_call())
    with transaction(one):
        assert run(one, ack_call(verb, acked)) == (1, None)
        assert do(two, rescue_call()) == (1, ["default"], 0)
    assert do(two, rescue_call()) == (0, [], 0)
    later = [("scheduled", 1, None)]
    live = {
        "finish": [],
        "retry": later,
        "snooze": later,
        "bury": [],
        "release": [("ready", 1, None)],
    }[verb]
    assert states(one) == [*live, ("ready", 1, None)]
    row = one.execute("select rescues from pgqueue.jobs where id = %s", [lost]).fetchone()
    assert row == (1,)


def test_a_job_whose_ack_is_rolled_back_is_rescued_by_the_next_pass(connect: Connect) -> None:
    one, two = connect(), connect()
    (job_id,) = add(one)
    do(one, claim_call())
    do(two, fence_call())
    with contextlib.suppress(psycopg.Rollback), transaction(one):
        run(one, ack_call("finish", job_id))
        assert do(two, rescue_call()) == (0, [], 0)
        raise psycopg.Rollback
    assert do(two, rescue_call()) == (1, ["default"], 0)
    assert (states(one), count(one, "finished_jobs")) == ([("ready", 1, None)], 0)


def test_of_two_acks_of_one_attempt_one_counts(connect: Connect, pool: ThreadPoolExecutor) -> None:
    # The same outcome sent again after a lost answer, while the first is still on its way.
    watcher, one, two = connect(), connect(), connect()
    for first, second in itertools.product(VERBS, VERBS):
        (job_id,) = add(one)
        do(one, claim_call())
        with transaction(one):
            assert run(one, ack_call(first, job_id)) == (1, None)
            again = pool.submit(do, two, ack_call(second, job_id))
            wait_for_loser(watcher, two, again)
        assert again.result(DEADLINE) == (0, None)
        one.execute("truncate pgqueue.jobs, pgqueue.dead_letters")


# Fencing


@pytest.mark.parametrize("first", ["claim", "fence"])
def test_jobs_of_a_claim_in_flight_while_its_worker_is_fenced_are_rescued(
    connect: Connect, first: str
) -> None:
    claimer, fencer = connect(), connect()
    (job_id,) = add(claimer)
    if first == "claim":
        with transaction(claimer):
            assert [job.id for job in claimed(run(claimer, claim_call()))] == [job_id]
            assert do(fencer, fence_call()) == (ME,)
            assert do(fencer, rescue_call()) == (0, [], 0), "not committed, so not to be seen"
    else:
        with transaction(fencer):
            assert run(fencer, fence_call()) == (ME,)
            assert [job.id for job in claimed(do(claimer, claim_call()))] == [job_id], "it does not wait"
    assert states(fencer) == [("running", 1, ME)]

    assert claimed(do(claimer, claim_call())) == []
    assert do(fencer, rescue_call()) == (1, ["default"], 0)
    assert states(fencer) == [("ready", 1, None)]
    assert claimed(do(claimer, claim_call())) == []
    assert do(claimer, ack_call("finish", job_id)) == (0, None)


def test_a_heartbeat_that_meets_its_fencing_waits_and_finds_itself_fenced(
    connect: Connect, pool: ThreadPoolExecutor
) -> None:
    watcher, worker, fencer = connect(), connect(), connect()
    with transaction(fencer):
        assert run(fencer, fence_call()) == (ME,)
        beating = pool.submit(do, worker, beat_call())
        wait_for_loser(watcher, worker, beating)
    assert beating.result(DEADLINE) is None


def test_a_fencing_that_meets_a_heartbeat_waits_and_leaves_the_worker_alone(
    connect: Connect, pool: ThreadPoolExecutor
) -> None:
    watcher, worker, fencer = connect(), connect(), connect()
    with transaction(worker):
        assert run(worker, beat_call()) == (1,)
        fencing = pool.submit(do, fencer, fence_call())
        wait_for_loser(watcher, fencer, fencing)
    assert fencing.result(DEADLINE) is None
    assert do(worker, beat_call()) == (2,)


def test_of_two_who_fence_one_worker_one_does(connect: Connect, pool: ThreadPoolExecutor) -> None:
    watcher, one, two = connect(), connect(), connect()
    with transaction(one):
        assert run(one, fence_call()) == (ME,)
        fencing = pool.submit(do, two, fence_call())
        wait_for_loser(watcher, two, fencing)
    assert fencing.result(DEADLINE) is None


def test_two_rescuers_at_once_share_the_jobs(connect: Connect) -> None:
    one, two = connect(), connect()
    add(one, 30)
    do(one, claim_call())
    do(one, fence_call())
    with transaction(one), transaction(two):
        assert run(one, rescue_call(batch=10)) == (10, ["default"], 0)
        assert run(two, rescue_call(batch=15)) == (15, ["default"], 0)
        assert run(one, rescue_call(batch=10)) == (5, ["default"], 0)
    row = one.execute("select min(rescues), max(rescues), count(*) from pgqueue.jobs where state = 'ready'")
    assert row.fetchone() == (1, 1, 30)


# Many at once


def test_no_job_is_claimed_twice(connect: Connect, pool: ThreadPoolExecutor) -> None:
    connection = connect()
    ids = add(connection, 5_000)
    start = threading.Barrier(4)

    def take_all(session: Connection, worker: str) -> list[tuple[str, int]]:
        mine: list[tuple[str, int]] = []
        start.wait(DEADLINE)
        while jobs := claimed(do(session, claim_call(worker, batch=40))):
            mine += [(job.id, job.attempt) for job in jobs]
        return mine

    parts = [pool.submit(take_all, connect(), (ME, OTHER)[n % 2]) for n in range(4)]
    taken = [each for part in parts for each in part.result(60)]

    assert sorted(taken) == [(job_id, 1) for job_id in ids]
    row = connection.execute(
        "select count(*) from pgqueue.jobs where state = 'running' and attempt = 1"
    ).fetchone()
    assert row == (5_000,)


@pytest.mark.parametrize("first", VERBS)
@pytest.mark.parametrize("second", VERBS)
def test_batches_that_share_jobs_do_not_deadlock(
    connect: Connect, pool: ThreadPoolExecutor, first: Verb, second: Verb
) -> None:
    watcher, holder, one, two = connect(), connect(), connect(), connect()
    ids = add(one, 9)
    do(one, claim_call())
    with transaction(holder):
        holder.execute("select from pgqueue.jobs where id = %s for update", [ids[4]])
        forwards = pool.submit(do, one, ack_call(first, *ids))
        wait_for_loser(watcher, one, forwards)  # it has locked the first four
        backwards = pool.submit(do, two, ack_call(second, *reversed(ids)))
        wait_for_loser(watcher, two, backwards)  # had it begun with the last, each would wait for the other
    assert forwards.result(DEADLINE) == (9, None)
    assert backwards.result(DEADLINE) == (0, None)


# One round trip, several transactions


@pytest.fixture
def linked(db: str, connect: Connect) -> Callable[..., None]:
    """Runs a coroutine function with a link of its own."""

    def go(use: Callable[[Link], Coroutine[Any, Any, None]], **options: str) -> None:
        async def with_link() -> None:
            link = Link(db, schema="pgqueue", name="fencing", **options)
            try:
                await use(link)
            finally:
                await link.close()

        asyncio.run(with_link())

    return go


def bad_ack(job_id: str) -> Call:
    return ack_call("finish", job_id, result="{not JSON")


def test_an_ack_that_fails_leaves_the_transactions_before_it_committed(connect: Connect, linked: Any) -> None:
    connection = connect()
    first, second = add(connection, 2)
    do(connection, claim_call())
    (waiting,) = add(connection)

    async def use(link: Link) -> None:
        groups = [
            [ack_call("finish", first)],
            [claim_call(OTHER)],
            [bad_ack(second)],
            [ack_call("bury", second)],
        ]
        with pytest.raises(GroupFailed) as failed:
            await link.run(*groups)
        assert (failed.value.group, failed.value.blames_the_row) == (2, True)
        assert failed.value.rows[0] == [[(1, None)]]
        assert [job.id for job in decode_claim(failed.value.rows[1][0], OTHER).jobs] == [waiting]
        # Only the one at fault is to be sent again, and on the same connection.
        assert await link.run([ack_call("finish", second)]) == [[[(1, None)]]]
        assert link.opened == 1

    linked(use)
    assert states(connection) == [("running", 1, OTHER)]
    assert (count(connection, "finished_jobs"), count(connection, "dead_letters")) == (2, 0)


def test_what_comes_after_a_failed_ack_has_not_started(connect: Connect, linked: Any) -> None:
    connection = connect()
    (running,) = add(connection)
    do(connection, claim_call())
    (waiting,) = add(connection)

    async def use(link: Link) -> None:
        with pytest.raises(GroupFailed) as failed:
            await link.run([bad_ack(running)], [claim_call()])
        assert (failed.value.group, failed.value.rows) == (0, [])
        answers = await link.run([ack_call("finish", running)], [claim_call()])
        assert [job.attempt for job in decode_claim(answers[1][0], ME).jobs] == [1]

    linked(use)
    assert states(connection) == [("running", 1, ME)]
    assert running != waiting


def test_a_group_is_one_transaction(connect: Connect, linked: Any) -> None:
    connection = connect()
    good, bad = add(connection, 2)
    do(connection, claim_call())

    async def use(link: Link) -> None:
        with pytest.raises(GroupFailed) as failed:
            await link.run([ack_call("finish", good), bad_ack(bad)])
        assert failed.value.group == 0

    linked(use)
    assert states(connection) == [("running", 1, ME)] * 2
    assert count(connection, "finished_jobs") == 0


def test_a_lock_that_does_not_come_passes(connect: Connect, linked: Any) -> None:
    connection, holder = connect(), connect()
    first, held = add(connection, 2)
    do(connection, claim_call())

    async def use(link: Link) -> None:
        with pytest.raises(GroupFailed) as failed:
            await link.run([ack_call("finish", first)], [ack_call("finish", held)])
        assert (failed.value.group, failed.value.blames_the_row) == (1, False)
        holder.rollback()
        assert await link.run([ack_call("finish", held)]) == [[[(1, None)]]]

    holder.autocommit = False
    holder.execute("select from pgqueue.jobs where id = %s for update", [held])
    linked(use, lock_timeout=0.05)
    assert (states(connection), count(connection, "finished_jobs")) == ([], 2)


def test_a_lost_connection_is_made_anew_and_the_ack_sent_again(connect: Connect, linked: Any) -> None:
    connection, holder = connect(), connect()
    first, held = add(connection, 2)
    do(connection, claim_call())

    async def use(link: Link) -> None:
        groups = [[ack_call("finish", first)], [ack_call("finish", held)]]
        sending = asyncio.create_task(link.run(*groups))
        waiting = (
            "select pid from pg_stat_activity"
            " where application_name = 'pgqueue fencing' and wait_event_type = 'Lock'"
        )
        deadline = time.monotonic() + DEADLINE
        while not (row := connection.execute(waiting).fetchone()):
            assert time.monotonic() < deadline
            await asyncio.sleep(0.005)
        connection.execute("select pg_terminate_backend(%s)", row)
        with pytest.raises(DatabaseUnavailable):
            await sending
        holder.rollback()
        # Nobody knows how far it came: all is sent again, and what was done is found done.
        assert await link.run(*groups) == [[[(0, None)]], [[(1, None)]]]
        assert link.opened == 2

    holder.autocommit = False
    holder.execute("select from pgqueue.jobs where id = %s for update", [held])
    linked(use)
    assert (states(connection), count(connection, "finished_jobs")) == ([], 2)


def test_a_cancelled_call_leaves_the_link_usable(connect: Connect, linked: Any) -> None:
    connection, holder = connect(), connect()
    (held,) = add(connection)
    do(connection, claim_call())

    async def use(link: Link) -> None:
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.05):
                await link.run([ack_call("finish", held)])
        holder.rollback()
        deadline = time.monotonic() + DEADLINE
        done = 0
        while not done and states(connection):  # the server may end the abandoned ack itself
            assert time.monotonic() < deadline
            done = (await link.run([ack_call("finish", held)]))[0][0][0][0]

    holder.autocommit = False
    holder.execute("select from pgqueue.jobs where id = %s for update", [held])
    linked(use)
    assert (states(connection), count(connection, "finished_jobs")) == ([], 1)
