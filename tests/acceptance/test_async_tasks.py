"""`async def` tasks in executors that run one job at a time."""

from __future__ import annotations

from collections import Counter

from tests.acceptance.workers import Jobs, Workers


def test_the_loop_lives_across_jobs(jobs: Jobs, workers: Workers) -> None:
    workers.start("-c", "1", app="limits_app:app")
    ids = [jobs.add("limits_app.loop_of_before") for _ in range(20)]
    assert {jobs.finished(job)["result"] for job in ids} == {True}


def test_what_is_left_behind_is_said(jobs: Jobs, workers: Workers) -> None:
    worker = workers.start("-c", "1", app="limits_app:app")
    job = jobs.add("limits_app.leaves_one_behind")
    assert jobs.finished(job)["result"] == "done"
    worker.wait_for_log(f"tasks_left job={job} task=limits_app.leaves_one_behind count=1 first=left behind")
    after = jobs.add("limits_app.returns_a_coroutine")
    assert jobs.finished(after)["result"] == "awaited"
    assert worker.log.count("tasks_left") == 1


def test_a_body_that_stops_the_loop_harms_nobody_else(jobs: Jobs, workers: Workers) -> None:
    workers.start("-c", "1", app="limits_app:app")
    stopped = jobs.add("limits_app.closes_the_loop")
    assert jobs.dead(stopped)["error_class"] == "RuntimeError"
    ids = [jobs.add("limits_app.returns_a_coroutine") for _ in range(5)]
    assert jobs.ends(ids) == Counter(succeeded=5)


def test_it_runs_for_its_job(jobs: Jobs, workers: Workers) -> None:
    workers.start("-c", "1", app="limits_app:app")
    job = jobs.add("limits_app.sees_its_request")
    assert jobs.finished(job)["result"].startswith("a task must not wait for another job")
