"""Transactional tasks: one effect per job, whatever dies, freezes or is cut off in the middle of it."""

from __future__ import annotations

import signal
from pathlib import Path

import psutil
import pytest

from tests.acceptance.workers import eventually
from tests.faults.scene import Scene
from tests.faults.test_failpoints import (
    IN_EXECUTORS,
    IN_SUPERVISORS,
    IN_TRANSACTIONS,
    armed,
    happened,
    stopped,
)

QUICK = ("claim_after_commit", "heartbeat_before")
SLOW = tuple(place for place in IN_SUPERVISORS if place not in QUICK)


@pytest.mark.parametrize("place", IN_EXECUTORS + IN_TRANSACTIONS)
def test_executor_dies(scene: Scene, tmp_path: Path, place: str) -> None:
    worker = scene.worker("-c", "2", env=armed(place, "kill", tmp_path))
    producer = scene.produce(100, "effects")
    eventually(lambda: happened(tmp_path), "the executor dies")
    scene.healed()
    producer.wait_for(50)
    scene.settle(f"kill -9 of the executor at {place}, transactional tasks")
    assert ("ack_stale" in worker.log) is (place == "transaction_after_commit"), "its job had ended"


@pytest.mark.parametrize("place", [*QUICK, *(pytest.param(place, marks=pytest.mark.slow) for place in SLOW)])
def test_worker_dies(scene: Scene, tmp_path: Path, place: str) -> None:
    victim = scene.worker("-c", "1") if place == "rescue_mid_batch" else None
    doomed = scene.worker("-c", "2", env=armed(place, "kill", tmp_path, nth=1 if victim else 20))
    producer = scene.produce(100, "mixed")
    if victim is not None:
        producer.wait_for(20)
        victim.kill()
    assert doomed.wait(90) == -signal.SIGKILL
    scene.healed()
    scene.worker("-c", "2")
    producer.wait_for(50)
    scene.settle(f"kill -9 of the worker at {place}, transactional tasks")


@pytest.mark.parametrize("place", IN_TRANSACTIONS)
@pytest.mark.parametrize(
    ("action", "what"), [("drop_connection", "connection lost"), ("raise", "error raised")]
)
def test_something_happens_at_the_commit(scene: Scene, place: str, action: str, what: str) -> None:
    worker = scene.worker("-c", "2", env={"PGQUEUE_FAILPOINTS": f"{place}={action}~0.1"})
    producer = scene.produce(100, "effects")
    producer.wait_for(300)
    scene.healed()
    scene.settle(f"{what} at {place}, in one of ten times")
    assert "Traceback" not in worker.log
    if action == "drop_connection":
        assert ("transaction_uncertain" in worker.log) is (place == "transaction_before_commit")


@pytest.mark.parametrize("place", ["body_after", *IN_TRANSACTIONS])
def test_worker_freezes_past_its_lease(scene: Scene, tmp_path: Path, place: str) -> None:
    """The zombie wakes up when others have run its job, or waits with the job's row in its hands."""
    frozen = scene.worker("-c", "1", env=armed(place, "stop", tmp_path))
    producer = scene.produce(50, "effects")
    executor = eventually(lambda: stopped(frozen), "its executor freezes")
    frozen.send(signal.SIGSTOP)
    scene.worker("-c", "2")
    eventually(lambda: scene.jobs.sql("select id from pgqueue.workers where fenced"), "it is fenced")
    producer.wait_for(50)
    frozen.send(signal.SIGCONT)
    executor.resume()
    scene.healed()
    frozen.wait_for_log("worker_was_fenced")
    scene.settle(f"worker frozen at {place} past its lease, then awake")


def test_server_ends_the_transactions(scene: Scene) -> None:
    """Somebody terminates them, again and again."""
    scene.worker("-c", "2", "--max-crashes", "50")
    producer = scene.produce(100, "effects")
    ended = 0
    while ended < 30:
        producer.wait_for(5)
        rows = scene.jobs.sql(
            "select pg_terminate_backend(pid) from pg_stat_activity "
            "where datname = current_database() and application_name = 'pgqueue transaction'"
        )
        ended += len(rows)
    scene.healed()
    producer.wait_for(30)
    scene.settle("transactions of tasks terminated, 30 times")


@pytest.mark.slow
def test_executors_killed(scene: Scene) -> None:
    worker = scene.worker("-c", "2", "--max-crashes", "50")
    producer = scene.produce(150, "effects")
    for n in range(15):
        producer.wait_for(20)
        crew: list[psutil.Process] = worker.executors
        if crew:
            crew[n % len(crew)].kill()
    scene.healed()
    scene.settle("executor killed, 15 times, transactional tasks")


def test_without_the_transaction_the_oracle_finds_two_effects(scene: Scene, tmp_path: Path) -> None:
    """What people write without: shows that the judge would see it."""
    scene.worker("-c", "2", env=armed("body_after", "kill", tmp_path))
    producer = scene.produce(100, "careless")
    eventually(lambda: happened(tmp_path), "the executor dies")
    producer.wait_for(50)
    with pytest.raises(pytest.fail.Exception, match=r"1 things are wrong, 0 jobs lost:\n  4: .* \[1, 2\]"):
        scene.settle("an effect of its own before the ack")
