"""What a worker takes over on a new connection: jobs that it was given without hearing of it."""

from __future__ import annotations

import asyncio
from random import Random

import psycopg
import pytest

from pgqueue.database.store import Link, Outcome
from pgqueue.worker.claimer import Claimer
from pgqueue.worker.dispatcher import Dispatcher
from pgqueue.worker.identity import Identity
from pgqueue.worker.lanes import Lanes


@pytest.mark.parametrize(("claimed", "adopted"), [(1, 0), (2, 1)])
def test_a_job_given_back_and_claimed_anew_in_one_lost_round_trip(
    db: str, claimed: int, adopted: int
) -> None:
    """Acks and the next claim travel together. The answer to both was lost: was the job claimed again?"""

    async def scene() -> None:
        link, identity, dispatcher = (
            Link(db, schema="pgqueue", name="claim"),
            Identity(),
            Dispatcher(max_crashes=3),
        )
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
        with psycopg.connect(db, autocommit=True) as connection:
            connection.execute(
                "INSERT INTO pgqueue.workers (id, host, pid, queues, pool, concurrency, version)"
                " VALUES (%s, 'h', 1, '{}', 'prefork', 1, '0')",
                [identity.id],
            )
            row = connection.execute(
                "INSERT INTO pgqueue.jobs (id, task, state, attempt, worker_id, claimed_at)"
                " VALUES (pgqueue.uuid7(), 't', 'running', %s, %s, now()) RETURNING id::text",
                [claimed, identity.id],
            ).fetchone()
            assert row is not None
            claimer._acking = [Outcome(row[0], 1, identity.id, "release", queue="default", uncertain=True)]
            claimer.draining = True  # it claims nothing else
            try:
                await claimer.run_once()
                assert dispatcher.waiting == adopted
                state = connection.execute("SELECT state, attempt FROM pgqueue.jobs").fetchone()
                assert state == ("running", 2) if adopted else ("ready", 1)
            finally:
                await link.close()

    asyncio.run(scene())
