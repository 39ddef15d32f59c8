"""Finding jobs by what they belong to, and who did what, with real workers and the real commands."""

from __future__ import annotations

import json
from typing import Any

import pytest

from pgqueue.cli.status import ExitStatus
from tests.acceptance.workers import Jobs, Workers, eventually

APP = "orders_app:app"
OURS = {"delay", "many 1", "many 2", "by name", "on"}


def said(workers: Workers, *arguments: str) -> Any:
    done = workers.run(*arguments)
    assert (done.returncode, done.stderr) == (0, "")
    return json.loads(done.stdout) if "--json" in arguments else done.stdout


@pytest.mark.parametrize("task", ["place", "aplace"])
@pytest.mark.parametrize("pool", ["prefork", "threads", "asyncio", "solo"])
def test_what_a_run_enqueues_belongs_to_the_same(jobs: Jobs, workers: Workers, pool: str, task: str) -> None:
    worker = workers.start("--pool", pool, *(() if pool == "solo" else ("-c", "1")), app=APP)
    first = jobs.add(f"orders_app.{task}", correlation_id="order 42", tags=["vip"])
    other = jobs.add("orders_app.step", "unrelated")
    assert jobs.finished(first)["state"] == "succeeded"
    jobs.finished(other)
    ours = OURS | ({"adelay"} if task == "aplace" else set())
    count = len(ours) + 5
    eventually(
        lambda: jobs.sql("select count(*) as ended from pgqueue.finished_jobs")[0]["ended"] == count, "all"
    )
    worker.stop()
    told = {row["result"][0]: row["result"][1:] for row in steps(jobs)}
    assert told == {
        **{name: ["order 42", []] for name in ours},
        "many 2": ["order 42", ["t"]],
        "another's": ["order 43", []],
        "nobody's": [None, []],
        "in headers": ["order 44", []],
        "unrelated": [None, []],
    }
    found = said(workers, "job", "list", "--correlation-id", "order 42", "--json")
    assert {job["id"] for job in found} == {
        first,
        *(str(row["id"]) for row in steps(jobs) if row["result"][1] == "order 42"),
    }


def steps(jobs: Jobs) -> list[dict[str, Any]]:
    return jobs.sql("select id, result from pgqueue.finished_jobs where task = 'orders_app.step'")


def test_jobs_are_enqueued_and_found_from_a_shell(jobs: Jobs, workers: Workers) -> None:
    one = said(workers, "enqueue", "t", "--correlation-id", "order 1", "--tag", "vip", "--tag", "eu").strip()
    two = said(workers, "enqueue", "t", "--tag", "vip", "--queue", "other").strip()
    table = said(workers, "job", "list", "--tag", "vip").splitlines()
    assert [line.split()[0] for line in table] == ["id", two, one]
    assert table[2].endswith("order 1     vip, eu")
    assert "\x1b" not in "".join(table)
    (job,) = said(workers, "job", "list", "--tag", "vip", "--tag", "eu", "--json")
    assert (job["id"], job["correlation_id"], job["tags"], job["state"]) == (
        one,
        "order 1",
        ["vip", "eu"],
        "ready",
    )
    assert [job["id"] for job in said(workers, "job", "list", "--queue", "other", "--json")] == [two]
    assert [job["id"] for job in said(workers, "job", "list", "--limit", "1", "--json")] == [two]
    assert said(workers, "job", "list", "--since", "1h", "--state", "dead").startswith("no such job")
    assert said(workers, "job", "list", "--task", "no such", "--json") == []


def test_strange_labels_are_shown(jobs: Jobs, workers: Workers) -> None:
    jobs.sql("""select pgqueue.enqueue('t', headers => '{"tags": [1, "a"], "correlation_id": 5}')""")
    table = said(workers, "job", "list").splitlines()
    assert table[1].endswith('5           [1, "a"]')


def test_who_did_what(jobs: Jobs, workers: Workers) -> None:
    job = jobs.add("t", countdown=60)
    said(workers, "queue", "pause", "mail", "--note", "the server moves")
    said(workers, "job", "cancel", job, "--note", "withdrawn")
    said(workers, "schedule", "add", "nightly", "--task", "t", "--cron", "@daily")
    table = said(workers, "audit").splitlines()
    assert [line.split()[3] for line in table[1:]] == ["add_schedule", "cancel", "pause_queue"]
    assert table[0].split() == ["when", "who", "what", "to", "change", "why"]
    assert "state: scheduled → cancelled" in table[2]
    assert table[2].endswith("withdrawn")
    (act,) = said(workers, "audit", "--job", job, "--json")
    assert (act["action"], act["reason"], act["before"], act["after"]) == (
        "cancel",
        "withdrawn",
        {"state": "scheduled"},
        {"state": "cancelled"},
    )
    assert act["actor"]
    assert "@" in act["by"]
    (paused,) = said(workers, "audit", "--queue", "mail", "--who", act["by"], "--since", "1h", "--json")
    assert paused["action"] == "pause_queue"
    (added,) = said(workers, "audit", "--schedule", "nightly", "--json")
    assert added["after"]["cron"] == "@daily"
    assert said(workers, "audit", "--action", "dance") == "nobody did anything of that kind\n"
    done = workers.run("audit", "--job", "7")
    assert (done.returncode, done.stdout) == (ExitStatus.USAGE, "")
