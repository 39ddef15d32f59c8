"""The pools of one worker: its own, and one for each that tasks ask for.

Each has its executors, the jobs it holds for them, and a claimer that claims no other ones: a pool that is
busy for long never sits on jobs that another could run. The claimers share the worker's name and its claim
connection, and take turns on it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from pgqueue.config import PoolSize
from pgqueue.job import Progress
from pgqueue.worker.claimer import Claimer, TaskFilter
from pgqueue.worker.crew import Crew
from pgqueue.worker.dispatcher import Dispatcher, Executor
from pgqueue.worker.lanes import Lanes
from pgqueue.worker.payloads import Payloads
from pgqueue.worker.wire import TaskFacts


@dataclass(slots=True, eq=False)
class Pool:
    """One of them."""

    name: str
    size: PoolSize
    dispatcher: Dispatcher
    crew: Crew
    lanes: Lanes
    claimer: Claimer
    payloads: Payloads


def filters(own: str, tasks: Mapping[str, TaskFacts]) -> dict[str, TaskFilter]:
    """The pools that a worker needs, its own first, and which tasks each of them claims.

    In the pool for debuggers everything runs where the debugger is.
    """
    asked: dict[str, set[str]] = {}
    for name, facts in tasks.items():
        if facts.pool not in (None, own) and own != "solo":
            asked.setdefault(str(facts.pool), set()).add(name)
    elsewhere = frozenset(name for names in asked.values() for name in names)
    found = {own: TaskFilter(elsewhere, but=True) if elsewhere else TaskFilter()}
    return found | {pool: TaskFilter(frozenset(names)) for pool, names in sorted(asked.items())}


class Pools:
    """All of them, and what they come to together."""

    def __init__(self, pools: Sequence[Pool]) -> None:
        self._pools = list(pools)
        self._by_name = {pool.name: pool for pool in pools}

    def __iter__(self) -> Iterator[Pool]:
        return iter(self._pools)

    def __len__(self) -> int:
        return len(self._pools)

    @property
    def own(self) -> Pool:
        """The worker's own."""
        return self._pools[0]

    def of(self, executor: Executor) -> Pool:
        """Where an executor belongs."""
        return self._by_name[executor.pool]

    @property
    def name(self) -> str:
        """Their names."""
        return ",".join(pool.name for pool in self._pools)

    @property
    def concurrency(self) -> int:
        """Jobs at a time."""
        return sum(pool.size.jobs for pool in self._pools)

    @property
    def executors(self) -> list[Executor]:
        """Those that are up."""
        return [each for pool in self._pools for each in pool.dispatcher.executors.values()]

    @property
    def ready_slots(self) -> int:
        """Of the executors that are up."""
        return sum(pool.dispatcher.ready_slots for pool in self._pools)

    @property
    def in_flight(self) -> int:
        """Jobs that executors have."""
        return sum(pool.dispatcher.in_flight for pool in self._pools)

    def wanted(self) -> int:
        """How many jobs to claim now."""
        return sum(pool.dispatcher.wanted() for pool in self._pools)

    @property
    def tasks(self) -> Mapping[str, TaskFacts]:
        """What is known of the tasks."""
        return self.own.dispatcher.tasks

    @tasks.setter
    def tasks(self, tasks: Mapping[str, TaskFacts]) -> None:
        for pool in self._pools:
            pool.dispatcher.tasks = tasks

    def in_hand(self) -> set[str]:
        """Ids of the jobs that wait here or that executors have."""
        return {job for pool in self._pools for job in pool.dispatcher.in_hand}

    def running_for(self, seconds: float, now: float) -> list[str]:
        """Ids of the jobs known to have been running for so long."""
        return [job for pool in self._pools for job in pool.dispatcher.running_for(seconds, now)]

    def progress(self) -> dict[str, Progress]:
        """How far running jobs say they are, by id."""
        return {job: far for pool in self._pools for job, far in pool.dispatcher.progress().items()}

    def drop_waiting(self, worker: str) -> None:
        """Forget what waits here under a name that was fenced."""
        for pool in self._pools:
            pool.dispatcher.drop_waiting(worker)

    def counts(self) -> dict[str, int]:
        """What became of jobs."""
        total: Counter[str] = Counter()
        for pool in self._pools:
            total.update(pool.dispatcher.counts())
        return dict(total)

    # As one claimer: it does as badly as the one that does worst.

    @property
    def draining(self) -> bool:
        """Whether nothing more is claimed."""
        return self.own.claimer.draining

    @property
    def asleep(self) -> bool:
        """Whether none knows of work."""
        return all(pool.claimer.asleep for pool in self._pools)

    @property
    def unacked(self) -> int:
        """Outcomes that the database has not confirmed."""
        return sum(pool.claimer.unacked for pool in self._pools)

    @property
    def last_claim(self) -> float | None:
        """When each that could take a job had last asked for one."""
        needy = [pool for pool in self._pools if pool.dispatcher.wanted() > 0] or self._pools
        return _earliest(pool.claimer.last_claim for pool in needy)

    @property
    def last_failure(self) -> float | None:
        """When the database last failed one."""
        failures = [pool.claimer.last_failure for pool in self._pools]
        return max((at for at in failures if at is not None), default=None)

    @property
    def failing_since(self) -> float | None:
        """Since when it does."""
        since = [pool.claimer.failing_since for pool in self._pools]
        return min((at for at in since if at is not None), default=None)

    def wake(self, queue: str | None = None) -> None:
        """Look for jobs now, in this queue first."""
        for pool in self._pools:
            pool.claimer.wake(queue)

    def poke(self) -> None:
        """Something happened to the jobs in hand."""
        for pool in self._pools:
            pool.claimer.poke()


def _earliest(moments: Iterable[float | None]) -> float | None:
    """None if one of them has not come."""
    known = list(moments)
    return None if None in known else min(at for at in known if at is not None)
