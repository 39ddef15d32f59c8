"""Canvases whose workers are killed: every job ends, and what waits for many of them runs once."""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from pgqueue import PgQueue, chain, chord, group
from tests.acceptance.workers import PATIENCE, Jobs, Ledger, Workers, eventually
from tests.faults.scene import BRISK
from tests.faults.test_failpoints import IN_CANVASES, armed

MEMBERS = 10_000


@pytest.fixture
def jobs(db: str) -> Iterator[Jobs]:
    with closing(Jobs(db)) as jobs:
        yield jobs


@pytest.fixture
def workers(db: str, tmp_path: Path) -> Iterator[Workers]:
    with Workers(db, tmp_path) as workers:
        yield workers


@pytest.fixture
def ledger(workers: Workers) -> Ledger:
    return workers.ledger


@pytest.fixture
def app(db: str) -> Iterator[PgQueue]:
    with closing(PgQueue("client", dsn=db)) as app:
        yield app


def start(workers: Workers, **options: Any) -> Any:
    return workers.start("-c", "2", *BRISK, app="canvas_app:app", **options)


def test_ten_thousand_members_and_three_kills(
    app: PgQueue, jobs: Jobs, workers: Workers, ledger: Ledger
) -> None:
    s = app.signature
    canvas = chord([s("canvas_app.add", (n, n)) for n in range(MEMBERS)], s("canvas_app.total"))
    before = time.monotonic()
    result = canvas.delay()
    enqueued = time.monotonic() - before
    worker = start(workers)
    for share in (1, 2, 3):

        def has_come_so_far(share: int = share) -> bool:
            progress = result.progress
            return progress is not None and progress.done >= share * MEMBERS // 5

        eventually(has_come_so_far, "it comes on", 90)
        worker.kill()
        worker = start(workers)
    assert result.get(timeout=90) == MEMBERS * (MEMBERS - 1)
    took = time.monotonic() - before
    print(f"{MEMBERS} members enqueued in {enqueued:.2f} s, done in {took:.1f} s with three kills")
    assert ledger.labels().count("total") == 1
    assert jobs.sql("select state, count(*)::int as n from pgqueue.all_jobs group by state") == [
        {"state": "succeeded", "n": MEMBERS + 1}
    ]
    assert jobs.sql("select 1 from pgqueue.canvas_nodes where state is null or not passed_on") == []


@pytest.mark.parametrize("action", ["kill", "drop_connection"])
@pytest.mark.parametrize("place", ["claim_after_commit", "ack_sent", "ack_after_commit", *IN_CANVASES])
def test_a_worker_dies_between_any_two_steps(
    app: PgQueue, jobs: Jobs, workers: Workers, ledger: Ledger, tmp_path: Path, place: str, action: str
) -> None:
    if place == "ack_after_commit" and action == "drop_connection":
        pytest.skip("no connection is in use there")
    s = app.signature
    steps = [s("canvas_app.add", (1,)) for _ in range(6)]
    canvases = [
        chain(s("canvas_app.add", (0, 0)), *steps),
        chord([s("canvas_app.add", (n, n)) for n in range(10)], s("canvas_app.total")),
        chain(
            s("canvas_app.add", (1, 1)),
            group(s("canvas_app.add", (n,)) for n in range(10)),
            s("canvas_app.total"),
        ),
        chain(s("canvas_app.triple", (1,)), s("canvas_app.triple"), s("canvas_app.triple")),
    ]
    made = [canvas.delay() for canvas in canvases]
    doomed = start(workers, env=armed(place, action, tmp_path, nth=4))
    if action == "kill":
        assert doomed.wait() == -signal.SIGKILL
        start(workers)
    assert [each.get(timeout=PATIENCE) for each in made] == [6, 90, 65, 27]
    assert [each.state for each in made] == ["succeeded"] * 4
    # The bodies: what is claimed or running when its worker dies may run twice, what is released twice would.
    assert ledger.labels().count("total") <= 3
    query = "select id::text from pgqueue.all_jobs group by id having count(*) > 1"
    assert jobs.sql(query) == []
    assert jobs.sql("select state, count(*)::int as n from pgqueue.all_jobs group by state") == [
        {"state": "succeeded", "n": 7 + 11 + 12 + 3}
    ]
