"""Exclusive tasks: a run is ended before anybody else may take its job."""

from __future__ import annotations

import os
import signal

import psutil

from tests.acceptance.workers import Jobs, Ledger, Workers, eventually

QUICK = ("-c", "1", "--heartbeat", "0.5", "--lease", "3")
TASK = "limits_app.alone"


def test_the_run_of_a_frozen_worker_ends_before_another_begins(
    jobs: Jobs, workers: Workers, ledger: Ledger
) -> None:
    first = workers.start(*QUICK, app="limits_app:app")
    job = jobs.add(TASK, 60)
    (run,) = eventually(lambda: ledger.of(job), "it runs")
    second = workers.start(*QUICK, app="limits_app:app")
    os.kill(first.pid, signal.SIGSTOP)  # the supervisor alone: its children go on
    try:
        eventually(lambda: len(ledger.of(job)) == 2, "the other worker runs it")
        assert not psutil.pid_exists(run["pid"])
        last = max(entry["at"] for entry in ledger.of(job, "still") if entry["attempt"] == 1)
        assert last < ledger.of(job)[1]["at"]
    finally:
        os.kill(first.pid, signal.SIGCONT)
    first.wait_for_log(f"exclusive_job_killed job={job} pid={run['pid']}")
    jobs.sql("delete from pgqueue.jobs")
    for worker in (first, second):
        worker.kill()


def test_a_short_freeze_ends_nothing(jobs: Jobs, workers: Workers, ledger: Ledger) -> None:
    worker = workers.start(*QUICK, app="limits_app:app")
    job = jobs.add(TASK, 2)
    (run,) = eventually(lambda: ledger.of(job), "it runs")
    os.kill(worker.pid, signal.SIGSTOP)
    seen = len(ledger.of(job, "still"))
    eventually(lambda: len(ledger.of(job, "still")) > seen + 10, "it goes on for a while")
    os.kill(worker.pid, signal.SIGCONT)
    assert jobs.finished(job)["attempt"] == 1
    assert ledger.of(job, "end")[0]["pid"] == run["pid"]


def test_an_ordinary_run_goes_on(jobs: Jobs, workers: Workers, ledger: Ledger) -> None:
    first = workers.start(*QUICK, app="limits_app:app")
    job = jobs.add("limits_app.naps", 60)
    (run,) = eventually(lambda: ledger.of(job), "it runs")
    second = workers.start(*QUICK, app="limits_app:app")
    os.kill(first.pid, signal.SIGSTOP)
    try:
        eventually(lambda: len(ledger.of(job)) == 2, "the other worker runs it too")
        assert psutil.pid_exists(run["pid"])
    finally:
        os.kill(first.pid, signal.SIGCONT)
    jobs.sql("delete from pgqueue.jobs")
    for worker in (first, second):
        worker.kill()
