"""A database that is not there, goes away, or is the wrong one: what the worker does, and what it says."""

from __future__ import annotations

import re
import signal
import time
from collections import Counter
from urllib.parse import urlsplit, urlunsplit

import psycopg
import pytest

from pgqueue.database.migrate import head_revision
from tests.acceptance.conftest import Place
from tests.acceptance.workers import Gate, Jobs, Ledger, Worker, Workers, eventually

NOWHERE = "postgresql://nobody@127.0.0.1:1/nothing"


def complaints(worker: Worker) -> list[str]:
    """What the worker had to say beyond the ordinary."""
    return [line for line in worker.log.splitlines() if not re.search(r"INFO|SUCCEEDED", line)]


def let_pass(seconds: float) -> None:
    """For what must *not* happen in a while."""
    time.sleep(seconds)


class TestOutage:
    def test_a_worker_may_be_started_before_its_database(self, place: Place) -> None:
        place.server.stop(signal.SIGINT)
        worker = place.workers.start("-c", "1", ready=False)
        worker.wait_for_log("database_unavailable")
        place.server.start()
        worker.wait_for_log("worker_started")
        assert place.jobs.finished(place.jobs.add("echo", "hello"))["result"] == "hello"
        assert len(complaints(worker)) == 1, complaints(worker)

    @pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGQUIT], ids=["fast", "immediate"])
    def test_jobs_run_through_a_restart(self, place: Place, gate: Gate, number: signal.Signals) -> None:
        jobs, ledger = place.jobs, place.ledger
        worker = place.workers.start("-c", "2")
        held = jobs.add("gated", gate.path)
        eventually(lambda: ledger.count() == 1, "it runs")
        many = jobs.add_many("work", [(0.01, index) for index in range(300)])
        eventually(lambda: ledger.count("end") >= 30, "some have run")
        place.server.stop(number)
        worker.wait_for_log("database_unavailable connection=claim")
        gate.open()
        eventually(lambda: ledger.of(held, "end"), "the body ends while the database is away")
        assert worker.process.poll() is None
        place.server.start()
        assert jobs.ends([held, *many]) == Counter(succeeded=301)
        assert ledger.runs() == dict.fromkeys([held, *many], 1)
        row = jobs.finished(held)
        assert (row["result"], row["attempt"], row["worker_id"]) == ("through the gate", 1, worker.id)
        # It listens again, and its log says what happened without going on about it.
        assert jobs.finished(jobs.add("echo", "after"))["result"] == "after"
        assert 1 <= len(complaints(worker)) <= 8, complaints(worker)
        assert "Traceback" not in worker.log
        assert worker.stop() == 0
        assert "stale_acks=0" in worker.log

    def test_it_fences_nobody(self, place: Place, gate: Gate) -> None:
        # Whoever is back first finds every heartbeat old: that says nothing about who is alive.
        jobs, ledger = place.jobs, place.ledger
        quick = ("-c", "1", "--heartbeat", "0.3", "--lease", "1")
        pair = [place.workers.start(*quick), place.workers.start(*quick)]
        held = jobs.add_many("gated", [(gate.path,)] * 2)
        eventually(lambda: ledger.count() == 2, "both run")
        place.server.stop(signal.SIGQUIT)
        let_pass(2.5)
        place.server.start()
        heartbeats = "select sum(heartbeat) as n from pgqueue.workers"
        before = jobs.sql(heartbeats)[0]["n"]
        eventually(lambda: jobs.sql(heartbeats)[0]["n"] >= before + 10, "both beat again")
        gate.open()
        assert jobs.ends(held) == Counter(succeeded=2)
        assert set(ledger.runs().values()) == {1}
        assert not [worker.log for worker in pair if "fenced" in worker.log]

    def test_a_worker_can_be_stopped_during_one(self, place: Place, gate: Gate) -> None:
        jobs, ledger = place.jobs, place.ledger
        worker = place.workers.start("-c", "1", "--heartbeat", "0.3", "--lease", "1")
        done = jobs.add("gated", gate.path)
        eventually(lambda: ledger.count() == 1, "it runs")
        place.server.stop(signal.SIGINT)
        worker.send(signal.SIGTERM)
        worker.wait_for_log("worker_stopping")
        gate.open()
        worker.wait(within=30)
        assert "Traceback" not in worker.log
        assert "worker_left_jobs unacked=1" in worker.log
        assert place.workers.processes() == []
        place.server.start()
        place.workers.start("-c", "1", "--heartbeat", "0.3", "--lease", "1")
        assert jobs.ends([done]) == Counter(succeeded=1)
        assert ledger.runs()[done] == 2, "its outcome was never written, so it ran again"

    def test_a_worker_that_waits_for_its_database_can_be_stopped(self, place: Place) -> None:
        place.server.stop(signal.SIGINT)
        worker = place.workers.start("-c", "1", ready=False)
        worker.wait_for_log("database_unavailable")
        worker.stop(within=20)
        assert "Traceback" not in worker.log


class TestConnections:
    def test_each_of_them_may_be_cut_under_load(self, jobs: Jobs, workers: Workers, ledger: Ledger) -> None:
        worker = workers.start("-c", "2")
        many = jobs.add_many("work", [(0.002, index) for index in range(1_500)])
        cut = 0
        for wanted in range(50, 1_450, 100):
            eventually(lambda wanted=wanted: ledger.count("end") >= wanted, "they run")  # type: ignore[misc]
            name = ("claim", "maintenance", "listen")[cut % 3]
            found = jobs.sql(
                """select pg_terminate_backend(pid) as done from pg_stat_activity
                   where datname = current_database() and application_name = %s""",
                f"pgqueue {name}",
            )
            cut += len(found)
        assert cut >= 9
        assert jobs.ends(many) == Counter(succeeded=1_500)
        assert ledger.runs() == dict.fromkeys(many, 1)
        assert len(complaints(worker)) <= 2 * cut + 4, complaints(worker)
        assert "Traceback" not in worker.log
        names = """select application_name as name from pg_stat_activity
                   where datname = current_database() and application_name like 'pgqueue %%'"""
        three = ["pgqueue claim", "pgqueue listen", "pgqueue maintenance"]
        eventually(lambda: sorted(row["name"] for row in jobs.sql(names)) == three, "it has its three again")
        assert worker.stop() == 0
        assert "stale_acks=0" in worker.log

    def test_a_read_only_database_is_waited_for(self, place: Place, gate: Gate) -> None:
        # As after a failover to a server that has not been promoted yet.
        jobs, ledger = place.jobs, place.ledger
        worker = place.workers.start("-c", "1")
        held = jobs.add("gated", gate.path)
        eventually(lambda: ledger.count() == 1, "it runs")
        name = jobs.sql("select current_database() as name")[0]["name"]

        def make(how: str) -> None:
            with place.server.connect() as connection:
                connection.execute(
                    f"alter database {name} set default_transaction_read_only = {how}".encode()
                )
                connection.execute(
                    "select pg_terminate_backend(pid) from pg_stat_activity where datname = %s", [name]
                )

        make("on")
        gate.open()
        eventually(lambda: ledger.of(held, "end"), "the body ends")
        sessions = (
            "select pid from pg_stat_activity where datname = current_database() and application_name = %s"
        )
        for connection in ("pgqueue claim", "pgqueue maintenance"):
            eventually(lambda of=connection: jobs.sql(sessions, of), f"{connection} is back")  # type: ignore[misc]
        let_pass(0.5)
        assert jobs.live(held)["state"] == "running", "nothing can be written"
        make("off")
        row = jobs.finished(held)
        assert (row["attempt"], row["result"]) == (1, "through the gate")
        assert jobs.finished(jobs.add("echo", 1))["result"] == 1
        assert len(complaints(worker)) <= 12, complaints(worker)

    def test_somebody_locks_the_table_for_a_while(
        self, jobs: Jobs, workers: Workers, ledger: Ledger, gate: Gate
    ) -> None:
        worker = workers.start("-c", "2")
        held = jobs.add("gated", gate.path)
        eventually(lambda: ledger.count() == 1, "it runs")
        with psycopg.connect(jobs.dsn) as locker:
            locker.execute("lock table pgqueue.jobs in access exclusive mode")
            gate.open()
            worker.wait_for_log("database_unavailable connection=claim.*55P03")
            locker.rollback()
        assert jobs.finished(held)["attempt"] == 1
        assert jobs.finished(jobs.add("echo", 1))["result"] == 1
        assert len(complaints(worker)) <= 6, complaints(worker)


class TestRefusals:
    """A worker that cannot start says why in one line."""

    def refused(self, workers: Workers, dsn: str | None, status: int, app: str = "tests_app:app") -> str:
        done = workers.run("-A", app, "worker", "-c", "1", env={"PGQUEUE_DSN": dsn})
        assert done.returncode == status, (done.returncode, done.stderr)
        assert "Traceback" not in done.stderr
        lines = done.stderr.strip().splitlines()
        assert len(lines) == 1, done.stderr
        assert lines[0].startswith("pgqueue: ")
        assert done.stdout == ""
        return lines[0]

    def test_a_wrong_password(self, place: Place) -> None:
        parts = urlsplit(place.jobs.dsn)
        netloc = f"postgres:not-the-secret@{parts.hostname}:{parts.port}"
        line = self.refused(place.workers, urlunsplit(parts._replace(netloc=netloc)), 4)
        assert "password authentication failed" in line
        assert "not-the-secret" not in line

    def test_a_database_that_is_not_there(self, place: Place) -> None:
        line = self.refused(place.workers, place.server.dsn_of("no_such_database"), 4)
        assert 'database "no_such_database" does not exist' in line

    def test_a_host_that_is_not_there(self, workers: Workers) -> None:
        line = self.refused(workers, "postgresql://postgres@no-such-host.invalid/x", 4)
        assert "no-such-host.invalid" in line

    def test_a_database_without_the_schema(self, place: Place) -> None:
        line = self.refused(place.workers, place.server.new_database("template1"), 5)
        assert "run `pgqueue migrate`" in line

    @pytest.mark.parametrize(
        ("revision", "way_out"), [("0000", "run `pgqueue migrate`"), ("9999", "upgrade pgqueue")]
    )
    def test_another_revision(self, place: Place, revision: str, way_out: str) -> None:
        place.jobs.sql("update pgqueue.alembic_version set version_num = %s", revision)
        place.jobs.sql("update pgqueue.meta set oldest_code_revision = %s", revision)
        line = self.refused(place.workers, place.jobs.dsn, 5)
        assert revision in line
        assert head_revision() in line
        assert way_out in line

    def test_no_database_named(self, workers: Workers) -> None:
        assert "PGQUEUE_DSN" in self.refused(workers, None, 2)

    def test_something_that_is_no_address(self, workers: Workers) -> None:
        self.refused(workers, "postgresql://[", 2)

    def test_settings_that_do_not_go_together(self, workers: Workers) -> None:
        done = workers.run("-A", "tests_app:app", "worker", "--heartbeat", "10", "--lease", "1")
        assert done.returncode == 2
        assert done.stderr.splitlines() == [
            "pgqueue: lease must be at least 3 times heartbeat (10 s), got 1",
        ]

    @pytest.mark.parametrize(
        ("target", "hint"),
        [
            ("no_such_module:app", "no module 'no_such_module'"),
            ("tests_app:ap", "tests_app:app"),
            ("tests_app:echo", "must be a PgQueue"),
            (":app", "module:attribute"),
        ],
    )
    def test_a_misspelt_application(self, workers: Workers, target: str, hint: str) -> None:
        line = self.refused(workers, NOWHERE, 6, app=target)
        assert hint in line

    def test_no_application_named(self, workers: Workers) -> None:
        done = workers.run("worker")
        assert done.returncode == 2
        assert "-A module:attribute" in done.stderr
        assert "Traceback" not in done.stderr

    @pytest.mark.parametrize(
        ("target", "line", "place_"),
        [
            ("broken_app:app", "ZeroDivisionError", "broken_app.py"),
            (
                "broken_import_app:app",
                "ModuleNotFoundError: No module named 'no_such_package'",
                "broken_import_app.py",
            ),
            ("broken_syntax_app:app", "SyntaxError", "broken_syntax_app.py"),
            ("lost_tasks_app:app", "no_such_tasks", "no_such_tasks"),
            ("exits_app:app", "SystemExit", "exits_app.py"),
        ],
    )
    def test_an_application_that_cannot_be_imported_shows_where(
        self, workers: Workers, target: str, line: str, place_: str
    ) -> None:
        done = workers.run("-A", target, "worker", "-c", "1", env={"PGQUEUE_DSN": NOWHERE})
        assert done.returncode == 6
        assert place_ in done.stderr
        ours = [each for each in done.stderr.splitlines() if each.startswith("pgqueue: ")]
        assert len(ours) == 1
        assert line in ours[0]
        assert done.stderr.count("Traceback (most recent call last)") == 1


class TestWhichDatabase:
    def runs_a_job(self, jobs: Jobs, worker: Worker) -> bool:
        return bool(jobs.finished(jobs.add("dsn_app.where"))["worker_id"] == worker.id)

    def test_the_environments(self, jobs: Jobs, workers: Workers) -> None:
        worker = workers.start("-c", "1", app="dsn_app:app", env={"PGQUEUE_DSN": jobs.dsn, "APP_DSN": ""})
        assert self.runs_a_job(jobs, worker)

    def test_the_applications_beats_the_environments(self, jobs: Jobs, workers: Workers) -> None:
        worker = workers.start(
            "-c", "1", app="dsn_app:app", env={"PGQUEUE_DSN": NOWHERE, "APP_DSN": jobs.dsn}
        )
        assert self.runs_a_job(jobs, worker)

    def test_the_flags_beats_both(self, jobs: Jobs, workers: Workers) -> None:
        worker = workers.start(
            "-c", "1", app="dsn_app:app", env={"PGQUEUE_DSN": NOWHERE, "APP_DSN": NOWHERE},
            options=("--dsn", jobs.dsn),
        )  # fmt: skip
        assert self.runs_a_job(jobs, worker)

    def test_a_task_enqueues_where_its_worker_works(self, jobs: Jobs, workers: Workers) -> None:
        workers.start(
            "-c", "1", app="dsn_app:app", env={"PGQUEUE_DSN": NOWHERE, "APP_DSN": NOWHERE},
            options=("--dsn", jobs.dsn),
        )  # fmt: skip
        child = jobs.finished(jobs.add("dsn_app.enqueues"))["result"]
        assert jobs.finished(child)["task"] == "dsn_app.where"
