"""What a worker's maintenance asks the database, by a clock and a link of the test's own."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from random import Random
from typing import Any

import pytest

from pgqueue.config import Config
from pgqueue.database.link import QUERY_CANCELED, Call, GroupFailed, Row
from pgqueue.job import Progress
from pgqueue.worker.identity import Identity
from pgqueue.worker.lanes import PACE
from pgqueue.worker.maintenance import RESCUE_BATCH, Maintenance
from pgqueue.worker.wire import TaskFacts


class Idle:
    """Nothing in hand."""

    in_flight = 0
    tasks: Mapping[str, TaskFacts] = {}

    def in_hand(self) -> set[str]:
        return set()

    def running_for(self, seconds: float, now: float) -> list[str]:
        return []

    def progress(self) -> dict[str, Progress]:
        return {}

    def drop_waiting(self, worker: str) -> None:
        pass

    def counts(self) -> dict[str, int]:
        return {}


class Database:
    """Has lost jobs, and a look for them takes so many seconds."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 100.0
        self.lost = 0
        self.takes = 0.001
        self.looks: list[float] = []
        self.heartbeats: list[tuple[str, int]] = []
        monkeypatch.setattr("pgqueue.worker.maintenance.clock", lambda: self.now)

    async def call(self, name: str, /, **parameters: Any) -> list[Row]:
        return (await self.run([Call(name, parameters)]))[0][0]

    async def run(self, *groups: Sequence[Call]) -> list[list[list[Row]]]:
        return [[self._answer(call) for call in group] for group in groups]

    def _answer(self, call: Call) -> list[Row]:
        match call.name:
            case "rescue_jobs":
                self.looks.append(self.now)
                self.now += min(self.takes, 10.0)
                if self.takes > 10:
                    raise GroupFailed("57014: timeout", sqlstate=QUERY_CANCELED, group=0, rows=[])
                taken = min(self.lost, call.parameters["batch"])
                self.lost -= taken
                return [(taken, ["q"] if taken else [], 0)]
            case "list_heartbeats":
                return list(self.heartbeats)
            case "beat_heart" | "fence_worker":
                return [("me",)]
        return []


@pytest.fixture
def database(monkeypatch: pytest.MonkeyPatch) -> Database:
    return Database(monkeypatch)


@pytest.fixture
def maintenance(database: Database) -> Maintenance:
    return Maintenance(
        database,  # type: ignore[arg-type]
        Identity(),
        Idle(),
        Config(),
        registration=lambda _: [],
        queues=list,
        discover=None,
        asleep=lambda: False,
        wake=lambda: None,
        random=Random(1),
    )


def beats(maintenance: Maintenance, database: Database, count: int) -> None:
    for _ in range(count):
        began = database.now
        asyncio.run(maintenance.beat(began))
        database.now = max(database.now, began + 5)


def test_lost_jobs_are_looked_for_with_every_heartbeat(database: Database, maintenance: Maintenance) -> None:
    beats(maintenance, database, 10)
    assert len(database.looks) == 10


def test_all_that_a_worker_had_in_hand_is_taken_with_one_look(
    database: Database, maintenance: Maintenance
) -> None:
    database.lost = 5_000
    beats(maintenance, database, 1)
    assert (database.lost, len(database.looks)) == (0, 1)
    database.lost = 2 * RESCUE_BATCH + 1
    beats(maintenance, database, 1)
    assert (database.lost, len(database.looks)) == (0, 4)


@pytest.mark.parametrize("takes", [1.0, 60.0])
def test_a_look_for_lost_jobs_that_takes_long_is_made_rarely_and_keeps_no_heartbeat(
    takes: float, database: Database, maintenance: Maintenance
) -> None:
    database.takes = takes
    began = database.now
    beats(maintenance, database, 200)
    assert len(database.looks) > 2
    assert sum(min(takes, 10.0) for _ in database.looks) < 1.5 * (database.now - began) / PACE


def test_jobs_of_a_worker_that_was_fenced_just_now_are_taken_at_once(
    database: Database, maintenance: Maintenance
) -> None:
    database.takes = 1.0
    beats(maintenance, database, 1)
    database.heartbeats = [("lost", 7)]
    database.lost = 3
    while maintenance._watch._lease > database.now - 105.0:
        beats(maintenance, database, 1)
    beats(maintenance, database, 1)
    assert database.lost == 0
