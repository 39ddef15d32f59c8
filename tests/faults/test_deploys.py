"""Workers are stopped, started and replaced while there is work: nothing is lost, run twice or held up."""

from __future__ import annotations

import itertools
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from random import Random
from typing import Any

import pytest

from pgqueue.cli.status import ExitStatus
from tests.acceptance.workers import Gate, Jobs, Ledger, Worker, Workers, eventually, gone
from tests.servers import own_server

NOWHERE = "postgresql://postgres@127.0.0.1:1/nowhere"
OPERATIONS = Path(__file__).resolve().parents[2] / "docs" / "operations.md"
PROMPT = 1.0
"""Seconds within which a job that was given back starts again."""


class Load:
    """Enqueues jobs of `work` at a steady rate from a thread, until the end of the block.

    Args:
        seconds: Draws how long the next job takes.
        every: Seconds between two jobs.
    """

    def __init__(self, dsn: str, seconds: Callable[[Random], float], *, every: float) -> None:
        self.ids: list[str] = []
        self._dsn = dsn
        self._seconds = seconds
        self._every = every
        self._random = Random(1)
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._run)

    def __enter__(self) -> Load:
        self._thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._end.set()
        self._thread.join()

    def _run(self) -> None:
        with closing(Jobs(self._dsn)) as jobs:
            while not self._end.wait(self._every):
                self.ids.append(jobs.add("work", self._seconds(self._random)))


def mixed(random: Random) -> float:
    """From 1 ms to 2 s, mostly short."""
    return random.choice((0.001, 0.001, 0.005, 0.02, 0.05, 0.2, 0.2, 2.0))


def unharmed(jobs: Jobs, ledger: Ledger, ids: list[str], *, ran: int = 1) -> list[dict[str, Any]]:
    """The finished jobs; each succeeded, at no cost, and was started at most `ran` times."""
    assert jobs.ends(ids) == Counter(succeeded=len(ids))
    rows = jobs.sql(
        "select id::text as id, attempt, retries, crashes, rescues, worker_id from pgqueue.finished_jobs"
        " where id = any(%s::uuid[])",
        ids,
    )
    assert {(row["retries"], row["crashes"], row["rescues"]) for row in rows} == {(0, 0, 0)}
    assert jobs.sql("select * from pgqueue.failures") == []
    runs = ledger.runs()
    assert [job for job in ids if not 1 <= runs[job] <= ran] == []
    return rows


def asleep(worker: Worker) -> None:
    """Until it has had nothing to do for so long that it looks for work only every 2 s or more by itself."""
    started = time.monotonic()
    eventually(lambda: time.monotonic() - started > 5, "its pauses have grown", 10)


class TestUnderLoad:
    @pytest.mark.slow
    def test_what_a_leaving_worker_has_not_started_starts_elsewhere_at_once(
        self, jobs: Jobs, workers: Workers, ledger: Ledger
    ) -> None:
        leaving, staying = workers.start("-c", "2"), workers.start("-c", "16")
        given_back: list[dict[str, Any]] = []
        ids: list[str] = []
        for _ in range(4):  # until it had something to give back, as nearly always the first time
            with Load(jobs.dsn, mixed, every=0.02) as load:
                eventually(lambda load=load: len(load.ids) >= 100, "there is load")  # type: ignore[misc]
                ids += jobs.add_many("work", [(0.005,)] * 200)
                asked = time.time()
                assert leaving.stop() == ExitStatus.DONE
                stopped = time.time()
                eventually(lambda: time.time() > stopped + 2, "the load goes on")  # noqa: B023
            assert stopped - asked < 10
            ids += load.ids
            rows = unharmed(jobs, ledger, ids)
            assert {row["worker_id"] for row in rows} <= {leaving.id, staying.id}
            given_back = [row for row in rows if row["attempt"] > 1]
            starts = [ledger.of(row["id"])[0]["at"] for row in given_back]
            assert [at - asked for at in starts if at > asked + PROMPT] == []
            if given_back:
                break
            leaving = workers.start("-c", "2")
        assert given_back, "it never held anything that had not started"

    def test_what_it_had_to_kill_starts_elsewhere_at_once(
        self, jobs: Jobs, workers: Workers, ledger: Ledger, gate: Gate
    ) -> None:
        leaving = workers.start("-c", "3", "--shutdown-timeout", "0.5")
        ids = jobs.add_many("gated", [(gate.path,)] * 3)
        eventually(lambda: ledger.count() == 3, "they run")
        staying = workers.start("-c", "3")
        asleep(staying)
        asked = time.time()
        assert leaving.stop() == ExitStatus.INTERRUPTED
        eventually(lambda: ledger.count() == 6, "they run elsewhere")
        assert max(each["at"] for each in ledger.entries("start")) < asked + 0.5 + PROMPT
        gate.open()
        rows = unharmed(jobs, ledger, ids, ran=2)
        assert {(row["attempt"], row["worker_id"]) for row in rows} == {(2, staying.id)}

    @pytest.mark.slow
    def test_rolling_restarts_leave_no_gap(self, jobs: Jobs, workers: Workers, ledger: Ledger) -> None:
        fleet = [workers.start("-c", "2"), workers.start("-c", "2")]
        with Load(jobs.dsn, lambda random: random.choice((0.001, 0.02, 0.1)), every=0.05) as load:
            eventually(lambda: ledger.count() > 20, "there is load")
            for _ in range(5):
                for old in list(fleet):
                    assert old.stop() == ExitStatus.DONE
                    fleet.remove(old)
                    fleet.append(workers.start("-c", "2"))
        unharmed(jobs, ledger, load.ids)
        starts = sorted(each["at"] for each in ledger.entries("start"))
        assert len(starts) > 100
        gaps = [later - earlier for earlier, later in itertools.pairwise(starts)]
        assert max(gaps) < PROMPT


class TestSignals:
    def running(self, workers: Workers, jobs: Jobs, gate: Gate, *flags: str) -> tuple[Worker, str]:
        worker = workers.start("-c", "2", "--shutdown-timeout", "600", *flags)
        worker.full_crew()
        job = jobs.add("gated", gate.path)
        eventually(lambda: workers.ledger.of(job), "it runs")
        return worker, job

    @pytest.mark.parametrize("number", [signal.SIGHUP, signal.SIGTERM, signal.SIGINT])
    def test_to_the_whole_group_it_drains(
        self, jobs: Jobs, workers: Workers, gate: Gate, number: signal.Signals
    ) -> None:
        worker, job = self.running(workers, jobs, gate)
        os.killpg(worker.pid, number)
        worker.wait_for_log("worker_stopping running=1")
        gate.open()
        assert worker.wait() == ExitStatus.DONE
        unharmed(jobs, workers.ledger, [job])

    def test_sigquit_to_the_whole_group_does_not_wait(self, jobs: Jobs, workers: Workers, gate: Gate) -> None:
        worker, job = self.running(workers, jobs, gate)
        os.killpg(worker.pid, signal.SIGQUIT)
        assert worker.wait(within=10) == ExitStatus.INTERRUPTED
        row = jobs.live(job)
        assert (row["state"], row["retries"], row["crashes"]) == ("ready", 0, 0)
        assert "Traceback" not in worker.log

    def test_the_same_request_twice_is_one(self, jobs: Jobs, workers: Workers, gate: Gate) -> None:
        # As `timeout` does: to the process, then to its group.
        worker, job = self.running(workers, jobs, gate)
        worker.send(signal.SIGTERM)
        worker.wait_for_log("worker_stopping")
        os.killpg(worker.pid, signal.SIGTERM)
        worker.send(signal.SIGINT)
        gate.open()
        assert worker.wait() == ExitStatus.DONE
        unharmed(jobs, workers.ledger, [job])

    def test_sigquit_after_sigterm_does_not_wait(self, jobs: Jobs, workers: Workers, gate: Gate) -> None:
        worker, job = self.running(workers, jobs, gate)
        worker.send(signal.SIGTERM)
        worker.wait_for_log("worker_stopping")
        assert worker.stop(signal.SIGQUIT, within=10) == ExitStatus.INTERRUPTED
        assert jobs.live(job)["state"] == "ready"

    def test_under_nohup_a_closing_terminal_means_nothing(self, jobs: Jobs, workers: Workers) -> None:
        process = subprocess.Popen(
            ["nohup", sys.executable, "-m", "pgqueue.cli.main", "-A", "tests_app:app", "worker", "-c", "1"],
            cwd=Path(__file__).parents[1] / "acceptance" / "apps",
            env=workers.environment(),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        try:
            eventually(lambda: jobs.sql("select id from pgqueue.workers"), "it serves")
            os.killpg(process.pid, signal.SIGHUP)
            assert jobs.finished(jobs.add("echo", 1))["result"] == 1
            process.terminate()
            assert process.wait(20) == ExitStatus.DONE
        finally:
            process.kill()
            process.wait()

    @pytest.mark.slow
    def test_a_stuck_fork_server_does_not_keep_it(self, jobs: Jobs, workers: Workers, gate: Gate) -> None:
        worker = workers.start("-c", "2", "--shutdown-timeout", "0.5")
        tree = worker.tree()
        job = jobs.add("gated", gate.path)
        eventually(lambda: workers.ledger.of(job), "it runs")
        worker.fork_server.send_signal(signal.SIGSTOP)
        assert worker.stop(within=30) == ExitStatus.INTERRUPTED
        gone(tree)
        row = jobs.live(job)
        assert (row["state"], row["retries"], row["crashes"]) == ("ready", 0, 0)


class TestStartingUp:
    @pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT])
    def test_waiting_for_the_database_it_leaves_at_once(
        self, workers: Workers, number: signal.Signals
    ) -> None:
        worker = workers.start("-c", "1", env={"PGQUEUE_DSN": NOWHERE}, ready=False)
        worker.wait_for_log("database_unavailable connection=start")
        assert worker.stop(number, within=5) == ExitStatus.DONE
        assert "Traceback" not in worker.log

    def test_connecting_to_a_silent_database_it_leaves_at_once(self, workers: Workers) -> None:
        with socket.create_server(("127.0.0.1", 0)) as server:
            port = server.getsockname()[1]
            worker = workers.start(
                "-c", "1", env={"PGQUEUE_DSN": f"postgresql://x@127.0.0.1:{port}/x"}, ready=False
            )
            caller, _ = server.accept()
            with caller:
                assert worker.stop(within=5) == ExitStatus.DONE
        assert "Traceback" not in worker.log

    def test_to_the_group_while_the_application_is_imported(self, workers: Workers) -> None:
        worker = workers.start(app="slow_app:app", ready=False)
        worker.wait_for_log("slow_app is being imported")
        os.killpg(worker.pid, signal.SIGTERM)
        assert worker.wait(within=5) == ExitStatus.DONE
        assert "Traceback" not in worker.log

    def test_while_the_event_loop_is_being_made(self, jobs: Jobs, workers: Workers) -> None:
        done = run_script(workers, SIGNALLED_EARLY, "-A", "tests_app:app", "worker", "-c", "1")
        assert done.returncode == ExitStatus.DONE
        assert "Traceback" not in done.stderr

    def test_at_the_moment_the_application_is_there(self, jobs: Jobs, workers: Workers) -> None:
        done = run_script(workers, SIGNALLED_ON_START, "-A", "tests_app:app", "worker", "-c", "1")
        assert done.returncode == ExitStatus.DONE
        assert "Traceback" not in done.stderr

    def test_at_any_moment(self, jobs: Jobs, workers: Workers) -> None:
        """From the first moment to the last; before Python is up the kernel ends it, which is as good."""
        moments = [0.0, 0.05, 0.1, 0.2, 0.3, 0.45, 0.6, 0.8, 1.0]
        for moment in moments:
            worker = workers.start("-c", "1", ready=False)
            started = time.monotonic()
            eventually(lambda: time.monotonic() >= started + moment, "now")  # noqa: B023
            os.killpg(worker.pid, signal.SIGTERM)
            assert worker.wait(within=15) in (ExitStatus.DONE, -signal.SIGTERM), moment
            assert "Traceback" not in worker.log
        assert jobs.sql("select id from pgqueue.workers") == []


class TestWithoutADatabase:
    @pytest.mark.slow
    @pytest.mark.parametrize("seconds", [0, 2], ids=["while it drains", "while it waits to ack"])
    def test_an_impatient_operator_does_not_wait_for_it(self, tmp_path: Path, seconds: float) -> None:
        with own_server() as server:
            dsn = server.new_database()
            with closing(Jobs(dsn)) as jobs, Workers(dsn, tmp_path) as workers:
                gate = Gate(tmp_path)
                worker = workers.start("-c", "1", "--shutdown-timeout", "600")
                job = jobs.add("gated", gate.path)
                eventually(lambda: workers.ledger.of(job), "it runs")
                jobs.close()
                server.stop(signal.SIGINT)
                gate.open()
                eventually(lambda: workers.ledger.of(job, "end"), "it ends")
                worker.send(signal.SIGTERM)
                worker.wait_for_log("worker_stopping")
                asked = time.monotonic()
                eventually(lambda: time.monotonic() >= asked + seconds, "it is where we want it")
                assert worker.process.poll() is None, "it waits for the database, to ack"
                assert worker.stop(signal.SIGQUIT, within=15) == ExitStatus.INTERRUPTED
                worker.wait_for_log("worker_left_jobs")
                server.start()


def run_script(workers: Workers, script: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """A script that meddles with `pgqueue` and then runs it, at its end."""
    return subprocess.run(
        [sys.executable, "-c", script, *arguments],
        cwd=Path(__file__).parents[1] / "acceptance" / "apps",
        env=workers.environment(),
        capture_output=True,
        text=True,
        timeout=60,
    )


SIGNALLED_EARLY = """
import os, selectors, signal
import pgqueue.cli.main as main
make = selectors.DefaultSelector.__init__
def signalled(self):
    os.kill(os.getpid(), signal.SIGTERM)
    make(self)
selectors.DefaultSelector.__init__ = signalled
main.main()
"""

SIGNALLED_ON_START = """
import signal
import pgqueue.cli.main as main
from pgqueue.worker import run
hand_to = run.StopRequests.hand_to
def signalled(self, stop):
    self._hear(signal.SIGTERM)
    hand_to(self, stop)
run.StopRequests.hand_to = signalled
main.main()
"""

BOOM = """
import pgqueue.cli.main as main
def cli(**options):
    raise ZeroDivisionError("nobody thought of this")
main.cli = cli
main.main()
"""


class TestExitStatus:
    """One for each thing that an operator, or what restarts workers, would do next."""

    @pytest.mark.parametrize(
        ("status", "arguments", "elsewhere"),
        [
            (ExitStatus.DONE, ["inspect", "queues"], None),
            (ExitStatus.FAILED, ["dead", "show", "01890a5d-ac96-774b-bcce-b302099a8057"], None),
            (ExitStatus.USAGE, ["worker", "--no-such-option"], None),
            (ExitStatus.USAGE, ["-A", "tests_app:app", "worker", "--poll-interval", "0"], None),
            (ExitStatus.USAGE, ["inspect", "queues"], "postgresql://["),
            (ExitStatus.UNREACHABLE, ["inspect", "queues"], NOWHERE),
            (ExitStatus.UNREACHABLE, ["migrate"], NOWHERE),
            (ExitStatus.SCHEMA, ["--schema", "elsewhere", "inspect", "queues"], None),
            (ExitStatus.SCHEMA, ["--schema", "elsewhere", "-A", "tests_app:app", "worker"], None),
            (ExitStatus.APP, ["-A", "broken_app:app", "worker"], None),
            (ExitStatus.APP, ["-A", "broken_app:app", "enqueue", "t"], None),
            (ExitStatus.APP, ["-A", "no_such_module:app", "worker"], None),
        ],
        ids=lambda value: " ".join(value) if isinstance(value, list) else None,
    )
    def test_of_a_command(
        self, workers: Workers, status: ExitStatus, arguments: list[str], elsewhere: str | None
    ) -> None:
        done = workers.run(*arguments, env={"PGQUEUE_DSN": elsewhere} if elsewhere else None)
        assert done.returncode == status, done.stderr
        assert ("Traceback" in done.stderr) == (arguments[:2] == ["-A", "broken_app:app"])

    def test_of_ctrl_c(self, jobs: Jobs, workers: Workers) -> None:
        """While a command waits for a database that does not answer."""
        with socket.create_server(("127.0.0.1", 0)) as server:
            port = server.getsockname()[1]
            process = subprocess.Popen(
                [sys.executable, "-m", "pgqueue.cli.main", "inspect", "queues"],
                env=workers.environment(PGQUEUE_DSN=f"postgresql://x@127.0.0.1:{port}/x"),
                stderr=subprocess.PIPE,
                text=True,
                start_new_session=True,
            )
            caller, _ = server.accept()
            with caller:
                process.send_signal(signal.SIGINT)
                _, said = process.communicate(timeout=20)
        assert process.returncode == ExitStatus.CTRL_C
        assert said.strip() == "pgqueue: interrupted"

    def test_of_a_bug(self, workers: Workers) -> None:
        done = run_script(workers, BOOM)
        assert done.returncode == ExitStatus.BUG
        assert "ZeroDivisionError: nobody thought of this" in done.stderr

    def test_all_of_them_are_in_the_help_and_in_the_docs(self, workers: Workers) -> None:
        said = workers.run("--help").stdout.split("Exit status:")[1]
        table = OPERATIONS.read_text().split("| exit status | means |")[1].split("\n\n")[0]
        wanted = sorted(int(status) for status in ExitStatus)
        assert sorted(int(number) for number in re.findall(r"^\s+(\d+)\s", said, re.MULTILINE)) == wanted
        assert sorted(int(number) for number in re.findall(r"^\| (\d+) \|", table, re.MULTILINE)) == wanted
