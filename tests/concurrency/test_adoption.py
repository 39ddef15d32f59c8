"""What a worker takes over on a new connection: jobs that it was given without hearing of it."""

from __future__ import annotations

import asyncio
import mmap
from collections.abc import Awaitable, Callable
from contextlib import closing
from itertools import pairwise
from random import Random

import psycopg
import pytest

from pgqueue.database.link import QUERY_CANCELED, GroupFailed, Link, Row
from pgqueue.database.store import Outcome
from pgqueue.job import ClaimedJob
from pgqueue.worker.claimer import STRAYS_INTERVAL, STRAYS_MOST, Claimer
from pgqueue.worker.dispatcher import Dispatcher, Executor, Slot
from pgqueue.worker.identity import Identity
from pgqueue.worker.lanes import Lanes
from pgqueue.worker.wire import Board

Scene = Callable[[Claimer, Dispatcher, Link, str], Awaitable[None]]


def play(db: str, attempt: int, scene: Scene) -> None:
    """With one job that runs as this attempt under the claimer's name."""

    async def run() -> None:
        link, identity = Link(db, schema="pgqueue", name="claim"), Identity()
        dispatcher = Dispatcher(max_crashes=3)
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
        with closing(psycopg.connect(db, autocommit=True)) as connection:
            connection.execute(
                "INSERT INTO pgqueue.workers (id, host, pid, queues, pool, concurrency, version)"
                " VALUES (%s, 'h', 1, '{}', 'prefork', 1, '0')",
                [identity.id],
            )
            row = connection.execute(
                "INSERT INTO pgqueue.jobs (id, task, state, attempt, worker_id, claimed_at)"
                " VALUES (pgqueue.uuid7(), 't', 'running', %s, %s, now()) RETURNING id::text",
                [attempt, identity.id],
            ).fetchone()
        assert row is not None
        claimer.draining = True  # it claims nothing else
        try:
            await scene(claimer, dispatcher, link, row[0])
        finally:
            await link.close()

    asyncio.run(run())


@pytest.mark.parametrize(("claimed", "adopted"), [(1, 0), (2, 1)])
def test_a_job_given_back_and_claimed_anew_in_one_lost_round_trip(
    db: str, claimed: int, adopted: int
) -> None:
    """Acks and the next claim travel together. The answer to both was lost: was the job claimed again?"""

    async def scene(claimer: Claimer, dispatcher: Dispatcher, link: Link, job: str) -> None:
        worker = claimer._identity.id
        claimer._acker._unconfirmed = [Outcome(job, 1, worker, "release", queue="default", uncertain=True)]
        await claimer.run_once()
        assert dispatcher.waiting == adopted
        with closing(psycopg.connect(db)) as connection:
            state = connection.execute("SELECT state, attempt FROM pgqueue.jobs").fetchone()
        assert state == ("running", 2) if adopted else ("ready", 1)

    play(db, claimed, scene)


def test_a_run_that_ends_by_itself_while_the_answer_is_on_its_way(
    db: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A transactional run: its row is gone when the worker reads that it is there."""

    async def scene(claimer: Claimer, dispatcher: Dispatcher, link: Link, job: str) -> None:
        worker, ask = claimer._identity.id, link.call
        facts = ("default", 5, 1, "t", "[]", "{}", "{}", 1, 0, None, 0, None, False, False, worker)
        dispatcher.add([ClaimedJob(job, *facts)], 0.0)

        async def answer_late(name: str, **parameters: object) -> list[Row]:
            rows = await ask(name, **parameters)
            dispatcher.drop_waiting(worker)
            return rows

        monkeypatch.setattr(link, "call", answer_late)
        claimer.wake()
        await claimer.run_once()
        assert dispatcher.waiting == 0

    play(db, 1, scene)


def test_a_look_that_takes_too_long_does_not_hold_up_the_claims(
    db: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Old snapshots keep an index entry of every job that ran under this name: the look may never end."""

    async def scene(claimer: Claimer, dispatcher: Dispatcher, link: Link, job: str) -> None:
        ask = link.call

        async def cancelled(name: str, **parameters: object) -> list[Row]:
            if name == "list_claimed":
                raise GroupFailed("57014: canceling statement", sqlstate=QUERY_CANCELED, group=0, rows=[])
            return await ask(name, **parameters)

        with closing(psycopg.connect(db, autocommit=True)) as connection:
            connection.execute("INSERT INTO pgqueue.jobs (id, task) VALUES (pgqueue.uuid7(), 't')")
        facts = Executor(0, pool="solo", ready=True)
        facts.slots.append(Slot(facts, 0, Board(mmap.mmap(-1, Board.SIZE))))
        dispatcher.executors[0] = facts
        claimer.draining = False
        monkeypatch.setattr(link, "call", cancelled)
        await claimer.run_once()
        assert dispatcher.waiting == 1

    play(db, 1, scene)


def test_looks_for_strays_become_rare_until_the_connection_is_lost(
    db: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def scene(claimer: Claimer, dispatcher: Dispatcher, link: Link, job: str) -> None:
        now, looks = 0.0, []
        ask = link.call

        async def noting(name: str, **parameters: object) -> list[Row]:
            if name == "list_claimed":
                looks.append(now)
            return await ask(name, **parameters)

        monkeypatch.setattr(link, "call", noting)
        monkeypatch.setattr("pgqueue.worker.claimer.clock", lambda: now)
        for minute in range(120):
            now = 60.0 * minute
            claimer.wake()
            await claimer.run_once()
        assert len(looks) < 15
        assert max(later - earlier for earlier, later in pairwise(looks)) <= STRAYS_MOST + 60
        before = len(looks)
        await link.close()
        for _ in range(2):
            now += STRAYS_INTERVAL
            claimer.wake()
            await claimer.run_once()
        assert len(looks) == before + 2

    play(db, 1, scene)
