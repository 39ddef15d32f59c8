"""Disks that are full or refuse to sync, and power cuts: what was acknowledged is kept, no job is blamed."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import psutil
import psycopg
import pytest

from pgqueue import PgQueue, Signature
from tests.acceptance.workers import Jobs, Worker, Workers, eventually
from tests.faults.network import require
from tests.faults.report import Report
from tests.faults.scene import APPS, Scene, own_scene
from tests.servers import Server, own_server


def let_pass(seconds: float) -> None:
    """For how long a fault lasts."""
    time.sleep(seconds)


def complaints(worker: Worker) -> list[str]:
    return [line for line in worker.log.splitlines() if re.search("WARNING|ERROR", line)]


@contextlib.contextmanager
def small_disk(megabytes: int) -> Iterator[Path]:
    """A file system of that size."""
    require("mount", "mount")
    folder = Path(tempfile.mkdtemp(prefix="pgqueue-disk-"))
    try:
        options = f"size={megabytes}m,mode=0711"
        done = subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)])
        if done.returncode:
            pytest.skip("needs a kernel that lets root mount a tmpfs")
        try:
            yield folder
        finally:
            subprocess.run(["umount", "-l", str(folder)], check=True)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def move_wal(server: Server, place: Path) -> None:
    """Keep the server's write-ahead log in another folder."""
    server.stop(signal.SIGINT)
    wal = server.home / "cluster" / "pg_wal"
    shutil.copytree(wal, place)
    owner = wal.stat()
    for path in (place, *place.rglob("*")):
        os.chown(path, owner.st_uid, owner.st_gid)
    place.chmod(0o700)
    shutil.rmtree(wal)
    wal.symlink_to(place)
    server.start()


def is_running(server: Server) -> bool:
    try:
        return server.postmaster.is_running()
    except (FileNotFoundError, psutil.NoSuchProcess):
        return False


def fill(disk: Path) -> Path:
    """Take up all the space there is; the file that does."""
    ballast = disk / "ballast"
    with ballast.open("wb", buffering=0) as file, contextlib.suppress(OSError):
        for size in (1 << 20, 1 << 12):
            with contextlib.suppress(OSError):
                while True:
                    file.write(b"\0" * size)
    return ballast


def blamed(scene: Scene) -> int:
    """Jobs that failed or were buried."""
    query = (
        "select (select count(*) from pgqueue.failures) + (select count(*) from pgqueue.dead_letters) as n"
    )
    return int(scene.jobs.sql(query)[0]["n"])


@pytest.mark.slow
def test_data_disk_full(tmp_path: Path, report: Report) -> None:
    """The server refuses whatever needs a new page. Outcomes are kept, and written when there is room."""
    with small_disk(200) as disk, tempfile.TemporaryDirectory(prefix="pgqueue-wal-") as elsewhere:
        Path(elsewhere).chmod(0o711)
        server = Server(disk, {"max_wal_size": "100MB", "logging_collector": "off"})
        with closing(server):
            move_wal(server, Path(elsewhere) / "pg_wal")
            with own_scene(server.new_database("template1"), tmp_path, report) as scene:
                worker = scene.worker("-c", "2")
                producer = scene.produce(100, "plain")
                producer.wait_for(100)
                ballast = fill(disk)
                worker.wait_for_log("database_unavailable connection=claim.*53100")
                let_pass(5)
                assert worker.process.poll() is None
                ballast.unlink()
                scene.healed()
                worker.wait_for_log("database_back connection=claim")
                producer.wait_for(100)
                verdict = scene.settle("data disk full for 5 s")
                assert blamed(scene) == 0
                assert verdict.duplicated == 0, "outcomes were kept, so no job ran again"
                assert len(complaints(worker)) <= 10, complaints(worker)


@pytest.mark.slow
def test_log_disk_full(tmp_path: Path, report: Report) -> None:
    """The server panics and stays down until somebody makes room and starts it."""
    with small_disk(100) as disk, own_server({"max_wal_size": "64MB", "min_wal_size": "32MB"}) as server:
        move_wal(server, disk / "pg_wal")
        with own_scene(server.new_database("template1"), tmp_path, report) as scene:
            worker = scene.worker("-c", "2")
            producer = scene.produce(100, "plain")
            producer.wait_for(100)
            ballast = fill(disk)
            with contextlib.suppress(psycopg.OperationalError), server.connect() as connection:
                while True:
                    connection.execute("select pg_logical_emit_message(false, '', repeat('x', 1000000))")
            log = server.home / "cluster" / "server.log"
            eventually(lambda: "PANIC" in log.read_text(), "the server panics")
            eventually(lambda: not is_running(server), "it stays down")
            worker.wait_for_log("database_unavailable connection=claim")
            let_pass(2)
            ballast.unlink()
            server.start()
            scene.healed()
            producer.wait_for(100)
            scene.settle("log disk full, server down until there is room")
            assert blamed(scene) == 0
            assert len(complaints(worker)) <= 10, complaints(worker)


@contextlib.contextmanager
def injected(pid: int, what: str, log: Path) -> Iterator[None]:
    """Let system calls of a process fail as `what` says, in strace's words."""
    call = what.split(":")[0]
    command = ["strace", "-qq", "-p", str(pid), "-e", f"trace={call}", "-e", f"inject={what}", "-o", str(log)]
    tracer = subprocess.Popen(command, stderr=subprocess.PIPE)
    try:
        yield
    finally:
        if tracer.poll() is None:
            tracer.terminate()
        _, said = tracer.communicate(timeout=10)
        assert "INJECTED" in log.read_text(), said.decode()


def server_process(scene: Scene, kind: str) -> int:
    query = "select pid from pg_stat_activity where backend_type = %s or application_name = %s"
    return int(scene.jobs.sql(query, kind, kind)[0]["pid"])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("process", "error"),
    [("walwriter", "EIO"), ("checkpointer", "EIO"), ("pgqueue claim", "EIO"), ("pgqueue claim", "ENOSPC")],
)
def test_sync_fails(tmp_path: Path, report: Report, process: str, error: str) -> None:
    """Postgres does not trust a disk that failed to sync: it panics, and starts again from its log."""
    require("strace", "strace")
    with own_server({"wal_writer_delay": "10ms"}) as server:
        with own_scene(server.new_database("template1"), tmp_path, report) as scene:
            worker = scene.worker("-c", "2")
            producer = scene.produce(60, "plain")
            producer.wait_for(60)
            pid = server_process(scene, process)
            call = "fsync" if process == "checkpointer" else "fdatasync"
            log = server.home / "cluster" / "server.log"
            with injected(pid, f"{call}:error={error}:when=3", tmp_path / "strace"):
                while "PANIC" not in log.read_text():
                    with contextlib.suppress(psycopg.OperationalError), server.connect() as connection:
                        # The first two find something to write.
                        connection.execute("set synchronous_commit = off")
                        connection.execute("create table if not exists scrap (n int)")
                        connection.execute("insert into scrap values (1)")
                        if process == "checkpointer":
                            connection.execute("checkpoint")
            scene.healed()
            producer.wait_for(60)
            scene.settle(f"{process.removeprefix('pgqueue ')}: sync fails with {error}")
            assert blamed(scene) == 0
            assert len(complaints(worker)) <= 10, complaints(worker)


@pytest.mark.slow
def test_power_cuts(tmp_path: Path, report: Report) -> None:
    with own_server() as server, own_scene(server.new_database("template1"), tmp_path, report) as scene:
        worker = scene.worker("-c", "2")
        producer = scene.produce(100)
        for _ in range(3):
            producer.wait_for(100)
            server.kill()
            server.start()
        scene.healed()
        producer.wait_for(100)
        scene.settle("server killed with all its processes, 3 times")
        assert "Traceback" not in worker.log


@pytest.fixture(scope="module")
def careless() -> Iterator[Server]:
    """A server that acknowledges commits before they are on disk, unless it is told otherwise."""
    with own_server({"wal_writer_delay": "10s", "synchronous_commit": "off"}) as server:
        yield server


@pytest.mark.slow
def test_power_cut_where_commits_are_not_synced(careless: Server) -> None:
    """`synchronous_commit = off` of the database is for the application's own data: enqueues on our own
    connections are on disk."""
    lost = False
    for _ in range(3):
        careless.start()
        dsn = careless.new_database()
        app = PgQueue("client", dsn=dsn)
        kept = [app.send_task("faults_app.work", (str(number),)).id for number in range(20)]
        kept += app.enqueue_many([Signature("faults_app.work", (number,), {}, {}) for number in range(20)])
        app.close()
        with psycopg.connect(dsn, autocommit=True) as connection:
            connection.execute("create table orders (n int)")
            careless.kill()
        careless.start()
        with psycopg.connect(dsn, autocommit=True) as connection:
            rows = connection.execute("select id::text from pgqueue.jobs").fetchall()
            orders = connection.execute("select to_regclass('orders')").fetchall()
        assert sorted(row[0] for row in rows) == sorted(kept)
        lost = lost or orders == [(None,)]
    assert lost, "the cuts were no cuts: what nobody synced survived"


@pytest.mark.slow
def test_power_cut_after_acks_where_commits_are_not_synced(careless: Server, tmp_path: Path) -> None:
    """What the worker was told is written stays written: no job runs a second time."""
    careless.start()
    dsn = careless.new_database()
    with closing(Jobs(dsn)) as jobs, Workers(dsn, tmp_path, APPS) as workers:
        worker = workers.start("-c", "2", app="faults_app:app")
        for number in range(3):
            ids = [jobs.add("faults_app.work", f"{number}-{each}") for each in range(10)]
            jobs.wait(ids)
            careless.kill()
            careless.start()
            assert jobs.ends(ids)["succeeded"] == 10
        assert set(workers.ledger.runs().values()) == {1}
        assert worker.process.poll() is None
