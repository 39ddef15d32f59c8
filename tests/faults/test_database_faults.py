"""A database that crashes, restarts, is away for minutes, or answers no more."""

from __future__ import annotations

import re
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from tests.acceptance.workers import Worker, eventually
from tests.faults.report import Report
from tests.faults.scene import Scene, own_scene
from tests.servers import Server, own_server


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with own_server() as server:
        yield server


@pytest.fixture
def scene(server: Server, tmp_path: Path, report: Report) -> Iterator[Scene]:
    """A queue on a server that comes and goes."""
    server.start()
    with own_scene(server.new_database("template1"), tmp_path, report) as scene:
        yield scene
        server.start()


def complaints(worker: Worker) -> list[str]:
    return [line for line in worker.log.splitlines() if not re.search(r"INFO|job_crashed", line)]


def let_pass(seconds: float) -> None:
    """For what must *not* happen in a while."""
    time.sleep(seconds)


def recovered(scene: Scene, worker: Worker, since: float) -> float:
    """Seconds from `since` on until a job was started."""
    runs = scene.ledger

    def look() -> float | None:
        later = [line["at"] for line in runs.entries("start") if line["at"] >= since]
        return min(later) if later else None

    return float(eventually(look, "jobs run again") or 0) - since


@pytest.mark.parametrize(
    "number",
    [
        pytest.param(signal.SIGINT, id="fast", marks=pytest.mark.slow),
        pytest.param(signal.SIGQUIT, id="immediate"),
    ],
)
def test_restart(scene: Scene, server: Server, number: signal.Signals) -> None:
    worker = scene.worker("-c", "2")
    producer = scene.produce(100)
    for _ in range(3):
        producer.wait_for(50)
        server.stop(number)
        server.start()
    scene.healed()
    producer.wait_for(50)
    how = "a fast shutdown" if number == signal.SIGINT else "an immediate shutdown"
    verdict = scene.settle(f"database restarted three times by {how}")
    assert verdict.recovery < 5
    assert "worker_fenced" not in worker.log


def test_a_backend_is_killed(scene: Scene, server: Server) -> None:
    """One server process killed by SIGKILL takes all sessions with it, and the server recovers."""
    scene.worker("-c", "2")
    producer = scene.produce(100)
    for application in ("pgqueue claim", "pgqueue maintenance", "pgqueue listen"):
        producer.wait_for(50)
        server.backend(application, scene.dsn).kill()
    scene.healed()
    producer.wait_for(50)
    verdict = scene.settle("server process killed, all sessions lost")
    assert verdict.recovery < 5


def test_sessions_are_terminated_all_the_time(scene: Scene, server: Server) -> None:
    scene.worker("-c", "2")
    producer = scene.produce(100)
    producer.wait_for(20)
    with server.connect() as connection:
        for _ in range(25):
            connection.execute(
                "select pg_terminate_backend(pid) from pg_stat_activity"
                " where datname = %s and pid <> pg_backend_pid()",
                [scene.dsn.rsplit("/", 1)[1]],
            )
            let_pass(0.2)
    scene.healed()
    producer.wait_for(20)
    scene.settle("all sessions terminated every 200 ms for 5 s")


@pytest.mark.parametrize(
    "seconds", [8, pytest.param(180, marks=[pytest.mark.slow, pytest.mark.timeout(400)])]
)
def test_outage(scene: Scene, server: Server, seconds: int) -> None:
    """It kills no work, floods no log, fences nobody, and is over five seconds after the server's return."""
    workers = [scene.worker("-c", "2"), scene.worker("-c", "2")]
    producer = scene.produce(50, "long")
    producer.wait_for(50)
    before = len(scene.ledger.entries("start"))
    crews = [sorted(each.pid for each in worker.full_crew()) for worker in workers]
    server.stop(signal.SIGQUIT)
    let_pass(seconds)
    assert [sorted(each.pid for each in worker.executors) for worker in workers] == crews
    server.start()
    scene.healed()
    back = time.time()
    for worker in workers:
        assert recovered(scene, worker, back) < 5
        said = complaints(worker)
        assert len(said) <= 6, said
        assert not re.search("fenced|rescued|crashed", worker.log)
    assert len(scene.ledger.entries("start")) > before
    verdict = scene.settle(f"database away for {seconds} s")
    assert verdict.duplicated == 0


@pytest.mark.slow
def test_the_claim_connection_gets_no_answer(scene: Scene, server: Server) -> None:
    """Its server process is frozen: the worker takes another connection, and what the frozen one claims after
    all is found."""
    worker = scene.worker("-c", "2")
    producer = scene.produce(50)
    producer.wait_for(50)
    backend = server.backend("pgqueue claim", scene.dsn)
    waits = "select wait_event from pg_stat_activity where pid = %s"

    def freeze() -> bool:
        # Between two statements: frozen within one it may hold a lock that stops the whole server.
        backend.suspend()
        if scene.jobs.sql(waits, backend.pid) == [{"wait_event": "ClientRead"}]:
            return True
        backend.resume()
        return False

    eventually(freeze, "the server process freezes between two statements")
    worker.wait_for_log("database_silent connection=claim")
    producer.wait_for(50)
    backend.resume()
    psutil.wait_procs([backend], timeout=20)
    scene.healed()
    verdict = scene.settle("server process of the claim connection frozen", within=90)
    assert verdict.duplicated == 0


@pytest.mark.slow
@pytest.mark.timeout(200)
def test_a_claim_is_committed_long_after_its_connection_was_given_up(scene: Scene, server: Server) -> None:
    """It waited for a synchronous standby that did not come back for a minute."""
    worker = scene.worker("-c", "2")
    producer = scene.produce(20, "plain")
    producer.wait_for(20)
    producer.stop()
    eventually(lambda: not scene.jobs.sql("select id from pgqueue.jobs"), "all done")
    with server.connect() as connection:
        connection.execute("alter system set synchronous_standby_names = 'nobody'")
        connection.execute("select pg_reload_conf()")
        try:
            # Whoever does not wait for the standby can still enqueue.
            scene.jobs.sql("set synchronous_commit = local")
            scene.jobs.sql("create table if not exists late (id uuid)")
            scene.jobs.sql(
                "insert into late select pgqueue.enqueue('faults_app.work', jsonb_build_array('late-' || n))"
                " from generate_series(1, 20) n"
            )
            worker.wait_for_log("database_silent connection=claim", 60)
        finally:
            connection.execute("alter system reset synchronous_standby_names")
            connection.execute("select pg_reload_conf()")
    left = "select id from pgqueue.jobs where id in (select id from late)"
    eventually(lambda: not scene.jobs.sql(left), "all that was claimed late has run", 90)
    assert len([line for line in scene.ledger.entries("end") if line["label"].startswith("late")]) == 20
    assert "claim_adopted" in worker.log
