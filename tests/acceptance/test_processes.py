"""Processes that die, freeze or are asked to leave: what it costs, who takes over, that nobody is left."""

from __future__ import annotations

import os
import re
import signal
import time
from collections import Counter

import psutil
import pytest

from tests.acceptance.workers import Gate, Jobs, Ledger, Worker, Workers, eventually, gone, living

QUICK = ("--heartbeat", "0.3", "--lease", "1")
"""So that a dead worker is missed within about two seconds."""


def running(jobs: Jobs) -> int:
    return int(jobs.sql("select count(*) as n from pgqueue.jobs where state = 'running'")[0]["n"])


def settled(worker: Worker, concurrency: int) -> list[psutil.Process]:
    """The worker's executors, once there are as many as there should be."""

    def look() -> list[psutil.Process]:
        try:
            found = worker.executors
        except (StopIteration, psutil.NoSuchProcess):
            return []
        return found if len(found) == concurrency else []

    return eventually(look, f"{concurrency} executors")


class TestExecutors:
    def test_a_killed_one_costs_the_job_it_ran(
        self, jobs: Jobs, workers: Workers, ledger: Ledger, gate: Gate
    ) -> None:
        worker = workers.start("-c", "2")
        before = {each.pid for each in settled(worker, 2)}
        victim, other = jobs.add_many("gated", [(gate.path, "victim"), (gate.path, "other")])
        eventually(lambda: ledger.count() == 2, "both run")
        (note,) = ledger.of(victim)
        os.kill(note["pid"], signal.SIGKILL)
        waiting = jobs.until(victim, "scheduled")
        assert (waiting["attempt"], waiting["retries"], waiting["crashes"]) == (1, 0, 1)
        (failure,) = jobs.failures(victim)
        assert (failure["kind"], failure["attempt"], failure["worker_id"]) == ("crashed", 1, worker.id)
        assert (
            f"{note['pid']} was killed by SIGKILL while running job {victim}, attempt 1"
            in failure["error_message"]
        )
        after = {each.pid for each in settled(worker, 2)}
        assert len(after & before) == 1
        gate.open()
        row = jobs.finished(victim)
        assert (row["result"], row["attempt"], row["retries"], row["crashes"]) == (
            "through the gate",
            2,
            0,
            1,
        )
        row = jobs.finished(other)
        assert (row["attempt"], row["crashes"], row["rescues"]) == (1, 0, 0)
        assert ledger.runs() == {victim: 2, other: 1}

    @pytest.mark.parametrize("concurrency", ["1", "2"])
    def test_one_that_dies_in_a_chunk_of_short_jobs_costs_one_of_them(
        self, jobs: Jobs, workers: Workers, ledger: Ledger, concurrency: str
    ) -> None:
        workers.start("-c", concurrency)
        jobs.ends(
            jobs.add_many("chancy", [(index,) for index in range(400)])
        )  # now they are known to be short
        arguments = [(index, "", index in (300, 301, 700)) for index in range(1_000)]
        chunked = jobs.add_many("chancy", arguments)
        assert jobs.ends(chunked) == Counter(succeeded=1_000)
        fatal = {chunked[300], chunked[301], chunked[700]}
        runs = ledger.runs()
        assert {job: runs[job] for job in fatal} == dict.fromkeys(fatal, 2)
        assert [job for job in chunked if job not in fatal and runs[job] != 1] == []
        rows = jobs.sql(
            """select id::text as id, attempt, crashes, retries from pgqueue.finished_jobs
               where id = any(%s::uuid[])""",
            chunked,
        )
        assert {row["id"] for row in rows if row["crashes"]} == fatal
        assert {row["crashes"] for row in rows} == {0, 1}
        assert {row["retries"] for row in rows} == {0}
        last = {note["job"]: note["attempt"] for note in ledger.entries("end")}
        assert {row["id"]: row["attempt"] for row in rows} == {job: last[job] for job in chunked}

    def test_one_that_gets_stuck_gives_its_chunk_back(
        self, jobs: Jobs, workers: Workers, ledger: Ledger, gate: Gate
    ) -> None:
        workers.start("-c", "2")
        jobs.ends(jobs.add_many("chancy", [(index,) for index in range(400)]))
        chunked = jobs.add_many(
            "chancy", [(index, gate.path if index == 500 else "") for index in range(1_000)]
        )
        jobs.wait([job for job in chunked if job != chunked[500]])
        assert jobs.live(chunked[500])["state"] == "running"
        gate.open()
        assert jobs.ends(chunked) == Counter(succeeded=1_000)
        assert set(ledger.runs().values()) == {1}

    def test_a_frozen_one_gives_its_chunk_back(self, jobs: Jobs, workers: Workers, ledger: Ledger) -> None:
        worker = workers.start("-c", "2")
        jobs.ends(jobs.add_many("chancy", [(index,) for index in range(400)]))
        frozen = worker.executors[0]
        chunked = jobs.add_many("chancy", [(index,) for index in range(3_000)])
        eventually(lambda: ledger.count() > 500, "they run")
        frozen.send_signal(signal.SIGSTOP)
        try:
            # All but the one it was in the middle of, if any.
            eventually(
                lambda: jobs.sql("select count(*) as n from pgqueue.jobs")[0]["n"] <= 1,
                "the others run elsewhere",
            )
        finally:
            frozen.send_signal(signal.SIGCONT)
        assert jobs.ends(chunked) == Counter(succeeded=3_000)
        assert set(ledger.runs().values()) == {1}

    @pytest.mark.parametrize(
        ("how", "end"),
        [("exit", "exited with status 0"), ("kill", "killed by SIGKILL"), ("segfault", "killed by SIGSEGV")],
    )
    def test_the_third_death_buries_the_job(
        self, jobs: Jobs, workers: Workers, ledger: Ledger, how: str, end: str
    ) -> None:
        worker = workers.start("-c", "1")
        job = jobs.add("die", how)
        for crashes in (1, 2):
            eventually(
                lambda crashes=crashes: jobs.sql(  # type: ignore[misc]
                    "select id from pgqueue.jobs where id = %s and state = 'scheduled' and crashes = %s",
                    job,
                    crashes,
                ),
                f"it has died {crashes} times",
            )
            jobs.make_due(job)
        letter = jobs.dead(job)
        assert (letter["reason"], letter["crashes"], letter["retries"], letter["attempt"]) == (
            "crashed",
            3,
            0,
            3,
        )
        assert end in letter["error_message"]
        failures = jobs.failures(job)
        assert [(row["attempt"], row["kind"]) for row in failures] == [(n, "crashed") for n in (1, 2, 3)]
        assert ledger.runs() == {job: 3}
        assert jobs.finished(jobs.add("echo", "next"))["result"] == "next"
        assert len(settled(worker, 1)) == 1

    def test_the_limit_is_a_setting_and_the_letter_goes_where_the_task_says(
        self, jobs: Jobs, workers: Workers
    ) -> None:
        workers.start("-c", "1", "--max-crashes", "1")
        letter = jobs.dead(jobs.add("dies_with_a_place"))
        assert (letter["reason"], letter["crashes"], letter["dead_letter_queue"]) == (
            "crashed",
            1,
            "crash_site",
        )

    def test_a_job_that_dies_once_succeeds_at_the_second_attempt(self, jobs: Jobs, workers: Workers) -> None:
        workers.start("-c", "1")
        row = jobs.finished(jobs.add("die", "exit", 1))
        assert (row["result"], row["attempt"], row["crashes"], row["retries"]) == ("survived", 2, 1, 0)


class TestForkServer:
    def test_when_it_is_killed_the_worker_recovers(
        self, jobs: Jobs, workers: Workers, ledger: Ledger, gate: Gate
    ) -> None:
        worker = workers.start("-c", "4")
        held = jobs.add_many("gated", [(gate.path, index) for index in range(2)])
        eventually(lambda: ledger.count() == 2, "both run")
        first, old = worker.fork_server, settled(worker, 4)
        first.kill()
        worker.wait_for_log("fork_server_lost")
        gone(old)
        settled(worker, 4)
        assert worker.fork_server.pid != first.pid
        gate.open()
        assert jobs.ends(held) == Counter(succeeded=2)
        assert {jobs.finished(job)["crashes"] for job in held} == {1}
        assert jobs.ends(jobs.add_many("echo", [(index,) for index in range(200)])) == Counter(succeeded=200)

    def test_it_is_replaced_with_as_many_executors_as_before(self, jobs: Jobs, workers: Workers) -> None:
        worker = workers.start("-c", "6")
        worker.fork_server.kill()
        worker.wait_for_log("fork_server_lost")
        settled(worker, 6)
        # The replacements of the dead ones are spread over three seconds: none may come on top.
        deadline = time.monotonic() + 4
        while time.monotonic() < deadline:
            assert len(worker.executors) <= 6
            time.sleep(0.1)
        assert jobs.ends(jobs.add_many("echo", [(index,) for index in range(50)])) == Counter(succeeded=50)

    def test_the_dead_one_is_buried(self, jobs: Jobs, workers: Workers) -> None:
        worker = workers.start("-c", "1")
        first = worker.fork_server
        first.kill()
        worker.wait_for_log("fork_server_lost")
        jobs.finished(jobs.add("echo", 1))
        eventually(lambda: not psutil.pid_exists(first.pid), "no zombie is left")


class TestSupervisor:
    def test_its_children_die_with_it_and_another_worker_finishes_its_jobs(
        self, jobs: Jobs, workers: Workers, ledger: Ledger
    ) -> None:
        first = workers.start("-c", "2", *QUICK)
        many = jobs.add_many("work", [(0.01, index) for index in range(400)])
        eventually(lambda: ledger.count("end") >= 30, "some have run")
        first.kill()
        assert workers.processes() == []
        left = jobs.sql("select count(*) as n from pgqueue.jobs")[0]["n"]
        assert 0 < left < 400
        assert running(jobs) > 0
        second = workers.start("-c", "2", *QUICK)
        assert jobs.ends(many) == Counter(succeeded=400)
        runs = ledger.runs()
        assert max(runs.values()) <= 2
        assert sum(count - 1 for count in runs.values()) <= 2 + 20, "only what was in flight runs again"
        assert f"worker_fenced id={first.id}" in second.log
        retried = jobs.sql("select count(*) as n from pgqueue.finished_jobs where retries > 0 or crashes > 0")
        assert retried[0]["n"] == 0, (
            "nobody saw these jobs running for a second, so nothing counts against them"
        )

    def test_a_job_it_was_known_to_run_counts_a_crash(
        self, jobs: Jobs, workers: Workers, ledger: Ledger, gate: Gate
    ) -> None:
        first = workers.start("-c", "1", *QUICK)
        job = jobs.add("gated", gate.path)
        eventually(
            lambda: jobs.sql("select id from pgqueue.workers where %s = any(running)", job),
            "the heartbeat has recorded it",
        )
        worker_id = first.id
        first.kill()
        workers.start("-c", "1", *QUICK)
        eventually(lambda: len(ledger.of(job)) == 2, "the other worker runs it")
        gate.open()
        row = jobs.finished(job)
        assert (row["attempt"], row["crashes"], row["rescues"], row["retries"]) == (2, 1, 0, 0)
        (failure,) = jobs.failures(job)
        assert (failure["kind"], failure["error_class"], failure["worker_id"]) == (
            "crashed",
            "WorkerLost",
            worker_id,
        )

    def test_one_that_was_frozen_finds_itself_fenced(
        self, jobs: Jobs, workers: Workers, ledger: Ledger, gate: Gate
    ) -> None:
        frozen = workers.start("-c", "2", *QUICK)
        old_id = frozen.id
        held = jobs.add_many("gated", [(gate.path, index) for index in range(2)])
        eventually(lambda: ledger.count() == 2, "both run")
        other = workers.start("-c", "2", *QUICK)
        frozen.send(signal.SIGSTOP)
        other.wait_for_log(f"worker_fenced id={old_id}")
        eventually(lambda: ledger.count() == 4, "the other worker runs both")
        gate.open()
        eventually(lambda: ledger.count("end") == 4, "all four bodies end")
        assert jobs.ends(held) == Counter(succeeded=2)
        frozen.send(signal.SIGCONT)
        new_id = frozen.wait_for_log(rf"worker_was_fenced id={old_id} new=(\S+)").group(1)
        frozen.wait_for_log("ack_stale count=")
        rows = [jobs.finished(job) for job in held]
        assert [(row["attempt"], row["worker_id"]) for row in rows] == [(2, other.id)] * 2
        assert jobs.ends(held) == Counter(succeeded=2)
        # Under its new name it works on.
        assert other.stop() == 0
        row = jobs.finished(jobs.add("echo", "again"))
        assert row["worker_id"] == new_id != old_id
        assert frozen.stop() == 0
        assert "stale_acks=2" in frozen.log
        assert jobs.sql("select id from pgqueue.workers where not fenced") == []

    def test_one_that_was_frozen_acks_first(
        self, jobs: Jobs, workers: Workers, ledger: Ledger, gate: Gate
    ) -> None:
        # The zombie's ack comes while the other worker is still running the job.
        frozen = workers.start("-c", "1", *QUICK)
        second_gate = Gate(workers.ledger.path.parent)
        job = jobs.add("two_gates", gate.path, second_gate.path)
        eventually(lambda: ledger.count() == 1, "it runs")
        frozen.send(signal.SIGSTOP)
        other = workers.start("-c", "1", *QUICK)
        eventually(lambda: ledger.count() == 2, "the other worker runs it")
        gate.open()
        eventually(lambda: ledger.count("end") == 1, "the first body ends")
        frozen.send(signal.SIGCONT)
        frozen.wait_for_log("ack_stale count=1")
        assert jobs.live(job)["state"] == "running"
        second_gate.open()
        row = jobs.finished(job)
        assert (row["attempt"], row["worker_id"], row["result"]) == (2, other.id, 2)

    def test_a_worker_loads_neither_the_tables_nor_what_prints_them(
        self, jobs: Jobs, workers: Workers
    ) -> None:
        worker = workers.start("-c", "1", env={"PYTHONPROFILEIMPORTTIME": "1"})
        assert jobs.finished(jobs.add("echo", 1))["result"] == 1
        assert worker.stop() == 0
        loaded = set(re.findall(r"^import time: [ 0-9|]+ ([\w.]+)$", worker.log, re.MULTILINE))
        assert {"pgqueue.worker.supervisor", "pgqueue.worker.executor", "psycopg"} <= loaded
        assert loaded & {"sqlalchemy", "alembic", "rich", "pgqueue.database.tables", "psycopg_pool"} == set()

    def test_two_share_a_queue_and_run_each_job_once(
        self, jobs: Jobs, workers: Workers, ledger: Ledger
    ) -> None:
        pair = [workers.start("-c", "2"), workers.start("-c", "2")]
        many = jobs.add_many("work", [(0.0005, index) for index in range(5_000)])
        assert jobs.ends(many, within=90) == Counter(succeeded=5_000)
        assert ledger.runs() == dict.fromkeys(many, 1)
        shares = jobs.sql("select worker_id, count(*) as n from pgqueue.finished_jobs group by 1")
        assert {row["worker_id"] for row in shares} == {worker.id for worker in pair}
        assert [worker.stop() for worker in pair] == [0, 0]
        assert all("stale_acks=0" in worker.log for worker in pair)


class TestStopping:
    def test_an_idle_worker_leaves_at_once_and_signs_off(self, jobs: Jobs, workers: Workers) -> None:
        worker = workers.start("-c", "2")
        tree = worker.tree()
        assert len(jobs.sql("select id from pgqueue.workers")) == 1
        assert worker.stop(within=15) == 0
        gone(tree)
        assert jobs.sql("select id from pgqueue.workers") == []
        assert "Traceback" not in worker.log

    @pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
    def test_under_load_it_drains_and_gives_the_rest_back(
        self, jobs: Jobs, workers: Workers, ledger: Ledger, number: signal.Signals
    ) -> None:
        first = workers.start("-c", "2")
        many = jobs.add_many("work", [(0.002, index) for index in range(1_500)])
        eventually(lambda: ledger.count("end") >= 100, "some have run")
        assert first.stop(number) == 0
        assert workers.processes() == []
        assert ledger.count("start") == ledger.count("end"), "what had started was finished"
        left = jobs.sql("select state, retries, crashes, rescues, worker_id from pgqueue.jobs")
        assert 0 < len(left) < 1_500
        assert {tuple(row.values()) for row in left} == {("ready", 0, 0, 0, None)}
        assert len(left) + ledger.count("end") == 1_500
        workers.start("-c", "2")
        assert jobs.ends(many) == Counter(succeeded=1_500)
        assert ledger.runs() == dict.fromkeys(many, 1)
        assert jobs.sql("select job_id from pgqueue.failures") == []

    def test_a_job_longer_than_the_timeout_is_killed_and_given_back(
        self, jobs: Jobs, workers: Workers, ledger: Ledger, gate: Gate
    ) -> None:
        first = workers.start("-c", "2", "--shutdown-timeout", "0.5")
        long, short = jobs.add("gated", gate.path), jobs.add("work", 0.1)
        eventually(lambda: ledger.count() == 2, "both run")
        assert first.stop() == 3
        assert workers.processes() == []
        row = jobs.live(long)
        assert (row["state"], row["worker_id"], row["attempt"]) == ("ready", None, 1)
        assert (row["retries"], row["crashes"], row["rescues"]) == (0, 0, 0)
        assert jobs.finished(short)["state"] == "succeeded"
        assert jobs.failures(long) == []
        gate.open()
        workers.start("-c", "1")
        row = jobs.finished(long)
        assert (row["attempt"], row["retries"], row["crashes"]) == (2, 0, 0)

    def test_no_time_at_all(self, jobs: Jobs, workers: Workers, ledger: Ledger, gate: Gate) -> None:
        worker = workers.start("-c", "1", "--shutdown-timeout", "0")
        job = jobs.add("gated", gate.path)
        eventually(lambda: ledger.count() == 1, "it runs")
        assert worker.stop() == 3
        assert jobs.live(job)["state"] == "ready"

    @pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
    def test_a_second_signal_does_not_wait(
        self, jobs: Jobs, workers: Workers, ledger: Ledger, gate: Gate, number: signal.Signals
    ) -> None:
        worker = workers.start("-c", "1", "--shutdown-timeout", "600")
        job = jobs.add("gated", gate.path)
        eventually(lambda: ledger.count() == 1, "it runs")
        worker.send(number)
        worker.wait_for_log("worker_stopping running=1")
        assert worker.process.poll() is None
        assert jobs.live(job)["state"] == "running"
        at_once = time.monotonic()
        while worker.process.poll() is None:  # within half a second of the first it would be the same request
            worker.send(number)
            time.sleep(0.1)
        assert time.monotonic() - at_once < 10
        assert worker.wait() == 3
        assert workers.processes() == []
        row = jobs.live(job)
        assert (row["state"], row["retries"], row["crashes"]) == ("ready", 0, 0)

    @pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
    def test_a_signal_to_the_whole_group_lets_the_running_job_finish(
        self, jobs: Jobs, workers: Workers, ledger: Ledger, gate: Gate, number: signal.Signals
    ) -> None:
        # Ctrl-C at the terminal reaches the supervisor, the fork server and the executors alike.
        worker = workers.start("-c", "2")
        running_, waiting = jobs.add("gated", gate.path), []
        eventually(lambda: ledger.count() == 1, "it runs")
        tree = living(worker.tree())
        assert len(tree) == 4
        os.killpg(worker.pid, number)
        worker.wait_for_log("worker_stopping running=1")
        waiting = jobs.add_many("mark", [(index,) for index in range(20)])
        assert len(living(tree)) == 4
        gate.open()
        assert worker.wait() == 0
        gone(tree)
        assert jobs.finished(running_)["attempt"] == 1
        assert {jobs.live(job)["attempt"] for job in waiting} == {0}
        assert "Traceback" not in worker.log
        assert "KeyboardInterrupt" not in worker.log

    def test_while_the_application_is_being_imported(self, workers: Workers) -> None:
        worker = workers.start(app="slow_app:app", ready=False)
        worker.wait_for_log("slow_app is being imported")
        assert worker.stop(within=3) == 0
        eventually(lambda: not workers.processes(), "nobody is left")
        assert "Traceback" not in worker.log

    def test_a_dying_job_during_the_drain_counts_as_a_crash(
        self, jobs: Jobs, workers: Workers, ledger: Ledger, gate: Gate
    ) -> None:
        worker = workers.start("-c", "2")
        job, other = jobs.add("gated", gate.path), jobs.add("gated", gate.path)
        eventually(lambda: ledger.count() == 2, "both run")
        worker.send(signal.SIGTERM)
        worker.wait_for_log("worker_stopping")
        os.kill(ledger.of(job)[0]["pid"], signal.SIGKILL)
        row = jobs.until(job, "scheduled")
        assert (row["crashes"], row["retries"]) == (1, 0)
        gate.open()
        assert worker.wait() == 0
        assert jobs.finished(other)["attempt"] == 1

    def test_killed_again_and_again_under_load_no_job_is_lost(
        self, jobs: Jobs, workers: Workers, ledger: Ledger
    ) -> None:
        many = jobs.add_many("work", [(0.004, index) for index in range(600)])
        for _ in range(4):
            worker = workers.start("-c", "2", *QUICK)
            seen = ledger.count("end")
            eventually(lambda seen=seen: ledger.count("end") >= seen + 40, "it has run some")  # type: ignore[misc]
            worker.kill()
        workers.start("-c", "2", *QUICK)
        assert jobs.ends(many) == Counter(succeeded=600)
        assert max(ledger.runs().values()) <= 5
