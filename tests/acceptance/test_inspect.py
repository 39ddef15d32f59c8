"""What `pgqueue inspect` says of real workers: busy, idle, stopped, frozen, killed."""

from __future__ import annotations

import json
import signal
from typing import Any

from pgqueue.database.migrate import upgrade
from tests.acceptance.workers import Gate, Jobs, Workers, eventually

Row = dict[str, Any]


def inspect(workers: Workers, what: str, *flags: str) -> list[Row]:
    done = workers.run(*flags, "inspect", what, "--json")
    assert done.returncode == 0, done.stderr
    found: list[Row] = json.loads(done.stdout)
    return found


def table(workers: Workers, what: str) -> str:
    done = workers.run("inspect", what)
    assert done.returncode == 0, done.stderr
    assert "\x1b" not in done.stdout
    return done.stdout


def test_what_runs_and_what_waits(jobs: Jobs, workers: Workers, gate: Gate) -> None:
    worker = workers.start("-c", "2")
    running = [jobs.add("gated", gate.path) for _ in range(2)]
    for job in running:
        jobs.until(job, "running")
    waits = jobs.add("echo", 1)
    later = jobs.add("echo", 2, countdown=600)
    active = eventually(lambda: len(inspect(workers, "active")) == 2 and inspect(workers, "active"), "active")
    assert {row["id"] for row in active} == set(running)
    assert {row["worker_id"] for row in active} == {worker.id}
    assert waits not in {row["id"] for row in inspect(workers, "reserved")}
    (scheduled,) = inspect(workers, "scheduled")
    assert (scheduled["id"], scheduled["retries"]) == (later, 0)
    assert 500 < scheduled["seconds"] <= 600
    assert later in table(workers, "scheduled")
    worker.send(signal.SIGSTOP)  # the database knows
    assert {row["id"] for row in inspect(workers, "active")} == set(running)
    worker.send(signal.SIGCONT)
    worker.kill()
    assert {row["id"] for row in inspect(workers, "active")} == set(running), "until they are rescued"
    gate.open()


def test_a_retry_that_waits(jobs: Jobs, workers: Workers) -> None:
    workers.start("-c", "1")
    job = jobs.add("asks_again", {"countdown": 600})
    jobs.until(job, "scheduled")
    (row,) = inspect(workers, "scheduled")
    assert (row["id"], row["retries"], row["attempt"]) == (job, 1, 1)
    assert "retry 1" in table(workers, "scheduled")


def test_workers(jobs: Jobs, workers: Workers) -> None:
    assert "no worker is there; `pgqueue worker` starts one" in table(workers, "workers")
    one = workers.start("-c", "2", "-Q", "a,b")
    two = workers.start("-c", "3", "--pool", "threads")
    jobs.finished(jobs.add("echo", 1))

    def both() -> dict[str, Row]:
        found = {row["id"]: row for row in inspect(workers, "workers")}
        return found if all(row["state"] == "ready" for row in found.values()) else {}

    found = eventually(both, "both are ready")
    assert found.keys() == {one.id, two.id}
    assert (found[one.id]["queues"], found[one.id]["pool"], found[one.id]["concurrency"]) == (
        ["a", "b"],
        "prefork",
        2,
    )
    assert (found[two.id]["queues"], found[two.id]["pool"]) == (["default"], "threads")
    assert all(row["beat_ago"] < 30 and row["pid"] and row["host"] for row in found.values())
    jobs.sql("update pgqueue.workers set heartbeat_at = now() - interval '31 s' where id = %s", one.id)
    jobs.sql("update pgqueue.workers set fenced = true where id = %s", two.id)
    states = {row["id"]: row["state"] for row in inspect(workers, "workers")}
    assert states[two.id] == "fenced"
    assert states[one.id] in ("silent", "ready"), "it may have beaten since"
    assert two.id in table(workers, "workers")


def test_stats_count_what_each_has_done(jobs: Jobs, workers: Workers) -> None:
    one = workers.start("-c", "1", "--heartbeat", "0.5", "--lease", "10")
    two = workers.start("-c", "1", "-Q", "other", "--heartbeat", "0.5", "--lease", "10")
    jobs.ends([jobs.add("echo", n) for n in range(7)])
    jobs.dead(jobs.add("hostile", "value"))
    jobs.ends([jobs.add("echo", n, queue="other") for n in range(3)])

    def counted() -> dict[str, Row]:
        found = {row["id"]: row for row in inspect(workers, "stats")}
        return found if sum(row["succeeded"] + row["failed"] for row in found.values()) == 11 else {}

    found = eventually(counted, "heartbeats tell")
    assert (found[one.id]["succeeded"], found[one.id]["failed"]) == (7, 1)
    assert (found[two.id]["succeeded"], found[two.id]["failed"]) == (3, 0)
    assert table(workers, "stats").splitlines()[-1].split() == ["together", "0", "10", "1", "0", "0"]


def test_registered_tasks_and_settings(jobs: Jobs, workers: Workers) -> None:
    one = workers.start("-c", "1")
    two = workers.start("-c", "2", "--lease", "60", app="periodic_app:app", env={"PERIODIC_EVERY": "0"})
    found = {row["task"]: row["workers"] for row in inspect(workers, "registered")}
    assert found["tests_app.echo"] == [one.id]
    assert found["periodic_app.tell"] == [two.id]
    assert "tests_app.echo" in table(workers, "registered")

    with_app = {row["task"]: row["workers"] for row in inspect(workers, "registered", "-A", "pools_app:app")}
    unknown = [task for task in with_app if task.startswith("pools_app.")]
    assert unknown
    assert {task: with_app[task] for task in unknown} == {task: [] for task in unknown}

    conf = {row["id"]: row["conf"] for row in inspect(workers, "conf")}
    assert (conf[one.id]["lease"], conf[two.id]["lease"]) == (30, 60)
    assert (conf[one.id]["concurrency"], conf[two.id]["concurrency"]) == (1, 2)
    password = jobs.dsn.split("@")[0].rpartition(":")[2]
    assert password not in json.dumps(conf)
    lines = {line.split()[0]: line.split()[1:] for line in table(workers, "conf").splitlines()[1:]}
    order = sorted((one.id, two.id))
    assert lines["lease"] == [f"{conf[each]['lease']:.1f}" for each in order]
    assert lines["heartbeat"] == ["5.0", "="]


def test_a_worker_that_was_fenced_says_it_again(jobs: Jobs, workers: Workers) -> None:
    worker = workers.start("-c", "1", "--heartbeat", "0.5", "--lease", "10")
    jobs.sql("update pgqueue.workers set fenced = true")
    new = worker.wait_for_log(r"worker_was_fenced id=\S+ new=(\S+)").group(1)
    eventually(lambda: inspect(workers, "registered"), "it is there under its new name")
    assert {each for row in inspect(workers, "registered") for each in row["workers"]} == {new}


def test_a_schema_from_before(fresh_dsn: str, tmp_path: Any) -> None:
    upgrade(fresh_dsn, revision="0007")
    with Workers(fresh_dsn, tmp_path) as workers:
        workers.start("-c", "1")
        assert len(inspect(workers, "workers")) == 1
        done = workers.run("inspect", "conf")
        assert done.returncode == 5
        assert "this needs revision 0008 of the schema; run `pgqueue migrate`" in done.stderr
