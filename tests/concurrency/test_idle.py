"""What a worker without work asks of the database: how often, and what happens when it is refused."""

from __future__ import annotations

import asyncio
import selectors
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from random import Random

import psycopg
import pytest

from pgqueue.config import Config
from pgqueue.database.link import Call, Link, Row
from pgqueue.worker import claimer as claimer_module
from pgqueue.worker import maintenance as maintenance_module
from pgqueue.worker.claimer import EVERY_QUEUE, Claimer
from pgqueue.worker.dispatcher import Dispatcher, Executor, Slot
from pgqueue.worker.identity import Identity
from pgqueue.worker.lanes import Lanes
from pgqueue.worker.maintenance import Maintenance
from pgqueue.worker.scheduler import Scheduler
from pgqueue.worker.wire import Board

SPEED = 10.0
"""By so much the worker's time goes faster than the database's."""


class FastSelector(selectors.DefaultSelector):
    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        return super().select(None if timeout is None else timeout / SPEED)


class FastLoop(asyncio.SelectorEventLoop):
    def __init__(self) -> None:
        super().__init__(FastSelector())

    def time(self) -> float:
        return fast_clock()


def fast_clock() -> float:
    return time.monotonic() * SPEED


class CountingLink(Link):
    """Notes the transactions that it is asked for, by what is in them."""

    transactions: list[tuple[str, ...]]
    refused: frozenset[str] = frozenset()
    """Statements that the server refuses in the company of others."""
    meanwhile: Callable[[], None] | None = None
    """What happens once, while the answer to the next wish to be woken is on its way."""

    async def run(self, *groups: Sequence[Call]) -> list[list[list[Row]]]:
        self.transactions += [tuple(call.name for call in group) for group in groups]
        answers = await super().run(*map(self._spoilt, groups))
        if self.meanwhile and any(call.name == "arm_wake" for group in groups for call in group):
            self.meanwhile = self.meanwhile()
        return answers

    def _spoilt(self, group: Sequence[Call]) -> Sequence[Call]:
        if len(group) == 1 or not self.refused & {call.name for call in group}:
            return group
        return [*group, Call("settle_canvases", {"ids": "{no uuid}"})]


async def until(condition: Callable[[], object]) -> None:
    while not condition():  # noqa: ASYNC110
        await asyncio.sleep(0.1)


class Worker:
    """All of a worker's loops, in this process, with one executor that never gets a job."""

    def __init__(self, dsn: str, *, everything: bool = True, told: bool = True) -> None:
        self.transactions: list[tuple[str, ...]] = []
        self.found: list[str] = []
        self.links = {
            name: CountingLink(dsn, schema="pgqueue", name=name) for name in ("claim", "maintenance")
        }
        for link in self.links.values():
            link.transactions = self.transactions
        identity, random = Identity(), Random(1)
        self.lanes = Lanes([] if everything else ["default"], {} if everything else None, random)
        self.dispatcher = Dispatcher(max_crashes=3)
        config = Config(dsn=dsn)
        self.maintenance = Maintenance(
            self.links["maintenance"],
            identity,
            self.dispatcher,
            config,
            registration=lambda worker: [
                Call(
                    "register_worker",
                    {
                        "worker": worker,
                        "host": "h",
                        "pid": 1,
                        "queues": [],
                        "pool": "prefork",
                        "concurrency": 1,
                        "version": "0",
                    },
                )
            ],
            queues=lambda: self.lanes.queues,
            discover=self.discover if everything else None,
            asleep=lambda: self.claimer.asleep,
            wake=lambda: self.claimer.wake(),
            told_of_queues=lambda: told,
            random=random,
        )
        self.claimer = Claimer(
            self.links["claim"],
            self.lanes,
            self.dispatcher,
            identity,
            dispatch=lambda: None,
            next_eta=self.maintenance.next_eta,
            share=self.maintenance.share,
            retried=self.maintenance.look_for_due_jobs,
            poll_interval=config.poll_every(hears=True),
            random=random,
            everything=everything,
        )
        self.claimer.hears = True
        self.scheduler = Scheduler(
            self.links["maintenance"],
            identity,
            [],
            ready=self.maintenance.became_ready,
            random=random,
            hears=lambda: True,
        )
        executor = Executor(1, ready=True)
        executor.slots.append(Slot(executor, 0, Board.map(Board.create(1), 1)[0]))
        self.dispatcher.executors[1] = executor

    def discover(self, queue: str) -> None:
        self.found.append(queue)
        self.claimer.serve(queue)

    def most_common(self) -> Counter[str]:
        return Counter(" ".join(names) for names in self.transactions)

    async def play(self, scene: Callable[[], Awaitable[None]]) -> None:
        await self.maintenance.register()
        loops = [
            asyncio.ensure_future(each.run()) for each in (self.claimer, self.maintenance, self.scheduler)
        ]
        try:
            async with asyncio.timeout(600):
                await until(lambda: self.claimer.asleep)
                await asyncio.sleep(10)  # what a start has of its own
                await scene()
            assert not any(each.done() for each in loops)
        finally:
            for each in loops:
                each.cancel()
            await asyncio.gather(*loops, return_exceptions=True)
            for link in self.links.values():
                await link.close()


@pytest.fixture
def fast(monkeypatch: pytest.MonkeyPatch) -> Callable[[Awaitable[None]], None]:
    for module in (claimer_module, maintenance_module):
        monkeypatch.setattr(module, "clock", fast_clock)

    def run(work: Awaitable[None]) -> None:
        with asyncio.Runner(loop_factory=FastLoop) as runner:
            runner.run(work)  # type: ignore[arg-type]

    return run


def test_a_worker_without_work_makes_at_most_one_transaction_in_two_seconds(
    db: str, fast: Callable[[Awaitable[None]], None]
) -> None:
    worker = Worker(db)

    async def scene() -> None:
        worker.transactions.clear()
        await asyncio.sleep(120)

    fast(worker.play(scene))
    counts = worker.most_common()
    assert len(worker.transactions) <= 0.5 * 120, counts
    beats = [names for names in worker.transactions if "beat_heart" in names]
    assert 20 <= len(beats) <= 24, counts
    assert all("promote_jobs" in names and "find_queues" in names for names in beats), counts


@pytest.mark.parametrize(
    ("together", "alone"),
    [
        ("beat_heart", "promote_jobs settle_canvases rescue_jobs find_queues drain_notify_queue"),
        ("drop_partitions", "delete_fenced_workers prune_canvases prune_history drop_partitions"),
        ("arm_wake", "arm_wake claim_jobs"),
    ],
)
def test_what_is_refused_together_is_done_one_by_one(
    db: str, fast: Callable[[Awaitable[None]], None], together: str, alone: str
) -> None:
    worker = Worker(db)

    async def scene() -> None:
        with psycopg.connect(db, autocommit=True) as connection:
            before = connection.execute("select heartbeat from pgqueue.workers").fetchone()
            for link in worker.links.values():
                link.refused = frozenset([together])
            worker.transactions.clear()
            await asyncio.sleep(130)
            after = connection.execute("select heartbeat from pgqueue.workers").fetchone()
            for link in worker.links.values():
                link.refused = frozenset()
        assert before is not None
        assert after is not None
        assert 24 <= after[0] - before[0] <= 30, "it beats as ever"
        acts = [set(names) - {"set_timeouts"} for names in worker.transactions]
        names = {name for each in acts if len(each) == 1 for name in each}
        assert set(alone.split()) <= names, worker.most_common()
        worker.transactions.clear()
        await asyncio.sleep(130)
        assert any(len(names) > 1 and together in names for names in worker.transactions), (
            worker.most_common()
        )

    fast(worker.play(scene))


def test_a_job_that_is_due_is_made_ready_by_a_sleeper_in_time(
    db: str, fast: Callable[[Awaitable[None]], None]
) -> None:
    worker = Worker(db, everything=False)

    async def scene() -> None:
        with psycopg.connect(db, autocommit=True) as connection:
            connection.execute("select pgqueue.enqueue('t', eta => clock_timestamp() + interval '1 second')")
            worker.maintenance.look_for_due_jobs()  # as its notification does
            await until(lambda: worker.dispatcher.waiting)
            row = connection.execute("select claimed_at - eta from pgqueue.jobs").fetchone()
        assert row is not None
        assert 0 <= row[0].total_seconds() < 0.25, "the timer, not the heartbeat, half a second apart here"

    fast(worker.play(scene))


@pytest.mark.parametrize("told", [True, False])
def test_new_queues_are_found_without_a_notification(
    db: str, fast: Callable[[Awaitable[None]], None], told: bool
) -> None:
    worker = Worker(db, told=told)

    async def scene() -> None:
        worker.transactions.clear()
        await asyncio.sleep(60)
        looks = sum("find_queues" in names for names in worker.transactions)
        assert looks in (range(10, 15) if told else range(40, 61)), worker.most_common()
        with psycopg.connect(db, autocommit=True) as connection:
            connection.execute(
                "insert into pgqueue.jobs (id, task, queue) values (pgqueue.uuid7(), 't', 'new')"
            )
        before = fast_clock()
        await until(lambda: worker.dispatcher.waiting)
        assert worker.found == ["new"]
        assert fast_clock() - before < 10

    fast(worker.play(scene))


def test_a_queue_found_while_a_hint_is_on_its_way_has_one_too(
    db: str, fast: Callable[[Awaitable[None]], None]
) -> None:
    worker = Worker(db)

    async def scene() -> None:
        link = worker.links["claim"]
        link.meanwhile = lambda: worker.claimer.serve("new")
        await until(lambda: link.meanwhile is None)
        await until(lambda: worker.claimer.asleep)
        with psycopg.connect(db, autocommit=True) as connection:
            query = "select queue from pgqueue.wake where wake_until > clock_timestamp()"
            assert "new" in [queue for (queue,) in connection.execute(query)]

    fast(worker.play(scene))


def test_only_who_serves_every_queue_asks_for_new_ones(
    db: str, fast: Callable[[Awaitable[None]], None]
) -> None:
    async def nothing() -> None: ...

    def asked() -> set[str]:
        with psycopg.connect(db, autocommit=True) as connection:
            return {row[0] for row in connection.execute("select queue from pgqueue.wake")}

    fast(Worker(db, everything=False).play(nothing))
    assert asked() == {"default"}
    fast(Worker(db).play(nothing))
    assert asked() == {"default", EVERY_QUEUE}
