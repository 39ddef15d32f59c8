"""What each option of a task does to jobs in a real worker."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest

from pgqueue import EnqueueUncertain, JobFailed, PgQueue
from tests.acceptance.conftest import Shared, own_queue
from tests.acceptance.workers import Gate, Jobs, Workers, eventually
from tests.faults.network import LossyProxy

APP = "options_app:app"
BRISK = ("--heartbeat", "0.5", "--lease", "2")


def add(jobs: Jobs, task: str, *args: object, **options: Any) -> str:
    return jobs.add(f"options_app.{task}", *args, **options)


@pytest.fixture(scope="module")
def shared(postgres: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Shared]:
    with own_queue(postgres, tmp_path_factory.mktemp("shared")) as (jobs, workers):
        worker = workers.start("-c", "1", app=APP)
        jobs.finished(add(jobs, "silent"))
        yield Shared(jobs, workers, worker)


class TestEnds:
    def test_reject(self, shared: Shared) -> None:
        job = add(shared.jobs, "rejects")
        dead = shared.jobs.dead(job)
        assert (dead["reason"], dead["error_message"]) == ("rejected", "the customer is gone")
        assert shared.ledger.of(job, "swallowed") == [], "no `except Exception` catches it"
        with pytest.raises(JobFailed, match=r"\(rejected\).*the customer is gone"):
            PgQueue("reader", dsn=shared.jobs.dsn).AsyncResult(job).get()

    def test_snooze_burns_no_retry_and_leaves_no_failure(self, shared: Shared) -> None:
        job = add(shared.jobs, "snoozes", 3, max_retries=0)
        row = shared.jobs.finished(job)
        assert (row["result"], row["retries"], row["attempt"]) == (0, 0, 4)
        assert shared.jobs.failures(job) == []

    def test_retries_for_ever(self, shared: Shared) -> None:
        job = add(shared.jobs, "fails_often", 12)
        assert shared.jobs.finished(job)["result"] == 12
        assert len(shared.jobs.failures(job)) == 12

    @pytest.mark.parametrize(
        ("missing", "reason", "runs"), [(True, "not_retryable", 1), (False, "retries_exhausted", 4)]
    )
    def test_exceptions_taken_out_again(self, shared: Shared, missing: bool, reason: str, runs: int) -> None:
        dead = shared.jobs.dead(add(shared.jobs, "spares", missing))
        assert (dead["reason"], dead["attempt"]) == (reason, runs)

    def test_expiry_stops_retries(self, shared: Shared) -> None:
        job = add(shared.jobs, "fails_always", expires=1)
        row = shared.jobs.finished(job)
        assert row["state"] == "expired"
        assert row["retries"] >= 1


class TestWhatIsKept:
    def test_no_result(self, shared: Shared) -> None:
        job = add(shared.jobs, "silent")
        row = shared.jobs.finished(job)
        assert (row["result"], row["result_error"]) == (None, None)
        assert PgQueue("reader", dsn=shared.jobs.dsn).AsyncResult(job).get() is None

    def test_no_history(self, shared: Shared) -> None:
        kept, gone = add(shared.jobs, "forgotten", True), add(shared.jobs, "forgotten")
        assert shared.jobs.dead(kept)["reason"] == "not_retryable"
        shared.jobs.wait(gone)
        assert shared.jobs.sql("select from pgqueue.all_jobs where id = %s", gone) == []
        assert PgQueue("reader", dsn=shared.jobs.dsn).AsyncResult(gone).state == "unknown"

    def test_without_history_an_uncertain_enqueue_is_not_repeated(self, db: str) -> None:
        """A repeat could run what has run and been forgotten."""
        with LossyProxy(db) as proxy:
            app = PgQueue("producer", dsn=proxy.dsn)

            @app.task(history=False)
            def forgotten() -> None: ...

            @app.task
            def kept() -> None: ...

            kept.delay()
            proxy.lose_every = 1
            try:
                with pytest.raises(EnqueueUncertain, match="keeps no history that could tell"):
                    forgotten.delay()
            finally:
                proxy.lose_every = 0
                app.close()


class TestCrashes:
    def test_so_many_deaths(self, jobs: Jobs, workers: Workers) -> None:
        workers.start("-c", "1", app=APP)
        job = add(jobs, "dies")
        jobs.until(job, "scheduled")
        jobs.make_due(job)
        dead = jobs.dead(job)
        assert (dead["reason"], dead["crashes"]) == ("crashed", 2)
        assert workers.ledger.runs() == Counter({job: 2})

    def test_one_death(self, jobs: Jobs, workers: Workers) -> None:
        workers.start("-c", "1", app=APP)
        job = add(jobs, "dies_once")
        assert jobs.dead(job)["reason"] == "crashed"
        assert workers.ledger.runs() == Counter({job: 1})

    def test_an_error_is_no_death(self, shared: Shared) -> None:
        assert shared.jobs.finished(add(shared.jobs, "fails_once"))["result"] == 2

    def test_a_worker_that_was_killed(self, jobs: Jobs, workers: Workers, gate: Gate) -> None:
        """Another one finds its job, and buries it instead of running it."""
        doomed = workers.start("-c", "1", *BRISK, app=APP)
        job = add(jobs, "must_not_run_twice", gate.path)
        eventually(lambda: workers.ledger.of(job), "it starts")
        doomed.kill()
        workers.start("-c", "1", *BRISK, app=APP)
        assert jobs.dead(job)["reason"] == "crashed"
        gate.open()
        assert workers.ledger.runs() == Counter({job: 1})

    def test_a_worker_whose_patience_has_ended(self, jobs: Jobs, workers: Workers, gate: Gate) -> None:
        worker = workers.start("-c", "1", "--shutdown-timeout", "0.3", app=APP)
        job = add(jobs, "must_not_run_twice", gate.path)
        eventually(lambda: workers.ledger.of(job), "it starts")
        assert worker.stop() != 0
        assert jobs.dead(job)["reason"] == "crashed"

    def test_one_that_ends_in_time_has_ended(self, jobs: Jobs, workers: Workers, gate: Gate) -> None:
        worker = workers.start("-c", "1", app=APP)
        job = add(jobs, "must_not_run_twice", gate.path)
        eventually(lambda: workers.ledger.of(job), "it starts")
        worker.process.terminate()
        worker.wait_for_log("worker_stopping running=1")
        gate.open()
        assert worker.wait() == 0
        assert jobs.finished(job)["result"] == "ran once"
