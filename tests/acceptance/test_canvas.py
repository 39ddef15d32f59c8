"""Chains, groups and chords with real workers."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from pgqueue import JobCancelled, JobFailed, PgQueue, chain, chord, group
from tests.acceptance.workers import APPS, PATIENCE, Gate, Jobs, Ledger, Workers, eventually

POOLS = ("prefork", "threads", "asyncio", "solo")


@pytest.fixture(scope="module")
def tasks() -> Iterator[Any]:
    """The module that the workers import."""
    sys.path.insert(0, str(APPS))
    try:
        import canvas_app

        yield canvas_app
    finally:
        sys.path.remove(str(APPS))
        for name in ("canvas_app", "tests_app"):
            sys.modules.pop(name, None)


@pytest.fixture
def app(tasks: Any, db: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[PgQueue]:
    """Its application, on the database of this test."""
    client = PgQueue("client", dsn=db)
    monkeypatch.setattr(tasks.app, "_client", client._client, raising=False)
    yield tasks.app
    client.close()


def start(workers: Workers, *flags: str, **options: Any) -> Any:
    return workers.start("-c", "2", "--heartbeat", "0.5", *flags, app="canvas_app:app", **options)


@pytest.mark.parametrize("pool", POOLS)
def test_all_shapes_in_every_pool(app: PgQueue, tasks: Any, workers: Workers, pool: str) -> None:
    flags = ["--pool", pool] if pool == "solo" else ["-c", "2", "--pool", pool]
    workers.start("--heartbeat", "0.5", *flags, app="canvas_app:app")
    add, total, collect = tasks.add, tasks.total, tasks.collect
    shapes = {
        "chain": (chain(add.s(1, 2), add.s(3), tasks.double.s()), 12),
        "transactional": (chain(tasks.triple.s(1), tasks.triple.s(), add.s(1)), 10),
        "without history": (chain(tasks.forgotten.s(4), add.s(1)), 5),
        "group": (group(add.s(n, n) for n in range(20)), [2 * n for n in range(20)]),
        "chord": (chord((add.s(n, n) for n in range(20)), total.s()), 380),
        "piped": (group(add.s(1, 1), add.s(2, 2)) | total.s() | add.s(1), 7),
        "nested": (
            chain(add.s(1, 1), group(chain(add.s(1), add.s(1)), group(add.s(2), add.s(3))), collect.s("x")),
            [[4, [4, 5]], "x"],
        ),
        "immutable": (chain(add.s(1, 1), collect.si("a"), collect.s("b")), [["a"], "b"]),
    }
    made = {name: canvas.delay() for name, (canvas, _) in shapes.items()}
    assert {name: each.get(timeout=PATIENCE) for name, each in made.items()} == {
        name: expected for name, (_, expected) in shapes.items()
    }
    for each in made.values():
        progress = each.progress
        assert progress is not None
        assert (each.state, progress.done) == ("succeeded", progress.total)


def test_an_idle_worker_goes_on_at_once(app: PgQueue, tasks: Any, workers: Workers) -> None:
    """Nothing waits for a poll: fifty steps take less than one look at the queue would."""
    workers.start(
        "-c", "1", "--poll-interval", "30", "--heartbeat", "30", "--lease", "200", app="canvas_app:app"
    )
    assert tasks.add.delay(1, 1).get(timeout=PATIENCE) == 2
    started = time.monotonic()
    assert chain(tasks.add.s(0, 0), *(tasks.add.s(1) for _ in range(50))).delay().get(timeout=PATIENCE) == 50
    assert time.monotonic() - started < 25


def test_what_is_left_over_does_not_wait_for_a_heartbeat(app: PgQueue, tasks: Any, workers: Workers) -> None:
    """What one step cannot release, and a join of joins, which counts them in a later transaction."""
    patient = ("--poll-interval", "30", "--heartbeat", "30", "--lease", "200")
    workers.start("-c", "2", *patient, app="canvas_app:app")
    many = chain(tasks.add.s(0, 0), group(tasks.add.s(n) for n in range(2_500)), tasks.total.s()).delay()
    inner = [group(tasks.add.s(1, 1), tasks.add.s(2, 2)), group(tasks.add.s(3, 3), group(tasks.add.s(4, 4)))]
    nested = chord(inner, tasks.collect.s()).delay()
    assert many.get(timeout=28) == sum(range(2_500))
    assert nested.get(timeout=28) == [[[2, 4], [6, [8]]]]


def test_steps_of_different_workers(app: PgQueue, tasks: Any, workers: Workers) -> None:
    """The worker that ends a step wakes the one that serves the next."""
    for queue in ("a", "b"):
        workers.start("-c", "1", "-Q", queue, "--poll-interval", "30", app="canvas_app:app")
    steps = [tasks.add.s(1).set(queue="ab"[n % 2]) for n in range(20)]
    canvas = chain(tasks.add.s(0, 0).set(queue="b"), *steps).delay()
    assert canvas.get(timeout=25) == 20


def test_a_killed_chord(
    app: PgQueue, tasks: Any, workers: Workers, ledger: Ledger, jobs: Jobs, tmp_path: Path
) -> None:
    """A member dies, the body with it; the member is requeued, and the chord ends as if nothing had been."""
    start(workers)
    mended = tmp_path / "mended"
    members = [tasks.add.s(1, 1), tasks.fails_until.s(str(mended), 40), tasks.add.s(2, 2)]
    canvas = chord(members, tasks.total.s()).link_error(tasks.handle.s("failed")).delay()
    with pytest.raises(JobFailed, match=r"LookupError: .*mended is not there") as raised:
        canvas.get(timeout=PATIENCE)
    at_fault = raised.value.job_id
    body = canvas.children[3]
    assert (body.state, canvas.state) == ("dead", "dead")
    assert jobs.dead(body.id)["reason"] == "member_failed"
    assert at_fault in jobs.dead(body.id)["error_message"]
    (handled,) = eventually(lambda: [e for e in ledger.entries() if e["label"] == "failed"], "it is told")
    assert handled["failed"] == at_fault

    refused = workers.run("dead", "requeue", body.id)
    assert refused.returncode == 1
    assert "requeue that one, and this comes back by itself" in refused.stderr
    mended.touch()
    assert workers.run("dead", "requeue", at_fault, "--note", "file put there").returncode == 0
    eventually(lambda: canvas.state == "succeeded", "the chord goes on")
    assert canvas.get() == 46
    assert ledger.labels().count("total") == 1
    assert jobs.sql("select 1 from pgqueue.dead_letters") == []


def test_a_member_that_kills_its_process(app: PgQueue, tasks: Any, workers: Workers, jobs: Jobs) -> None:
    start(workers, "--max-crashes", "2")
    canvas = chord([tasks.add.s(1, 1), tasks.dies.s()], tasks.total.s(), on_member_failure="skip").delay()
    assert canvas.get(timeout=PATIENCE) == 2
    assert jobs.dead(canvas.children[1].id)["reason"] == "crashed"


def test_cancel_while_it_runs(app: PgQueue, tasks: Any, workers: Workers, ledger: Ledger, gate: Gate) -> None:
    start(workers)
    canvas = chain(
        group([tasks.slow.s(60), *(tasks.add.s(n, n) for n in range(5))]), tasks.gated.s(gate.path)
    ).delay()
    eventually(lambda: "slow" in ledger.labels() and canvas.progress.done == 5, "the others have ended")
    assert canvas.cancel("enough") == "requested"
    with pytest.raises(JobCancelled):
        canvas.get(timeout=PATIENCE)
    eventually(lambda: canvas.progress.done == 7, "the run has ended too")
    assert [child.state for child in canvas.children] == ["cancelled", *["succeeded"] * 5, "cancelled"]
    assert "gated" not in ledger.labels()


def test_results_too_large_to_travel_with_a_claim(app: PgQueue, tasks: Any, workers: Workers) -> None:
    start(workers)
    text = "x" * 30_000
    canvas = chord([tasks.collect.s(text, n) for n in range(10)], tasks.collect.s().set(headers={"h": text}))
    assert (canvas | tasks.collect.s()).delay().get(timeout=PATIENCE) == [[[[text, n] for n in range(10)]]]


def test_a_transaction_of_the_task(app: PgQueue, tasks: Any, workers: Workers, jobs: Jobs) -> None:
    """What a transactional run has ended is passed on by its worker at once."""
    workers.start(
        "-c", "1", "--heartbeat", "30", "--lease", "200", "--poll-interval", "30", app="canvas_app:app"
    )
    assert chain(tasks.triple.s(1), *(tasks.triple.s() for _ in range(5))).delay().get(timeout=25) == 3**6


def test_the_command(app: PgQueue, tasks: Any, workers: Workers, tmp_path: Path) -> None:
    start(workers)
    good = group(tasks.add.s(n, n) for n in range(3)).delay()
    good.get(timeout=PATIENCE)
    bad = chain(tasks.fails_until.s(str(tmp_path / "never")), tasks.collect.s()).delay()
    with pytest.raises(JobFailed):
        bad.get(timeout=PATIENCE)
    left = chain(tasks.add.s(1, 1).set(countdown=1000), tasks.collect.s()).delay()

    listed = json.loads(workers.run("canvas", "list", "--json").stdout)
    assert [(each["id"], each["state"], each["jobs"], each["left"]) for each in listed] == [
        (left.id, "scheduled", 2, 2), (bad.id, "dead", 2, 0), (good.id, "succeeded", 3, 0),
    ]  # fmt: skip
    table = workers.run("canvas", "list", "--state", "dead").stdout
    assert bad.id in table
    assert good.id not in table
    shown = workers.run("canvas", "show", bad.id).stdout
    assert "not_retryable" in shown
    assert bad.children[0].id in shown
    document = json.loads(workers.run("canvas", "show", bad.id, "--json").stdout)
    assert document["fault"] == bad.children[0].id
    assert [each["state"] for each in document["members"]] == ["dead", "dead"]

    cancelled = workers.run("canvas", "cancel", left.id, "--note", "enough")
    assert cancelled.stdout == f"canvas {left.id}: 2 jobs cancelled\n"
    assert left.state == "cancelled"
    again = workers.run("canvas", "cancel", left.id)
    assert (again.returncode, again.stderr) == (1, f"pgqueue: canvas {left.id} has ended, or there is none\n")
    unknown = "018f0000-0000-7000-8000-000000000000"
    missing = workers.run("canvas", "show", unknown)
    assert missing.returncode == 1
    assert (
        missing.stderr == f"pgqueue: no canvas {unknown}: never committed, pruned, or in another database\n"
    )
