"""Everything at once, at random, under load. PGQUEUE_NEMESIS_SEED repeats a draw, PGQUEUE_NEMESIS_SECONDS
sets the length of the long run."""

from __future__ import annotations

import os
import random
from pathlib import Path

import pytest

from tests.faults.nemesis import Nemesis
from tests.faults.report import Report
from tests.faults.scene import own_scene
from tests.servers import own_server

LONG = float(os.environ.get("PGQUEUE_NEMESIS_SECONDS", "180"))


@pytest.mark.timeout(LONG + 400)
@pytest.mark.parametrize(
    ("seconds", "rate"),
    [
        pytest.param(15.0, 300, id="short"),
        # While the database is away nothing is enqueued: of these about 320 a second are.
        pytest.param(LONG, 520, id="long", marks=pytest.mark.slow),
    ],
)
def test_nothing_is_lost(tmp_path: Path, report: Report, seconds: float, rate: float) -> None:
    seed = int(os.environ.get("PGQUEUE_NEMESIS_SEED", random.randrange(1_000_000)))
    print(f"PGQUEUE_NEMESIS_SEED={seed}")
    with own_server() as server, own_scene(server.new_database("template1"), tmp_path, report) as scene:
        nemesis = Nemesis(scene, server, tmp_path, seed, workers=3, rate=rate)
        nemesis.run(seconds)
        scene.healed()
        verdict = scene.settle(f"all of these at random for {seconds:g} s", within=120)
        print(f"seed {seed}: {verdict.jobs} jobs, {verdict.jobs / seconds:.0f}/s; {dict(nemesis.done)}")
