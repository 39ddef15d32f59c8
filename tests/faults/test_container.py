"""A worker as process 1 of a container, and in one that gives it next to nothing.

No container engine is needed: `unshare` makes the namespaces that an engine would make.
"""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest

from tests.acceptance.workers import APPS, Gate, Jobs, Worker, Workers, eventually, living

UNSHARE = ("unshare", "--fork", "--pid", "--mount", "--mount-proc", "--kill-child")
NOBODY = 12345
"""A user that no passwd file knows."""


def refusal() -> str:
    """Why there are no namespaces to be had here; empty when there are."""
    try:
        done = subprocess.run([*UNSHARE, "true"], capture_output=True, text=True, timeout=20)
    except OSError as error:
        return str(error)
    return "" if done.returncode == 0 else done.stderr.strip() or "unshare failed"


REFUSAL = refusal()
pytestmark = pytest.mark.skipif(bool(REFUSAL), reason=f"no pid namespace: {REFUSAL}")


class Container:
    """A running worker whose pid is 1, seen from outside."""

    def __init__(self, process: subprocess.Popen[bytes], log: Path) -> None:
        self.worker = Worker(process, log)
        self._process = process

    def started(self) -> Container:
        self.worker.wait_for_log("worker_started")
        return self

    @property
    def one(self) -> psutil.Process:
        """Its process 1."""
        found = eventually(lambda: psutil.Process(self._process.pid).children(), "process 1 is there")
        return found[0]

    @property
    def fork_server(self) -> psutil.Process:
        return next(each for each in living(self.one.children()) if "forkserver" in " ".join(each.cmdline()))

    def executors(self, count: int) -> list[psutil.Process]:
        def look() -> list[psutil.Process]:
            try:
                found = living(self.fork_server.children())
            except (StopIteration, psutil.NoSuchProcess):
                return []
            return found if len(found) == count else []

        return eventually(look, f"{count} executors")

    def children(self) -> list[tuple[str, str]]:
        """What process 1 is the parent of: name and status."""
        found = []
        for each in self.one.children():
            try:
                found.append((each.name(), each.status()))
            except psutil.NoSuchProcess:
                continue
        return found

    def zombies(self) -> list[psutil.Process]:
        return [
            each
            for each in self.one.children(recursive=True)
            if each.is_running() and each.status() == psutil.STATUS_ZOMBIE
        ]

    def stop(self, number: signal.Signals = signal.SIGTERM) -> int:
        self.one.send_signal(number)
        return self.worker.wait()


@contextmanager
def container(
    workers: Workers,
    folder: Path,
    *flags: str,
    shell: str = "",
    app: str = "tests_app:app",
    **env: str | None,
) -> Iterator[Container]:
    """A worker in namespaces of its own; `shell` is run first, as root, and execs its arguments."""
    command = [sys.executable, "-m", "pgqueue.cli.main", "-A", app, "worker", "-Q", "default", *flags]
    if shell:
        command = ["/bin/sh", "-euc", f"{shell} {shlex.join(command)}"]
    log = folder / "container.log"
    with log.open("wb") as file:
        process = subprocess.Popen(
            [*UNSHARE, *command],
            cwd=APPS,
            env=workers.environment(**env),
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        yield Container(process, log)
    finally:
        if process.poll() is None:
            process.kill()  # --kill-child takes process 1 with it, and the kernel the rest
        process.wait()
        print(log.read_text(errors="replace"))


class TestProcessOne:
    def test_sigterm_drains(self, jobs: Jobs, workers: Workers, gate: Gate, tmp_path: Path) -> None:
        with container(workers, tmp_path, "-c", "2") as box:
            box.started()
            job = jobs.add("gated", gate.path)
            eventually(lambda: workers.ledger.count() == 1, "it runs")
            box.one.send_signal(signal.SIGTERM)
            box.worker.wait_for_log("worker_stopping running=1")
            gate.open()
            assert box.worker.wait() == 0
        assert workers.processes() == []
        row = jobs.finished(job)
        assert (row["attempt"], row["retries"], row["crashes"]) == (1, 0, 0)

    def test_ctrl_c_stops_it(self, jobs: Jobs, workers: Workers, tmp_path: Path) -> None:
        with container(workers, tmp_path, "-c", "1") as box:
            assert box.started().stop(signal.SIGINT) == 0
        assert "Traceback" not in box.worker.log
        assert workers.processes() == []

    def test_it_can_be_stopped_while_it_gets_ready(self, workers: Workers, tmp_path: Path) -> None:
        # The kernel drops what process 1 has no handler for.
        with container(workers, tmp_path, app="slow_app:app") as box:
            box.worker.wait_for_log("slow_app is being imported")
            assert box.stop() == 0
        assert workers.processes() == []

    def test_a_killed_executor_is_noticed(
        self, jobs: Jobs, workers: Workers, gate: Gate, tmp_path: Path
    ) -> None:
        with container(workers, tmp_path, "-c", "2") as box:
            box.started()
            before = {each.pid for each in box.executors(2)}
            job = jobs.add("gated", gate.path)
            eventually(lambda: workers.ledger.count() == 1, "it runs")
            for each in box.executors(2):
                each.kill()
            assert jobs.until(job, "scheduled")["crashes"] == 1
            after = {each.pid for each in box.executors(2)}
            assert after != before
            gate.open()
            jobs.make_due(job)
            assert jobs.finished(job)["attempt"] == 2
            eventually(lambda: not box.zombies(), "no zombie is left")
            assert box.stop() == 0
        assert workers.processes() == []

    def test_it_waits_for_orphans(self, jobs: Jobs, workers: Workers, gate: Gate, tmp_path: Path) -> None:
        with container(workers, tmp_path, "-c", "2") as box:
            box.started()
            box.executors(2)
            server = box.fork_server.pid
            ids = [jobs.add("leaves_an_orphan", gate.path) for _ in range(20)]
            jobs.wait(ids)
            eventually(lambda: len(box.children()) == 21, "the orphans are handed to process 1")
            gate.open()
            eventually(lambda: len(box.children()) == 1, "they are waited for")
            assert box.fork_server.pid == server
            assert jobs.finished(jobs.add("echo", 1))["result"] == 1
            assert box.stop() == 0, "the exit status of its own child was not taken away"
        assert "Traceback" not in box.worker.log
        assert workers.processes() == []

    def test_it_waits_for_the_executors_of_a_killed_fork_server(
        self, jobs: Jobs, workers: Workers, tmp_path: Path
    ) -> None:
        with container(workers, tmp_path, "-c", "3") as box:
            box.started()
            box.executors(3)
            first = box.fork_server
            first.kill()
            box.worker.wait_for_log("fork_server_lost")
            box.executors(3)
            eventually(lambda: len(box.children()) == 1 and not box.zombies(), "only the new one is left")
            assert jobs.finished(jobs.add("echo", 1))["result"] == 1
            assert box.stop() == 0
        assert workers.processes() == []

    def test_what_a_task_leaves_running_ends_with_it(
        self, jobs: Jobs, workers: Workers, gate: Gate, tmp_path: Path
    ) -> None:
        with container(workers, tmp_path, "-c", "1") as box:
            box.started()
            jobs.finished(jobs.add("leaves_an_orphan", gate.path))
            assert len(box.children()) == 2
            assert box.stop() == 0
        eventually(lambda: not workers.processes(), "nothing of the namespace is left")

    def test_a_signal_to_every_process_lets_the_running_job_finish(
        self, jobs: Jobs, workers: Workers, gate: Gate, tmp_path: Path
    ) -> None:
        # As systemd does with KillMode=control-group, or `kill -TERM -1` inside.
        with container(workers, tmp_path, "-c", "2") as box:
            box.started()
            box.executors(2)
            job = jobs.add("gated", gate.path)
            eventually(lambda: workers.ledger.count() == 1, "it runs")
            for each in [*box.one.children(recursive=True), box.one]:
                each.send_signal(signal.SIGTERM)
            box.worker.wait_for_log("worker_stopping running=1")
            gate.open()
            assert box.worker.wait() == 0
        assert jobs.finished(job)["attempt"] == 1


def capabilities() -> str:
    """How a stranger may read an interpreter that lies in somebody's home; nothing where he can anyway."""
    stranger = ["setpriv", f"--reuid={NOBODY}", f"--regid={NOBODY}", "--clear-groups"]
    # A program of a program: the first exec still has the rights that setpriv had.
    second = "import subprocess, sys; sys.exit(subprocess.call([sys.executable, '-c', 'import psycopg']))"
    done = subprocess.run([*stranger, sys.executable, "-c", second], capture_output=True)
    return "" if done.returncode == 0 else "--inh-caps=+dac_read_search --ambient-caps=+dac_read_search"


@pytest.mark.skipif(os.getuid() != 0, reason="only root can become somebody else")
class TestBareContainer:
    def test_a_stranger_on_a_read_only_file_system(
        self, jobs: Jobs, workers: Workers, tmp_path: Path
    ) -> None:
        """A user without a passwd entry, no home, nothing that can be written to."""
        shell = (
            'mount --make-rprivate /; points=$(awk \'$3 != "proc" && $3 != "devpts" {print $2}\''
            " /proc/self/mounts | sort -u); for point in $points; do"
            ' mount -o remount,bind,ro "$point" 2>/dev/null || true; done; '
            f"if touch {tmp_path}/written 2>/dev/null; then echo 'still writable'; exit 9; fi; "
            f"exec setpriv --reuid={NOBODY} --regid={NOBODY} --clear-groups {capabilities()}"
        )
        with container(
            workers, tmp_path, "-c", "2", shell=shell, HOME=None, TMPDIR="/nowhere", USER=None, LOGNAME=None
        ) as box:
            box.started()
            assert {each.uids().real for each in [box.one, *box.executors(2)]} == {NOBODY}
            ids = [jobs.add("echo", index) for index in range(20)]
            assert jobs.ends(ids)["succeeded"] == 20
            assert box.stop() == 0
        assert "Traceback" not in box.worker.log
        assert workers.processes() == []
