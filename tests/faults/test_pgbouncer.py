"""Everything works behind PgBouncer, which hands its connections out by the transaction or by the session."""

from __future__ import annotations

import asyncio
import json
import re
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any
from uuid import uuid4

import psycopg
import pytest

from pgqueue import DatabaseError, PgQueue
from pgqueue.database import pool
from pgqueue.database.migrate import upgrade
from tests.acceptance.workers import Jobs, Worker, Workers, eventually
from tests.faults.pgbouncer import PgBouncer, pgbouncer
from tests.faults.relay import Relay

SETTINGS = ("statement_timeout", "lock_timeout", "synchronous_commit", "enable_seqscan")
MOST_THREADS = 6
POLLED = 1.2
"""Seconds: more than the half between two looks, less than the 1.8 until the next of a worker that means to
look every five."""
HEARD = 2.0
"""Seconds: less than the three between two looks of a worker that listens."""


@pytest.fixture
def bouncer(db: str) -> Iterator[PgBouncer]:
    """By the transaction, in front of the empty queue of this test."""
    with pgbouncer(db) as bouncer:
        yield bouncer


@pytest.fixture
def jobs(db: str) -> Iterator[Jobs]:
    """The queue, past PgBouncer."""
    with closing(Jobs(db)) as jobs:
        yield jobs


@pytest.fixture
def workers(bouncer: PgBouncer, tmp_path: Path) -> Iterator[Workers]:
    """Starts workers that reach their queue through PgBouncer."""
    with Workers(bouncer.dsn, tmp_path) as workers:
        yield workers


def make_app(dsn: str) -> PgQueue:
    app = PgQueue("tests", dsn=dsn)
    app.task(name="tests.note")(lambda number: None)
    return app


def enqueued(jobs: Jobs) -> set[str]:
    return {row["id"] for row in jobs.sql("select id::text as id from pgqueue.jobs")}


def armed(jobs: Jobs) -> bool:
    """Whether a worker has asked to be woken."""
    return bool(jobs.sql("select true as yes from pgqueue.wake where wake_until > clock_timestamp()"))


def listens(jobs: Jobs) -> bool:
    """Whether a session of a worker's listening connection is there, and not through PgBouncer."""
    query = """select true as yes from pg_stat_activity where datname = current_database()
               and application_name = 'pgqueue listen'"""
    return bool(jobs.sql(query))


def wait(jobs: Jobs) -> float:
    """Seconds from the enqueue of a job to its claim."""
    row = jobs.finished(jobs.add("echo", 1))
    return float((row["claimed_at"] - row["enqueued_at"]).total_seconds())


def idle_wait(jobs: Jobs) -> float:
    """`wait`, in a worker that looks by itself and has had nothing to do for a while; the best of three."""
    found = []
    while not found or (found[-1] >= POLLED and len(found) < 3):
        wait(jobs)
        time.sleep(
            2.3
        )  # it looks after 2, 4, 8 … ms: without a shorter interval, next 4.1 s after its last job
        found.append(wait(jobs))
    return found[-1]


def heard_wait(jobs: Jobs) -> float:
    """`wait`, in a worker that has just looked, and will not by itself for three seconds."""

    def hint() -> Any:
        found = jobs.sql("select wake_until from pgqueue.wake where wake_until > clock_timestamp()")
        return found[0]["wake_until"] if found else None

    before = eventually(hint, "it asks to be woken")
    eventually(lambda: hint() != before, "it asks again")
    return wait(jobs)


def warnings(worker: Worker) -> list[str]:
    return [line for line in worker.log.splitlines() if " WARNING " in line or " ERROR " in line]


class TestProducers:
    def test_every_way_to_enqueue(self, bouncer: PgBouncer, jobs: Jobs) -> None:
        app = make_app(bouncer.dsn)
        note = app.find_task("tests.note")
        mine = str(uuid4())
        ids = [note.delay(1).id, note.apply_async((2,), countdown=60, expires=90, headers={"a": 1}).id]
        ids += [note.apply_async((3,), job_id=mine).id, note.apply_async((3,), job_id=mine).id]
        ids += app.enqueue_many([note.s(4), note.s(5)])
        ids += app.enqueue_many([note.s(6).set(job_id=str(uuid4()))])
        with psycopg.connect(bouncer.dsn) as connection:
            ids += [note.on(connection).delay(7).id]
            ids += app.enqueue_many([note.s(8), note.s(9)], connection=connection)

        async def main() -> list[str]:
            found = [(await note.adelay(10)).id, *await app.aenqueue_many([note.s(11)])]
            async with await psycopg.AsyncConnection.connect(bouncer.dsn) as connection:
                found += [(await note.on(connection).adelay(12)).id]
            return found

        ids += asyncio.run(main())
        assert app.AsyncResult(ids[0]).state == "ready"
        assert app.AsyncResult(ids[1]).state == "scheduled"
        app.close()
        assert ids.count(mine) == 2
        assert enqueued(jobs) == set(ids)

    def test_many_threads_and_few_connections(self, bouncer: PgBouncer, jobs: Jobs) -> None:
        # Each client often meets another server connection: nothing may be prepared there.
        apps = [make_app(bouncer.dsn) for _ in range(2)]
        failed: list[BaseException] = []

        def enqueue(app: PgQueue) -> None:
            try:
                for number in range(25):
                    result = app.find_task("tests.note").delay(number)
                    assert result.state == "ready"
            except BaseException as error:
                failed.append(error)

        threads = [threading.Thread(target=enqueue, args=(apps[n % 2],)) for n in range(MOST_THREADS)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        for app in apps:
            app.close()
        assert failed == []
        assert len(enqueued(jobs)) == 25 * MOST_THREADS

    def test_nothing_waits_for_ever(self, db: str, bouncer: PgBouncer, monkeypatch: Any) -> None:
        monkeypatch.setattr(pool, "LOCK_TIMEOUT", "200ms")
        app = make_app(bouncer.dsn)
        with psycopg.connect(db) as locker:
            locker.execute("lock table pgqueue.jobs in access exclusive mode")
            with pytest.raises(DatabaseError, match="another session locks a table of the queue"):
                app.find_task("tests.note").delay(1)
            with pytest.raises(DatabaseError, match="another session locks a table of the queue"):
                asyncio.run(app.find_task("tests.note").adelay(1))
        app.close()

    def test_no_setting_is_left_to_the_next_client(
        self, db: str, jobs: Jobs, monkeypatch: Any, tmp_path: Path
    ) -> None:
        name = jobs.sql("select current_database() as name")[0]["name"]
        jobs.sql(f"alter database {name} set synchronous_commit = off")
        try:
            with pgbouncer(db, pool_size=1) as bouncer:
                with psycopg.connect(bouncer.dsn, autocommit=True) as connection:

                    def settings() -> list[Any]:
                        return [connection.execute(f"show {each}").fetchone() for each in SETTINGS]

                    before = settings()
                    assert before[2] == ("off",)
                    app = make_app(bouncer.dsn)
                    shown: list[Any] = []

                    def look(channel: Any) -> Any:
                        for each in SETTINGS:
                            shown.append(channel.connection.execute(f"show {each}").fetchone())
                        return
                        yield

                    app.client.database.run(look)
                    app.find_task("tests.note").delay(1)
                    asyncio.run(app.find_task("tests.note").adelay(1))
                    app.close()
                    assert [each[0] for each in shown[:3]] == ["30s", "10s", "on"]
                    assert settings() == before
                with Workers(bouncer.dsn, tmp_path) as workers:
                    workers.start("-c", "1", "--no-listen")
                    jobs.finished(jobs.add("echo", 1))
                with psycopg.connect(bouncer.dsn, autocommit=True) as connection:
                    assert settings() == before
        finally:
            jobs.sql(f"alter database {name} reset synchronous_commit")

    def test_commands(self, db: str, fresh_dsn: str, workers: Workers, jobs: Jobs) -> None:
        jobs.add("echo", 1)
        for command in (
            ("inspect", "queues", "--json"),
            ("inspect", "active", "--json"),
            ("dead", "list", "--json"),
            ("migrate",),
        ):
            done = workers.run(*command)
            assert done.returncode == 0, (command, done.stderr)
        done = workers.run("-A", "tests_app:app", "enqueue", "tests_app.echo", "--args", "[2]")
        assert done.returncode == 0, done.stderr
        assert len(enqueued(jobs)) == 2
        assert json.loads(workers.run("inspect", "queues", "--json").stdout)

    def test_migration_of_an_empty_database(self, fresh_dsn: str) -> None:
        with pgbouncer(fresh_dsn) as bouncer:
            assert upgrade(bouncer.dsn) is None
            assert upgrade(bouncer.dsn) is not None


class TestWorkers:
    def test_a_pooler_that_hears_nothing_is_found_and_polled(self, workers: Workers, jobs: Jobs) -> None:
        worker = workers.start("-c", "2")
        line = worker.wait_for_log(r"pooler_found error=(.*)").group(1)
        assert "--listen-dsn" in line
        assert "--no-listen" in line
        assert idle_wait(jobs) < POLLED
        assert not armed(jobs), "it asks for notifications that it cannot hear"
        assert len(warnings(worker)) == 1, warnings(worker)
        assert worker.stop() == 0

    def test_all_a_worker_does(self, workers: Workers, jobs: Jobs) -> None:
        flags = ("-c", "2", "--heartbeat", "0.3", "--lease", "1.5", "--no-listen")
        first = workers.start(*flags)
        quick = jobs.add_many("work", [(0.001, number) for number in range(400)])
        others = [
            jobs.add("fails_until", 2),
            jobs.add("echo", "later", countdown=0.5),
            jobs.add("echo", "x" * 20_000),
            jobs.add("die", "kill", 1),
        ]
        dead = jobs.add("fails_with_a_place")
        eventually(lambda: workers.ledger.count("end") > 50, "they run")
        first.kill()
        second = workers.start(*flags)
        assert jobs.ends([*quick, *others]) == Counter(succeeded=404)
        assert jobs.dead(dead)["dead_letter_queue"] == "of_the_task"
        assert "Traceback" not in second.log
        assert "prepared statement" not in first.log + second.log
        assert second.stop() == 0

    def test_pgbouncer_is_restarted_under_load(
        self, bouncer: PgBouncer, workers: Workers, jobs: Jobs
    ) -> None:
        worker = workers.start("-c", "2", "--no-listen")
        many = jobs.add_many("work", [(0.003, number) for number in range(500)])
        for wanted in (50, 200):
            eventually(lambda wanted=wanted: workers.ledger.count("end") > wanted, "they run")  # type: ignore[misc]
            bouncer.stop()
            bouncer.start()
        assert jobs.ends(many) == Counter(succeeded=500)
        assert workers.ledger.runs() == dict.fromkeys(many, 1)
        assert worker.stop() == 0

    def test_a_direct_connection_to_listen_on(self, db: str, workers: Workers, jobs: Jobs) -> None:
        worker = workers.start("-c", "1", "--listen-dsn", db, "--poll-interval", "60")
        assert heard_wait(jobs) < HEARD
        assert listens(jobs)
        assert warnings(worker) == []

    def test_a_listen_dsn_that_leads_elsewhere(self, fresh_dsn: str, workers: Workers, jobs: Jobs) -> None:
        worker = workers.start("-c", "1", env={"PGQUEUE_LISTEN_DSN": fresh_dsn})
        worker.wait_for_log("pooler_found error=the listen_dsn hears nothing .* to the same database")
        assert idle_wait(jobs) < POLLED
        assert not armed(jobs)

    def test_while_the_listening_connection_is_lost_it_polls(
        self, db: str, workers: Workers, jobs: Jobs
    ) -> None:
        with Relay(db) as relay:
            worker = workers.start("-c", "1", "--listen-dsn", relay.dsn)
            eventually(lambda: armed(jobs), "it asks to be woken")
        worker.wait_for_log("database_unavailable connection=listen")
        assert idle_wait(jobs) < POLLED
        with Relay(db, relay.port) as relay:
            assert heard_wait(jobs) < HEARD

    def test_a_pooler_by_the_session_is_listened_through(self, db: str, jobs: Jobs, tmp_path: Path) -> None:
        with pgbouncer(db, "session", pool_size=10) as bouncer, Workers(bouncer.dsn, tmp_path) as workers:
            worker = workers.start("-c", "1", "--poll-interval", "60")
            assert heard_wait(jobs) < HEARD
            assert warnings(worker) == []

    def test_polling_by_choice(self, db: str, jobs: Jobs, tmp_path: Path) -> None:
        with Workers(db, tmp_path) as workers:
            worker = workers.start("-c", "1", env={"PGQUEUE_LISTEN": "false"})
            assert idle_wait(jobs) < POLLED
            assert not armed(jobs)
            assert not listens(jobs)
            assert warnings(worker) == []
            assert re.search("worker_started", worker.log)
