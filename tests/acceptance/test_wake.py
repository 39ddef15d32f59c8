"""An idle worker hears of jobs at once: by notification, not because it happens to look.

The workers here are asked to look once a minute. They look every three seconds all the same, when they renew
their wish to be woken; tests that must tell a notification from that look enqueue right after one.
"""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import closing
from datetime import datetime
from typing import Any

import psycopg
import pytest

from pgqueue.worker.claimer import RUSH
from tests.acceptance.workers import Jobs, Ledger, Row, Workers, eventually

SLEEPY = ("-c", "1", "--poll-interval", "60")
SOON = 2.0
"""Seconds: less than the four to five between two looks, and hundreds of times what a notification takes."""


def hint(jobs: Jobs, queue: str = "default") -> datetime | None:
    """Until when a worker asks to be woken; None if nobody ever asked."""
    found = jobs.sql("select wake_until from pgqueue.wake where queue = %s", queue)
    return found[0]["wake_until"] if found else None


def armed(jobs: Jobs, queue: str = "default") -> bool:
    query = "select true as yes from pgqueue.wake where queue = %s and wake_until > clock_timestamp()"
    return bool(jobs.sql(query, queue))


def just_looked(jobs: Jobs) -> None:
    """Until the worker has just renewed its hint: its next look of its own is over four seconds away."""
    before = eventually(lambda: hint(jobs), "a worker asks to be woken")
    eventually(lambda: hint(jobs) != before, "it asks again")


def waited(row: Row, since: datetime | None = None) -> float:
    """Seconds from the enqueue, or from `since`, to the claim."""
    return float((row["claimed_at"] - (since or row["enqueued_at"])).total_seconds())


def now(jobs: Jobs) -> datetime:
    moment = jobs.sql("select clock_timestamp() as now")[0]["now"]
    assert isinstance(moment, datetime)
    return moment


@pytest.fixture
def other(jobs: Jobs) -> Iterator[psycopg.Connection]:
    """A second connection, for transactions that stay open."""
    with closing(psycopg.connect(jobs.dsn)) as connection:
        yield connection


def enqueue(connection: psycopg.Connection, label: str = "x") -> str:
    row = connection.execute(
        "select pgqueue.enqueue('tests_app.mark', jsonb_build_array(%s::text))::text", [label]
    ).fetchone()
    assert row is not None
    return str(row[0])


def test_an_idle_worker_is_notified_and_starts_at_once(
    jobs: Jobs, workers: Workers, other: psycopg.Connection
) -> None:
    workers.start(*SLEEPY)
    other.autocommit = True
    other.execute("listen pgqueue")
    just_looked(jobs)
    assert waited(jobs.finished(jobs.add("echo", "from Python"))) < SOON
    assert "default" in [notify.payload for notify in other.notifies(timeout=5, stop_after=1)]
    just_looked(jobs)
    (found,) = jobs.sql("select pgqueue.enqueue('tests_app.echo', '[\"from SQL\"]')::text as id")
    assert waited(jobs.finished(found["id"])) < SOON
    just_looked(jobs)
    many = jobs.add_many("echo", [(index,) for index in range(300)])
    assert jobs.ends(many) == Counter(succeeded=300)
    assert waited(min(map(jobs.finished, many[:5]), key=lambda row: row["claimed_at"])) < SOON


@pytest.mark.parametrize("open_for", [0.5, 3.0])
def test_a_transaction_that_read_nobody_sleeps_and_commits_later_is_found(
    jobs: Jobs, workers: Workers, other: psycopg.Connection, open_for: float
) -> None:
    # It enqueued before the worker slept, so it did not notify; it commits when the worker sleeps already.
    job = enqueue(other)
    before = now(jobs)
    workers.start(*SLEEPY)
    eventually(lambda: armed(jobs), "the worker sleeps")
    eventually(
        lambda: (now(jobs) - before).total_seconds() >= open_for, "the transaction was open for a while"
    )
    other.commit()
    committed = now(jobs)
    row = jobs.finished(job, within=20)
    assert waited(row, committed) < 10, "found long before the worker would look of its own accord"


def test_a_transaction_that_was_open_while_the_worker_was_busy_is_found(
    jobs: Jobs, workers: Workers, other: psycopg.Connection
) -> None:
    workers.start(*SLEEPY)
    many = jobs.add_many("work", [(0.002, index) for index in range(300)])
    late = enqueue(other)  # its position is before that of the jobs below
    many += jobs.add_many("mark", [(index,) for index in range(300)])
    jobs.ends(many)
    other.commit()
    committed = now(jobs)
    assert waited(jobs.finished(late, within=20), committed) < 10


def test_a_rolled_back_enqueue_does_not_run(
    jobs: Jobs, workers: Workers, ledger: Ledger, other: psycopg.Connection
) -> None:
    workers.start(*SLEEPY)
    eventually(lambda: armed(jobs), "the worker sleeps")
    for number in range(20):
        enqueue(other, f"undone {number}")
        other.rollback()
    kept = enqueue(other, "kept")
    other.execute("savepoint before")
    enqueue(other, "undone to the savepoint")
    other.execute("rollback to savepoint before")
    other.commit()
    jobs.finished(kept)
    assert ledger.labels() == ["kept"]
    assert jobs.sql("select count(*) as n from pgqueue.all_jobs")[0]["n"] == 1


class TestScheduled:
    def test_a_job_runs_when_it_is_due(self, jobs: Jobs, workers: Workers) -> None:
        workers.start(*SLEEPY)
        just_looked(jobs)
        row = jobs.finished(jobs.add("echo", 1, countdown=1.0))
        assert row["claimed_at"] >= row["eta"]
        assert waited(row, row["eta"]) < 1.5, "not at the next look, two seconds later"
        # One that is due sooner than the one the worker waits for.
        far = jobs.add("echo", "far", countdown=3_600)
        just_looked(jobs)
        row = jobs.finished(jobs.add("echo", "near", countdown=0.5))
        assert waited(row, row["eta"]) < SOON
        assert jobs.live(far)["state"] == "scheduled"

    def test_a_retry_is_not_forgotten(self, jobs: Jobs, workers: Workers) -> None:
        # With a slot free the worker sleeps while the job runs; when it fails, it must look again.
        workers.start(*SLEEPY, "-c", "2")
        for _ in range(3):
            job = jobs.add("asks_again", {"countdown": 0.05}, 1, 0.7)
            row = jobs.finished(job)
            (failure,) = jobs.failures(job)
            assert waited(row, failure["failed_at"]) < SOON


class TestListening:
    def terminate(self, jobs: Jobs) -> None:
        query = """select pg_terminate_backend(pid) from pg_stat_activity
                   where datname = current_database() and application_name = 'pgqueue listen'"""
        assert len(jobs.sql(query)) == 1

    def listening(self, jobs: Jobs) -> list[Row]:
        return jobs.sql(
            """select pid from pg_stat_activity where datname = current_database()
               and application_name = 'pgqueue listen' and query like 'LISTEN%%' and state = 'idle'"""
        )

    def test_it_comes_back_after_its_connection_was_cut(self, jobs: Jobs, workers: Workers) -> None:
        workers.start(*SLEEPY)
        eventually(lambda: armed(jobs), "the worker sleeps")
        self.terminate(jobs)
        during = jobs.add("echo", "while nobody listens")
        assert waited(jobs.finished(during)) < 10
        eventually(lambda: self.listening(jobs), "it listens again")
        just_looked(jobs)
        assert waited(jobs.finished(jobs.add("echo", "after"))) < SOON

    def test_it_hears_of_queues_it_has_just_found(self, jobs: Jobs, workers: Workers) -> None:
        workers.start(*SLEEPY, all_queues=True)
        jobs.finished(jobs.add("echo", 1, queue="found"))
        eventually(lambda: armed(jobs, "found"), "it asks to be woken for the new queue")


def test_the_first_job_in_a_new_queue_starts_at_once(jobs: Jobs, workers: Workers) -> None:
    # It looks for new queues by itself every six seconds, so four in a row are no accident.
    workers.start(*SLEEPY, "--heartbeat", "60", "--lease", "600", all_queues=True)
    eventually(lambda: armed(jobs, "*"), "it asks to be woken for queues that nobody knows")
    for number in range(4):
        if number:
            eventually(lambda: armed(jobs, f"new-{number - 1}"), "it sleeps again")  # noqa: B023
        add = jobs.add("echo", number, queue=f"new-{number}")
        assert waited(jobs.finished(add)) < SOON
    due = jobs.add("echo", "later", queue="new-and-later", countdown=1.0)
    row = jobs.finished(due)
    assert waited(row, row["eta"]) < SOON


class TestHint:
    def test_armed_when_idle_and_renewed(self, jobs: Jobs, workers: Workers) -> None:
        worker = workers.start(*SLEEPY, "-Q", "default,other")
        for queue in ("default", "other"):
            eventually(lambda queue=queue: armed(jobs, queue), "armed")  # type: ignore[misc]
        just_looked(jobs)
        ahead = jobs.sql(
            "select extract(epoch from wake_until - clock_timestamp()) as ahead from pgqueue.wake"
        )
        assert all(8 < row["ahead"] <= 10 for row in ahead)
        assert worker.stop() == 0

    def test_disarmed_while_jobs_rush_in(self, jobs: Jobs, workers: Workers) -> None:
        # Armed all the time, each of these enqueues would pay for a NOTIFY.
        workers.start("-c", "2")
        eventually(lambda: armed(jobs), "the worker sleeps")
        stop = threading.Event()
        enqueued: list[int] = []

        def produce() -> None:
            count = 0
            with psycopg.connect(jobs.dsn, autocommit=True) as connection:
                while not stop.is_set():
                    connection.execute("select pgqueue.enqueue('tests_app.echo', '[1]')")
                    count += 1
            enqueued.append(count)

        producers = [threading.Thread(target=produce) for _ in range(4)]
        started = time.monotonic()
        for each in producers:
            each.start()
        try:
            query = (
                "select true as yes from pgqueue.wake where queue = 'default' and wake_until = '-infinity'"
            )
            disarmed = False
            while not disarmed and time.monotonic() - started < 20:
                disarmed = bool(jobs.sql(query))
        finally:
            stop.set()
            for each in producers:
                each.join()
        rate = sum(enqueued) / (time.monotonic() - started)
        if not disarmed and rate < 5 * RUSH:
            pytest.skip(f"only {rate:.0f} enqueues a second here: too few for a rush")
        assert disarmed, f"{rate:.0f} enqueues a second, and each pays for a notification"
        # And when the rush is over it sleeps again, with all jobs done.
        eventually(lambda: not jobs.sql("select id from pgqueue.jobs limit 1"), "all jobs end")
        eventually(lambda: armed(jobs), "the worker sleeps again")
        just_looked(jobs)
        assert waited(jobs.finished(jobs.add("echo", 1))) < SOON


def test_a_sleeping_worker_helps_one_that_is_full(jobs: Jobs, workers: Workers, ledger: Ledger) -> None:
    """Two sleepers, one of them knows of the work: it wakes the other."""
    pair = [workers.start(*SLEEPY) for _ in range(2)]
    eventually(lambda: armed(jobs), "they sleep")
    many = jobs.add_many("work", [(0.05, index) for index in range(60)])
    assert jobs.ends(many) == Counter(succeeded=60)
    ran: Counter[Any] = Counter(note["worker"] for note in ledger.entries("start"))
    assert set(ran) == {worker.id for worker in pair}
    assert min(ran.values()) >= 10
