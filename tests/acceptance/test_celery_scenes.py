"""Scenes of Celery's worker guide that no other test plays.

docs/moving-from-celery.md lists all of them, each with its tests, which are looked for here.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections import Counter
from contextlib import closing
from pathlib import Path

import pytest

from pgqueue import JobFailed, PgQueue, chain
from tests.acceptance.workers import PACKAGE, Gate, Jobs, Ledger, Workers, eventually

PAGE = PACKAGE / "docs" / "moving-from-celery.md"
TESTS = Path(__file__).parents[1]


def test_two_workers_share_three_jobs(jobs: Jobs, workers: Workers, ledger: Ledger, gate: Gate) -> None:
    first, second = workers.start("-c", "1"), workers.start("-c", "1")
    ids = jobs.add_many("gated", [(gate.path, number) for number in range(3)])
    # One each, and the third is nobody's until a slot is free.
    eventually(lambda: ledger.count() == 2, "two jobs run")
    assert {entry["worker"] for entry in ledger.entries("start")} == {first.id, second.id}
    (waiting,) = jobs.sql("select id::text as id from pgqueue.jobs where state = 'ready'")
    assert waiting["id"] == ids[2]
    gate.open()
    assert jobs.ends(ids) == {"succeeded": 3}
    assert ledger.runs() == dict.fromkeys(ids, 1)
    assert {jobs.finished(job)["worker_id"] for job in ids[:2]} == {first.id, second.id}


@pytest.mark.parametrize("pool", ["prefork", "threads", "asyncio", "solo"])
def test_every_pool_runs_the_same_jobs(jobs: Jobs, workers: Workers, pool: str) -> None:
    size = [] if pool == "solo" else ["-c", "2"]
    worker = workers.start("--pool", pool, *size)
    fine = jobs.add_many("echo", [(1,), (2,)])
    later = jobs.add("echo_later", 3)
    failed = jobs.add("fail_later")
    assert [jobs.finished(job)["result"] for job in [*fine, later]] == [1, 2, 3]
    assert jobs.dead(failed)["reason"] == "not_retryable"
    (row,) = jobs.sql("select pool from pgqueue.workers where id = %s", worker.id)
    assert row["pool"] == pool


def test_a_queue_of_its_own_with_one_slot_runs_one_at_a_time(
    jobs: Jobs, workers: Workers, ledger: Ledger
) -> None:
    """What there is instead of a rate limit."""
    workers.start("-c", "4")
    workers.start("-Q", "mails", "-c", "1")
    mails = jobs.add_many("work", [(0.05, "mail") for _ in range(6)], queue="mails")
    others = jobs.add_many("work", [(0.05, "other") for _ in range(6)])
    assert jobs.ends([*mails, *others]) == {"succeeded": 12}
    of_mails = [entry for entry in ledger.entries() if entry["label"] == "mail"]
    assert len({entry["worker"] for entry in of_mails}) == 1
    in_order = sorted(of_mails, key=lambda entry: entry["at"])
    assert [entry["event"] for entry in in_order] == ["start", "end"] * 6


def test_what_is_linked_runs_once(db: str, jobs: Jobs, workers: Workers, ledger: Ledger) -> None:
    workers.start("-c", "2", app="canvas_app:app")
    with closing(PgQueue("client", dsn=db)) as app:
        add, double = app.signature("canvas_app.add"), app.signature("canvas_app.double")
        tell = app.signature("canvas_app.handle", args=("failed",))
        links = [add.clone((10,)), chain(add.clone((20,)), double)]
        fine = add.apply_async((1, 1), link=links, link_error=tell)
        wrong = app.signature("canvas_app.fails_until").apply_async(
            ("/nowhere",), link=add.clone((30,)), link_error=tell
        )
        assert fine.get(timeout=30) == 2
        with pytest.raises(JobFailed, match="/nowhere is not there"):
            wrong.get(timeout=30)
        eventually(lambda: jobs.sql("select 1 from pgqueue.jobs") == [], "what is linked has ended")
    ends = jobs.sql("select task, state, result from pgqueue.all_jobs")
    # With the result in front; what was to follow the failed one has not run.
    assert Counter((row["task"].partition(".")[2], row["state"], row["result"]) for row in ends) == Counter(
        [
            *(("add", "succeeded", number) for number in (2, 12, 22)),
            ("double", "succeeded", 44),
            ("fails_until", "dead", None),
            ("add", "dead", None),
            ("handle", "succeeded", wrong.id),
        ]
    )
    assert [entry["failed"] for entry in ledger.entries() if entry["label"] == "failed"] == [wrong.id]
    assert ledger.labels().count("add") == 3


def scenes() -> list[tuple[str, str, list[str]]]:
    """What the page's table has: a scene, what to type or write, and the tests that play it."""
    table = PAGE.read_text(encoding="utf-8").partition("## Scenes")[2].partition("\n## ")[0]
    rows = [line.strip("|").split(" | ") for line in table.splitlines() if line.startswith("| ")]
    return [(row[0].strip(), row[1], re.findall(r"`([\w./]+::[\w:]+)`", row[-1])) for row in rows[1:]]


def test_every_scene_of_the_page_has_a_test_that_is_collected() -> None:
    named = {test if "/" in test else f"acceptance/{test}" for _, _, tests in scenes() for test in tests}
    files = sorted({str(TESTS / test.partition("::")[0]) for test in named})
    found = subprocess.run(
        [sys.executable, "-m", "pytest", "--collect-only", "-q", "-p", "no:cacheprovider", *files],
        cwd=PACKAGE,
        env={**os.environ, "PYTEST_ADDOPTS": ""},
        capture_output=True,
        text=True,
        timeout=90,
    )
    assert found.returncode == 0, found.stdout[-2000:] + found.stderr[-2000:]
    collected = {
        line.partition("[")[0].removeprefix("tests/") for line in found.stdout.splitlines() if "::" in line
    }
    assert named - collected == set()
    silent = [scene for scene, _, tests in scenes() if not tests and "not there" not in scene]
    assert silent == []
    assert len(named) >= 30


def test_scenes_say_how() -> None:
    assert [scene for scene, how, _ in scenes() if "`" not in how] == []
