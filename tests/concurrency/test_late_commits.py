"""Transactions take positions in one order and commit in another: what appears behind the cursor is found.

The lanes are driven over a real connection with a clock of the test's own, which stays within five seconds:
the full sweep, which would find everything, does not come to help unless a test asks for it.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from contextlib import AsyncExitStack, asynccontextmanager, closing
from random import Random
from typing import Any

import psycopg
import pytest

from pgqueue.database.link import Link
from pgqueue.database.store import decode_claim
from pgqueue.job import ClaimedJob
from pgqueue.worker.claimer import Claimer
from pgqueue.worker.lanes import SWEEP_INTERVAL, TRAILING_INTERVAL, Lane, Lanes, Plan

WORKER = "late:1:commits"
BATCH = 100
STEP = TRAILING_INTERVAL / 10
"""Seconds of the test's clock per claim: ten claims of a busy worker between two trailing scans."""


class Claims:
    """A worker's claims without the worker."""

    def __init__(self, link: Link, queues: tuple[str, ...] = ("default",)) -> None:
        self._link = link
        self.lanes = Lanes(queues, None, Random(1))
        self.now = 100.0

    @property
    def lane(self) -> Lane:
        """The lane of the first queue's ordinary jobs."""
        return next(lane for lane in self.lanes._lanes["default"] if lane.priority == 5)

    async def claim(
        self, step: float = STEP, *, batch: int = BATCH, to_the_end: bool = False
    ) -> list[ClaimedJob]:
        """One claim, `step` seconds after the last one: the jobs in the order a worker serves them."""
        self.now += step
        jobs: list[ClaimedJob] = []
        if (sweep := self.lanes.sweep(batch, self.now)) is not None:
            jobs += await self._ask(sweep)
        if len(jobs) < batch:
            jobs += await self._ask(self.lanes.plan(batch - len(jobs), self.now, to_the_end=to_the_end))
        return jobs

    async def _ask(self, plan: Plan) -> list[ClaimedJob]:
        rows = await self._link.call("claim_jobs", **plan.parameters(), worker=WORKER)
        claim = decode_claim(rows, WORKER)
        found = [(job.queue, job.priority, job.position) for job in claim.jobs]
        self.lanes.absorb(plan, found, claim.xmin, claim.xmax, self.now, took=claim.took, unseen=claim.unseen)
        return Claimer._in_order(plan, claim)

    async def until(self, holds: Callable[[], bool], what: str) -> list[ClaimedJob]:
        """Claim, the clock standing still between scans, until `holds`.

        Writers of other databases on this server hold the cursor back too, so this may take a moment.
        """
        found: list[ClaimedJob] = []
        deadline = time.monotonic() + 90
        while not holds():
            assert time.monotonic() < deadline, what
            self.lane.next_scan = 0.0
            found += await self.claim(0.0)
        return found

    async def until_drained(self) -> list[ClaimedJob]:
        """Claim until there is nothing left, before the leader or behind it."""
        found: list[ClaimedJob] = []
        while True:
            found += await self.until(lambda: self.lane.trailer >= self.lane.leader, "all is settled")
            self.lane.next_scan = 0.0
            last = await self.claim(0.0, batch=500)
            found += last
            if not last and self.lane.trailer >= self.lane.leader:
                return found


@asynccontextmanager
async def claiming(dsn: str, queues: tuple[str, ...] = ("default",)) -> AsyncIterator[Claims]:
    """Claims of a registered worker."""
    async with AsyncExitStack() as stack:
        link = Link(dsn, schema="pgqueue", name="claim")
        stack.push_async_callback(link.close)
        await link.call(
            "register_worker", worker=WORKER, host="late", pid=1, queues=list(queues), pool="prefork",
            concurrency=1, version="test",
        )  # fmt: skip
        yield Claims(link, queues)


def run(test: Coroutine[Any, Any, None]) -> None:
    asyncio.run(test)


@pytest.fixture
def connection(db: str) -> Iterator[psycopg.Connection]:
    """Commits each statement; the queue's positions start at 1, within one trailing scan's reach."""
    with closing(psycopg.connect(db, autocommit=True)) as connection:
        connection.execute("select setval('pgqueue.jobs_position_seq', 1, false)")
        yield connection


@pytest.fixture
def late(db: str) -> Iterator[psycopg.Connection]:
    """Commits when the test says so."""
    with closing(psycopg.connect(db)) as connection:
        yield connection


def insert(connection: psycopg.Connection, task: str, count: int, queue: str = "default") -> list[int]:
    """Enqueue jobs; their positions."""
    rows = connection.execute(
        """insert into pgqueue.jobs (id, task, queue) select gen_random_uuid(), %s, %s
           from generate_series(1, %s) returning position""",
        [task, queue, count],
    ).fetchall()
    return [row[0] for row in rows]


def test_late_rows_are_served_in_order_and_before_newer_ones(
    db: str, connection: psycopg.Connection, late: psycopg.Connection
) -> None:
    async def test() -> None:
        async with claiming(db) as claims:
            insert(connection, "old", 500)
            positions = insert(late, "late", 5_000)
            insert(connection, "new", 20_000)
            before = [job for _ in range(20) for job in await claims.claim()]
            assert [job.task for job in before] == ["old"] * 500 + ["new"] * 1_500
            late.commit()
            served: list[ClaimedJob] = []
            claims_needed = 0
            while sum(job.task == "late" for job in served) < 5_000:
                claims_needed += 1
                assert claims_needed < 200, "newer jobs keep late ones waiting"
                found = await claims.claim()
                assert len(found) == BATCH, "the lane is never idle"
                served += found
            assert claims.now - 100.0 < SWEEP_INTERVAL, "the sweep has helped"
            tasks = [job.task for job in served]
            assert tasks.index("late") <= 11 * BATCH, "found with the next trailing scan"
            stretch = tasks[tasks.index("late") :]
            assert stretch.count("new") <= 2 * BATCH, "they are served before newer ones"
            assert [job.position for job in served if job.task == "late"] == sorted(positions)
            # And the newer ones go on where they were, each once.
            while found := await claims.claim(0.0):
                served += found
            everything = [job.position for job in before + served]
            assert len(everything) == len(set(everything)) == 25_500
            newer = [job.position for job in before + served if job.task == "new"]
            assert newer == sorted(newer)

    run(test())


def test_a_few_late_rows_do_not_hold_the_lane_up(
    db: str, connection: psycopg.Connection, late: psycopg.Connection
) -> None:
    async def test() -> None:
        async with claiming(db) as claims:
            positions = insert(late, "late", 3)
            insert(connection, "new", 5_000)
            for _ in range(15):
                await claims.claim()
            leader = claims.lane.leader
            late.commit()
            found: list[ClaimedJob] = []
            for _ in range(12):
                found += await claims.claim()
            assert [job.position for job in found if job.task == "late"] == positions
            assert claims.lane.leader > leader, "the leader was not set back"

    run(test())


@pytest.mark.parametrize("seed", range(6))
def test_whatever_the_order_of_commits_each_job_is_claimed_once(
    db: str, connection: psycopg.Connection, seed: int
) -> None:
    async def test() -> None:
        random = Random(seed)
        committed: set[int] = set()
        claimed: list[ClaimedJob] = []
        async with claiming(db) as claims:
            with Connections(db, 12) as idle:
                writing: list[tuple[psycopg.Connection, list[int]]] = []
                for _ in range(350):
                    act = random.random()
                    if act < 0.35 and idle:
                        writer = idle.pop(random.randrange(len(idle)))
                        writing.append((writer, insert(writer, "job", random.randint(1, 40))))
                    elif act < 0.5 and writing:
                        # Once more in the same transaction: its id is old by now, its positions are new.
                        writer, positions = random.choice(writing)
                        positions += insert(writer, "job", random.randint(1, 5))
                    elif act < 0.75 and writing:
                        writer, positions = writing.pop(random.randrange(len(writing)))
                        if random.random() < 0.2:
                            writer.rollback()
                        else:
                            writer.commit()
                            committed.update(positions)
                        idle.append(writer)
                    else:
                        claimed += await claims.claim(
                            random.uniform(0, 0.02), batch=random.choice([1, 7, 100, 500])
                        )
                for writer, positions in writing:
                    writer.commit()
                    committed.update(positions)
            claimed += await claims.until_drained()
            assert claims.now - 100.0 < SWEEP_INTERVAL, "the sweep has helped"
        found = [job.position for job in claimed]
        assert len(found) == len(set(found)), "a job was claimed twice"
        assert set(found) == committed
        assert {job.attempt for job in claimed} == {1}

    run(test())


class Connections:
    """So many connections, closed together."""

    def __init__(self, dsn: str, count: int) -> None:
        self._all = [psycopg.connect(dsn) for _ in range(count)]

    def __enter__(self) -> list[psycopg.Connection]:
        return list(self._all)

    def __exit__(self, *_: object) -> None:
        for connection in self._all:
            connection.close()


class TestTrailingCursor:
    def test_an_open_writer_holds_it(
        self, db: str, connection: psycopg.Connection, late: psycopg.Connection
    ) -> None:
        async def test() -> None:
            async with claiming(db) as claims:
                insert(connection, "job", 10)
                await claims.until(lambda: claims.lane.trailer == claims.lane.leader > 0, "it settles")
                settled = claims.lane.trailer
                late.execute("select pg_current_xact_id()")  # it may insert a job, at any time
                for _ in range(5):
                    insert(connection, "job", 10)
                    claims.lane.next_scan = 0.0
                    await claims.claim(0.0)
                    claims.lane.next_scan = 0.0
                    await claims.claim(0.0)
                    assert claims.lane.trailer == settled < claims.lane.leader
                late.rollback()
                await claims.until(lambda: claims.lane.trailer == claims.lane.leader, "it settles again")
                assert claims.lane.trailer > settled

        run(test())

    def test_a_held_snapshot_does_not_hold_it(
        self, db: str, connection: psycopg.Connection, late: psycopg.Connection
    ) -> None:
        async def test() -> None:
            async with claiming(db) as claims:
                late.execute("set transaction isolation level repeatable read, read only")
                late.execute("select count(*) from pgqueue.jobs")
                settled = 0.0
                for _ in range(3):
                    insert(connection, "job", 10)
                    await claims.claim(0.0)
                    await claims.until(lambda: claims.lane.trailer == claims.lane.leader, "it settles")
                    assert claims.lane.trailer > settled
                    settled = claims.lane.trailer
                held = connection.execute(
                    "select backend_xmin is not null from pg_stat_activity where pid = %s",
                    [late.info.backend_pid],
                ).fetchone()
                assert held == (True,)
                late.rollback()

        run(test())

    def test_it_waits_for_a_writer_that_began_after_the_one_it_saw(
        self, db: str, connection: psycopg.Connection, late: psycopg.Connection
    ) -> None:
        """Its id is above all that have ended: the snapshot that moved the leader does not list it."""

        async def test() -> None:
            async with claiming(db) as claims:
                with closing(psycopg.connect(db)) as first:
                    insert(first, "first", 1)
                    positions = insert(late, "late", 3)
                    insert(first, "first", 1)
                    first.commit()
                assert [job.task for job in await claims.claim()] == ["first", "first"]
                for _ in range(5):
                    claims.lane.next_scan = 0.0
                    assert await claims.claim(0.0) == []
                    assert claims.lane.trailer < positions[0]
                late.commit()
                claims.lane.next_scan = 0.0
                assert [job.position for job in await claims.claim(0.0)] == positions

        run(test())

    def test_a_writer_of_long_ago_is_waited_for(
        self, db: str, connection: psycopg.Connection, late: psycopg.Connection
    ) -> None:
        """Thousands of claims later, more than the cursor keeps marks for."""

        async def test() -> None:
            async with claiming(db) as claims:
                positions = insert(late, "late", 7)
                for _ in range(400):
                    insert(connection, "new", 2)
                    await claims.claim(0.0)
                late.commit()
                found = await claims.until(lambda: claims.lane.trailer == claims.lane.leader, "it settles")
                assert [job.position for job in found if job.task == "late"] == positions

        run(test())


class TestSweep:
    def test_a_sequence_that_was_set_back_is_found_on_a_new_connection(
        self, db: str, connection: psycopg.Connection
    ) -> None:
        """As a promoted replica's may be."""

        async def test() -> None:
            async with claiming(db) as claims:
                insert(connection, "job", 2_000)
                while await claims.claim(0.0, batch=500):
                    pass
                await claims.until(lambda: claims.lane.trailer == claims.lane.leader, "it settles")
                connection.execute("select setval('pgqueue.jobs_position_seq', 500)")
                (position,) = insert(connection, "behind", 1)
                assert await claims.claim() == []
                claims.lanes.forget_sweeps()
                assert [job.position for job in await claims.claim()] == [position]

        run(test())

    def test_it_comes_by_itself_within_five_seconds(self, db: str, connection: psycopg.Connection) -> None:
        async def test() -> None:
            async with claiming(db) as claims:
                insert(connection, "job", 2_000)
                while await claims.claim(0.0, batch=500):
                    pass
                await claims.until(lambda: claims.lane.trailer == claims.lane.leader, "it settles")
                connection.execute("select setval('pgqueue.jobs_position_seq', 500)")
                insert(connection, "behind", 1)
                assert await claims.claim() == []
                assert [job.task for job in await claims.claim(SWEEP_INTERVAL)] == ["behind"]

        run(test())

    def test_before_sleeping_it_looks_at_everything_visible(
        self, db: str, connection: psycopg.Connection, late: psycopg.Connection
    ) -> None:
        async def test() -> None:
            async with claiming(db) as claims:
                insert(connection, "job", 5)
                insert(late, "late", 1)
                insert(connection, "job", 5)
                await claims.claim()
                late.commit()
                claims.lane.next_scan = claims.now + 60
                assert await claims.claim(0.0) == []
                assert [job.task for job in await claims.claim(0.0, to_the_end=True)] == ["late"]

        run(test())
