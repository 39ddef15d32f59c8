"""Pausing queues under load, emptying them and moving their jobs: real workers, the real command."""

from __future__ import annotations

import json
import time
from datetime import UTC, datetime, timedelta
from typing import Any

import psycopg
import pytest

from pgqueue import PgQueue, SchemaMismatch
from pgqueue.database.migrate import upgrade
from tests.acceptance.workers import Gate, Jobs, Ledger, Workers, eventually

LISTENING = pytest.mark.parametrize("flags", [(), ("--no-listen",)])


def said(workers: Workers, *arguments: str) -> Any:
    done = workers.run("queue", *arguments)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout) if "--json" in arguments else done.stdout


@pytest.fixture
def api(db: str) -> PgQueue:
    return PgQueue("operator", dsn=db)


def live(jobs: Jobs, queue: str) -> int:
    return int(jobs.sql("select count(*) as live from pgqueue.jobs where queue = %s", queue)[0]["live"])


@LISTENING
def test_a_pause_holds_on_all_workers_within_a_second(
    jobs: Jobs, workers: Workers, api: PgQueue, flags: tuple[str, ...]
) -> None:
    """In the middle of twenty thousand jobs; those of another queue go on."""
    jobs.add_many("echo", [(n,) for n in range(20_000)], queue="a")
    api.queues.pause("a")  # a worker alone is through with them before the second one has started
    for _ in range(2):
        workers.start("-c", "1", "-Q", "a:1,b:1", *flags)
    api.queues.resume("a")
    eventually(lambda: live(jobs, "a") < 19_000, "they work")
    api.queues.pause("a", reason="too much")
    now = jobs.sql("select clock_timestamp() as now")[0]["now"]
    eventually(
        lambda: jobs.sql("select clock_timestamp() > %s + interval '2 s' as late", now)[0]["late"], "2 s"
    )
    left = live(jobs, "a")
    assert left > 0
    late = "select count(*) as late from pgqueue.finished_jobs where started_at > %s + interval '1 s'"
    assert jobs.sql(late, now)[0]["late"] == 0
    assert not jobs.sql("select from pgqueue.jobs where state = 'running'")
    others = jobs.add_many("echo", [(n,) for n in range(50)], queue="b")
    assert jobs.ends(others) == {"succeeded": 50}
    third = workers.start("-c", "1", "-Q", "a", *flags)  # a pause is there for whoever comes later
    jobs.finished(jobs.add("echo", 1, queue="b"))
    assert live(jobs, "a") == left
    third.stop()
    began = time.monotonic()
    assert api.queues.resume("a")
    eventually(lambda: live(jobs, "a") < left, "they go on")
    assert flags or time.monotonic() - began < 2, "they are told"
    eventually(lambda: live(jobs, "a") == 0, "all are done")


def test_what_runs_ends(jobs: Jobs, workers: Workers, api: PgQueue, gate: Gate, ledger: Ledger) -> None:
    workers.start("-c", "1")
    running = jobs.add("gated", gate.path)
    jobs.until(running, "running")
    waiting = jobs.add("echo", 1)
    api.queues.pause("default")
    gate.open()
    assert jobs.finished(running)["state"] == "succeeded"
    time.sleep(1.5)
    assert jobs.live(waiting)["state"] == "ready"
    api.queues.resume("default")
    assert jobs.finished(waiting)["state"] == "succeeded"


def test_it_resumes_by_itself(jobs: Jobs, workers: Workers) -> None:
    workers.start("-c", "1")
    assert said(workers, "pause", "default", "--for", "3s").startswith("queue default: paused until 20")
    job = jobs.add("echo", 1)
    row = jobs.finished(job, within=20)
    (paused,) = jobs.sql("select at from pgqueue.audit_log where action = 'pause_queue'")
    assert timedelta(seconds=2.9) < row["started_at"] - paused["at"] < timedelta(seconds=9)


def test_a_pause_outlives_a_restart_of_everything(jobs: Jobs, workers: Workers) -> None:
    worker = workers.start("-c", "1")
    said(workers, "pause", "default", "--note", "the mail server moves")
    job = jobs.add("echo", 1)
    worker.kill()
    workers.start("-c", "1")
    time.sleep(1.5)
    assert jobs.live(job)["state"] == "ready"
    (stats,) = [each for each in said(workers, "list", "--json") if each["queue"] == "default"]
    assert (stats["ready"], stats["pause"]["reason"], stats["pause"]["resume_at"]) == (
        1,
        "the mail server moves",
        None,
    )
    table = said(workers, "list")
    assert "paused" in table
    assert "default is paused since 20" in table
    assert "the mail server moves" in table
    assert "default is paused since 20" in workers.run("inspect", "queues").stdout
    assert said(workers, "resume", "default") == "queue default: resumed\n"
    assert said(workers, "resume", "default") == "queue default: was not paused\n"
    assert jobs.finished(job)


def test_who_paused_what(jobs: Jobs, api: PgQueue) -> None:
    at = datetime.now(UTC).replace(microsecond=0) + timedelta(hours=1)
    api.queues.pause("a", by="ann", reason="first")
    api.queues.pause("a", resume_at=at, by="bob", reason="second")
    (stats,) = api.queues.list()
    assert stats.pause is not None
    assert (stats.queue, stats.pause.by, stats.pause.resume_at) == ("a", "bob", at)
    (view,) = jobs.sql("select * from pgqueue.paused_queues")
    assert (view["queue"], view["by"], view["actor"], view["reason"]) == ("a", "bob", "postgres", "second")
    api.queues.resume("a", by="cid")
    assert not api.queues.resume("a")
    acts = jobs.sql("select action, queue, reason, details from pgqueue.audit_log order by id")
    assert [act["action"] for act in acts] == ["pause_queue", "pause_queue", "resume_queue"]
    assert "before" not in acts[0]["details"]
    assert acts[1]["details"]["before"]["reason"] == "first"
    assert acts[1]["details"]["before"]["since"] == acts[1]["details"]["after"]["since"]
    assert acts[2]["details"]["before"]["reason"] == "second"
    assert jobs.sql("select paused from pgqueue.meta") == [{"paused": {}}]


def test_an_open_pause_holds_nobody_up(jobs: Jobs, workers: Workers) -> None:
    """Claims read, they do not wait; and it counts when it is committed."""
    workers.start("-c", "1")
    with psycopg.connect(jobs.dsn) as connection:
        connection.execute("select pgqueue.pause_queue('default')")
        assert jobs.finished(jobs.add("echo", 1))
    job = jobs.add("echo", 2)
    time.sleep(1)
    assert jobs.live(job)["state"] == "ready"


def test_a_purge_cancels_what_waits(jobs: Jobs, workers: Workers, gate: Gate) -> None:
    workers.start("-c", "1")
    running = jobs.add("gated", gate.path)
    jobs.until(running, "running")
    ready = jobs.add_many("echo", [(n,) for n in range(1500)])
    later = [jobs.add("echo", n, countdown=3600) for n in range(3)]
    kept = jobs.add("mark")
    other = jobs.add("echo", 1, queue="other")
    would = said(workers, "purge", "default", "--task", "tests_app.echo")
    assert would == "would cancel 1,503 jobs of queue default; --yes does it\n"
    assert said(workers, "purge", "default", "--dry-run", "--json") == {"dry_run": True, "jobs": 1504}
    first = said(workers, "purge", "default", "--state", "ready", "--limit", "10", "--yes", "--json")
    assert first == {"dry_run": False, "jobs": 10}
    done = said(workers, "purge", "default", "--task", "tests_app.echo", "--note", "obsolete", "--yes")
    assert done == "cancelled 1,493 jobs of queue default\n"
    assert jobs.ends([*ready, *later]) == {"cancelled": 1503}
    assert jobs.live(other)["state"] == "ready"
    gate.open()
    assert jobs.ends([running, kept]) == {"succeeded": 2}
    acts = jobs.sql("select * from pgqueue.audit_trail where action = 'purge_queue' order by id")
    assert sorted(str(act["job_id"]) for act in acts) == sorted([*ready, *later])
    assert {act["reason"] for act in acts[10:]} == {"obsolete"}
    assert {(act["before"]["state"], act["after"]["state"]) for act in acts} == {
        ("ready", "cancelled"),
        ("scheduled", "cancelled"),
    }


def test_moved_jobs_keep_their_order_and_run(jobs: Jobs, workers: Workers, ledger: Ledger) -> None:
    there = jobs.add("mark", "first", queue="to")
    high = jobs.add("mark", "high", queue="from", priority=9)
    low = [jobs.add("mark", n, queue="from") for n in range(5)]
    later = jobs.add("mark", "later", queue="from", countdown=3600)
    assert said(workers, "move", "from", "to") == "would move 7 jobs of queue from; --yes does it\n"
    assert said(workers, "move", "from", "to", "--limit", "3", "--yes") == "moved 3 jobs of queue from\n"
    assert said(workers, "move", "from", "to", "--yes", "--json") == {"dry_run": False, "jobs": 4}
    workers.start("-c", "1", "-Q", "to")
    assert jobs.ends([there, high, *low]) == {"succeeded": 7}
    assert ledger.labels() == ["high", "first", *range(5)]
    assert jobs.live(later)["queue"] == "to"
    acts = jobs.sql("select * from pgqueue.audit_trail where action = 'move_job'")
    assert sorted(str(act["job_id"]) for act in acts) == sorted([high, *low, later])
    changes = [(act["queue"], act["before"], act["after"]) for act in acts]
    assert changes == [("from", {"queue": "from"}, {"queue": "to"})] * 7


@LISTENING
def test_a_sleeping_worker_gets_what_is_moved(
    jobs: Jobs, workers: Workers, api: PgQueue, flags: tuple[str, ...]
) -> None:
    workers.start("-c", "1", "-Q", "to", *flags)
    job = jobs.add("echo", 1, queue="from")
    assert api.queues.move("from", "to") == 1
    assert jobs.finished(job, within=10)["queue"] == "to"
    assert api.queues.purge("to") == 0


def test_a_schema_without_pauses(fresh_dsn: str, tmp_path: Any) -> None:
    """A worker of this release serves it; nobody can pause a queue."""
    upgrade(fresh_dsn, revision="0005")
    api = PgQueue("operator", dsn=fresh_dsn)
    with pytest.raises(SchemaMismatch, match="pausing queues needs revision 0006 of the schema"):
        api.queues.pause("a")
    assert api.queues.list() == []
    with Workers(fresh_dsn, tmp_path) as workers:
        workers.start("-c", "1")
        jobs = Jobs(fresh_dsn)
        assert jobs.finished(jobs.add("echo", 1))["state"] == "succeeded"
        jobs.close()
