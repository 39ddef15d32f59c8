"""Loading large arguments: what is sent, what waits again, what is dead; the database is a script."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from pgqueue.database.link import QUERY_CANCELED, GroupFailed
from pgqueue.errors import DatabaseUnavailable
from pgqueue.job import ClaimedJob
from pgqueue.worker import payloads
from pgqueue.worker.dispatcher import Dispatcher, Executor, Slot
from pgqueue.worker.payloads import TIMEOUTS, Payloads
from pgqueue.worker.wire import Board

Answer = Callable[[list[str]], list[tuple[Any, ...]]]


def refused(sqlstate: str) -> Answer:
    def answer(ids: list[str]) -> list[tuple[Any, ...]]:
        raise GroupFailed("refused", sqlstate=sqlstate, group=0, rows=[])

    return answer


def lost(ids: list[str]) -> list[tuple[Any, ...]]:
    raise DatabaseUnavailable("lost")


def found(ids: list[str]) -> list[tuple[Any, ...]]:
    return [(job, 1, f'["{job}"]', "{}", '{"a": 1}') for job in ids]


class Script:
    """Answers one call after another."""

    def __init__(self) -> None:
        self.answers: list[Answer] = []
        self.asked: list[list[str]] = []

    async def call(self, name: str, *, ids: list[str], attempts: list[int], workers: list[str]) -> Any:
        assert (name, len(attempts), workers) == ("load_payloads", len(ids), ["me"] * len(ids))
        self.asked.append(ids)
        await asyncio.sleep(0)
        return self.answers.pop(0)(ids)


class Stage:
    """One slot, and what it gets."""

    def __init__(self, board: Board) -> None:
        self.dispatcher = Dispatcher(max_crashes=3)
        executor = self.dispatcher.executors[1] = Executor(1, 1001, ready=True)
        self.slot = Slot(executor, 0, board)
        executor.slots = [self.slot]
        self.script = Script()
        self.sent: list[ClaimedJob] = []
        self.freed = 0
        self.payloads = Payloads(self.script, self.dispatcher, send=self._send, freed=self._free)  # type: ignore[arg-type]
        for _ in range(200):
            self.dispatcher.pace.observe("task", 0.0001)

    def _send(self, slot: Slot, jobs: list[ClaimedJob]) -> None:
        assert slot is self.slot
        self.sent += jobs

    def _free(self) -> None:
        self.freed += 1

    def add(self, count: int) -> None:
        lane, counts = ("default", 5), (1, 0, None, 0, None)
        self.dispatcher.add(
            [
                ClaimedJob(f"job-{n}", *lane, n, "task", None, None, "{}", *counts, False, False, "me")
                for n in range(count)
            ],
            0.0,
        )

    def load(self, *answers: Answer) -> None:
        self.script.answers = list(answers)
        ((slot, jobs),) = self.dispatcher.assign(0.0)
        asyncio.run(self.payloads.load(slot, jobs))
        assert not self.script.answers


@pytest.fixture
def stage(monkeypatch: pytest.MonkeyPatch) -> Iterator[Stage]:
    monkeypatch.setattr(payloads, "PAUSE", 0.001)
    descriptor = Board.create(1)
    (board,) = Board.map(descriptor, 1)
    os.close(descriptor)
    yield Stage(board)
    board.close()


def test_a_chunk_is_loaded_together_and_sent(stage: Stage) -> None:
    stage.add(3)
    stage.load(found)
    assert [(job.id, job.args, job.headers) for job in stage.sent] == [
        (f"job-{n}", f'["job-{n}"]', '{"a": 1}') for n in range(3)
    ]
    assert stage.script.asked == [["job-0", "job-1", "job-2"]]
    assert stage.slot.loading == 0


def test_what_is_gone_is_forgotten_and_what_was_too_much_waits(stage: Stage) -> None:
    stage.add(4)
    stage.load(lambda ids: [*found(ids[:1]), *((job, 1, None, None, None) for job in ids[2:])])
    assert [job.id for job in stage.sent] == ["job-0"]
    assert stage.dispatcher.in_hand == {"job-0", "job-2", "job-3"}
    assert stage.dispatcher.waiting == 2
    assert stage.freed == 1, "another slot may have them"


def test_when_nothing_is_left_the_slot_is_free(stage: Stage) -> None:
    stage.add(2)
    stage.load(lambda ids: [])
    assert (stage.sent, stage.freed, stage.dispatcher.in_hand) == ([], 1, set())


def test_a_lost_connection_is_tried_again_with_all_of_them(stage: Stage) -> None:
    stage.add(2)
    stage.load(lost, lost, found)
    assert [len(ids) for ids in stage.script.asked] == [2, 2, 2]
    assert [job.id for job in stage.sent] == ["job-0", "job-1"]


@pytest.mark.parametrize("sqlstate", [QUERY_CANCELED, "54000"])
def test_refused_together_the_first_goes_alone(stage: Stage, sqlstate: str) -> None:
    stage.add(4)
    stage.load(refused(sqlstate), found)
    assert stage.script.asked[-1] == ["job-0"]
    assert [job.id for job in stage.sent] == ["job-0"]
    assert stage.dispatcher.waiting == 3


@pytest.mark.parametrize(("sqlstate", "tries"), [(QUERY_CANCELED, TIMEOUTS), ("54000", 1)])
def test_refused_alone_it_is_dead(stage: Stage, sqlstate: str, tries: int) -> None:
    stage.add(1)
    stage.load(*[refused(sqlstate)] * tries)
    (outcome,) = stage.dispatcher.outcomes
    assert (outcome.id, outcome.verb, outcome.reason) == ("job-0", "bury", "bad_payload")
    assert (stage.sent, stage.freed) == ([], 1)


def test_other_refusals_pass(stage: Stage) -> None:
    stage.add(1)
    stage.load(*[refused("53100")] * 5, found)
    assert [job.id for job in stage.sent] == ["job-0"]


def test_what_was_taken_back_meanwhile_is_not_sent(stage: Stage) -> None:
    stage.add(2)

    def taken_back(ids: list[str]) -> list[tuple[Any, ...]]:
        stage.dispatcher.take_back_all()
        stage.dispatcher.assign(0.0)  # to the same slot again: somebody else loads them
        return found(ids)

    stage.load(taken_back)
    assert stage.sent == []
    assert stage.dispatcher.in_hand == {"job-0", "job-1"}


@pytest.mark.parametrize("answer", [refused("54000"), refused(QUERY_CANCELED), lost])
@pytest.mark.parametrize("count", [1, 3])
def test_what_was_taken_back_before_a_refusal_is_nobodys_here(
    stage: Stage, count: int, answer: Answer
) -> None:
    stage.add(count)

    def taken_back(ids: list[str]) -> list[tuple[Any, ...]]:
        stage.dispatcher.take_back_all()
        return answer(ids)

    stage.load(taken_back)
    assert (stage.sent, stage.dispatcher.waiting, stage.dispatcher.outcomes) == ([], count, [])


def test_nor_is_what_took_its_place(stage: Stage) -> None:
    stage.add(3)

    def replaced(ids: list[str]) -> list[tuple[Any, ...]]:
        stage.dispatcher.take_back_all()
        stage.dispatcher.assign(0.0)
        stage.slot.board.start(stage.slot.next_number - 3)
        return refused("54000")(ids)

    stage.load(replaced)
    assert (len(stage.slot.in_flight), stage.dispatcher.waiting) == (3, 0)
    assert stage.dispatcher.outcomes == []


def test_a_slot_that_was_given_others_before_its_load_began_gets_them_once(stage: Stage) -> None:
    stage.add(2)
    stage.script.answers = [found]

    async def both() -> None:
        ((slot, jobs),) = stage.dispatcher.assign(0.0)
        first = stage.payloads.load(slot, jobs)
        stage.dispatcher.take_back_all()
        ((slot, jobs),) = stage.dispatcher.assign(0.0)
        await asyncio.gather(first, stage.payloads.load(slot, jobs))

    asyncio.run(both())
    assert [job.id for job in stage.sent] == ["job-0", "job-1"]


def test_two_attempts_of_a_job_in_one_chunk(stage: Stage) -> None:
    """The first under a name that was fenced."""
    stage.add(1)
    stage.add(1)
    old, new = stage.dispatcher._waiting
    old.attempt, new.attempt = 1, 2
    stage.load(lambda ids: [("job-0", 2, "[]", "{}", "{}")])
    assert [(job.id, job.attempt) for job in stage.sent] == [("job-0", 2)]
    assert stage.dispatcher.in_flight == 1
