"""Processes that die or freeze under load: executors, fork servers, supervisors, producers."""

from __future__ import annotations

import random
import signal

from tests.acceptance.workers import eventually
from tests.faults.scene import Scene


def test_quiet(scene: Scene) -> None:
    """Nothing goes wrong: the measure of the others."""
    scene.worker("-c", "2")
    producer = scene.produce(200)
    producer.wait_for(400)
    verdict = scene.settle("none")
    assert verdict.jobs >= 400
    assert verdict.duplicated == 0
    assert verdict.stale == 0


def test_executors_killed(scene: Scene) -> None:
    worker = scene.worker("-c", "2", "--max-crashes", "50")
    producer = scene.produce(200)
    draw = random.Random(3)
    for _ in range(15):
        producer.wait_for(20)
        crew = worker.executors
        if crew:
            draw.choice(crew).kill()
    scene.healed()
    verdict = scene.settle("executor killed, 15 times")
    assert verdict.jobs >= 300


def test_supervisor_killed(scene: Scene) -> None:
    doomed = scene.worker("-c", "2")
    scene.worker("-c", "1")
    producer = scene.produce(30, "long")
    producer.wait_for(40)
    doomed.kill()
    scene.healed()
    producer.wait_for(20)
    scene.settle("worker killed, all its processes")


def test_supervisor_frozen_past_its_lease(scene: Scene) -> None:
    frozen = scene.worker("-c", "2")
    scene.worker("-c", "1")
    producer = scene.produce(30, "long")
    producer.wait_for(40)
    holds = f"select id::text from pgqueue.jobs where state = 'running' and worker_id = '{frozen.id}'"

    def freeze() -> bool:
        frozen.send(signal.SIGSTOP)
        held = [row["id"] for row in scene.jobs.sql(holds)]
        # A claim whose answer has not been read is held too, but it is dropped on waking, not acked.
        # And of a run that has ended the ack may be on its way.
        runs = [run for job in held if not scene.ledger.of(job, "end") for run in scene.ledger.of(job)]
        if any(run["worker"] == frozen.id for run in runs):
            return True
        frozen.send(signal.SIGCONT)
        return False

    eventually(freeze, "it freezes while it runs a job")
    fenced = "select id from pgqueue.workers where fenced"
    eventually(lambda: scene.jobs.sql(fenced), "the frozen worker is fenced")
    producer.wait_for(40)
    frozen.send(signal.SIGCONT)
    scene.healed()
    frozen.wait_for_log("worker_was_fenced")
    verdict = scene.settle("worker frozen past its lease, then awake")
    assert verdict.stale > 0, "it ran jobs when it froze: their acks must have been refused"


def test_fork_server_killed(scene: Scene) -> None:
    worker = scene.worker("-c", "2")
    producer = scene.produce(200)
    producer.wait_for(100)
    worker.fork_server.kill()
    scene.healed()
    producer.wait_for(100)
    scene.settle("fork server killed")


def test_producer_killed(scene: Scene) -> None:
    scene.worker("-c", "2")
    for _ in range(3):
        producer = scene.produce(200)
        producer.wait_for(50)
        producer.kill()
    scene.healed()
    scene.settle("producer killed")
