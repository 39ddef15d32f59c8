"""Time limits, and executors that are renewed: what ends, what is told, that no job is lost or delayed."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from typing import Any

import psutil
import pytest

from tests.acceptance.conftest import Shared, own_queue
from tests.acceptance.workers import Gate, Jobs, Ledger, Workers, eventually


@pytest.fixture(scope="module")
def limits(postgres: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Shared]:
    with own_queue(postgres, tmp_path_factory.mktemp("limits")) as (jobs, workers):
        worker = workers.start("-c", "2", app="limits_app:app")
        jobs.finished(add(jobs, "says_its_pid", 0))
        yield Shared(jobs, workers, worker)


def add(jobs: Jobs, task: str, *args: object, **options: Any) -> str:
    return jobs.add(f"limits_app.{task}", *args, **options)


class TestSoftLimit:
    def test_a_task_is_told(self, limits: Shared) -> None:
        row = limits.jobs.finished(add(limits.jobs, "sleeps"))
        assert row["result"] == "told: it ran longer than its soft_time_limit of 0.3 s"

    def test_except_exception_does_not_swallow_it(self, limits: Shared) -> None:
        row = limits.jobs.dead(add(limits.jobs, "ignores_exceptions"))
        assert (row["reason"], row["error_class"]) == (
            "not_retryable",
            "pgqueue.errors.SoftTimeLimitExceeded",
        )

    def test_a_task_that_waits_for_a_lock_is_told(self, limits: Shared) -> None:
        row = limits.jobs.dead(add(limits.jobs, "waits_for_a_lock"))
        assert row["error_class"] == "pgqueue.errors.SoftTimeLimitExceeded"

    def test_an_async_task_is_told_where_it_awaits(self, limits: Shared) -> None:
        assert limits.jobs.finished(add(limits.jobs, "awaits"))["result"] == "told"

    def test_it_is_retried_if_the_task_names_it(self, limits: Shared) -> None:
        row = limits.jobs.dead(add(limits.jobs, "named"))
        assert (row["reason"], row["retries"], row["crashes"]) == ("retries_exhausted", 1, 0)

    def test_it_rings_for_nobody_else(self, limits: Shared) -> None:
        """A job that ended in time, and the next one is not told."""
        ids: list[str] = []
        for _ in range(6):
            ids += [add(limits.jobs, "naps", 0.01, soft_time_limit=0.1), add(limits.jobs, "naps", 0.3)]
        assert limits.jobs.ends(ids) == Counter(succeeded=12)

    def test_a_jobs_own_beats_the_tasks(self, limits: Shared) -> None:
        row = limits.jobs.dead(add(limits.jobs, "naps", 30, soft_time_limit=0.1))
        assert row["error_message"] == "it ran longer than its soft_time_limit of 0.1 s"


class TestHardLimit:
    def test_code_that_holds_the_interpreter_is_killed(
        self, jobs: Jobs, workers: Workers, ledger: Ledger
    ) -> None:
        worker = workers.start("-c", "2", app="limits_app:app")
        job = add(jobs, "holds_the_interpreter")
        row = jobs.dead(job)
        assert (row["reason"], row["crashes"], row["error_class"], row["error_message"]) == (
            "time_limit",
            0,
            "TimeLimitExceeded",
            "killed at its time_limit of 0.7 s",
        )
        (run,) = ledger.of(job)
        eventually(lambda: not psutil.pid_exists(run["pid"]), "the executor is gone")
        worker.wait_for_log(f"job_overdue job={job} task=limits_app.holds_the_interpreter attempt=1")
        assert "executor_died" not in worker.log

    def test_a_task_that_swallows_everything_is_killed(
        self, jobs: Jobs, workers: Workers, ledger: Ledger
    ) -> None:
        workers.start("-c", "2", app="limits_app:app")
        row = jobs.dead(add(jobs, "swallows"))
        assert (row["reason"], row["retries"]) == ("time_limit", 0)

    def test_it_is_retried_if_the_task_names_it(self, jobs: Jobs, workers: Workers, ledger: Ledger) -> None:
        workers.start("-c", "2", app="limits_app:app")
        job = add(jobs, "tries_again")
        row = jobs.dead(job)
        assert (row["reason"], row["retries"], row["crashes"]) == ("retries_exhausted", 1, 0)
        assert len(ledger.of(job)) == 2
        assert [failure["kind"] for failure in jobs.failures(job)] == ["failed", "failed"]

    def test_a_jobs_own_beats_the_tasks(self, jobs: Jobs, workers: Workers, ledger: Ledger) -> None:
        workers.start("-c", "2", app="limits_app:app")
        job = add(jobs, "naps", 30, time_limit=0.3)
        assert jobs.dead(job)["error_message"] == "killed at its time_limit of 0.3 s"
        job = add(jobs, "swallows", time_limit=1.5)
        assert jobs.dead(job)["error_message"] == "killed at its time_limit of 1.5 s"

    def test_the_workers_limits_hold_for_tasks_without(self, jobs: Jobs, workers: Workers) -> None:
        workers.start("-c", "1", "--time-limit", "0.5", app="limits_app:app")
        hard = add(jobs, "naps", 30)
        free = add(jobs, "naps", 1.2, time_limit=0)
        assert jobs.dead(hard)["reason"] == "time_limit"
        assert jobs.finished(free)["result"] == "rested"

    def test_the_others_go_on(self, jobs: Jobs, workers: Workers) -> None:
        workers.start("-c", "2", app="limits_app:app")
        stuck = add(jobs, "swallows")
        short = [add(jobs, "says_its_pid", index) for index in range(300)]
        assert jobs.ends(short) == Counter(succeeded=300)
        assert jobs.dead(stuck)["reason"] == "time_limit"


class TestRenewal:
    def test_an_executor_leaves_after_its_jobs(self, jobs: Jobs, workers: Workers, ledger: Ledger) -> None:
        worker = workers.start("-c", "2", "--max-tasks-per-child", "5", app="limits_app:app")
        ids = [add(jobs, "says_its_pid", index) for index in range(103)]
        assert jobs.ends(ids) == Counter(succeeded=103)
        assert set(ledger.runs().values()) == {1}
        ran = Counter(entry["pid"] for entry in ledger.entries())
        assert max(ran.values()) <= 5
        assert len(ran) >= 21
        assert "executor_died" not in worker.log
        eventually(lambda: len(worker.executors) == 2, "two executors are left")

    def test_no_more_run_at_a_time_while_one_is_renewed(
        self, jobs: Jobs, workers: Workers, ledger: Ledger, gate: Gate
    ) -> None:
        """The successor is there, and waits until the last job of its predecessor has ended."""
        worker = workers.start("-c", "1", "--max-tasks-per-child", "1", app="limits_app:app")
        first, second = add(jobs, "naps", 3.0), add(jobs, "naps", 0)
        eventually(lambda: len(worker.executors) == 2, "the successor is up")
        jobs.finished(second)
        started = jobs.sql("select started_at from pgqueue.finished_jobs where id = %s", second)[0]
        ended = jobs.sql("select finished_at from pgqueue.finished_jobs where id = %s", first)[0]
        assert started["started_at"] >= ended["finished_at"]

    def test_a_leaking_task_keeps_within_bounds(self, jobs: Jobs, workers: Workers) -> None:
        limit = 120_000
        worker = workers.start("-c", "2", "--max-memory-per-child", str(limit), app="limits_app:app")
        ids = [add(jobs, "leaks", 1_000) for _ in range(600)]
        assert jobs.ends(ids) == Counter(succeeded=600)
        sizes = [int(size) for size in re.findall(r"executor_full pid=\d+ memory_kib=(\d+)", worker.log)]
        assert len(sizes) >= 5
        assert all(limit < size < limit + 5_000 for size in sizes), sizes
        assert "executor_died" not in worker.log
        assert not jobs.sql("select 1 from pgqueue.failures")

    def test_autoscale_grows_with_the_work(self, jobs: Jobs, workers: Workers, ledger: Ledger) -> None:
        worker = workers.start("--autoscale", "4,1", app="limits_app:app")
        eventually(lambda: len(worker.executors) == 1, "one executor")
        ids = [add(jobs, "naps", 6) for _ in range(4)]
        eventually(lambda: ledger.count() == 4, "four run")
        assert not jobs.sql("select 1 from pgqueue.finished_jobs"), "none waited for another's end"
        assert jobs.ends(ids) == Counter(succeeded=4)
        assert len(worker.executors) == 4

    def test_what_is_wrong_is_said_at_once(self, workers: Workers) -> None:
        done = workers.run(
            *("-A", "limits_app:app", "worker", "--autoscale", "2,8", "--max-tasks-per-child", "0"),
            *("--max-memory-per-child", "-1", "--time-limit", "1", "--soft-time-limit", "2"),
        )
        assert done.returncode == 2
        for part in (
            "autoscale must be the most and the least executors, 1 to 1024, as in 8,2, got '2,8'",
            "max_tasks_per_child must be a whole number from 1",
            "max_memory_per_child must be a whole number from 1",
            "soft_time_limit must be less than time_limit (1 s), got 2",
        ):
            assert part in done.stderr
