"""Clocks that jump. The database's decides when jobs are due; nobody's decides who is alive."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from pgqueue import PgQueue
from tests.acceptance.workers import Worker, eventually
from tests.faults.report import Report
from tests.faults.scene import Scene, own_scene
from tests.servers import Server, own_server

LIBRARY = "/usr/lib/x86_64-linux-gnu/faketime/libfaketime.so.1"
HOUR = 3600
DAY = 24 * HOUR
BEYOND = 20 * DAY
"""Partitions of history are made for fourteen days."""
WITHIN = 4.0
"""Seconds until an idle worker has found a job by itself: it looks every three."""


class Clock:
    """The wall clock of processes started with this environment; it can be set while they run."""

    def __init__(self, folder: Path) -> None:
        libraries = [Path(LIBRARY), *Path("/usr/lib").glob("*/faketime/libfaketime.so.1")]
        found = next((library for library in libraries if library.exists()), None)
        if found is None:
            pytest.skip("needs libfaketime: apt-get install faketime")
        folder.chmod(0o755)  # for the user that Postgres runs as
        self._file = folder / "clock"
        self.environment = {
            "LD_PRELOAD": str(found),
            "FAKETIME_TIMESTAMP_FILE": str(self._file),
            "FAKETIME_NO_CACHE": "1",
            # Clocks that count seconds since the start know nothing of the date.
            "FAKETIME_DONT_FAKE_MONOTONIC": "1",
            "DONT_FAKE_MONOTONIC": "1",
        }
        self.set(0)

    def set(self, seconds: int) -> None:
        """So far from the right time."""
        scratch = self._file.with_suffix(".new")
        scratch.write_text(f"{seconds:+d}\n")
        scratch.chmod(0o644)
        scratch.rename(self._file)


@pytest.fixture(scope="module")
def clock() -> Iterator[Clock]:
    # Not tmp_path: for root it is closed to the user that Postgres runs as.
    with tempfile.TemporaryDirectory(prefix="pgqueue-clock-") as folder:
        yield Clock(Path(folder))


@pytest.fixture(scope="module")
def server(clock: Clock) -> Iterator[Server]:
    """A server with a clock of its own."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in clock.environment.items():
            patch.setenv(name, value)
        context = own_server()
        server = context.__enter__()
    try:
        yield server
    finally:
        context.__exit__(None, None, None)


@pytest.fixture
def scene(server: Server, clock: Clock, tmp_path: Path, report: Report) -> Iterator[Scene]:
    clock.set(0)
    with own_scene(server.new_database("template1"), tmp_path, report) as scene:
        yield scene
    clock.set(0)


def offset(scene: Scene) -> float:
    """How far the database's clock is ahead of ours."""
    query = "select extract(epoch from clock_timestamp())::float8 as now"
    return float(scene.jobs.sql(query)[0]["now"]) - time.time()


def jump(scene: Scene, clock: Clock, seconds: int) -> None:
    clock.set(seconds)
    eventually(lambda: abs(offset(scene) - seconds) < 60, "the database's clock has jumped")


@pytest.mark.slow
def test_the_databases_clock_jumps_under_load(scene: Scene, clock: Clock) -> None:
    """Forward an hour, back, and the same with a day. At the end it is ahead of all it has ever shown: what
    was to run in a moment by a clock that is a day ahead waits until that time has come."""
    pair = [scene.worker("-c", "1"), scene.worker("-c", "1")]
    producer = scene.produce(60)
    for seconds in (HOUR, 0, DAY, 0, -HOUR, 0, -DAY, 0, DAY + HOUR):
        producer.wait_for(60)
        jump(scene, clock, seconds)
    scene.healed()
    producer.wait_for(60)
    scene.settle("database's clock jumps an hour, a day, forward and back")
    assert not [worker.log for worker in pair if "fenced" in worker.log]


@pytest.mark.parametrize(
    "seconds", [-HOUR, *(pytest.param(each, marks=pytest.mark.slow) for each in (HOUR, DAY, -DAY, BEYOND))]
)
def test_the_databases_clock_jumps_while_a_worker_sleeps(scene: Scene, clock: Clock, seconds: int) -> None:
    worker = scene.worker("-c", "1")
    worker.full_crew()
    armed = "select queue from pgqueue.wake where wake_until > clock_timestamp()"
    eventually(lambda: scene.jobs.sql(armed), "the wake hint is armed")
    app = PgQueue("client", dsn=scene.dsn)
    try:
        later = app.send_task("faults_app.work", ("later",), countdown=2)
        jump(scene, clock, seconds)
        for number in range(3):
            start = time.monotonic()
            job = app.send_task("faults_app.work", (f"now {number}",))
            eventually(lambda: f"now {number}" in scene.ledger.labels(), "it is started")  # noqa: B023
            assert time.monotonic() - start < WITHIN
            # History has a partition for it, or the default one; a look-up by id finds it there.
            assert job.get(timeout=10).startswith(f"now {number}/")
        soon = app.send_task("faults_app.work", ("soon",), countdown=1)
        start = time.monotonic()
        eventually(lambda: "soon" in scene.ledger.labels(), "it is started")
        assert time.monotonic() - start < 10
        assert soon.get(timeout=10).startswith("soon/")
        if seconds > 0:
            assert later.get(timeout=10).startswith("later/"), "its time has come"
        else:
            assert later.state == "scheduled", "it waits for its time, by the database's clock"
            jump(scene, clock, 0)
            assert later.get(timeout=20).startswith("later/")
    finally:
        app.close()
    assert "fenced" not in worker.log
    assert "WARNING" not in worker.log


@pytest.mark.slow
def test_a_workers_clock_jumps(clock: Clock, fresh_dsn: str, tmp_path: Path, report: Report) -> None:
    """Nobody notices: neither the database nor who watches its heartbeat."""
    clock.set(0)
    with own_scene(fresh_dsn, tmp_path, report) as scene:
        odd = scene.worker("-c", "1", env=clock.environment)
        other = scene.worker("-c", "1")
        producer = scene.produce(60, "plain")
        for seconds in (HOUR, -HOUR, DAY, -DAY):
            producer.wait_for(60)
            beat = beats(scene, odd)
            clock.set(seconds)
            eventually(lambda: beats(scene, odd) > beat + 2, "its heart beats on")  # noqa: B023
            producer.wait_for(30)
        clock.set(0)
        scene.healed()
        producer.wait_for(60)
        verdict = scene.settle("a worker's clock jumps an hour, a day, forward and back")
        assert verdict.duplicated == 0
        assert verdict.stale == 0
        for worker in (odd, other):
            assert "fenced" not in worker.log
            assert "WARNING" not in worker.log
        wrong = "select id from pgqueue.finished_jobs where abs(extract(epoch from now() - finished_at)) > 99"
        assert scene.jobs.sql(wrong) == [], "times are the database's"
        seen = [round((line["at"] - time.time()) / HOUR) for line in scene.ledger.entries("end")]
        assert {0, 1, -1, 24, -24} <= set(seen), "its clock did jump"


def beats(scene: Scene, worker: Worker) -> int:
    return int(scene.jobs.sql("select heartbeat as n from pgqueue.workers where id = %s", worker.id)[0]["n"])
