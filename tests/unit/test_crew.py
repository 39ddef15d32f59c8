"""How many executors there are: who is replaced when, who leaves, and when there are more or fewer."""

from __future__ import annotations

import asyncio
import itertools
import os
from collections.abc import Callable, Iterator

import pytest

from pgqueue.config import PoolSize
from pgqueue.worker.crew import RESTART_FIRST, SHRINK_AFTER, Crew
from pgqueue.worker.dispatcher import Dispatcher, Executor, Slot
from pgqueue.worker.wire import Board, Succeeded
from tests.unit.test_dispatcher import claimed, succeed


class Processes:
    """Executors that are up as soon as they are asked for."""

    def __init__(self, boards: list[Board]) -> None:
        self.crew: Crew
        self.executors: list[Executor] = []
        self.retired: list[Executor] = []
        self._boards = boards
        self._index = itertools.count(1)

    def count(self, pool: str) -> int:
        return len(self.executors)

    def fork(self, pool: str, slots: int) -> None:
        descriptor = Board.create()
        self._boards += Board.map(descriptor)
        os.close(descriptor)
        executor = Executor(next(self._index), 1, ready=True)
        executor.slots.append(Slot(executor, 0, self._boards[-1]))
        self.executors.append(executor)
        self.crew.ready(executor)

    def retire(self, executor: Executor) -> None:
        self.retired.append(executor)


class Scene:
    def __init__(self, boards: list[Board], most: int, least: int, max_tasks: int | None) -> None:
        self.dispatcher = Dispatcher(max_crashes=3, max_tasks=max_tasks)
        self.processes = Processes(boards)
        size = PoolSize(most, least, 1)
        self.crew = self.processes.crew = Crew(self.processes, self.dispatcher, "prefork", size)
        self.crew.fill()

    @property
    def up(self) -> int:
        return self.processes.count("prefork")

    def leaves(self, executor: Executor) -> bool:
        self.processes.executors.remove(executor)
        self.dispatcher.gone(executor, "left")
        return self.crew.gone(executor)


@pytest.fixture
def make() -> Iterator[Callable[..., Scene]]:
    boards: list[Board] = []
    yield lambda most=2, least=None, max_tasks=None: Scene(
        boards, most, most if least is None else least, max_tasks
    )
    for board in boards:
        board.close()


def run(scene: Callable[[], None]) -> None:
    async def inside() -> None:
        scene()

    asyncio.run(inside())


def test_a_dead_one_is_replaced_after_a_moment(make: Callable[..., Scene]) -> None:
    async def scene() -> None:
        it = make(2)
        assert it.up == 2
        assert it.leaves(it.processes.executors[0]) is False
        assert it.up == 1
        await asyncio.sleep(2 * RESTART_FIRST)
        assert it.up == 2

    asyncio.run(scene())


def test_nobody_is_forked_once_they_are_dismissed(make: Callable[..., Scene]) -> None:
    async def scene() -> None:
        it = make(1)
        it.leaves(it.processes.executors[0])
        it.crew.dismiss()
        await asyncio.sleep(2 * RESTART_FIRST)
        assert it.up == 0

    asyncio.run(scene())


def test_a_successor_is_up_before_its_predecessor_leaves_and_waits_for_it(make: Callable[..., Scene]) -> None:
    def scene() -> None:
        it = make(1, max_tasks=2)
        old = it.processes.executors[0]
        it.dispatcher.add([claimed() for _ in range(4)], 0.0)
        for number in (1, 2):
            ((slot, _),) = it.dispatcher.assign(0.0)
            assert slot.executor is old
            it.crew.renew()
            assert it.up == number, "the last job is out: the successor comes"
            assert it.processes.retired == []
            if number == 1:
                succeed(it.dispatcher, old.slots[0], number, 1.0)
        assert it.dispatcher.assign(0.0) == [], "one slot, and it is taken"
        assert it.dispatcher.free_slots == 0
        old.slots[0].board.start(2)
        it.dispatcher.finished(old.slots[0], Succeeded(2, 0.0, 1.0))
        it.crew.renew()
        it.crew.renew()
        assert it.processes.retired == [old], "asked once"
        ((slot, _),) = it.dispatcher.assign(0.0)
        assert slot.executor is not old
        assert it.leaves(old) is True
        assert it.up == 1

    run(scene)


def test_it_grows_when_a_job_waits_for_a_slot(make: Callable[..., Scene]) -> None:
    def scene() -> None:
        it = make(4, 1)
        assert (it.up, it.dispatcher.wanted()) == (1, 4), "claims for those it could have"
        it.dispatcher.add([claimed() for _ in range(3)], 0.0)
        it.dispatcher.assign(0.0)
        it.crew.scale(0.0)
        assert it.up == 3
        assert len(it.dispatcher.assign(0.0)) == 2
        assert it.dispatcher.wanted() == 1

    run(scene)


def test_it_shrinks_to_what_was_needed(make: Callable[..., Scene]) -> None:
    def scene() -> None:
        it = make(4, 1)
        it.crew.scale(0.0)
        it.dispatcher.add([claimed() for _ in range(4)], 0.0)
        it.dispatcher.assign(0.0)
        it.crew.scale(1.0)
        it.dispatcher.assign(1.0)
        assert it.up == 4
        for executor in it.processes.executors[1:]:
            executor.slots[0].board.start(1)
            it.dispatcher.finished(executor.slots[0], Succeeded(1, 0.0, 1.0))
        it.crew.scale(SHRINK_AFTER)
        assert it.processes.retired == [], "they were needed in this while"
        it.crew.scale(2 * SHRINK_AFTER + 1)
        assert len(it.processes.retired) == 3
        assert it.processes.executors[0] not in it.processes.retired, "it has a job"

    run(scene)


def test_a_fixed_crew_keeps_its_size(make: Callable[..., Scene]) -> None:
    def scene() -> None:
        it = make(2)
        it.dispatcher.add([claimed() for _ in range(9)], 0.0)
        it.dispatcher.assign(0.0)
        it.crew.scale(0.0)
        it.crew.scale(10 * SHRINK_AFTER)
        assert (it.up, it.processes.retired, it.dispatcher.spare) == (2, [], 0)

    run(scene)
