"""Threads, coroutines, and the pool for debuggers: what runs where, what ends when, what a crash costs."""

from __future__ import annotations

import os
import pty
import re
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest

from tests.acceptance.conftest import Shared, own_queue
from tests.acceptance.workers import APPS, Gate, Jobs, Ledger, Workers, eventually

APP = "pools_app:app"
KIND = {"threads": "", "asyncio": "_async"}


def add(jobs: Jobs, task: str, *args: object, **options: Any) -> str:
    return jobs.add(f"pools_app.{task}", *args, **options)


@pytest.fixture(scope="module", params=["threads", "asyncio"])
def pool(
    request: pytest.FixtureRequest, postgres: Any, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[str, Shared]]:
    with own_queue(postgres, tmp_path_factory.mktemp(request.param)) as (jobs, workers):
        worker = workers.start("--pool", request.param, "-c", "4", app=APP)
        jobs.finished(add(jobs, "where"))
        yield request.param, Shared(jobs, workers, worker)


class TestShared:
    def test_plain_and_async_tasks_run_side_by_side_in_one_process(
        self, pool: tuple[str, Shared], gate: Gate
    ) -> None:
        _, shared = pool
        waiting = [add(shared.jobs, name, gate.path) for name in ("gated", "gated_async")]
        for job in waiting:
            eventually(lambda job=job: shared.ledger.of(job), "it to start")  # type: ignore[misc]
        rows = [shared.jobs.finished(add(shared.jobs, name))["result"] for name in ("where", "where_async")]
        gate.open()
        assert shared.jobs.ends(waiting) == Counter(succeeded=2)
        assert len({pid for pid, _, _ in rows}) == 1
        assert rows[0][1] is False, "a plain task blocks nobody"

    def test_each_body_sees_its_own_job(self, pool: tuple[str, Shared]) -> None:
        _, shared = pool
        ids = [add(shared.jobs, name, 0.02) for _ in range(20) for name in ("where", "where_async")]
        assert {job: shared.jobs.finished(job)["result"][2] for job in ids} == {job: job for job in ids}

    def test_short_jobs_do_not_wait_behind_a_long_one(self, pool: tuple[str, Shared], gate: Gate) -> None:
        kind, shared = pool
        long = add(shared.jobs, "gated" + KIND[kind], gate.path)
        eventually(lambda: shared.ledger.of(long), "the long one to start")
        ids = shared.jobs.add_many("pools_app.short" + KIND[kind], [()] * 400)
        assert shared.jobs.ends(ids) == Counter(succeeded=400)
        assert shared.jobs.live(long)["state"] == "running"
        gate.open()
        shared.jobs.finished(long)

    @pytest.mark.parametrize("task", ["busy", "awaits"])
    def test_a_soft_limit_is_told(self, pool: tuple[str, Shared], task: str) -> None:
        _, shared = pool
        row = shared.jobs.finished(add(shared.jobs, task))
        assert row["result"] == "told: it ran longer than its soft_time_limit of 0.3 s"

    def test_a_soft_limit_is_told_to_nobody_else(self, pool: tuple[str, Shared]) -> None:
        _, shared = pool
        ids = [add(shared.jobs, "where", 0.01, soft_time_limit=0.011) for _ in range(40)]
        after = [add(shared.jobs, "where", 0.05) for _ in range(40)]
        assert shared.jobs.ends(after) == Counter(succeeded=40)
        assert sum(shared.jobs.ends(ids).values()) == 40

    @pytest.mark.parametrize("task", ["works", "works_async"])
    def test_a_cancelled_run_ends(self, pool: tuple[str, Shared], task: str) -> None:
        _, shared = pool
        job, other = add(shared.jobs, task), add(shared.jobs, "where", 1.0)
        eventually(lambda: shared.ledger.of(job), "it to start")
        shared.jobs.sql("SELECT pgqueue.cancel(%s)", job)
        assert shared.jobs.ends([job, other]) == Counter(cancelled=1, succeeded=1)
        assert len(shared.ledger.of(job, "end")) == 1

    def test_a_body_can_ask_whether_it_is_cancelled(self, pool: tuple[str, Shared]) -> None:
        _, shared = pool
        job = add(shared.jobs, "asks")
        eventually(lambda: shared.ledger.of(job), "it to start")
        shared.jobs.sql("SELECT pgqueue.cancel(%s)", job)
        assert shared.jobs.finished(job)["result"] == "stopped by itself"

    @pytest.mark.parametrize("task", ["exits", "exits_async"])
    def test_a_body_that_exits_ends_only_its_own_run(self, pool: tuple[str, Shared], task: str) -> None:
        _, shared = pool
        before = [each.pid for each in shared.worker.executors]
        assert shared.jobs.dead(add(shared.jobs, task))["error_class"] == "SystemExit"
        assert [each.pid for each in shared.worker.executors] == before


@pytest.mark.parametrize("kind", ["threads", "asyncio"])
class TestOwn:
    def test_a_hard_limit_renews_the_process_and_costs_the_others_nothing(
        self, jobs: Jobs, workers: Workers, ledger: Ledger, gate: Gate, kind: str
    ) -> None:
        worker = workers.start("--pool", kind, "-c", "3", app=APP)
        ends, stays = add(jobs, "where" + KIND[kind], 2.0), add(jobs, "gated" + KIND[kind], gate.path)
        stuck = add(jobs, "stuck" + KIND[kind])
        for job in (ends, stays, stuck):
            eventually(lambda job=job: ledger.of(job), "it to start")  # type: ignore[misc]
        (old,) = worker.executors
        row = jobs.dead(stuck)
        assert (row["reason"], row["error_class"]) == ("time_limit", "TimeLimitExceeded")
        eventually(lambda: len(ledger.of(stays)) == 2, "the other to run again")
        gate.open()
        assert (jobs.finished(ends)["crashes"], jobs.finished(stays)["crashes"]) == (0, 0)
        assert ledger.runs() == {ends: 1, stays: 2, stuck: 1}
        assert old.pid not in [each.pid for each in worker.executors]

    def test_a_crash_costs_the_runs_of_its_process_and_no_job(
        self, jobs: Jobs, workers: Workers, ledger: Ledger, gate: Gate, kind: str
    ) -> None:
        worker = workers.start("--pool", kind, "-c", "4", app=APP)
        ids = [add(jobs, "gated" + KIND[kind], gate.path) for _ in range(6)]
        eventually(lambda: ledger.count() == 4, "four to start")
        (executor,) = worker.executors
        executor.kill()
        eventually(lambda: ledger.count() >= 8, "them to run again")
        gate.open()
        assert jobs.ends(ids) == Counter(succeeded=6)
        rows = jobs.sql("SELECT crashes FROM pgqueue.finished_jobs ORDER BY crashes")
        assert [row["crashes"] for row in rows] == [0, 0, 1, 1, 1, 1]

    def test_executors_are_renewed_and_no_job_is_lost(
        self, jobs: Jobs, workers: Workers, ledger: Ledger, kind: str
    ) -> None:
        flags = ("--processes", "2", "--max-tasks-per-child", "20")
        worker = workers.start("--pool", kind, "-c", "3", *flags, app=APP)
        ids = jobs.add_many("pools_app.where" + KIND[kind], [()] * 200)
        assert jobs.ends(ids) == Counter(succeeded=200)
        runs = Counter(entry["pid"] for entry in ledger.entries("start"))
        assert ledger.runs() == dict.fromkeys(ids, 1)
        assert max(runs.values()) <= 20
        eventually(lambda: len(worker.executors) == 2, "two executors")

    def test_asked_to_stop_it_finishes_what_it_can_and_gives_the_rest_back(
        self, jobs: Jobs, workers: Workers, ledger: Ledger, gate: Gate, kind: str
    ) -> None:
        worker = workers.start("--pool", kind, "-c", "2", "--shutdown-timeout", "2", app=APP)
        ends, stays = add(jobs, "where" + KIND[kind], 1.0), add(jobs, "gated" + KIND[kind], gate.path)
        waits = add(jobs, "where")
        eventually(lambda: ledger.count() == 2, "two to start")
        worker.send(signal.SIGTERM)
        assert worker.wait() != 0
        jobs.finished(ends)
        rows = [jobs.live(job) for job in (stays, waits)]
        assert [(row["state"], row["retries"], row["crashes"]) for row in rows] == [("ready", 0, 0)] * 2


def test_many_coroutines_wait_at_the_same_time(jobs: Jobs, workers: Workers, gate: Gate) -> None:
    workers.start("--pool", "asyncio", "-c", "1000", app=APP)
    ids = jobs.add_many("pools_app.gated_async", [(gate.path,)] * 1000)
    eventually(lambda: workers.ledger.count() == 1000, "all to start", within=60)
    gate.open()
    assert jobs.ends(ids, within=60) == Counter(succeeded=1000)


def test_a_debugger_has_the_terminal_in_solo(jobs: Jobs, workers: Workers) -> None:
    ours, theirs = pty.openpty()
    command = [
        sys.executable,
        "-m",
        "pgqueue.cli.main",
        "-A",
        APP,
        "worker",
        "--pool",
        "solo",
        "-Q",
        "default",
    ]
    process = subprocess.Popen(
        command,
        cwd=APPS,
        env=workers.environment(),
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        start_new_session=True,
    )
    os.close(theirs)
    seen = bytearray()

    def read_until(pattern: str) -> None:
        def look() -> bool:
            seen.extend(os.read(ours, 4096))
            return re.search(pattern, seen.decode(errors="replace")) is not None

        eventually(look, f"{pattern!r} on the terminal")

    try:
        read_until("worker_started")
        job = add(jobs, "debugged", time_limit=0.2)
        read_until(r"\(Pdb\) ")
        os.write(ours, b"answer = answer + 1\n")
        read_until(r"answer \+ 1\s+\S*\(Pdb\) ")
        os.write(ours, b"c\n")
        assert jobs.finished(job)["result"] == 42
        process.send_signal(signal.SIGTERM)
        assert process.wait(20) == 0
    finally:
        process.kill()
        process.wait()
        os.close(ours)
