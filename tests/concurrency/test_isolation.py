"""A worker's statements never fail to serialize, whatever the database's default isolation level.

Four workers of one queue claim, ack, retry, release, promote and rescue at once, each on a connection of its
own. Without an isolation level of their own their transactions would collide under the two higher ones.
"""

from __future__ import annotations

import asyncio
import time
from typing import Any

import psycopg
import pytest

from pgqueue.database.link import Call, Link
from pgqueue.database.migrate import upgrade
from pgqueue.database.store import Outcome, Verb, ack_calls, decode_claim
from pgqueue.job import ClaimedJob, new_id

LEVELS = ("read committed", "repeatable read", "serializable")
WORKERS = 4
READY, DUE, LOST = 400, 200, 200
DEADLINE = 60.0
END = 2**63 - 1


@pytest.mark.parametrize("level", LEVELS)
def test_workers_do_not_collide(fresh_dsn: str, level: str) -> None:
    with psycopg.connect(fresh_dsn, autocommit=True) as connection:
        name = connection.info.dbname
        connection.execute(
            f"alter database \"{name}\" set default_transaction_isolation to '{level}'".encode()
        )
    upgrade(fresh_dsn)
    with psycopg.connect(fresh_dsn, autocommit=True) as connection:
        assert connection.execute("show transaction_isolation").fetchone() == (level,)
        fill(connection)

    runs = asyncio.run(work(fresh_dsn))

    jobs = READY + DUE + LOST
    # A third fails once, a fifth is given back once; each comes back for another attempt.
    assert len(runs) == len(set(runs)), "an attempt was run twice"
    assert len({job_id for job_id, _ in runs}) == jobs
    with psycopg.connect(fresh_dsn, autocommit=True) as connection:
        ended = connection.execute(
            "select (select count(*) from pgqueue.jobs), (select count(*) from pgqueue.finished_jobs),"
            " (select count(distinct id) from pgqueue.finished_jobs),"
            " (select count(*) from pgqueue.dead_letters), (select count(*) from pgqueue.failures)"
        ).fetchone()
    verbs = [verb_of(*run) for run in runs]
    finished, buried, failed = (verbs.count(verb) for verb in ("finish", "bury", "retry"))
    assert ended == (0, finished, finished, buried, buried + failed)
    assert finished + buried == jobs


def fill(connection: psycopg.Connection) -> None:
    """Jobs to claim, to promote and to rescue."""
    rows = {
        "'ready', NULL::timestamptz, NULL": READY,
        "'scheduled', now() - n * interval '1 second', NULL": DUE,
        "'running', NULL::timestamptz, 'gone:' || n %% 7": LOST,
    }
    for columns, count in rows.items():
        ids = [new_id() for _ in range(count)]
        connection.execute(
            "insert into pgqueue.jobs (id, task, state, eta, worker_id)"
            f" select id, 't', {columns} from unnest(%s::uuid[]) with ordinality as new(id, n)".encode(),
            [ids],
        )


def verb_of(job_id: str, attempt: int) -> Verb:
    """What becomes of an attempt; it depends on the id, so it can be told again afterwards."""
    number = int(job_id[-6:], 16)
    if attempt == 1 and number % 3 == 0:
        return "retry"
    if attempt == 1 and number % 5 == 0:
        return "release"
    return "bury" if number % 7 == 0 else "finish"


async def work(dsn: str) -> list[tuple[str, int]]:
    """Serve the queue with all workers at once until it is empty; returns what was run: (job, attempt)."""
    links = [Link(dsn, schema="pgqueue", name=f"isolation {n}") for n in range(WORKERS)]
    runs: list[tuple[str, int]] = []
    try:
        await asyncio.gather(*(serve(link, f"host:{n}:aaaa", runs) for n, link in enumerate(links)))
    finally:
        for link in links:
            await link.close()
    return runs


async def serve(link: Link, worker: str, runs: list[tuple[str, int]]) -> None:
    """One worker's rounds: ack and claim in one round trip, then rescue and promote."""
    facts = dict(host="h", pid=1, queues=["default"], pool="prefork", concurrency=1, version="1")
    await link.call("register_worker", worker=worker, **facts)
    lane = {
        "queues": ["default"],
        "priorities": [5],
        "after": [0],
        "upto": [END],
        "most": [20],
        "bare": False,
        "tasks": None,
        "but": False,
    }
    claim = Call("claim_jobs", {**lane, "batch": 20, "worker": worker})
    keep = [
        Call(
            "rescue_jobs",
            {
                "batch": 10,
                "max_crashes": 3,
                "max_rescues": 10,
                "dead_letter_queues": "{}",
                "task_max_crashes": "{}",
                "once": [],
            },
        ),
        Call("promote_jobs", {"after": 0.0, "upto": None, "mark": False, "now": None, "batch": 10}),
        Call("beat_heart", {"worker": worker, "running": "{}", "stats": "{}"}),
        Call("arm_wake", {"queues": ["default"], "next_eta": None}),
    ]
    held: list[ClaimedJob] = []
    deadline = time.monotonic() + DEADLINE
    while True:
        assert time.monotonic() < deadline, "the queue did not drain"
        outcomes = [Outcome(job.id, job.attempt, worker, verb_of(job.id, job.attempt)) for job in held]
        acks = ack_calls(outcomes, 0.0)
        groups: list[list[Call]] = [[call for call, _ in acks]] if acks else []
        answers = await link.run(*groups, [claim], *([call] for call in keep))
        if acks:
            assert [rows[0][0] for rows in answers[0]] == [len(group) for _, group in acks]
        held = decode_claim(answers[len(groups)][0], worker).jobs
        runs += [(job.id, job.attempt) for job in held]
        if not held and await is_empty(link):
            return


async def is_empty(link: Link) -> bool:
    connection: Any = await link.connect()
    row = await (await connection.execute("select not exists (select from pgqueue.jobs)")).fetchone()
    return bool(row[0])
