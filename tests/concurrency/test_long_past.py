"""Workers that have more behind them than one statement can walk over before its timeout.

As when somebody has held a snapshot for hours. Here the link refuses statements that would walk too far, as
the server does, so that no test has to wait for a timeout.
"""

from __future__ import annotations

import asyncio
import mmap
from collections.abc import Awaitable, Callable, Sequence
from contextlib import closing, suppress
from random import Random
from typing import Any

import psycopg
import pytest

from pgqueue.database.link import QUERY_CANCELED, Call, GroupFailed, Link, Row
from pgqueue.worker.claimer import Claimer
from pgqueue.worker.dispatcher import Dispatcher, Executor, Slot
from pgqueue.worker.identity import Identity
from pgqueue.worker.lanes import STEP, Lanes
from pgqueue.worker.wire import Board

PAST = 20 * STEP
"""The last position that is used up, by entries that cannot be cleaned up."""
Scene = Callable[[Claimer, Dispatcher, "ShortLink"], Awaitable[None]]


class ShortLink(Link):
    """Refuses a claim that walks over more than `limit` positions, or over `bad`."""

    limit = 2 * STEP
    bad: int | None = None
    refused = 0

    async def run(self, *groups: Sequence[Call]) -> list[list[list[Row]]]:
        for number, group in enumerate(groups):
            for call in group:
                if call.name == "claim_jobs" and self._too_far(call.parameters):
                    self.refused += 1
                    done = await super().run(*groups[:number]) if number else []
                    raise GroupFailed("57014: timeout", sqlstate=QUERY_CANCELED, group=number, rows=done)
        return await super().run(*groups)

    def _too_far(self, given: Any) -> bool:
        for priority, after, upto in zip(given["priorities"], given["after"], given["upto"], strict=True):
            after, upto = max(after, 0), min(upto, PAST)
            if priority == 5 and (upto - after > self.limit or (self.bad and after < self.bad <= upto)):
                return True
        return False


def play(db: str, scene: Scene) -> None:
    async def run() -> None:
        link, identity = ShortLink(db, schema="pgqueue", name="claim"), Identity()
        dispatcher = Dispatcher(max_crashes=3)
        executor = Executor(0, pool="solo", ready=True)
        executor.slots.append(Slot(executor, 0, Board(mmap.mmap(-1, Board.SIZE))))
        dispatcher.executors[0] = executor
        claimer = Claimer(
            link,
            Lanes(["default"], None, Random(1)),
            dispatcher,
            identity,
            dispatch=lambda: None,
            next_eta=lambda: None,
            share=lambda _: None,
            retried=lambda _: None,
            poll_interval=5.0,
            random=Random(1),
        )
        facts = dict(host="h", pid=1, queues=["default"], pool="solo", concurrency=1, version="0")
        await link.call("register_worker", worker=identity.id, **facts)
        try:
            await scene(claimer, dispatcher, link)
        finally:
            await link.close()

    with closing(psycopg.connect(db, autocommit=True)) as connection:
        connection.execute("SELECT setval('pgqueue.jobs_position_seq', %s)", [PAST])
        connection.execute("SELECT pgqueue.enqueue('t')")
    asyncio.run(run())


async def rounds(claimer: Claimer, count: int) -> None:
    for _ in range(count):
        claimer.wake()
        with suppress(GroupFailed):
            await claimer.run_once()


def test_a_worker_that_starts_finds_its_way_to_the_jobs(db: str) -> None:
    async def scene(claimer: Claimer, dispatcher: Dispatcher, link: ShortLink) -> None:
        await rounds(claimer, 25)
        assert dispatcher.waiting == 1
        assert link.refused == 1

    play(db, scene)


def test_sweeps_that_take_too_long_do_not_keep_a_worker_from_claiming(
    db: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def scene(claimer: Claimer, dispatcher: Dispatcher, link: ShortLink) -> None:
        now = 1000.0
        monkeypatch.setattr("pgqueue.worker.claimer.clock", lambda: now)
        await rounds(claimer, 25)
        assert dispatcher.waiting == 1
        dispatcher.drop_waiting(claimer._identity.id)
        link.limit, link.bad, link.refused = PAST // 100, PAST // 2, 0
        with closing(psycopg.connect(db, autocommit=True)) as connection:
            connection.execute(
                "INSERT INTO pgqueue.jobs (id, task, position) VALUES (pgqueue.uuid7(), 'late', 7)"
            )
            found: list[str] = []
            for number in range(2_000):
                now += 0.1
                if number % 20 == 0:
                    assert found.count("t") == number // 20, "each claim finds what is new"
                    connection.execute("SELECT pgqueue.enqueue('t')")
                await rounds(claimer, 1)
                found += [job.task for job in dispatcher._waiting]
                dispatcher.drop_waiting(claimer._identity.id)
                connection.execute("DELETE FROM pgqueue.jobs WHERE state = 'running'")
                if "late" in found:
                    break
        assert found.count("late") == 1, "and the sweep goes round in spite of all"
        assert link.refused > 3

    play(db, scene)


def test_a_sweep_that_goes_on_while_there_is_no_work_makes_the_pauses_no_longer(
    db: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A transaction that read "nobody sleeps" and commits so much later is found within as much again."""

    async def scene(claimer: Claimer, dispatcher: Dispatcher, link: ShortLink) -> None:
        now = 1000.0
        monkeypatch.setattr("pgqueue.worker.claimer.clock", lambda: now)
        monkeypatch.setattr(Lanes, "sweep_at", property(lambda _: now + 0.01))
        while now < 1001:
            claimer._found_nothing(now)
            assert now < claimer._look_again_at <= now + 0.0101
            assert claimer._poll_at - now <= 2 * (now - 1000) + 0.02
            now = claimer._look_again_at

    play(db, scene)
