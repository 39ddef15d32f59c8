"""Tasks that ask for their pool: one worker runs each where it belongs, and none in the way of another."""

from __future__ import annotations

import os
import re
import signal
from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest

from tests.acceptance.conftest import Shared, own_queue
from tests.acceptance.workers import Gate, Jobs, Workers, eventually

APP = "task_pools_app:app"
KINDS = ("own", "threaded", "waiting", "forked")


def add(jobs: Jobs, task: str, *args: object, **options: Any) -> str:
    return jobs.add(f"task_pools_app.{task}", *args, **options)


def add_many(jobs: Jobs, task: str, count: int, *args: object) -> list[str]:
    return jobs.add_many(f"task_pools_app.{task}", [args] * count)


def attempts(jobs: Jobs, ids: list[str]) -> set[int]:
    """How often the jobs were claimed."""
    found = jobs.sql("select attempt from pgqueue.finished_jobs where id = any(%s::uuid[])", ids)
    return {row["attempt"] for row in found}


@pytest.fixture(scope="module")
def shared(postgres: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Shared]:
    """A worker of one prefork executor, with the pools that its tasks ask for."""
    with own_queue(postgres, tmp_path_factory.mktemp("shared")) as (jobs, workers):
        worker = workers.start("-c", "1", "--task-pools", "threads:2,asyncio:50", app=APP)
        for kind in KINDS:
            jobs.finished(add(jobs, kind))
        yield Shared(jobs, workers, worker)


class TestShared:
    def test_each_runs_where_it_belongs(self, shared: Shared) -> None:
        places = {kind: shared.jobs.finished(add(shared.jobs, kind))["result"] for kind in KINDS}
        assert places["own"] == places["forked"], "both in the worker's own pool, which is prefork"
        pids = {pid for pid, _ in places.values()}
        assert pids == {each.pid for each in shared.worker.executors}
        assert len(pids) == 3
        assert {kind: main for kind, (_, main) in places.items()} == {
            "own": True, "forked": True, "waiting": True, "threaded": False,
        }  # fmt: skip

    def test_it_says_what_it_has(self, shared: Shared) -> None:
        assert "pool=prefork,asyncio,threads concurrency=53" in shared.worker.log
        (row,) = shared.jobs.sql("select pool, concurrency from pgqueue.workers")
        assert row == {"pool": "prefork,asyncio,threads", "concurrency": 53}

    def test_coroutines_do_not_wait_behind_processes(self, shared: Shared, gate: Gate) -> None:
        """In one queue, behind three hundred that wait for the only process."""
        long = add(shared.jobs, "gated", gate.path)
        eventually(lambda: shared.ledger.of(long), "the long one starts")
        behind = add_many(shared.jobs, "own", 300)
        quick = add_many(shared.jobs, "waiting", 50)
        assert shared.jobs.ends(quick) == Counter(succeeded=50)
        waits = "select count(*) as n from pgqueue.jobs where id = any(%s::uuid[]) and state = 'ready'"
        all_wait = [{"n": 300}]
        eventually(lambda: shared.jobs.sql(waits, behind) == all_wait, "what was claimed ahead is given back")
        gate.open()
        assert shared.jobs.ends([long, *behind]) == Counter(succeeded=301)
        assert attempts(shared.jobs, quick) == {1}

    def test_processes_do_not_wait_behind_coroutines(self, shared: Shared, gate: Gate) -> None:
        held = add_many(shared.jobs, "gated_waiting", 80, gate.path)
        eventually(lambda: sum(bool(shared.ledger.of(job)) for job in held) == 50, "all its slots are taken")
        quick = add_many(shared.jobs, "own", 20) + add_many(shared.jobs, "threaded", 20)
        assert shared.jobs.ends(quick) == Counter(succeeded=40)
        assert sum(bool(shared.ledger.of(job)) for job in held) == 50
        gate.open()
        assert shared.jobs.ends(held) == Counter(succeeded=80)

    def test_all_at_once(self, shared: Shared) -> None:
        ids = [job for kind in KINDS for job in add_many(shared.jobs, kind, 200)]
        assert shared.jobs.ends(ids) == Counter(succeeded=800)
        runs = shared.ledger.runs()
        assert {runs[job] for job in ids} == {1}

    def test_a_name_that_nobody_knows(self, shared: Shared) -> None:
        assert shared.jobs.dead(add(shared.jobs, "nowhere"))["reason"] == "unknown_task"

    def test_cancelling(self, shared: Shared, gate: Gate) -> None:
        ids = [add(shared.jobs, task, gate.path) for task in ("gated", "gated_waiting")]
        for job in ids:
            eventually(lambda job=job: shared.ledger.of(job), "it starts")  # type: ignore[misc]
            shared.jobs.sql("select pgqueue.cancel(%s)", job)
        assert shared.jobs.ends(ids) == Counter(cancelled=2)


def test_a_dead_process_costs_its_own_pool_only(jobs: Jobs, workers: Workers, gate: Gate) -> None:
    worker = workers.start("-c", "1", app=APP)
    pids = {kind: jobs.finished(add(jobs, kind))["result"][0] for kind in ("own", "waiting")}
    held = {task: add(jobs, task, gate.path) for task in ("gated", "gated_waiting")}
    for job in held.values():
        eventually(lambda job=job: workers.ledger.of(job), "it starts")  # type: ignore[misc]
    os.kill(pids["waiting"], signal.SIGKILL)
    jobs.until(held["gated_waiting"], "scheduled")
    gate.open()
    assert jobs.finished(held["gated"])["crashes"] == 0
    jobs.make_due(held["gated_waiting"])
    assert jobs.finished(held["gated_waiting"])["crashes"] == 1
    assert len(re.findall("job_crashed", worker.log)) == 1
    assert jobs.finished(add(jobs, "waiting"))["result"][0] != pids["waiting"]


def test_draining_waits_for_all_pools(jobs: Jobs, workers: Workers, gate: Gate) -> None:
    worker = workers.start("-c", "1", app=APP)
    held = [add(jobs, task, gate.path) for task in ("gated", "gated_waiting")]
    for job in held:
        eventually(lambda job=job: workers.ledger.of(job), "it starts")  # type: ignore[misc]
    behind = add_many(jobs, "own", 5)
    worker.send(signal.SIGTERM)
    worker.wait_for_log("worker_stopping running=2")
    gate.open()
    assert worker.wait() == 0
    assert jobs.ends(held) == Counter(succeeded=2)
    rows = jobs.sql("select state from pgqueue.jobs where id = any(%s::uuid[])", behind)
    assert [row["state"] for row in rows] == ["ready"] * 5


def test_killed_after_its_patience(jobs: Jobs, workers: Workers, gate: Gate) -> None:
    worker = workers.start("-c", "1", "--shutdown-timeout", "0.5", app=APP)
    held = [add(jobs, task, gate.path) for task in ("gated", "gated_waiting")]
    for job in held:
        eventually(lambda job=job: workers.ledger.of(job), "it starts")  # type: ignore[misc]
    assert worker.stop() != 0
    assert [jobs.live(job)["state"] for job in held] == ["ready", "ready"]


@pytest.mark.parametrize("place", ["claim_after_commit", "claim_before_commit", "ack_sent"])
def test_a_connection_that_is_lost_again_and_again(jobs: Jobs, workers: Workers, place: str) -> None:
    """The pools share it: each takes back its own jobs, and only those."""
    workers.start("-c", "2", app=APP, env={"PGQUEUE_FAILPOINTS": f"{place}=drop_connection~0.2"})
    ids = [job for _ in range(10) for kind in KINDS for job in add_many(jobs, kind, 10)]
    assert jobs.ends(ids) == Counter(succeeded=400)
    runs = workers.ledger.runs()
    assert {runs[job] for job in ids} == {1}


@pytest.mark.parametrize("pool", ["threads", "asyncio", "solo"])
def test_beside_other_pools_of_the_worker(jobs: Jobs, workers: Workers, pool: str) -> None:
    flags = () if pool == "solo" else ("-c", "2")
    worker = workers.start("--pool", pool, *flags, app=APP)
    places = {kind: jobs.finished(add(jobs, kind))["result"] for kind in KINDS}
    processes = {pid for pid, _ in places.values()}
    assert len(processes) == (1 if pool == "solo" else 3)
    own = {"threads": "threaded", "asyncio": "waiting", "solo": "forked"}[pool]
    assert places["own"][0] == places[own][0]
    assert worker.stop() == 0
