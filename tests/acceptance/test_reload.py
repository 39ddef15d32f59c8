"""`pgqueue worker --reload`: changed code runs, broken code is waited for, and signals reach the worker."""

from __future__ import annotations

import re
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from pgqueue.cli.reload import watched_folders, worker_command
from tests.acceptance.workers import PACKAGE, Gate, Jobs, Worker, Workers, eventually

pytest.importorskip("watchfiles")

APP = """
import os, time
from pgqueue import PgQueue

app = PgQueue("reloaded")

@app.task
def version() -> int:
    return {version}

@app.task
def gated(path: str) -> str:
    while not os.path.exists(path):
        time.sleep(0.005)
    return "through the gate"
"""


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """The application's file, in a folder of its own."""
    folder = tmp_path / "code"
    folder.mkdir()
    source = folder / "reloaded_app.py"
    source.write_text(APP.format(version=1))
    return source


@pytest.fixture
def workers(db: str, tmp_path: Path, source: Path) -> Iterator[Workers]:
    with Workers(db, tmp_path, source.parent) as workers:
        yield workers


def start(workers: Workers, *, ready: bool = True) -> Worker:
    env = {"PYTHONDONTWRITEBYTECODE": None}
    return workers.start("--reload", "-c", "1", app="reloaded_app:app", ready=ready, env=env)


def starts(worker: Worker, count: int) -> None:
    """Until so many workers have started, one after another."""
    eventually(lambda: worker.log.count("worker_started") >= count, f"start {count}")


def test_a_changed_task_runs(jobs: Jobs, workers: Workers, source: Path) -> None:
    worker = start(workers)
    assert jobs.finished(jobs.add("reloaded_app.version"))["result"] == 1
    source.write_text(APP.format(version=2))  # as long, and perhaps in the same second
    starts(worker, 2)
    assert jobs.finished(jobs.add("reloaded_app.version"))["result"] == 2
    assert "worker_reloading changed=reloaded_app.py" in worker.log
    assert worker.log.count("worker_stopped") == 1
    # Compiled code could pass for that of the change after it.
    assert not (source.parent / "__pycache__").exists()


def test_a_change_waits_for_the_job_that_runs(jobs: Jobs, workers: Workers, source: Path, gate: Gate) -> None:
    worker = start(workers)
    job = jobs.add("reloaded_app.gated", gate.path)
    jobs.until(job, "running")
    source.write_text(APP.format(version=2))
    worker.wait_for_log("worker_stopping")
    gate.open()
    starts(worker, 2)
    row = jobs.finished(job)
    assert (row["result"], row["attempt"]) == ("through the gate", 1)


def test_broken_code_is_waited_for(jobs: Jobs, workers: Workers, source: Path) -> None:
    worker = start(workers)
    source.write_text("def (\n")
    worker.wait_for_log("worker_awaits_change status=6")
    assert re.search(r"cannot load reloaded_app:app: SyntaxError", worker.log)
    assert worker.process.poll() is None
    source.write_text(APP.format(version=3))
    starts(worker, 2)
    assert jobs.finished(jobs.add("reloaded_app.version"))["result"] == 3
    assert worker.log.count("worker_awaits_change") == 1
    assert worker.stop() == 0


def test_it_can_be_stopped_while_it_waits(workers: Workers, source: Path) -> None:
    source.write_text("1 / 0\n")
    worker = start(workers, ready=False)
    worker.wait_for_log("worker_awaits_change status=6")
    assert worker.stop(signal.SIGINT) == 0


def test_other_files_change_nothing(jobs: Jobs, workers: Workers, source: Path) -> None:
    worker = start(workers)
    source.with_suffix(".txt").write_text("a note")
    source.write_text(APP.format(version=2))
    starts(worker, 2)
    assert worker.log.count("worker_reloading") == 1
    assert ".txt" not in worker.log


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_request_to_stop_reaches_the_worker_which_drains(
    jobs: Jobs, workers: Workers, gate: Gate, number: signal.Signals
) -> None:
    worker = start(workers)
    job = jobs.add("reloaded_app.gated", gate.path)
    jobs.until(job, "running")
    worker.send(number)
    worker.wait_for_log("worker_stopping")
    gate.open()
    assert worker.wait() == 0
    assert jobs.finished(job)["attempt"] == 1


def test_nothing_outlives_a_killed_watcher(workers: Workers) -> None:
    worker = start(workers)
    eventually(lambda: len(worker.tree()) >= 4, "watcher, supervisor, fork server and executor")
    worker.kill()


def test_what_no_change_of_the_code_can_mend_ends_it(fresh_dsn: str, workers: Workers) -> None:
    done = workers.run("-A", "reloaded_app:app", "worker", "--reload", env={"PGQUEUE_DSN": fresh_dsn})
    assert done.returncode == 5, done.stderr
    assert "pgqueue migrate" in done.stderr


def test_without_watchfiles_it_says_what_to_install(workers: Workers, source: Path) -> None:
    (source.parent / "watchfiles.py").write_text("raise ImportError\n")
    path = f"{PACKAGE}:{source.parent}"
    done = workers.run("-A", "reloaded_app:app", "worker", "--reload", env={"PYTHONPATH": path})
    assert done.returncode == 2
    assert 'Error: --reload needs watchfiles: pip install "pgqueue[reload]"' in done.stderr


def test_wrong_flags_are_refused_at_once(workers: Workers) -> None:
    done = workers.run("-A", "reloaded_app:app", "worker", "--reload", "--heartbeat", "10", "--lease", "20")
    assert done.returncode == 2
    assert "worker_awaits_change" not in done.stderr


def test_the_package_is_watched_where_it_is(
    tmp_path: Path, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = tmp_path / "elsewhere" / "reloaded_package"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("1 / 0\n")
    monkeypatch.syspath_prepend(str(package.parent))
    monkeypatch.chdir(source.parent)
    assert watched_folders("reloaded_package.app:app") == [source.parent, package]
    assert watched_folders("reloaded_app:app") == [source.parent]
    assert watched_folders("no_such_module:app") == [source.parent]


def test_the_worker_has_the_same_flags() -> None:
    assert worker_command(["-A", "a:b", "worker", "--reload", "-c", "2"])[-5:] == [
        *("-A", "a:b", "worker", "-c", "2")
    ]
