"""What becomes of jobs that fail: when they run again, when they do not, and what is kept of each attempt."""

from __future__ import annotations

from typing import Any

import pytest

from tests.acceptance.conftest import Shared
from tests.acceptance.workers import Gate, Jobs, Row, eventually


def delay(jobs: Jobs, job: str) -> float:
    """Seconds from the last failure to the next run."""
    (row,) = jobs.sql(
        """select extract(epoch from j.eta - max(f.failed_at))::float8 as delay
           from pgqueue.jobs j join pgqueue.failures f on f.job_id = j.id where j.id = %s group by j.eta""",
        job,
    )
    return float(row["delay"])


def until_retry(jobs: Jobs, job: str, retries: int) -> Row:
    """The job, waiting for this retry."""

    def look() -> list[Row]:
        return jobs.sql(
            "select * from pgqueue.jobs where id = %s and state = 'scheduled' and retries = %s", job, retries
        )

    return eventually(look, f"job {job} waits for retry {retries}")[0]


def attempts_kept(jobs: Jobs, job: str) -> list[tuple[Any, ...]]:
    return [(row["attempt"], row["kind"], row["error_message"]) for row in jobs.failures(job)]


def test_an_error_named_in_autoretry_for_runs_again(shared: Shared) -> None:
    jobs = shared.jobs
    job = jobs.add("fails_until", 3)
    row = jobs.finished(job)
    assert (row["state"], row["result"]) == ("succeeded", 3)
    assert (row["attempt"], row["retries"], row["crashes"]) == (3, 2, 0)
    assert attempts_kept(jobs, job) == [(1, "failed", "attempt 1"), (2, "failed", "attempt 2")]
    assert [(note["attempt"], note["retries"]) for note in shared.ledger.of(job)] == [(1, 0), (2, 1), (3, 2)]
    assert {row["worker_id"] for row in jobs.failures(job)} == {shared.worker.id}


def test_so_does_a_subclass_of_it(shared: Shared) -> None:
    assert shared.jobs.finished(shared.jobs.add("fails_until", 2, True))["result"] == 2


def test_retries_run_out(shared: Shared) -> None:
    jobs = shared.jobs
    job = jobs.add("fails_until", 99)
    letter = jobs.dead(job)
    assert (letter["reason"], letter["error_class"]) == ("retries_exhausted", "tests_app.Passing")
    assert (letter["attempt"], letter["retries"], letter["crashes"]) == (3, 2, 0)
    assert letter["eta"] is not None, "it keeps when its last run was due"
    assert letter["dead_letter_queue"] == "default"
    assert "attempt 3" in letter["error_message"]
    assert "fails_until" in letter["traceback"]
    assert attempts_kept(jobs, job) == [(n, "failed", f"attempt {n}") for n in (1, 2, 3)]
    assert len(shared.ledger.of(job)) == 3


@pytest.mark.parametrize(("limit", "runs"), [(0, 1), (1, 2), (4, 5)])
def test_a_jobs_own_limit_beats_its_tasks(shared: Shared, limit: int, runs: int) -> None:
    job = shared.jobs.add("fails_until", 99, max_retries=limit)
    letter = shared.jobs.dead(job)
    assert (letter["reason"], letter["retries"], letter["attempt"]) == ("retries_exhausted", limit, runs)


def test_for_ever_is_longer_than_the_tasks_limit(shared: Shared) -> None:
    job = shared.jobs.add("fails_until", 8, max_retries=-1)
    row = shared.jobs.finished(job)
    assert (row["result"], row["retries"]) == (8, 7)


def test_an_error_nobody_named_is_final(shared: Shared) -> None:
    jobs = shared.jobs
    job = jobs.add("fails_with_a_place")
    letter = jobs.dead(job)
    assert (letter["reason"], letter["error_class"], letter["error_message"]) == (
        "not_retryable",
        "KeyError",
        "'no retry for this'",
    )
    assert (letter["attempt"], letter["retries"]) == (1, 0)
    assert len(jobs.failures(job)) == 1


def test_dont_autoretry_for_takes_a_subclass_out(shared: Shared) -> None:
    letter = shared.jobs.dead(shared.jobs.add("fails_but_not_as_child"))
    assert (letter["reason"], letter["error_class"]) == ("not_retryable", "tests_app.PassingChild")


def test_the_default_delay(shared: Shared) -> None:
    jobs = shared.jobs
    job = jobs.add("fails_slowly")
    waiting = until_retry(jobs, job, 1)
    assert (waiting["worker_id"], waiting["claimed_at"], waiting["attempt"]) == (None, None, 1)
    assert delay(jobs, job) == pytest.approx(100, abs=5)


def test_a_backoff_doubles_up_to_its_limit(shared: Shared) -> None:
    jobs = shared.jobs
    job = jobs.add("backs_off")
    delays = []
    for retries in (1, 2, 3):
        until_retry(jobs, job, retries)
        delays.append(delay(jobs, job))
        jobs.make_due(job)
    assert delays == [pytest.approx(seconds, abs=5) for seconds in (40, 80, 100)]
    assert jobs.dead(job)["reason"] == "retries_exhausted"


def test_jitter_draws_from_nothing_to_the_backoff(shared: Shared) -> None:
    jobs = shared.jobs
    many = jobs.add_many("backs_off_with_jitter", [()] * 60)
    drawn = []
    # So long that none of them comes due by itself meanwhile.
    for retries, most in ((1, 10_000_000), (2, 20_000_000), (3, 30_000_000), (4, 30_000_000)):
        for job in many:
            until_retry(jobs, job, retries)
        delays = [delay(jobs, job) for job in many]
        assert all(-1 <= seconds <= most + 1 for seconds in delays), (retries, min(delays), max(delays))
        # 60 even draws all on one side of the middle: one chance in 10^18.
        assert min(delays) < most / 2 < max(delays)
        assert len({round(seconds) for seconds in delays}) > 20
        drawn.append(sum(delays) / len(delays))
        jobs.sql(
            """update pgqueue.jobs set eta = clock_timestamp()
               where id = any(%s::uuid[]) and state = 'scheduled'""",
            many,
        )
        jobs.sql("select pgqueue.wake_workers(array['default'])")
    assert drawn[0] < drawn[1] < max(drawn[2:])


class TestSelfRetry:
    def test_with_a_countdown(self, shared: Shared) -> None:
        job = shared.jobs.add("asks_again", {"countdown": 50})
        until_retry(shared.jobs, job, 1)
        assert delay(shared.jobs, job) == pytest.approx(50, abs=5)

    def test_with_an_eta(self, shared: Shared) -> None:
        job = shared.jobs.add("asks_again", {"eta_in": 70})
        until_retry(shared.jobs, job, 1)
        assert delay(shared.jobs, job) == pytest.approx(70, abs=5)

    def test_at_once_and_then_it_succeeds(self, shared: Shared) -> None:
        jobs = shared.jobs
        job = jobs.add("asks_again", {"countdown": 0}, 1)
        row = jobs.finished(job)
        assert (row["result"], row["retries"], row["attempt"]) == (2, 1, 2)
        (failure,) = jobs.failures(job)
        assert (failure["error_class"], failure["error_message"]) == ("LookupError", "the reason")

    def test_runs_out_like_any_retry(self, shared: Shared) -> None:
        job = shared.jobs.add("asks_again", {"countdown": 0})
        letter = shared.jobs.dead(job)
        assert (letter["reason"], letter["retries"], letter["error_class"]) == (
            "retries_exhausted",
            1,
            "LookupError",
        )

    def test_names_its_own_reason(self, shared: Shared) -> None:
        letter = shared.jobs.dead(shared.jobs.add("asks_again", {"countdown": 0, "exc": "my own"}))
        assert (letter["error_class"], letter["error_message"]) == ("tests_app.Passing", "my own")

    def test_sets_its_own_limit(self, shared: Shared) -> None:
        jobs = shared.jobs
        fewer = jobs.dead(jobs.add("asks_again", {"countdown": 0, "max_retries": 0}))
        assert (fewer["reason"], fewer["attempt"]) == ("retries_exhausted", 1)
        more = jobs.dead(jobs.add("asks_again", {"countdown": 0, "max_retries": 4}))
        assert (more["reason"], more["attempt"], more["retries"]) == ("retries_exhausted", 5, 4)

    def test_is_not_swallowed_by_except_exception(self, shared: Shared) -> None:
        letter = shared.jobs.dead(shared.jobs.add("swallows"))
        assert letter["reason"] == "retries_exhausted"

    def test_with_nonsense_is_a_failure_of_the_task(self, shared: Shared) -> None:
        letter = shared.jobs.dead(shared.jobs.add("asks_again", {"countdown": "soon"}))
        assert (letter["reason"], letter["error_class"]) == ("not_retryable", "TypeError")

    def test_after_the_expiry_is_the_end(self, shared: Shared) -> None:
        jobs = shared.jobs
        job = jobs.add("asks_again", {"countdown": 30}, expires=600)
        until_retry(jobs, job, 1)
        jobs.sql("update pgqueue.jobs set expires_at = clock_timestamp() where id = %s", job)
        jobs.make_due(job)
        assert jobs.finished(job)["state"] == "expired"
        assert len(shared.ledger.of(job)) == 1


@pytest.mark.parametrize(
    ("task", "place"),
    [
        ("fails_with_a_place", "of_the_task"),
        ("fails_routed", "of_the_route"),
        ("glob_fails", "of_the_glob"),
        ("hostile", "default"),
    ],
)
def test_dead_letters_go_under_the_label_of_the_task_or_its_route(
    shared: Shared, task: str, place: str
) -> None:
    arguments = ["recursion"] if task == "hostile" else []
    assert shared.jobs.dead(shared.jobs.add(task, *arguments))["dead_letter_queue"] == place


def test_a_bad_payload_and_an_unknown_task_go_there_too(shared: Shared) -> None:
    jobs = shared.jobs
    payload = jobs.add_row(task="tests_app.fails_with_a_place", args="[1, 2]")
    unknown = jobs.add_row(task="tests_app.glob_is_gone")
    letters = [jobs.dead(payload), jobs.dead(unknown)]
    assert [(letter["reason"], letter["dead_letter_queue"]) for letter in letters] == [
        ("bad_payload", "of_the_task"),
        ("unknown_task", "of_the_glob"),
    ]


@pytest.mark.parametrize("requeue", ["command", "sql"])
def test_a_dead_letter_that_is_requeued_runs_again(
    shared: Shared, tmp_path_factory: pytest.TempPathFactory, requeue: str
) -> None:
    jobs, gate = shared.jobs, Gate(tmp_path_factory.mktemp("gate"))
    move = by_command if requeue == "command" else by_sql
    job = jobs.add("fails_unless", gate.path, priority=7)
    first = jobs.dead(job)
    assert first["reason"] == "not_retryable"
    # Requeued before the cause is mended: it dies again, and its letter is the new one.
    move(shared, job)
    eventually(lambda: len(jobs.failures(job)) == 2, "it fails again")
    second = jobs.dead(job)
    assert (second["attempt"], second["priority"]) == (2, 7)
    assert second["died_at"] > first["died_at"]
    gate.open()
    move(shared, job)
    row = jobs.finished(job)
    assert (row["result"], row["attempt"], row["retries"], row["priority"]) == ("mended", 3, 0, 7)
    assert jobs.sql("select id from pgqueue.dead_letters where id = %s", job) == []


def by_command(shared: Shared, job: str) -> None:
    """`pgqueue dead requeue`."""
    done = shared.workers.run("dead", "requeue", job)
    assert (done.returncode, done.stderr) == (0, "")


def by_sql(shared: Shared, job: str) -> None:
    """Move a dead letter back, as an operator with psql can."""
    moved = shared.jobs.sql(
        """with gone as (delete from pgqueue.dead_letters where id = %s returning *)
           insert into pgqueue.jobs (id, queue, task, args, kwargs, priority, attempt, max_retries,
                                     enqueued_at, enqueued_by, unique_key, headers)
           select id, queue, task, args, kwargs, priority, attempt, max_retries, enqueued_at, enqueued_by,
                  unique_key, headers from gone
           returning id""",
        job,
    )
    assert len(moved) == 1
    shared.jobs.sql("select pgqueue.wake_workers(array['default'])")
