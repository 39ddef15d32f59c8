"""Signals by the hundred, and what a task finds in its process: descriptors, threads, signals."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.acceptance.workers import Gate, Jobs, Worker, Workers, eventually, gone

APPS = Path(__file__).with_name("apps")
RATE = 200
"""Signals a second into each process."""

IGNORED = (signal.SIGCHLD, signal.SIGWINCH, signal.SIGCONT, signal.SIGURG)
HANDLED = (signal.SIGUSR1, signal.SIGUSR2, signal.SIGALRM)


@pytest.fixture
def workers(db: str, tmp_path: Path) -> Iterator[Workers]:
    with Workers(db, tmp_path, APPS) as workers:
        yield workers


def start(workers: Workers, *flags: str, **env: str) -> Worker:
    path = os.pathsep.join([str(APPS), workers.environment()["PYTHONPATH"]])
    return workers.start(*flags, app="signal_app:app", env={"PYTHONPATH": path, **env})


@contextlib.contextmanager
def rain(targets: Callable[[], list[tuple[int, signal.Signals]]]) -> Iterator[list[int]]:
    """Signals at `RATE` into every process named, one after the other; how many have been sent."""
    done = threading.Event()
    sent = [0]

    def pour() -> None:
        while not done.is_set():
            for pid, number in targets():
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, number)
                    sent[0] += 1
            done.wait(1 / RATE)

    thread = threading.Thread(target=pour)
    thread.start()
    try:
        yield sent
    finally:
        done.set()
        thread.join()


def test_signals_at_a_high_rate_cost_nothing(jobs: Jobs, workers: Workers) -> None:
    worker = start(workers, "-c", "3")
    executors = {each.pid for each in worker.full_crew()}
    supervisor, server = worker.pid, worker.fork_server.pid
    turn = [0]

    def targets() -> list[tuple[int, signal.Signals]]:
        # The supervisor never imports the application: only what is ignored by default is for it.
        turn[0] += 1
        ignored, any_ = IGNORED[turn[0] % len(IGNORED)], (*IGNORED, *HANDLED)[turn[0] % 7]
        return [(supervisor, ignored), (server, any_), *((pid, any_) for pid in executors)]

    with rain(targets) as sent:
        many = [jobs.add("signal_app.work", 0.005) for _ in range(200)]
        many += [jobs.add("signal_app.short", number) for number in range(300)]
        assert jobs.ends(many, within=60) == Counter(succeeded=500)
        assert jobs.finished(jobs.add("signal_app.hears"))["result"]["heard"] > 0
    assert sent[0] > 100
    assert workers.ledger.runs() == dict.fromkeys(many, 1)
    assert {each.pid for each in worker.executors} == executors
    assert worker.stop() == 0
    assert "Traceback" not in worker.log
    assert "stale_acks=0" in worker.log


def test_executors_are_forked_in_the_rain(jobs: Jobs, workers: Workers) -> None:
    worker = start(workers, "-c", "2")
    server = worker.fork_server.pid
    worker.full_crew()
    with rain(lambda: [(server, signal.SIGCHLD), (server, signal.SIGUSR1)]):
        for _ in range(5):
            victim = worker.full_crew()[0]
            victim.kill()
            gone([victim])
            many = [jobs.add("signal_app.short", number) for number in range(20)]
            assert jobs.ends(many) == Counter(succeeded=20)
        worker.full_crew()
    assert worker.fork_server.pid == server
    assert worker.stop() == 0


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGALRM, signal.SIGSEGV])
def test_what_kills_the_supervisor_loses_no_job(jobs: Jobs, workers: Workers, number: signal.Signals) -> None:
    quick = ("--heartbeat", "0.3", "--lease", "1")
    worker = start(workers, "-c", "2", *quick)
    many = [jobs.add("signal_app.work", 0.005) for _ in range(60)]
    eventually(lambda: workers.ledger.count() >= 5, "some run")
    tree = worker.tree()
    worker.send(number)
    assert worker.wait() == -number
    gone(tree)
    start(workers, "-c", "2", *quick)
    assert jobs.ends(many) == Counter(succeeded=60)
    assert max(workers.ledger.runs().values()) <= 2


class TestFreshlyForked:
    """An executor has its channel and its board, and nothing else of the worker's."""

    @pytest.mark.parametrize("odd", ["", "thread"])
    def test_it_is_clean(self, jobs: Jobs, workers: Workers, odd: str) -> None:
        # The warning about a fork beside a thread (Python 3.12) would end the fork server as an error.
        strict = {"PYTHONWARNINGS": "error::DeprecationWarning,error::ResourceWarning", "PYTHONDEVMODE": "1"}
        worker = start(workers, "-c", "3", ODD_IMPORT=odd, **strict)
        worker.full_crew()
        looks = [jobs.add("signal_app.surroundings") for _ in range(6)]
        for look in looks:
            self._is_clean(jobs.finished(look)["result"], worker)
        assert worker.stop() == 0
        assert "Traceback" not in worker.log

    def _is_clean(self, found: dict[str, Any], worker: Worker) -> None:
        # The standard ones; the channel; the board; those of the look itself: the folder listed, pipes.
        above = {number: what for number, what in found["ours"].items() if int(number) > 2}
        kinds = Counter(
            "board" if "pgqueue-board" in what else what.partition(":")[0] for what in above.values()
        )
        assert kinds["socket"] == 1, above
        assert kinds["board"] <= 1, above
        assert not [what for what in above.values() if "eventpoll" in what or "pidfd" in what], above
        others = self._inodes([worker.pid, worker.fork_server.pid])
        assert not [what for what in above.values() if what in others and what.startswith("socket")], above
        assert (found["threads"], found["tasks"], found["mask"], found["wakeup"]) == (1, 1, [], -1)
        for program in (found["program"], found["careless"]):
            blocked, ignored = program["masks"]["SigBlk"], program["masks"]["SigIgn"]
            assert blocked == 0
            for number in (signal.SIGTERM, signal.SIGINT, signal.SIGCHLD, signal.SIGPIPE, signal.SIGHUP):
                # Python itself ignores SIGPIPE, in the program too.
                assert number == signal.SIGPIPE or not ignored & 1 << (number - 1), number.name
        # Also a program that is started without closing anything sees nothing of ours.
        assert len(found["careless"]["descriptors"]) == len(found["program"]["descriptors"])

    @staticmethod
    def _inodes(pids: list[int]) -> set[str]:
        found = set()
        for pid in pids:
            for each in Path(f"/proc/{pid}/fd").iterdir():
                with contextlib.suppress(OSError):
                    found.add(os.readlink(each))
        return found

    def test_signals_of_the_application_do_not_end_the_fork_server(
        self, jobs: Jobs, workers: Workers
    ) -> None:
        worker = start(workers, "-c", "2", ODD_IMPORT="thread")
        tree = [worker.fork_server, *worker.full_crew()]
        for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGINT):
            for each in tree:
                each.send_signal(number)
        assert jobs.ends([jobs.add("signal_app.short", n) for n in range(20)]) == Counter(succeeded=20)
        assert [worker.fork_server, *worker.executors] == tree
        found = jobs.finished(jobs.add("signal_app.hears"))["result"]
        assert found["terminated"] == -signal.SIGTERM
        assert worker.stop() == 0

    def test_a_fork_that_fails_is_tried_again(self, jobs: Jobs, workers: Workers) -> None:
        worker = start(workers, "-c", "3", ODD_IMPORT="no fork")
        server = worker.fork_server
        assert jobs.ends([jobs.add("signal_app.short", n) for n in range(20)]) == Counter(succeeded=20)
        worker.full_crew()
        assert worker.fork_server == server
        assert worker.stop() == 0

    def test_a_dead_fork_server_is_missed_although_a_helper_holds_its_socket(
        self, jobs: Jobs, workers: Workers, tmp_path: Path
    ) -> None:
        gate = Gate(tmp_path)
        worker = start(workers, "-c", "2", ODD_IMPORT="helper", HELPER_GATE=gate.path)
        try:
            assert jobs.finished(jobs.add("signal_app.short", 1))["result"] == 1
            worker.fork_server.kill()
            worker.wait_for_log("fork_server_lost", 15)
            assert jobs.finished(jobs.add("signal_app.short", 2))["result"] == 2
        finally:
            gate.open()
        eventually(lambda: len(workers.processes()) == 4, "the helpers leave")
        assert all(isinstance(each, psutil.Process) for each in workers.processes())
