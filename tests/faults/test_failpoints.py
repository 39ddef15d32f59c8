"""A process that dies, freezes or loses its connection at each of the places that matter, in the middle of
its work and with others beside it."""

from __future__ import annotations

import signal
from pathlib import Path

import psutil
import pytest

from pgqueue.errors import ConfigError
from pgqueue.failpoints import FAILPOINTS, read_failpoints
from tests.acceptance.workers import Worker, eventually
from tests.faults.scene import Scene

IN_PRODUCERS = ("enqueue_before_commit", "enqueue_after_commit")
IN_EXECUTORS = ("job_received", "body_before", "body_after")
IN_TRANSACTIONS = ("transaction_before_commit", "transaction_after_commit")
IN_SCHEDULERS = ("tick_before_commit", "tick_after_commit")
IN_CANVASES = ("settle_before_commit", "settle_after_commit")
ELSEWHERE = IN_PRODUCERS + IN_EXECUTORS + IN_TRANSACTIONS + IN_SCHEDULERS + IN_CANVASES
IN_SUPERVISORS = tuple(name for name in FAILPOINTS if name not in ELSEWHERE)
FROZEN_AT = ("claim_before_commit", "claim_after_commit", "ack_sent", "ack_after_commit")
WITH_CONNECTION = ("claim_before_commit", "claim_after_commit", "ack_sent", "promote_mid_batch")


def armed(place: str, action: str, folder: Path, nth: int = 20) -> dict[str, str]:
    """The environment of a process that comes to grief there, once."""
    once = folder / "once"
    once.mkdir(exist_ok=True)
    nth = 2 if place == "heartbeat_before" else nth
    return {"PGQUEUE_FAILPOINTS": f"{place}={action}@{nth}", "PGQUEUE_FAILPOINTS_ONCE": str(once)}


def happened(folder: Path) -> bool:
    return any((folder / "once").iterdir())


@pytest.mark.parametrize("place", IN_PRODUCERS)
def test_producer_dies(scene: Scene, tmp_path: Path, place: str) -> None:
    scene.worker("-c", "2")
    doomed = scene.produce(100, env=armed(place, "kill", tmp_path))
    other = scene.produce(50)
    assert doomed.process.wait(60) == -signal.SIGKILL
    other.wait_for(20)
    scene.healed()
    scene.settle(f"kill -9 of the producer at {place}")


def test_producer_freezes_in_its_transaction(scene: Scene, tmp_path: Path) -> None:
    """A frozen producer holds its row, and nobody else's."""
    scene.worker("-c", "2")
    frozen = scene.produce(100, env=armed("enqueue_before_commit", "stop", tmp_path))
    other = scene.produce(50)
    eventually(lambda: happened(tmp_path), "the producer freezes")
    other.wait_for(100)
    frozen.process.send_signal(signal.SIGCONT)
    scene.healed()
    frozen.wait_for(20)
    scene.settle("producer frozen before its COMMIT")


@pytest.mark.parametrize("place", IN_EXECUTORS)
def test_executor_dies(scene: Scene, tmp_path: Path, place: str) -> None:
    worker = scene.worker("-c", "2", env=armed(place, "kill", tmp_path))
    producer = scene.produce(100)
    eventually(lambda: happened(tmp_path), "the executor dies")
    scene.healed()
    producer.wait_for(50)
    scene.settle(f"kill -9 of the executor at {place}")
    crashed = "job_crashed" in worker.log
    assert crashed is (place != "job_received"), "only a job that had started has crashed"


@pytest.mark.parametrize("place", IN_EXECUTORS)
def test_executor_freezes(scene: Scene, tmp_path: Path, place: str) -> None:
    """In the middle of a chunk of short jobs: the others go on, and what it had not started goes to them."""
    producer = scene.produce(200, "plain")
    producer.wait_for(300)
    worker = scene.worker("-c", "2", env=armed(place, "stop", tmp_path, nth=60))
    frozen = eventually(lambda: stopped(worker), "an executor freezes")
    producer.wait_for(100)
    frozen.resume()
    scene.healed()
    scene.settle(f"executor frozen at {place}, then awake")


def stopped(worker: Worker) -> psutil.Process | None:
    return next((each for each in worker.executors if each.status() == psutil.STATUS_STOPPED), None)


@pytest.mark.parametrize("place", IN_SUPERVISORS)
def test_supervisor_dies(scene: Scene, tmp_path: Path, place: str) -> None:
    if place == "rescue_mid_batch":
        victim = scene.worker("-c", "1")
    doomed = scene.worker("-c", "2", env=armed(place, "kill", tmp_path, nth=1 if "rescue" in place else 20))
    producer = scene.produce(50)
    producer.wait_for(20)
    if place == "rescue_mid_batch":
        victim.kill()
    assert doomed.wait() == -signal.SIGKILL
    scene.healed()
    scene.worker("-c", "2")
    producer.wait_for(20)
    scene.settle(f"kill -9 of the worker at {place}")


@pytest.mark.parametrize(
    "place",
    [
        "ack_sent",
        *(
            pytest.param(place, marks=pytest.mark.slow)
            for place in ("claim_before_commit", "claim_after_commit", "ack_after_commit")
        ),
    ],
)
def test_supervisor_freezes(scene: Scene, tmp_path: Path, place: str) -> None:
    frozen = scene.worker("-c", "2", env=armed(place, "stop", tmp_path))
    scene.worker("-c", "2")
    producer = scene.produce(50)
    eventually(lambda: scene.jobs.sql("select id from pgqueue.workers where fenced"), "it is fenced")
    producer.wait_for(20)
    frozen.send(signal.SIGCONT)
    scene.healed()
    frozen.wait_for_log("worker_was_fenced")
    scene.settle(f"worker frozen at {place} past its lease, then awake")


@pytest.mark.parametrize("place", WITH_CONNECTION)
def test_supervisor_loses_its_connection(scene: Scene, tmp_path: Path, place: str) -> None:
    worker = scene.worker("-c", "2", env={"PGQUEUE_FAILPOINTS": f"{place}=drop_connection~0.1"})
    producer = scene.produce(100)
    producer.wait_for(300)
    scene.healed()
    verdict = scene.settle(f"connection lost at {place}, in one of ten times")
    assert "database_unavailable" in worker.log
    assert verdict.duplicated == 0


@pytest.mark.parametrize(
    "text",
    [
        "claim_after_commit",
        "claim_after_commit=explode",
        "claim_after_commit=sleep",
        "claim_after_commit=kill:3",
        "claim_after_comit=kill",
        "body_after=drop_connection",
    ],
)
def test_a_misspelt_failpoint_is_an_error(text: str) -> None:
    with pytest.raises(ConfigError, match="failpoint"):
        read_failpoints(text)


def test_a_worker_with_a_misspelt_failpoint_does_not_start(scene: Scene) -> None:
    done = scene.workers.run("-A", "any:app", "worker", env={"PGQUEUE_FAILPOINTS": "nonsense"})
    assert done.returncode != 0
    assert "a failpoint is name=action" in done.stderr
