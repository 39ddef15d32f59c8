"""One job per tick, whatever happens to the worker that is about to make it."""

from __future__ import annotations

import signal
from datetime import datetime, timedelta
from pathlib import Path

import pytest

from tests.acceptance.workers import Jobs, Workers, eventually

PLACES = ("tick_before_commit", "tick_after_commit")
APP = "periodic_app:app"
LATE = "select clock_timestamp() > %s::timestamptz + interval '3 seconds' as late"
ALL = {"PERIODIC_CATCH_UP": "all"}


def enqueued(jobs: Jobs) -> list[datetime]:
    rows = jobs.sql(
        "select headers ->> 'tick' as tick from pgqueue.jobs"
        " union all select headers ->> 'tick' from pgqueue.finished_jobs order by 1"
    )
    return [datetime.fromisoformat(row["tick"]) for row in rows]


def check(jobs: Jobs, more: int = 3) -> None:
    """It goes on, and each tick since the first has one job."""
    last = jobs.sql("select max(last_tick) as tick from pgqueue.schedules")[0]["tick"]
    due = last + timedelta(seconds=more)
    eventually(lambda: max(enqueued(jobs), default=last) >= due, f"{more} more ticks")
    found = enqueued(jobs)
    assert found == [found[0] + timedelta(seconds=n) for n in range(len(found))]


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("action", ["kill", "raise", "drop_connection", "stop"])
def test_the_worker_that_makes_a_tick_comes_to_grief(
    jobs: Jobs, workers: Workers, tmp_path: Path, place: str, action: str
) -> None:
    """Others are there; one that freezes wakes up later."""
    (tmp_path / "once").mkdir()
    failing = {"PGQUEUE_FAILPOINTS": f"{place}={action}@2", "PGQUEUE_FAILPOINTS_ONCE": str(tmp_path / "once")}
    for _ in range(3):
        workers.start("-c", "1", app=APP, env={**ALL, **failing})
    eventually(lambda: any((tmp_path / "once").iterdir()), "somebody comes to grief")
    if action != "stop" or place == "tick_after_commit":  # else the frozen one holds this schedule's row
        check(jobs)
    for worker in workers.started:
        if worker.process.poll() is None:
            worker.send(signal.SIGCONT)
    check(jobs)


@pytest.mark.parametrize("place", PLACES)
def test_all_of_them_now_and_then(jobs: Jobs, workers: Workers, place: str) -> None:
    failing = {"PGQUEUE_FAILPOINTS": f"{place}=drop_connection~0.4"}
    for _ in range(3):
        workers.start("-c", "1", app=APP, env={**ALL, **failing})
    eventually(lambda: len(enqueued(jobs)) > 8, "eight ticks")
    check(jobs)


def test_leaders_that_are_frozen_in_turn(jobs: Jobs, workers: Workers) -> None:
    """Each by itself, then two at once, then all: what came meanwhile is made up for."""
    three = [workers.start("-c", "1", app=APP, env=ALL) for _ in range(3)]
    eventually(lambda: len(enqueued(jobs)) >= 2, "it comes")
    for frozen in ([0], [1], [2], [0, 1], [1, 2], [0, 1, 2]):
        for number in frozen:
            three[number].send(signal.SIGSTOP)
        last = enqueued(jobs)[-1]
        if len(frozen) < 3:
            eventually(lambda last=last: enqueued(jobs)[-1] > last + timedelta(seconds=1), "another does it")
        else:
            eventually(lambda last=last: jobs.sql(LATE, last)[0]["late"], "nobody does it for a while")
        for number in frozen:
            three[number].send(signal.SIGCONT)
        check(jobs, more=1)


def test_a_database_that_was_away(workers: Workers, jobs: Jobs) -> None:
    """Every connection is cut again and again."""
    for _ in range(2):
        workers.start("-c", "1", app=APP, env=ALL)
    for _ in range(10):
        before = len(enqueued(jobs))
        jobs.sql(
            "select pg_terminate_backend(pid) from pg_stat_activity"
            " where datname = current_database() and application_name like 'pgqueue %%'"
        )
        eventually(lambda before=before: len(enqueued(jobs)) > before, "it goes on")
    check(jobs)
