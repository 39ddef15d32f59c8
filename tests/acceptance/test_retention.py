"""Retention by task and queue, with a real worker and the real commands."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import closing
from typing import Any

import pytest

from pgqueue.cli.status import ExitStatus
from pgqueue.database.migrate import upgrade
from tests.acceptance.workers import Jobs, Workers, eventually
from tests.integration.test_retention import History


@pytest.fixture
def history(db: str) -> Iterator[History]:
    with closing(History(db)) as history:
        history.sql("set timezone = 'UTC'")
        history.clear()
        yield history
        history.clear()


def said(workers: Workers, *arguments: str, env: dict[str, str | None] | None = None) -> Any:
    done = workers.run(*arguments, env=env)
    assert (done.returncode, done.stderr) == (0, "")
    return json.loads(done.stdout) if "--json" in arguments else done.stdout


def fill(history: History) -> None:
    for ago in (3, 10, 500):
        for task in ("invoice", "click", "other"):
            history.add(ago, 40, task=task, queue=f"{task}s")


def test_a_worker_does_it_by_itself(history: History, workers: Workers) -> None:
    fill(history)
    said(workers, "retention", "set", "--task", "invoice", "--finished", "365d", "--failures", "365d")
    said(workers, "retention", "set", "--queue", "clicks", "--finished", "1d", "--failures", "1d")
    worker = workers.start("-c", "1", env={"PGQUEUE_RETENTION_FAILURES": "7"})
    wanted = {(3, "invoice", "invoices"), (3, "other", "others"), (10, "invoice", "invoices")}
    eventually(lambda: set(history.left()) == set(history.left("failures")) == wanted, "the rest is gone")
    assert set(history.left().values()) == {40}
    assert "failed" not in worker.log


def test_rules_from_a_shell(history: History, workers: Workers) -> None:
    words = ("retention", "set", "--task", "invoice", "--finished", "365d", "--dead-letters", "4w")
    assert said(workers, *words, "--note", "tax law") == (
        "task invoice: keeps finished jobs 365 d, dead letters 28 d\n"
    )
    said(workers, "retention", "set", "--queue", "clicks", "--failures", "12h")
    table = said(workers, "retention", "list", env={"PGQUEUE_RETENTION_FINISHED": "3"}).splitlines()
    assert [line.split()[:2] for line in table[:3]] == [
        ["what", "of"],
        ["finished", "jobs"],
        ["failures", "(the"],
    ]
    assert table[1].split()[2:] == ["(the", "rest)", "3", "d", "settings", "-"]
    assert [line.split()[:5] for line in table[-2:]] == [
        ["dead", "letters", "task", "invoice", "28"],
        ["finished", "jobs", "task", "invoice", "365"],
    ]
    found = said(workers, "retention", "list", "--json")
    assert found["general"]["dead_letters"] == 90
    assert [(rule["name"], rule["what"], rule["days"]) for rule in found["rules"]] == [
        ("clicks", "failures", 0.5),
        ("invoice", "dead_letters", 28),
        ("invoice", "finished", 365),
    ]
    assert said(workers, "retention", "remove", "--queue", "clicks") == "queue clicks: as the rest again\n"
    assert said(workers, "retention", "remove", "--queue", "clicks") == "queue clicks: did not differ\n"
    acts = said(workers, "audit", "--json")
    assert [act["action"] for act in acts] == ["remove_retention", "set_retention", "set_retention"]
    assert (acts[2]["reason"], acts[2]["after"]["finished"]) == ("tax law", "365 days")


def test_pruning_from_a_shell(history: History, workers: Workers) -> None:
    fill(history)
    said(workers, "retention", "set", "--task", "invoice", "--finished", "365d")
    before = history.left()
    table = said(workers, "prune", "--dry-run")
    lines = {line.split()[0]: line for line in table.splitlines()}
    rows = f"finished_jobs_p{history.day(10):%Y%m%d}"
    whole = f"finished_jobs_p{history.day(500):%Y%m%d}"
    assert "80 rows" in lines[rows]
    assert "all of it" in lines[whole]
    assert "all of it" in lines[f"failures_p{history.day(500):%Y%m%d}"]
    assert len(lines) == 5
    plan = said(workers, "prune", "--dry-run", "--json")
    assert plan["dry_run"] is True
    assert {day["part"]: day["goes"] for day in plan["days"]} == {
        rows: "rows",
        whole: "whole",
        f"failures_p{history.day(500):%Y%m%d}": "whole",
    }
    assert said(workers, "prune").endswith("nothing was removed; --yes does it\n")
    assert history.left() == before
    assert said(workers, "prune", "--yes", "--note", "full", "--json") == {
        "dry_run": False,
        "days": 2,
        "rows": 80,
        "dead_letters": 0,
        "acts": 0,
        "in_use": [],
    }
    assert set(history.left()) == {
        (3, "invoice", "invoices"),
        (3, "click", "clicks"),
        (3, "other", "others"),
        (10, "invoice", "invoices"),
    }
    assert said(workers, "prune", "--yes") == "nothing is past its retention\n"
    (act,) = said(workers, "audit", "--action", "prune", "--json")
    assert (act["reason"], act["details"]["rows"]) == ("full", 80)
    history.app.close()


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("retention", "set", "--finished", "1d"), "give --task or --queue"),
        (("retention", "set", "--task", "a", "--queue", "b", "--finished", "1d"), "one of them"),
        (("retention", "set", "--task", "a"), "give --finished, --failures or --dead-letters"),
        (("retention", "set", "--task", "a", "--finished", "soon"), "must be like 30s, 15m, 2h or 1d"),
        (("retention", "remove"), "give --task or --queue"),
    ],
)
def test_wrong_usage(workers: Workers, arguments: tuple[str, ...], says: str) -> None:
    done = workers.run(*arguments)
    assert (done.returncode, done.stdout) == (ExitStatus.USAGE, "")
    assert says in done.stderr


def test_a_worker_on_an_older_schema_says_nothing_of_it(fresh_dsn: str, tmp_path: Any) -> None:
    upgrade(fresh_dsn, revision="0009")
    with closing(Jobs(fresh_dsn)) as jobs, Workers(fresh_dsn, tmp_path) as workers:
        jobs.sql(
            "insert into pgqueue.dead_letters (id, queue, task, args, kwargs, priority, attempt, retries,"
            " crashes, rescues, enqueued_at, enqueued_by, headers, dead_letter_queue, reason, died_at) values"
            " (pgqueue.uuid7(), 'q', 't', '[]', '{}', 5, 1, 0, 0, 0, now(), 'me', '{}', 'q', 'crashed',"
            " now() - interval '100 days')"
        )
        worker = workers.start("-c", "1")
        eventually(lambda: not jobs.sql("select from pgqueue.dead_letters"), "housekeeping goes on")
        jobs.finished(jobs.add("echo", 1))
        assert "housekeeping_failed" not in worker.log
        done = workers.run("retention", "list")
        assert (done.returncode, done.stderr) == (
            ExitStatus.SCHEMA,
            "pgqueue: retention by task or queue needs revision 0010 of the schema; run `pgqueue migrate`\n",
        )
