"""Cancelling jobs that wait and jobs that run, and what the command line says of one job."""

from __future__ import annotations

import json
import random
from collections import Counter
from typing import Any

import pytest

from tests.acceptance.workers import Jobs, Ledger, Worker, Workers, eventually


def cancel(jobs: Jobs, job: str, reason: str | None = None) -> str:
    return str(jobs.sql("select pgqueue.cancel(%s, %s) as answer", job, reason)[0]["answer"])


def add(jobs: Jobs, task: str, *args: object, **options: Any) -> str:
    return jobs.add(f"limits_app.{task}", *args, **options)


def started(jobs: Jobs, ledger: Ledger, task: str, *args: object) -> str:
    job = add(jobs, task, *args)
    eventually(lambda: ledger.of(job), "it runs")
    return job


@pytest.mark.parametrize("how", ["sleeps", "busy", "swallows", "fails", "later"])
@pytest.mark.parametrize("flags", [(), ("--no-listen",)])
def test_a_running_one_ends_and_is_not_retried(
    jobs: Jobs, workers: Workers, ledger: Ledger, how: str, flags: tuple[str, ...]
) -> None:
    worker = workers.start("-c", "2", *flags, app="limits_app:app")
    job = (
        started(jobs, ledger, "cancellable_later")
        if how == "later"
        else started(jobs, ledger, "cancellable", how)
    )
    assert cancel(jobs, job, "changed my mind") == "requested"
    row = jobs.finished(job)
    assert (row["state"], row["retries"], row["attempt"]) == ("cancelled", 0, 1)
    assert row["started_at"] <= row["finished_at"]
    assert len(ledger.of(job, "end")) == 1
    assert not jobs.failures(job)
    assert "executor_died" not in worker.log
    (act,) = jobs.sql("select * from pgqueue.audit_log where job_id = %s", job)
    assert (act["action"], act["reason"], act["details"]) == (
        "cancel",
        "changed my mind",
        {"answer": "requested", "before": {"state": "running"}, "after": {"state": "running"}},
    )
    assert jobs.finished(add(jobs, "naps", 0))["result"] == "rested"


def test_one_that_ends_first_has_succeeded(jobs: Jobs, workers: Workers, ledger: Ledger) -> None:
    workers.start("-c", "1", app="limits_app:app")
    job = started(jobs, ledger, "cancellable", "asks")
    assert cancel(jobs, job) == "requested"
    row = jobs.finished(job)
    assert (row["state"], row["result"]) == ("succeeded", "stopped by itself")
    assert cancel(jobs, job) == "too_late"


def test_waiting_ones_never_run(jobs: Jobs, workers: Workers, ledger: Ledger) -> None:
    ready, later = add(jobs, "naps", 0), add(jobs, "naps", 0, countdown=3600)
    for job in (ready, later):
        assert cancel(jobs, job) == "cancelled"
        assert cancel(jobs, job) == "too_late"
        assert jobs.finished(job)["state"] == "cancelled"
    workers.start("-c", "1", app="limits_app:app")
    jobs.finished(add(jobs, "naps", 0))
    assert len(ledger.runs()) == 1


def test_one_that_was_claimed_and_waits_for_a_slot(jobs: Jobs, workers: Workers, ledger: Ledger) -> None:
    """Behind a job that has become long without warning."""
    worker = workers.start("-c", "1", app="limits_app:app")
    jobs.ends([add(jobs, "naps", 0) for _ in range(300)])
    ids = [add(jobs, "naps", 2), *(add(jobs, "naps", 0) for _ in range(50))]
    eventually(lambda: ledger.of(ids[0]), "the long one runs")
    answers = Counter(cancel(jobs, job) for job in ids[1:])
    assert set(answers) <= {"cancelled", "requested"}
    assert jobs.ends(ids) == Counter(succeeded=1, cancelled=50)
    assert all(not ledger.of(job) for job in ids[1:])
    assert "executor_died" not in worker.log


@pytest.mark.slow
def test_one_that_cannot_be_told_is_killed(jobs: Jobs, workers: Workers, ledger: Ledger) -> None:
    worker = workers.start("-c", "1", app="limits_app:app")
    job = started(jobs, ledger, "cancellable", "stubborn")
    assert cancel(jobs, job) == "requested"
    row = jobs.finished(job)
    assert (row["state"], row["crashes"]) == ("cancelled", 0)
    worker.wait_for_log(f"job_cancel_killed job={job}")
    assert jobs.finished(add(jobs, "naps", 0))["result"] == "rested"


def test_one_whose_worker_dies_does_not_run_again(jobs: Jobs, workers: Workers, ledger: Ledger) -> None:
    worker = workers.start("-c", "1", "--heartbeat", "0.3", "--lease", "1", app="limits_app:app")
    job = add(jobs, "swallows", time_limit=60)
    eventually(lambda: ledger.of(job), "it runs")
    assert cancel(jobs, job) == "requested"
    worker.kill()
    workers.start("-c", "1", "--heartbeat", "0.3", "--lease", "1", app="limits_app:app")
    assert jobs.finished(job)["state"] == "cancelled"
    assert len(ledger.of(job)) == 1


def test_nobody_else_is_hit(jobs: Jobs, workers: Workers, ledger: Ledger) -> None:
    """Thousands of short jobs, some of them cancelled at any moment."""
    worker = workers.start("-c", "2", app="limits_app:app")
    dice = random.Random(7)
    ids = [add(jobs, "naps", 0.001) for _ in range(1_500)]
    chosen = dice.sample(ids, 150)
    answers = {job: cancel(jobs, job) for job in chosen}
    ends = jobs.ends(ids)
    assert ends["succeeded"] + ends["cancelled"] == 1_500
    cancelled = {
        str(row["id"]) for row in jobs.sql("select id from pgqueue.finished_jobs where state = 'cancelled'")
    }
    assert cancelled <= set(chosen)
    assert {job for job, answer in answers.items() if answer == "cancelled"} <= cancelled
    assert "executor_died" not in worker.log


class TestCommands:
    @pytest.fixture
    def worker(self, workers: Workers) -> Worker:
        return workers.start("-c", "1", app="limits_app:app")

    def test_cancel(self, jobs: Jobs, workers: Workers) -> None:
        job = add(jobs, "naps", 0)
        done = workers.run("job", "cancel", job, "--note", "twice")
        assert (done.returncode, done.stdout) == (0, f"job {job}: cancelled\n")
        done = workers.run("job", "cancel", job, "--json")
        assert (done.returncode, json.loads(done.stdout)) == (1, {job: "too_late"})
        assert f"pgqueue: job {job} has ended, or there is none" in done.stderr
        shown = json.loads(workers.run("job", "show", job, "--json").stdout)
        assert (shown["state"], shown["acts"][0]["reason"]) == ("cancelled", "twice")
        assert shown["acts"][0]["details"]["by"]

    def test_show_and_retry(self, jobs: Jobs, workers: Workers, worker: Worker) -> None:
        dead = add(jobs, "ignores_exceptions")
        jobs.dead(dead)
        text = workers.run("job", "show", dead)
        assert text.returncode == 0
        for part in (dead, "dead", "limits_app.ignores_exceptions", "SoftTimeLimitExceeded", worker.id):
            assert part in text.stdout
        again = workers.run("job", "retry", dead, "--note", "try again")
        assert (again.returncode, again.stdout) == (0, f"job {dead}: ready\n")
        eventually(lambda: jobs.sql("select 1 from pgqueue.dead_letters where attempt = 2"), "it ran again")

        later = add(jobs, "naps", 0, countdown=3600)
        assert workers.run("job", "retry", later).returncode == 0
        assert jobs.finished(later)["result"] == "rested"
        ended = workers.run("job", "retry", later)
        assert ended.returncode == 1
        assert "it has succeeded; to do it once more, enqueue it anew" in ended.stderr

    def test_nobody_knows_it(self, workers: Workers) -> None:
        unknown = "01890a5d-ac96-774b-bcce-b302099a8057"
        for command in ("show", "retry", "cancel"):
            done = workers.run("job", command, unknown)
            assert done.returncode == 1
            assert done.stderr.startswith("pgqueue: ")
