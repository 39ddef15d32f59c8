"""The network between the queue and its users: slow, lossy, silent, or lost at the worst moment."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

import pytest

from tests.acceptance.workers import Worker, eventually
from tests.faults.network import LossyProxy, RemoteServer, remote_server
from tests.faults.report import Report
from tests.faults.scene import Producer, Scene, own_scene

NOTICED = 9.0
"""Seconds until a silent network must be noticed: about four, on a busy machine more."""
HEALED = 8.0
"""Seconds until the queue must have caught up after a heal."""


def let_pass(seconds: float) -> None:
    """For how long a fault lasts."""
    time.sleep(seconds)


def complaints(worker: Worker) -> list[str]:
    return [line for line in worker.log.splitlines() if "WARNING" in line or "ERROR" in line]


class Remote:
    """A scene whose workers and producers are at the other end of a wire."""

    def __init__(self, remote: RemoteServer, scene: Scene) -> None:
        self.remote = remote
        self.network = remote.network
        self.scene = scene

    def worker(self, client: int, *flags: str) -> Worker:
        dsn = self.remote.seen_from(client, self.scene.dsn)
        with self.network.inside(self.network.clients[client]):
            return self.scene.worker("-c", "2", *flags, env={"PGQUEUE_DSN": dsn})

    def produce(self, client: int, rate: float = 60, mix: str = "quick") -> Producer:
        dsn = self.remote.seen_from(client, self.scene.dsn)
        with self.network.inside(self.network.clients[client]):
            return self.scene.produce(rate, mix, env={"PGQUEUE_DSN": dsn})


@pytest.fixture(scope="module")
def wired() -> Iterator[RemoteServer]:
    with remote_server(clients=2) as remote:
        yield remote


@pytest.fixture
def far(wired: RemoteServer, tmp_path: Path, report: Report) -> Iterator[Remote]:
    wired.start()
    with own_scene(wired.server.new_database("template1"), tmp_path, report) as scene:
        try:
            yield Remote(wired, scene)
        finally:
            wired.network.heal()
            wired.start()


def noticed(worker: Worker) -> float:
    """Seconds until the worker says that its connection is gone."""
    start = time.monotonic()
    worker.wait_for_log("database_unavailable connection=claim", within=NOTICED)
    return time.monotonic() - start


def go_on(far: Remote, producer: Producer, fault: str) -> None:
    """Heal, and see that everything goes on as before."""
    far.network.heal()
    far.scene.healed()
    producer.wait_for(30)
    verdict = far.scene.settle(fault)
    assert verdict.recovery < HEALED


@pytest.mark.parametrize(
    ("way", "fault"),
    [
        pytest.param("both", "network silent both ways for 10 s", marks=pytest.mark.slow),
        pytest.param("to server", "packets to the server lost for 10 s", marks=pytest.mark.slow),
        pytest.param("from server", "packets from the server lost for 10 s", marks=pytest.mark.slow),
    ],
)
def test_packets_vanish(far: Remote, way: Literal["both", "to server", "from server"], fault: str) -> None:
    worker = far.worker(0)
    producer = far.produce(0)
    producer.wait_for(60)
    start = time.monotonic()
    far.network.lose(0, way)
    noticed(worker)
    let_pass(10 - (time.monotonic() - start))
    go_on(far, producer, fault)
    assert len(complaints(worker)) <= 8, complaints(worker)


def test_packets_are_answered_with_rst(far: Remote) -> None:
    worker = far.worker(0)
    producer = far.produce(0)
    producer.wait_for(60)
    far.network.reset(0)
    noticed(worker)
    let_pass(4)
    go_on(far, producer, "packets to the server answered with RST for 4 s")
    assert len(complaints(worker)) <= 8, complaints(worker)


@pytest.mark.slow
def test_every_fifth_packet_is_lost(far: Remote) -> None:
    far.worker(0)
    producer = far.produce(0, 30)
    producer.wait_for(30)
    far.network.lose(0, "both", "-m", "statistic", "--mode", "random", "--probability", "0.2")
    let_pass(10)
    go_on(far, producer, "20 % of the packets lost for 10 s")


@pytest.mark.slow
def test_a_worker_is_cut_off_past_its_lease(far: Remote) -> None:
    """Another one takes its jobs; when it is back it finds itself fenced, and serves under a new name."""
    cut_off, other = far.worker(0), far.worker(1)
    producer = far.produce(1, 30, "long")
    producer.wait_for(40)
    far.network.lose(0, "both")
    other.wait_for_log(f"worker_fenced id={cut_off.id}")
    producer.wait_for(30)
    far.network.heal()
    far.scene.healed()
    cut_off.wait_for_log("worker_was_fenced")
    served = "select id from pgqueue.workers where not fenced and heartbeat > 0"
    eventually(lambda: len(far.scene.jobs.sql(served)) == 2, "it serves under another name")
    producer.wait_for(30)
    far.scene.settle("worker cut off past its lease")


@pytest.mark.slow
def test_the_server_restarts_while_nobody_can_hear(far: Remote) -> None:
    """The connections are half open: one end has forgotten them."""
    worker = far.worker(0)
    producer = far.produce(0)
    producer.wait_for(60)
    far.network.lose(0, "both")
    far.remote.server.kill()
    far.remote.start()
    far.network.heal()
    far.scene.healed()
    producer.wait_for(30)
    verdict = far.scene.settle("server restarted behind a silent network")
    assert verdict.recovery < HEALED
    assert len(complaints(worker)) <= 8, complaints(worker)


@contextmanager
def proxied_scene(dsn: str, folder: Path, report: Report) -> Iterator[tuple[Scene, LossyProxy]]:
    """A scene whose workers and producers reach the database through a proxy."""
    with LossyProxy(dsn) as proxy:
        through = {"dsn_of_producers": proxy.dsn, "dsn_of_workers": proxy.dsn}
        with own_scene(dsn, folder, report, **through) as scene:
            yield scene, proxy


@pytest.mark.slow
def test_far_away(fresh_dsn: str, tmp_path: Path, report: Report) -> None:
    """100 ms there and back."""
    with proxied_scene(fresh_dsn, tmp_path, report) as (scene, proxy):
        proxy.delay = 0.05
        scene.worker("-c", "2")
        pair = [scene.produce(8), scene.produce(8)]
        for producer in pair:
            producer.wait_for(20)
        verdict = scene.settle("50 ms of latency each way")
        assert verdict.duplicated == 0
        assert verdict.stale == 0


@pytest.mark.slow
def test_connections_are_cut_all_the_time(fresh_dsn: str, tmp_path: Path, report: Report) -> None:
    with proxied_scene(fresh_dsn, tmp_path, report) as (scene, proxy):
        worker = scene.worker("-c", "2")
        producer = scene.produce(60)
        producer.wait_for(30)
        cut = 0
        for _ in range(16):
            cut += proxy.cut()
            let_pass(0.3)
        assert cut >= 16
        scene.healed()
        producer.wait_for(30)
        scene.settle("every connection cut every 0.3 s for 5 s")
        assert "Traceback" not in worker.log


@pytest.mark.parametrize(
    ("nth", "mix", "what"),
    [
        pytest.param(3, "quick", "third or seventh COMMIT lost", marks=pytest.mark.slow),
        (7, "quick", "third or seventh COMMIT lost"),
        (5, "effects", "fifth COMMIT lost, transactional tasks"),
    ],
)
def test_answers_are_lost(
    fresh_dsn: str, tmp_path: Path, report: Report, nth: int, mix: str, what: str
) -> None:
    """The commit is done, and nobody hears of it: enqueues, claims, acks, heartbeats, transactional tasks."""
    with proxied_scene(fresh_dsn, tmp_path, report) as (scene, proxy):
        worker = scene.worker("-c", "2")
        producer = scene.produce(60, mix)
        producer.wait_for(20)
        proxy.lose_every = nth
        eventually(lambda: proxy.lost >= 30, "thirty answers are lost")
        if mix == "effects":  # as it happens, all of them may have been other connections'
            worker.wait_for_log("transaction_uncertain")
        proxy.lose_every = 0
        scene.healed()
        producer.wait_for(30)
        scene.settle(f"the answer of every {what}")
        assert "Traceback" not in worker.log
        assert ("transaction_uncertain" in worker.log) is (mix == "effects")
