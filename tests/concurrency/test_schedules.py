"""Several schedulers on one database: one job per tick, whoever is first, late, or in between."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Awaitable, Callable, Iterator
from contextlib import closing
from datetime import UTC, datetime, timedelta
from random import Random
from typing import Any

import psycopg
import pytest
from psycopg.rows import dict_row

from pgqueue.cron import Cron, ticks_between
from pgqueue.database.link import Link
from pgqueue.database.migrate import upgrade
from pgqueue.worker.identity import Identity
from pgqueue.worker.scheduler import (
    HEARING_INTERVAL,
    HELD_INTERVAL,
    LOOK_INTERVAL,
    OLD_INTERVAL,
    Scheduler,
)

Row = dict[str, Any]
START = datetime(2026, 5, 6, 12, tzinfo=UTC)


class Queue:
    """The tables of a test."""

    def __init__(self, dsn: str) -> None:
        self.dsn = dsn
        self.connection = psycopg.connect(dsn, autocommit=True, row_factory=dict_row)

    def close(self) -> None:
        self.connection.close()

    def sql(self, text: str, *parameters: object) -> list[Row]:
        cursor = self.connection.execute(text.encode(), parameters)
        return cursor.fetchall() if cursor.description else []

    def schedule(self, name: str = "report", **columns: object) -> None:
        """A schedule whose last tick was at the start."""
        given = {"source": "database", "task": "t", "every": "1 min", "last_tick": START, **columns}
        if "cron" in columns:
            del given["every"]
        names = ", ".join(given)
        places = ", ".join("%s" for _ in given)
        self.sql(
            f"INSERT INTO pgqueue.schedules (name, {names}) VALUES (%s, {places})", name, *given.values()
        )

    def row(self, name: str = "report") -> Row:
        (row,) = self.sql("SELECT * FROM pgqueue.schedules WHERE name = %s", name)
        return row

    def jobs(self, name: str = "report") -> list[Row]:
        """Its jobs, in the order in which they are to run."""
        return self.sql(
            "SELECT * FROM pgqueue.jobs WHERE headers ->> 'schedule' = %s ORDER BY position", name
        )

    def ticks(self, name: str = "report") -> list[datetime]:
        return [datetime.fromisoformat(job["headers"]["tick"]) for job in self.jobs(name)]

    def end_jobs(self) -> None:
        self.sql("DELETE FROM pgqueue.jobs")

    def worker(self, worker: str) -> None:
        self.sql(
            "INSERT INTO pgqueue.workers (id, host, pid, queues, pool, concurrency, version)"
            " VALUES (%s, 'h', 1, '{}', 'prefork', 1, '0')",
            worker,
        )


@pytest.fixture
def queue(db: str) -> Iterator[Queue]:
    with closing(Queue(db)) as queue:
        yield queue


def scheduler(link: Link, *in_code: Row, identity: Identity | None = None) -> Scheduler:
    async def ready(queues: list[str]) -> None: ...

    return Scheduler(link, identity or Identity(), in_code, ready=ready, random=Random(1))


def definition(name: str = "report", **values: object) -> Row:
    """A document as an application's code makes it."""
    return {
        "name": name, "task": "t", "cron": None, "every": 60.0, "timezone": "UTC", "args": [1], "kwargs": {},
        "queue": "reports", "priority": 7, "max_retries": 2, "expires_in": None, "headers": {"a": 1},
        "catch_up": "latest", "overlap": "allow", "jitter": 0.0, **values,
    }  # fmt: skip


def play(dsn: str, scene: Callable[[Link], Awaitable[None]]) -> None:
    async def run() -> None:
        link = Link(dsn, schema="pgqueue", name="maintenance")
        try:
            await scene(link)
        finally:
            await link.close()

    asyncio.run(run())


def look(queue: Queue, minutes: float, *in_code: Row) -> float:
    """One scheduler looks, so long after the start; when it wants to look again."""
    pauses: list[float] = []

    async def scene(link: Link) -> None:
        pauses.append(await scheduler(link, *in_code).run_once(START + timedelta(minutes=minutes)))

    play(queue.dsn, scene)
    return pauses[0]


def minute(number: int) -> datetime:
    return START + timedelta(minutes=number)


@pytest.mark.parametrize("seed", range(3))
def test_many_schedulers_make_one_job_per_tick(queue: Queue, seed: int) -> None:
    """Through the long day of a zone, at the same moments and in any order."""
    random = Random(seed)
    start = datetime(2026, 10, 24, 12, tzinfo=UTC)
    queue.schedule("report", cron="*/20 * * * *", timezone="Europe/Berlin", last_tick=start, catch_up="all")
    queue.schedule("nightly", cron="30 2 * * *", timezone="Europe/Berlin", last_tick=start)
    end = start + timedelta(days=1)

    async def run() -> None:
        links = [Link(queue.dsn, schema="pgqueue", name=f"maintenance {n}") for n in range(5)]
        schedulers = [scheduler(link) for link in links]
        try:
            now = start
            while now < end:
                now = min(now + timedelta(minutes=random.expovariate(1 / 15)), end)
                some = random.sample(schedulers, random.randint(1, 5))
                await asyncio.gather(
                    *(each.run_once(now - timedelta(seconds=random.choice([0, 0, 0, 90]))) for each in some)
                )
            await schedulers[0].run_once(end)
        finally:
            for link in links:
                await link.close()

    asyncio.run(run())
    for name in ("report", "nightly"):
        row = queue.row(name)
        expected = ticks_between(Cron(row["cron"], row["timezone"]), start, end, 1000)
        assert sorted(queue.ticks(name)) == expected, name
        assert row["fired"] == len(expected)
    assert queue.ticks("nightly") == [datetime(2026, 10, 25, 0, 30, tzinfo=UTC)]


def test_one_that_freezes_between_looking_and_acting_does_nothing(queue: Queue) -> None:
    queue.schedule()

    async def scene(link: Link) -> None:
        slow = scheduler(link)
        act = slow._carry_out

        async def later(*arguments: Any) -> Any:
            other = Link(queue.dsn, schema="pgqueue", name="maintenance")
            try:
                await scheduler(other).run_once(minute(1))
                await scheduler(other).run_once(minute(2))
            finally:
                await other.close()
            return await act(*arguments)

        slow._carry_out = later  # type: ignore[method-assign]
        assert await slow.run_once(minute(1)) <= 0.2, "it looks again: it cannot know who was first"

    play(queue.dsn, scene)
    assert queue.ticks() == [minute(1), minute(2)]


def test_the_same_decision_twice_counts_once(queue: Queue) -> None:
    """The answer of the first time was lost."""
    queue.schedule(version=3)
    job = "01890a5d-ac96-774b-bcce-b302099a8057"
    parameters = {
        "name": "report", "version": 3, "ids": f"{{{job}}}", "ticks": [minute(1).timestamp()], "skipped": 0,
        "etas": [minute(1).timestamp()], "last_tick": minute(1).timestamp(), "held": [], "missed": 0,
        "next_tick": minute(2).timestamp(),
    }  # fmt: skip
    answers: list[list[Any]] = []

    async def scene(link: Link) -> None:
        for _ in range(2):
            answers.append(await link.call("fire_schedule", **parameters))

    play(queue.dsn, scene)
    assert answers == [[("default", 1)], []]
    assert len(queue.jobs()) == 1


def test_a_row_that_somebody_holds_delays_no_other(queue: Queue) -> None:
    queue.schedule("held")
    queue.schedule("other")
    with psycopg.connect(queue.dsn) as holder:
        holder.execute("SELECT FROM pgqueue.schedules WHERE name = 'held' FOR UPDATE")
        assert look(queue, 1) <= 0.2
        assert (queue.ticks("held"), queue.ticks("other")) == ([], [minute(1)])
    look(queue, 1.1)
    assert queue.ticks("held") == [minute(1)]


def test_what_the_job_is_like(queue: Queue) -> None:
    queue.worker("w1")
    identity = Identity("w1")

    async def scene(link: Link) -> None:
        await scheduler(link, definition(expires_in=600.0), identity=identity).run_once()

    play(queue.dsn, scene)
    queue.sql("UPDATE pgqueue.schedules SET last_tick = %s, next_tick = %s", START, minute(1))
    look(queue, 1)
    (job,) = queue.jobs()
    wanted = {"task": "t", "args": [1], "kwargs": {}, "queue": "reports", "priority": 7, "max_retries": 2}
    assert {name: job[name] for name in wanted} == wanted
    assert job["headers"] == {"a": 1, "schedule": "report", "tick": "2026-05-06T12:01:00Z"}
    assert (job["state"], job["eta"]) == ("ready", None)
    assert job["expires_at"] - job["enqueued_at"] < timedelta(seconds=601)


def test_jitter_puts_each_job_off_by_its_own_share(queue: Queue) -> None:
    """Of a tick to come, as the real clock has it."""
    now = datetime.now(UTC).replace(microsecond=0)
    queue.schedule(every="1 s", last_tick=now - timedelta(seconds=100), jitter="1 h", catch_up="all")

    async def scene(link: Link) -> None:
        await scheduler(link).run_once(now)

    play(queue.dsn, scene)
    jobs = queue.jobs()
    assert len(jobs) == 100
    delays = [
        (job["eta"] - datetime.fromisoformat(job["headers"]["tick"])).total_seconds()
        for job in jobs
        if job["state"] == "scheduled"
    ]
    assert len(set(delays)) == len(delays) > 90
    assert 0 <= min(delays) < 600 < 3000 < max(delays) <= 3600


def test_ticks_that_nobody_was_there_for(queue: Queue) -> None:
    for catch_up in ("latest", "all", "none"):
        queue.schedule(catch_up, catch_up=catch_up, every="2 min")
    assert look(queue, 7.5) == LOOK_INTERVAL
    assert queue.ticks("latest") == [minute(6)]
    assert queue.ticks("all") == [minute(2), minute(4), minute(6)]
    assert queue.ticks("none") == []
    assert [queue.row(name)["missed"] for name in ("latest", "all", "none")] == [2, 0, 3]
    look(queue, 8)
    assert queue.ticks("none") == [minute(8)]


def test_who_hears_of_changes_looks_less_often(queue: Queue) -> None:
    async def ready(queues: list[str]) -> None: ...

    async def scene(link: Link) -> None:
        hears = True
        one = Scheduler(link, Identity(), [], ready=ready, random=Random(1), hears=lambda: hears)
        assert await one.run_once(START) == HEARING_INTERVAL
        hears = False
        assert await one.run_once(START) == LOOK_INTERVAL
        hears = True
        queue.schedule(every="5 s")
        await one.run_once(START)
        assert 0 < await one.run_once(START + timedelta(seconds=1)) <= 5

    play(queue.dsn, scene)


def test_skip_while_a_job_lives(queue: Queue) -> None:
    queue.schedule(overlap="skip")
    look(queue, 1)
    queue.sql("UPDATE pgqueue.jobs SET state = 'running', worker_id = 'w1'")
    look(queue, 2)
    queue.sql("UPDATE pgqueue.jobs SET state = 'scheduled', eta = now() + interval '1 h'")  # for a retry
    look(queue, 3)
    assert queue.ticks() == [minute(1)]
    queue.end_jobs()
    look(queue, 4)
    assert queue.ticks() == [minute(4)]
    assert (queue.row()["skipped"], queue.row()["fired"]) == (2, 2)


def test_queue_runs_them_one_after_another(queue: Queue) -> None:
    queue.schedule(overlap="queue")
    look(queue, 1)
    look(queue, 2)
    assert look(queue, 3) == HELD_INTERVAL
    assert queue.ticks() == [minute(1)]
    assert queue.row()["held"] == [minute(2), minute(3)]
    for now, tick in ((3.1, 2), (3.2, 3)):
        queue.end_jobs()
        look(queue, now)
        assert queue.ticks() == [minute(tick)]
        look(queue, now + 0.05)
        assert queue.ticks() == [minute(tick)]
    assert (queue.row()["held"], queue.row()["skipped"]) == ([], 0)


def test_a_paused_one_lets_its_ticks_pass(queue: Queue) -> None:
    queue.schedule(last_tick=datetime.now(UTC) - timedelta(hours=1))
    assert queue.sql("SELECT pgqueue.pause_schedule('report', 'stocktaking', 'me')")
    play(queue.dsn, lambda link: scheduler(link).run_once())  # type: ignore[arg-type,return-value]
    assert queue.ticks() == []
    queue.sql("SELECT pgqueue.resume_schedule('report')")
    play(queue.dsn, lambda link: scheduler(link).run_once())  # type: ignore[arg-type,return-value]
    assert queue.ticks() == [], "what came meanwhile is not made up for"
    assert queue.row()["next_tick"] > datetime.now(UTC)


def test_paused_between_looking_and_acting(queue: Queue) -> None:
    queue.schedule()

    async def scene(link: Link) -> None:
        slow = scheduler(link)
        act = slow._carry_out

        async def later(*arguments: Any) -> Any:
            queue.sql("SELECT pgqueue.pause_schedule('report')")
            return await act(*arguments)

        slow._carry_out = later  # type: ignore[method-assign]
        await slow.run_once(minute(1))

    play(queue.dsn, scene)
    assert queue.ticks() == []


def test_a_row_that_makes_no_sense_stops_no_other(queue: Queue, caplog: pytest.LogCaptureFixture) -> None:
    queue.schedule("broken", cron="61 * * * *", next_tick=START)
    queue.schedule("nowhere", cron="@daily", timezone="Mars/Olympus", next_tick=START)
    queue.schedule("unfit", queue="q", next_tick=START)
    queue.schedule("fine")
    queue.sql("UPDATE pgqueue.schedules SET expires_in = '300000 years' WHERE name = 'unfit'")

    async def scene(link: Link) -> None:
        one = scheduler(link)
        for now in (1, 2):
            await one.run_once(minute(now))

    with caplog.at_level(logging.INFO, "pgqueue.worker"):
        play(queue.dsn, scene)
    assert queue.ticks("fine") == [minute(1), minute(2)]
    said = [record.message for record in caplog.records if record.message.startswith("schedule_broken")]
    assert sorted(line.split()[1] for line in said) == ["name=broken", "name=nowhere", "name=unfit"], (
        "once each"
    )


# In the code.


def declare(queue: Queue, worker: str, *in_code: Row) -> None:
    if not queue.sql("SELECT FROM pgqueue.workers WHERE id = %s", worker):
        queue.worker(worker)

    async def scene(link: Link) -> None:
        await scheduler(link, *in_code, identity=Identity(worker)).run_once()

    play(queue.dsn, scene)


def rewind(queue: Queue) -> None:
    queue.sql("UPDATE pgqueue.schedules SET last_tick = %s, next_tick = NULL", START)


def test_one_in_the_code_comes_while_a_live_worker_has_it(queue: Queue) -> None:
    declare(queue, "w1", definition())
    declare(queue, "w2", definition())
    rewind(queue)
    look(queue, 1)
    queue.sql("DELETE FROM pgqueue.workers WHERE id = 'w1'")
    look(queue, 2)
    queue.sql("UPDATE pgqueue.workers SET fenced = true")
    look(queue, 3)
    assert queue.ticks() == [minute(1), minute(2)]
    declare(queue, "w3", definition("another"))  # a release without it
    look(queue, 4)
    assert queue.ticks() == [minute(1), minute(2)]


def test_a_definition_that_did_not_change_keeps_its_place(queue: Queue) -> None:
    """So what was missed while no worker ran is made up for."""
    declare(queue, "w1", definition(every=3600.0))
    queue.sql("UPDATE pgqueue.schedules SET last_tick = now() - interval '1 day', next_tick = NULL")
    queue.sql("DELETE FROM pgqueue.workers")
    declare(queue, "w2", definition(every=3600.0))
    assert len(queue.ticks()) == 1


def test_a_new_time_table_begins_now(queue: Queue) -> None:
    declare(queue, "w1", definition(every=3600.0))
    queue.sql(
        "UPDATE pgqueue.schedules SET last_tick = now() - interval '1 day', next_tick = NULL, held = '{now}'"
    )
    declare(queue, "w2", definition(every=7200.0))
    assert queue.ticks() == []
    assert (queue.row()["every"], queue.row()["held"]) == (timedelta(hours=2), [])


def test_other_arguments_keep_the_place(queue: Queue) -> None:
    declare(queue, "w1", definition(every=3600.0))
    queue.sql("UPDATE pgqueue.schedules SET last_tick = now() - interval '1 day', next_tick = NULL")
    queue.sql("DELETE FROM pgqueue.workers")
    declare(queue, "w2", definition(every=3600.0, args=[2]))
    assert [job["args"] for job in queue.jobs()] == [[2]]


def test_a_pause_outlives_the_code(queue: Queue) -> None:
    declare(queue, "w1", definition())
    queue.sql("SELECT pgqueue.pause_schedule('report')")
    declare(queue, "w2", definition(every=30.0))
    assert queue.row()["paused"]


def test_a_name_that_was_added_is_not_taken_over(queue: Queue, caplog: pytest.LogCaptureFixture) -> None:
    queue.schedule(task="mine", next_tick=datetime.now(UTC) + timedelta(days=1))
    with caplog.at_level(logging.ERROR, "pgqueue.worker"):
        declare(queue, "w1", definition())
    assert (queue.row()["source"], queue.row()["task"]) == ("database", "mine")
    assert "schedule_name_taken name=report" in caplog.text


def test_a_worker_that_was_fenced_says_it_under_its_new_name(queue: Queue) -> None:
    queue.worker("w1")
    identity = Identity("w1")

    async def scene(link: Link) -> None:
        one = scheduler(link, definition(), identity=identity)
        await one.run_once()
        queue.worker(identity.renew())
        await one.run_once()

    play(queue.dsn, scene)
    held = queue.sql("SELECT schedules FROM pgqueue.workers ORDER BY started_at")
    assert [row["schedules"] for row in held] == [["report"], ["report"]]


def test_a_database_without_schedules(fresh_dsn: str, caplog: pytest.LogCaptureFixture) -> None:
    """A release is deployed before its migration, and finds the table when it is there."""
    upgrade(fresh_dsn, revision="0004")
    pauses: list[float] = []

    async def scene(link: Link) -> None:
        one = scheduler(link, definition())
        pauses.append(await one.run_once())
        pauses.append(await one.run_once())
        await asyncio.to_thread(upgrade, fresh_dsn)
        pauses.append(await one.run_once())

    with caplog.at_level(logging.INFO, "pgqueue.worker"):
        play(fresh_dsn, scene)
    assert pauses[:2] == [OLD_INTERVAL, OLD_INTERVAL]
    assert pauses[2] <= LOOK_INTERVAL
    said = [record.message for record in caplog.records if "schedule" in record.message]
    assert said == ["schedules_off revision=0004 needs=0005", "schedule_written name=report new=True"]


def test_the_document_of_the_code_is_what_the_statement_reads() -> None:
    from dataclasses import asdict

    from pgqueue.schedule import Schedule

    assert asdict(Schedule("n", "t", every=60.0)).keys() == definition().keys()
    json.dumps(asdict(Schedule("n", "t", every=60.0)))
