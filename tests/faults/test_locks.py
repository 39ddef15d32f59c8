"""Held locks, stopped processes and old snapshots: whoever they stop, it is not who enqueues."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import psutil
import psycopg
import pytest

from tests.acceptance.workers import eventually
from tests.faults.report import Report
from tests.faults.scene import Scene, own_scene
from tests.faults.test_notify import complaints, seconds, slowest
from tests.servers import Server, own_server

QUICK = 0.05
"""Seconds within which 99 of 100 enqueues are done; five times the quiet figure where that is more."""
ENQUEUES = 120
"""Watched during each fault."""

Fault = Callable[[Scene, Server], AbstractContextManager[None]]


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with own_server({"autovacuum_naptime": "1s"}) as server:
        yield server


def in_a_transaction(*statements: str) -> Fault:
    """Another session has done this and not ended its transaction."""

    @contextmanager
    def fault(scene: Scene, _server: Server) -> Iterator[None]:
        with psycopg.connect(scene.dsn, application_name="holder") as holder:
            for statement in statements:
                holder.execute(statement.encode())
            yield
            holder.rollback()

    return fault


def over_and_over(statement: str) -> Fault:
    """Another session does this all the time."""

    @contextmanager
    def fault(scene: Scene, _server: Server) -> Iterator[None]:
        ended = threading.Event()

        def run() -> None:
            with psycopg.connect(scene.dsn, autocommit=True) as connection:
                while not ended.is_set():
                    connection.execute(statement.encode())

        thread = threading.Thread(target=run)
        thread.start()
        try:
            yield
        finally:
            ended.set()
            thread.join()

    return fault


@contextmanager
def stopped(process: psutil.Process) -> Iterator[None]:
    process.send_signal(signal.SIGSTOP)
    try:
        yield
    finally:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.send_signal(signal.SIGCONT)


def backend(name: str) -> Fault:
    """The server process of one of the worker's connections is stopped."""

    def fault(scene: Scene, server: Server) -> AbstractContextManager[None]:
        return stopped(server.backend(name, scene.dsn))

    return fault


@contextmanager
def executor(scene: Scene, _server: Server) -> Iterator[None]:
    with stopped(scene.workers.started[0].executors[0]):
        yield


@contextmanager
def supervisor_in_a_claim(scene: Scene, _server: Server) -> Iterator[None]:
    """A second worker that stops itself between a claim and its COMMIT."""
    frozen = scene.worker("-c", "1", env={"PGQUEUE_FAILPOINTS": "claim_before_commit=stop@3"}, ready=False)
    process = psutil.Process(frozen.pid)
    eventually(lambda: process.status() == psutil.STATUS_STOPPED, "it has stopped")
    yield
    frozen.send(signal.SIGCONT)


@contextmanager
def autovacuum(scene: Scene, _server: Server) -> Iterator[None]:
    """A worker of the server's own that has begun to clean up `jobs`."""
    query = (
        "select pid from pg_stat_activity where backend_type = 'autovacuum worker'"
        " and datname = current_database()"
    )
    scene.jobs.sql("alter table pgqueue.jobs set (autovacuum_vacuum_cost_delay = 20)")
    scene.jobs.sql("alter table pgqueue.jobs set (autovacuum_vacuum_threshold = 10)")
    scene.jobs.sql("alter table pgqueue.jobs set (autovacuum_vacuum_cost_limit = 1)")
    found = eventually(lambda: scene.jobs.sql(query), "autovacuum is at work")
    try:
        with stopped(psutil.Process(found[0]["pid"])):
            yield
    except psutil.NoSuchProcess:
        pytest.fail("autovacuum was quicker than this test")
    finally:
        scene.jobs.sql("alter table pgqueue.jobs reset (autovacuum_vacuum_cost_limit)")


FAULTS: dict[str, Fault] = {
    "rows of workers": in_a_transaction("select from pgqueue.workers for update"),
    "rows of wake": in_a_transaction("select from pgqueue.wake for update"),
    "rows of alembic_version and meta": in_a_transaction(
        "select from pgqueue.alembic_version for update", "select from pgqueue.meta for update"
    ),
    "ready jobs": in_a_transaction(
        "select pgqueue.enqueue('faults_app.work', '[]', queue => 'elsewhere') from generate_series(1, 1000)",
        "commit",
        "select from pgqueue.jobs where queue = 'elsewhere' or state = 'ready' for update",
    ),
    "running jobs": in_a_transaction("select from pgqueue.jobs where state = 'running' for update"),
    "5,000 jobs enqueued and not committed": in_a_transaction(
        "select pgqueue.enqueue('faults_app.work', '[]') from generate_series(1, 5000)"
    ),
    "an old snapshot": in_a_transaction(
        "set transaction isolation level repeatable read", "select count(*) from pgqueue.jobs"
    ),
    "VACUUM and ANALYZE": over_and_over("vacuum (analyze) pgqueue.jobs"),
    "a supervisor in the middle of a claim": supervisor_in_a_claim,
    "an executor": executor,
    "the claiming backend": backend("pgqueue claim"),
    "the backend of maintenance": backend("pgqueue maintenance"),
    "the listening backend": backend("pgqueue listen"),
    "autovacuum": autovacuum,
}


@pytest.mark.slow
def test_enqueues_go_on(server: Server, tmp_path: Path, report: Report) -> None:
    with own_scene(server.new_database("template1"), tmp_path, report) as scene:
        scene.worker("-c", "2")
        producer = scene.produce(80)
        producer.wait_for(ENQUEUES)
        quiet = slowest(producer, 0)
        slow = {}
        for name, fault in FAULTS.items():
            with fault(scene, server):
                known = len(seconds(producer))
                producer.wait_for(ENQUEUES)
                slow[name] = slowest(producer, known)
            known = len(seconds(producer))
            producer.wait_for(40)
            quiet = max(quiet, slowest(producer, known))
        scene.jobs.sql("delete from pgqueue.jobs where queue = 'elsewhere'")
        scene.healed()
        limit = max(QUICK, 5 * quiet)
        assert {name: took for name, took in slow.items() if took > limit} == {}, f"quiet: {quiet}"
        assert complaints(producer) == []
        scene.settle("locks held, processes stopped, old snapshots")
