"""LISTEN and NOTIFY in trouble: a full queue, a held lock, dead and frozen listeners.

Notifications are hints: without them everything goes on, later at most by a poll.
"""

from __future__ import annotations

import contextlib
import re
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import psycopg
import pytest

from pgqueue.worker.maintenance import NOTIFY_WITHIN
from tests.acceptance.workers import Worker, eventually
from tests.faults.oracle import read_lines
from tests.faults.report import Report
from tests.faults.scene import Producer, Scene, own_scene
from tests.servers import MAJOR, Server, own_server

POLLED = 6.0
"""Seconds until an idle worker has found a job by itself: it looks every five."""


def let_pass(seconds: float) -> None:
    """For how long a fault lasts."""
    time.sleep(seconds)


SMALL_QUEUE = {"max_notify_queue_pages": "64"} if MAJOR >= 17 else {}
can_be_filled = pytest.mark.skipif(not SMALL_QUEUE, reason="before PostgreSQL 17 that takes 8 GB")


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    settings = {"synchronous_standby_names": "nobody", "synchronous_commit": "local"}
    with own_server(SMALL_QUEUE | settings) as server:
        yield server


@pytest.fixture
def scene(server: Server, tmp_path: Path, report: Report) -> Iterator[Scene]:
    with own_scene(server.new_database("template1"), tmp_path, report) as scene:
        yield scene


@contextlib.contextmanager
def notify_lock_held(scene: Scene) -> Iterator[None]:
    """A session that has notified waits in COMMIT for a standby that does not come.

    In the whole cluster no transaction that notifies can commit meanwhile.
    """
    with psycopg.connect(scene.dsn, application_name="holder") as holder:
        holder.execute("set synchronous_commit = on")
        holder.execute("select pg_logical_emit_message(true, 'holder', '')")
        holder.execute("notify something_else")
        holder.pgconn.send_query(b"commit")
        waiting = (
            "select pid from pg_stat_activity where application_name = 'holder' and wait_event = 'SyncRep'"
        )
        eventually(lambda: scene.jobs.sql(waiting), "it waits, holding the lock")
        try:
            yield
        finally:
            holder.cancel_safe()
            while holder.pgconn.get_result() is not None:
                pass


def waiters(scene: Scene, longer_than: float = 0.0) -> int:
    """Sessions that have waited for the lock of NOTIFY for so many seconds."""
    query = (
        "select count(*) as n from pg_locks where not granted and locktype = 'object'"
        " and classid = 'pg_database'::regclass and objid = 0"
        " and coalesce(waitstart, now()) <= clock_timestamp() - %s * interval '1 second'"
    )
    return int(scene.jobs.sql(query, longer_than)[0]["n"])


def usage(scene: Scene) -> float:
    return float(scene.jobs.sql("select pg_notification_queue_usage() as part")[0]["part"])


def fill_notify_queue(scene: Scene, until: float) -> None:
    """Notify the workers until so much of the server's queue is in use; 1: until it refuses."""
    with psycopg.connect(scene.dsn, autocommit=True) as connection:
        for size in (7000, 1):
            with contextlib.suppress(psycopg.errors.ProgramLimitExceeded):
                for number in range(20_000):
                    connection.execute("select pg_notify('pgqueue', %s)", [f"{number:0{size}}"])
                    if number % 5 == 0 and usage(scene) >= until:
                        return
                pytest.fail(f"the queue is not full: {usage(scene)}")


def complaints(producer: Producer) -> list[str]:
    """Enqueues that were refused."""
    return [line[3] for line in read_lines(producer.log) if line[0] in ("failed", "uncertain")]


def seconds_to_start(scene: Scene, label: str) -> float:
    """How long a job takes to be started in an idle queue."""
    call = "select pgqueue.enqueue('faults_app.work', jsonb_build_array(%s::text))"
    producer = psycopg.connect(scene.dsn, autocommit=True)
    with producer:
        start = time.monotonic()
        producer.execute(call, [label])
        eventually(lambda: label in scene.ledger.labels(), f"{label} is started")
        return time.monotonic() - start


def ready_to_be_woken(scene: Scene, worker: Worker) -> None:
    """Until the worker is asleep and wants a notification."""
    worker.full_crew()
    armed = "select queue from pgqueue.wake where wake_until > clock_timestamp()"
    eventually(lambda: scene.jobs.sql(armed), "the wake hint is armed")


@can_be_filled
@pytest.mark.slow
def test_the_queue_is_full(scene: Scene) -> None:
    """A session that listens and leaves its transaction open keeps the server from forgetting anything."""
    worker = scene.worker("-c", "2")
    with psycopg.connect(scene.dsn, autocommit=True) as lazy:
        lazy.execute("listen pgqueue")
        lazy.execute("begin")
        lazy.execute("select 1")
        fill_notify_queue(scene, 1)
        producer = scene.produce(60)
        producer.wait_for(60)
        worker.wait_for_log("notify_queue_filling usage=(0.9|1)")
        ended = scene.ledger.count("end")
        eventually(lambda: scene.ledger.count("end") >= ended + 30, "jobs run")
        assert complaints(producer) == []
        producer.stop()
        eventually(lambda: not scene.jobs.sql("select id from pgqueue.jobs"), "the queue is empty")
        scene.jobs.sql("delete from pgqueue.wake")
        ready_to_be_woken(scene, worker)
    scene.healed()
    # Nobody needs to be told that the session is gone: the worker asks every ten seconds.
    eventually(lambda: usage(scene) < 0.1, "the server has forgotten what everybody has read")
    scene.settle("server's notification queue full")


@can_be_filled
@pytest.mark.slow
def test_the_queue_was_full_and_wakes_again(scene: Scene) -> None:
    worker = scene.worker("-c", "2")
    ready_to_be_woken(scene, worker)
    with psycopg.connect(scene.dsn, autocommit=True) as lazy:
        lazy.execute("listen pgqueue")
        lazy.execute("begin")
        lazy.execute("select 1")
        fill_notify_queue(scene, 0.6)
        assert seconds_to_start(scene, "polled") < POLLED
    eventually(lambda: usage(scene) < 0.1, "the server has forgotten what everybody has read")
    waits = [seconds_to_start(scene, f"woken {number}") for number in range(5)]
    assert sorted(waits)[2] < 0.5, "it is woken, not found by a look every five seconds"


@pytest.mark.slow
def test_the_lock_of_notify_is_held_and_nobody_sleeps(scene: Scene) -> None:
    """Claims, acks, heartbeats and enqueues that need not wake anybody do not come by it."""
    worker = scene.worker("-c", "2", "--no-listen", "--poll-interval", "0.2")
    producer = scene.produce(60, "long")
    producer.wait_for(60)
    quiet = slowest(producer, 0)
    beats = "select heartbeat as n from pgqueue.workers"
    with notify_lock_held(scene):
        known, beat = len(seconds(producer)), scene.jobs.sql(beats)[0]["n"]
        ended = scene.ledger.count("end")
        for _ in range(5):
            producer.wait_for(60)
            assert waiters(scene, NOTIFY_WITHIN + 0.2) == 0
        assert scene.jobs.sql(beats)[0]["n"] >= beat + 5
        assert scene.ledger.count("end") > ended + 150
        held = slowest(producer, known)
    scene.healed()
    assert held < max(0.05, 5 * quiet), (held, quiet)
    assert complaints(producer) == []
    scene.settle("lock of NOTIFY held for 5 s, workers that poll")
    assert "database_unavailable" not in worker.log


def test_the_lock_of_notify_is_held_and_somebody_sleeps(scene: Scene) -> None:
    """Whoever notifies waits for it, but loses nothing; all goes on when it is free."""
    worker = scene.worker("-c", "2")
    ready_to_be_woken(scene, worker)
    with notify_lock_held(scene):
        producer = scene.produce(60)
        eventually(lambda: waiters(scene) > 0, "an enqueue waits")
        let_pass(3)
    scene.healed()
    producer.wait_for(60)
    scene.settle("lock of NOTIFY held for 3 s, a worker asleep")


def test_enqueues_go_on_while_others_wait_for_the_lock_of_notify(scene: Scene) -> None:
    worker = scene.worker("-c", "2")
    ready_to_be_woken(scene, worker)
    with notify_lock_held(scene):
        scene.produce(60)
        eventually(lambda: waiters(scene) > 0, "an enqueue waits")
        let_pass(0.5)
        producer = scene.produce(60)
        eventually(lambda: producer.count() >= 60, "others go on without notifying", 8)
        eventually(lambda: scene.ledger.count("end") >= 30, "their jobs are found all the same", 8)
    scene.healed()
    assert complaints(producer) == []
    scene.settle("lock of NOTIFY held and waited for, a worker asleep")


@pytest.mark.slow
def test_the_lock_of_notify_is_held_when_jobs_fall_due(scene: Scene) -> None:
    """The notification of a promotion is refused: that costs nothing but the notification."""
    worker = scene.worker("-c", "4")
    later = (
        "select pgqueue.enqueue('faults_app.work', jsonb_build_array(%s::text), eta => now() + %s::interval)"
    )
    ready_to_be_woken(scene, worker)
    scene.jobs.sql(later, "first", "5 s")
    # It has heard of it, and will be there in time.
    known = "select queue from pgqueue.wake where next_eta < 'infinity'"
    eventually(lambda: scene.jobs.sql(known), "the worker knows when the job is due")
    with notify_lock_held(scene):
        eventually(lambda: "first" in scene.ledger.labels(), "the job runs")
        let_pass(3)  # a worker waits two seconds for a lock
    scene.jobs.sql(later, "second", "1 s")
    eventually(lambda: "second" in scene.ledger.labels(), "so does the next one", 15)
    assert len(re.findall("WARNING", worker.log)) <= 2


@can_be_filled
@pytest.mark.slow
def test_a_frozen_worker_does_not_fill_the_queue(scene: Scene) -> None:
    """It reads nothing; the others' notifications pile up behind it, and stop before they hurt anybody."""
    frozen = scene.worker("-c", "1")
    other = scene.worker("-c", "1")
    frozen.send(signal.SIGSTOP)
    fill_notify_queue(scene, 0.55)
    before = usage(scene)
    producer = scene.produce(60)
    producer.wait_for(120)
    assert usage(scene) <= before + 0.05
    assert complaints(producer) == []
    other.wait_for_log(f"worker_fenced id={frozen.id}")
    frozen.send(signal.SIGCONT)
    scene.healed()
    eventually(lambda: usage(scene) < 0.1, "it has caught up")
    producer.wait_for(60)
    scene.settle("notifications piled up behind a frozen worker")


@pytest.mark.slow
def test_the_listening_connection_is_killed_all_the_time(scene: Scene) -> None:
    worker = scene.worker("-c", "2")
    producer = scene.produce(60)
    producer.wait_for(30)
    killed = 0
    end = time.monotonic() + 5
    while time.monotonic() < end:
        killed += len(
            scene.jobs.sql(
                "select pg_terminate_backend(pid) from pg_stat_activity"
                " where datname = current_database() and application_name = 'pgqueue listen'"
            )
        )
        let_pass(0.2)
    assert killed >= 5
    scene.healed()
    assert complaints(producer) == []
    producer.stop()
    eventually(lambda: not scene.jobs.sql("select id from pgqueue.jobs"), "the queue is empty")
    waits = []
    for number in range(5):
        ready_to_be_woken(scene, worker)
        with psycopg.connect(scene.dsn, autocommit=True) as connection:
            start = time.monotonic()
            label = f"after-{number}"
            connection.execute(
                "select pgqueue.enqueue('faults_app.work', jsonb_build_array(%s::text))", [label]
            )
        eventually(lambda of=label: of in scene.ledger.labels(), f"{label} is started")  # type: ignore[misc]
        waits.append(time.monotonic() - start)
    assert sorted(waits)[2] < 0.5, f"it listens again: {waits}"


def seconds(producer: Producer) -> list[float]:
    """How long each acknowledged enqueue took, in order."""
    return [line[2] for line in read_lines(producer.log) if line[0] == "acked"]


def slowest(producer: Producer, known: int) -> float:
    """What 99 of 100 enqueues took at most, of those after the first so many."""
    ordered = sorted(seconds(producer)[known:])
    assert ordered, "nothing was enqueued"
    return ordered[min(int(len(ordered) * 0.99), len(ordered) - 1)]
