"""`pgqueue doctor --only canvases`: canvases that can never end, provoked for real, and no false alarm."""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psycopg
import pytest

from pgqueue import PgQueue, chain, chord, group
from tests.acceptance.test_canvas import app, tasks
from tests.acceptance.test_doctor import Doctor, Report, add_worker, everything, only
from tests.acceptance.workers import PATIENCE, Gate, Jobs, Workers, eventually

__all__ = ["app", "tasks"]


def look(jobs: Jobs, *flags: str) -> Report:
    return Doctor(jobs.dsn)(*only("canvases"), *flags)


def nodes(jobs: Jobs, canvas: str) -> list[str | None]:
    """The ends of its nodes, in order."""
    rows = jobs.sql("select state from pgqueue.canvas_nodes where canvas_id = %s order by nth", canvas)
    return [row["state"] for row in rows]


@pytest.fixture
def no_triggers(jobs: Jobs) -> Iterator[None]:
    """What leaves `jobs` in this test is noted nowhere, until the test says so."""
    jobs.sql("alter table pgqueue.jobs disable trigger user")
    yield
    jobs.sql("alter table pgqueue.jobs enable trigger user")


def test_jobs_that_were_truncated(app: PgQueue, tasks: Any, jobs: Jobs) -> None:
    add, total = tasks.add, tasks.total
    made = [
        chain(add.s(1, 1), add.s(1), add.s(1)).delay(),
        chord((add.s(n, n) for n in range(5)), total.s()).delay(),
        group(chain(add.s(1, 1), add.s(1)), add.s(2, 2)).delay(),
        chain(add.s(1, 1)).delay(),  # one that nothing waits for, and that is a member of nothing
    ]
    assert look(jobs).levels == {}
    with psycopg.connect(jobs.dsn) as other:
        other.execute("truncate pgqueue.jobs")
    before = everything(jobs.dsn)
    report = look(jobs)
    assert everything(jobs.dsn) == before
    lost = report.finding("canvases")
    assert (report.status, lost["level"], lost["fixable"]) == (1, "error", True)
    assert lost["what"].startswith("13 jobs of 4 canvases are neither in jobs nor noted as ended")
    assert "history has no end" in lost["what"]
    assert set(lost["facts"]["canvases"]) == {each.id for each in made}
    assert lost["mend"] == "pgqueue doctor --only canvases --fix"

    report = look(jobs, "--fix", "--fail-on", "hint")
    assert (report.status, report.finding("canvases")["fixed"]) == (0, True)
    assert [each.state for each in made] == ["cancelled"] * 4
    assert look(jobs).levels == {}, "and their ends were passed on"
    (act,) = jobs.sql("select details from pgqueue.audit_log where action = 'doctor_fix'")
    assert act["details"]["before"]["facts"]["count"] == 13
    assert act["details"]["after"] == {"found": None}


def test_one_job_that_was_lost(app: PgQueue, tasks: Any, jobs: Jobs, no_triggers: None) -> None:
    """Whatever it is in its canvas, it is found, and no other is touched."""
    first = chain(tasks.add.s(1, 1), tasks.add.s(1), tasks.add.s(1)).delay()
    second = chord([tasks.add.s(1, 1), tasks.add.s(2, 2)], tasks.total.s()).delay()
    third = chain(tasks.add.s(1, 1)).delay()
    begun = chain(tasks.add.s(1, 1), tasks.add.s(1)).delay()
    linked = chain(tasks.add.s(1, 1)).link(tasks.add.s(1)).delay()
    lost = [
        first.children[1].id,  # waits, and is waited for
        second.children[1].id,  # a member
        third.children[0].id,  # the output
        begun.children[0].id,  # waits for nothing
        linked.children[1].id,  # nothing waits for it
    ]
    for job in lost:
        jobs.sql("delete from pgqueue.jobs where id = %s", job)
    jobs.sql("alter table pgqueue.jobs enable trigger user")
    finding = look(jobs).finding("canvases", "5 jobs of 5 canvases")
    assert sorted(finding["facts"]["ids"]) == sorted(lost)
    look(jobs, "--fix")
    assert look(jobs).levels == {}
    assert first.children[0].state == "ready"
    assert nodes(jobs, first.id) == [None, "cancelled", "dead"]
    assert second.children[0].state == "ready"
    assert third.state == "cancelled"


def test_lost_jobs_whose_end_is_in_history(
    app: PgQueue, tasks: Any, jobs: Jobs, workers: Workers, tmp_path: Path, no_triggers: None
) -> None:
    """A worker ran them while the triggers were off: --fix finds their results, and the chord goes on."""
    members = [tasks.add.s(n, n) for n in range(4)]
    canvas = chord(members, tasks.total.s()).delay()
    failed = chain(tasks.fails_until.s(str(tmp_path / "never")).set(max_retries=0), tasks.add.s(1)).delay()
    workers.start("-c", "2", app="canvas_app:app")
    jobs.wait([child.id for child in [*canvas.children[:4], failed.children[0]]])
    jobs.sql("alter table pgqueue.jobs enable trigger user")
    found = look(jobs).finding("canvases", "5 jobs of 2 canvases")
    assert found["what"].endswith("history has the end of 5 jobs")
    report = look(jobs, "--fix")
    assert report.finding("canvases")["fixed"]
    assert canvas.get(timeout=PATIENCE) == 12
    eventually(lambda: failed.state == "dead", "what waits for the dead letter is dead too")
    assert jobs.dead(failed.children[1].id)["reason"] == "member_failed"


def test_ends_that_nobody_passes_on(app: PgQueue, tasks: Any, jobs: Jobs) -> None:
    canvas = chain(tasks.add.s(1, 1), tasks.add.s(1)).delay()
    jobs.sql("select pgqueue.cancel(%s)", canvas.children[0].id)
    before = everything(jobs.dsn)
    report = look(jobs)
    assert everything(jobs.dsn) == before
    alone = report.finding("canvases", f"1 end in canvas {canvas.id} wait")
    assert (report.status, alone["level"]) == (0, "warning")
    assert "no live worker is there" in alone["means"]
    assert alone["mend"].startswith("SELECT pgqueue.settle_canvases()")

    add_worker(jobs, "old-one", version="0.0.9", conf='{"heartbeat": 0.2}')
    older = look(jobs).finding("canvases")
    assert older["level"] == "error"
    assert "all live workers are of release 0.0.9, before this one" in older["means"]
    add_worker(jobs, "new-one", version="99.1", conf='{"heartbeat": 0.2}')
    report = look(jobs)
    assert report.finding("canvases")["level"] == "error"
    assert "canvas_not_settled" in report.finding("canvases")["means"]
    assert report.finding("canvases")["facts"]["versions"] == ["0.0.9", "99.1"]

    assert look(jobs, "--fix").finding("canvases")["fixed"]
    assert canvas.state == "dead" or canvas.state == "cancelled"
    assert look(jobs).levels == {}


def test_a_backlog_of_ends_is_passed_on(
    app: PgQueue, tasks: Any, jobs: Jobs, monkeypatch: pytest.MonkeyPatch
) -> None:
    """More than one call passes on; what there was no time for is said."""
    canvas = group(tasks.add.s(n, n) for n in range(2500)).delay()
    jobs.sql("truncate pgqueue.jobs")
    with monkeypatch.context() as patch:
        patch.setattr("pgqueue.database.doctor.canvases.FIX_FOR", 0.0)
        report = look(jobs, "--fix")
    late = report.finding("canvases", "2,500 jobs")
    assert (report.status, late["fixed"]) == (1, False)
    assert late["refused"].startswith("done, but not all ends were passed on")
    assert "1,500 ends" in look(jobs).finding("canvases")["what"]
    assert look(jobs, "--fix").finding("canvases")["fixed"]
    assert look(jobs).levels == {}
    assert canvas.state == "cancelled"


STRANDED = {
    "not in canvas_nodes": "delete from pgqueue.canvas_nodes where id = %(step)s",
    "ended already": "update pgqueue.canvas_nodes set state = 'dead', passed_on = true where id = %(step)s",
    "released already": "update pgqueue.canvas_nodes set released = true where id = %(step)s",
    "what it waits for is not in canvas_nodes": "delete from pgqueue.canvas_nodes where id = %(first)s",
    "what it waits for has ended": (
        "update pgqueue.canvas_nodes set state = 'succeeded', passed_on = true where id = %(first)s"
    ),
}


def test_blocked_jobs_that_nobody_will_release(app: PgQueue, tasks: Any, jobs: Jobs) -> None:
    steps = []
    for statement in STRANDED.values():
        first, step = chain(tasks.add.s(1, 1), tasks.add.s(1)).delay().children
        jobs.connection.execute(statement.encode(), {"first": first.id, "step": step.id})
        steps.append(step.id)
    before = everything(jobs.dsn)
    report = look(jobs, "--fix")
    assert everything(jobs.dsn) == before, "that is nothing for --fix"
    stranded = report.finding("canvases", "5 blocked jobs will never be released")
    assert (report.status, stranded["level"], stranded["fixable"]) == (1, "error", False)
    assert sorted(stranded["facts"]["ids"]) == sorted(steps)
    for words in STRANDED:
        assert f"1 {words}" in stranded["what"]
    program, *words = shlex.split(stranded["mend"])
    assert (program, words[:2], sorted(words[2:])) == ("pgqueue", ["job", "cancel"], sorted(steps))
    for job in words[2:]:
        jobs.sql("select pgqueue.cancel(%s)", job)
    look(jobs, "--fix")
    assert look(jobs).levels == {}


def test_no_alarm_while_canvases_are_under_way(
    app: PgQueue, tasks: Any, jobs: Jobs, workers: Workers, gate: Gate, tmp_path: Path
) -> None:
    """Looked at again and again, with members that end, die, come back, are cancelled, run and wait."""
    add, total, mended = tasks.add, tasks.total, tmp_path / "mended"
    held = chain(tasks.gated.s(gate.path, 1), add.s(1)).delay()
    dead = chain(tasks.fails_until.s(str(mended), 1).set(max_retries=0), add.s(1), add.s(1)).delay()
    later = chain(add.s(1, 1), add.s(1).set(countdown=3600)).delay()
    made = []
    for _ in range(30):
        made += [
            chord((add.s(n, n) for n in range(150)), total.s()).delay(),
            chain(add.s(1, 1), group(add.s(n) for n in range(50)), total.s()).delay(),
            chain(add.s(0, 0), *(add.s(1) for _ in range(30))).delay(),
        ]
    workers.start("-c", "4", "--pool", "threads", app="canvas_app:app")
    looks = 0
    while left := [each for each in made if not each.ready()]:
        if looks % 4 == 0:
            left[-1].cancel()
        if dead.state == "dead":
            mended.touch()
            app.dead_letters.requeue([dead.children[0].id])
        report = look(jobs, "--fail-on", "hint")
        assert report.levels == {}, report.document
        looks += 1
    assert looks > 2, "they were under way"
    assert eventually(lambda: dead.state == "succeeded", "it went on")
    assert (held.state, later.state) == ("running", "running")
    gate.open()
    assert held.get(timeout=PATIENCE) == 2
    assert look(jobs, "--fail-on", "hint").levels == {}
