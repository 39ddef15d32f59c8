"""Something goes wrong all the time: acts drawn at random, each from a seed that repeats the draw (not the
timing: processes have their own)."""

from __future__ import annotations

import contextlib
import random
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import psutil
import psycopg

from tests.acceptance.workers import Worker
from tests.faults.scene import Producer, Scene
from tests.servers import Server

FAILPOINTS = ",".join(
    f"{place}={action}~{chance}"
    for place, action, chance in [
        ("claim_before_commit", "drop_connection", 0.001),
        ("claim_after_commit", "kill", 0.0003),
        ("ack_sent", "drop_connection", 0.001),
        ("ack_after_commit", "kill", 0.0003),
        ("body_after", "kill", 0.0005),
        ("transaction_before_commit", "drop_connection", 0.002),
        ("transaction_after_commit", "kill", 0.001),
        ("job_received", "kill", 0.0003),
        ("promote_mid_batch", "drop_connection", 0.002),
    ]
)
"""What workers come to grief by on their own."""


class Nemesis:
    """Acts on a scene until told to stop, and puts back in order what it broke.

    Args:
        workers: How many to keep alive.
        rate: Jobs a second, over all producers.
    """

    def __init__(self, scene: Scene, server: Server, folder: Path, seed: int, *, workers: int, rate: float):
        self._scene = scene
        self._server = server
        self._folder = folder
        self._draw = random.Random(seed)
        self._wanted = workers
        self._rate = rate
        self._workers: list[Worker] = []
        self._producers: list[Producer] = []
        self.done: Counter[str] = Counter()

    def run(self, seconds: float) -> None:
        """Act for so long, then heal everything."""
        acts: list[tuple[int, Callable[[], None]]] = [
            (6, self.kill_an_executor),
            (3, self.kill_a_worker),
            (3, self.freeze_a_worker),
            (3, self.stop_a_worker),
            (2, self.kill_a_fork_server),
            (2, self.kill_a_producer),
            (4, self.terminate_sessions),
            (2, self.freeze_a_server_process),
            (2, self.hold_locks),
            (1, self.restart_the_database),
            (1, self.crash_the_database),
        ]
        weights = [weight for weight, _ in acts]
        end = time.monotonic() + seconds
        self.man()
        while time.monotonic() < end:
            ((_, act),) = self._draw.choices(acts, weights)
            # Whom it would strike may have fallen already.
            with contextlib.suppress(psutil.NoSuchProcess, psycopg.OperationalError, StopIteration):
                act()
                self.done[act.__name__] += 1
            time.sleep(self._draw.uniform(0.1, 1.5))
            self.man()
        self._server.start()
        for worker in self._workers:
            if worker.process.poll() is None:
                worker.send(signal.SIGCONT)
        self.man()

    def man(self) -> None:
        """Replace the fallen."""
        self._workers = [worker for worker in self._workers if worker.process.poll() is None]
        while len(self._workers) < self._wanted:
            env = {"PGQUEUE_FAILPOINTS": FAILPOINTS}
            flags = ("-c", "2", "--max-crashes", "1000")
            self._workers.append(self._scene.worker(*flags, env=env, ready=False))
        self._producers = [each for each in self._producers if each.process.poll() is None]
        while len(self._producers) < 2:
            self._producers.append(self._scene.produce(self._rate / 2, "mixed"))

    def kill_an_executor(self) -> None:
        crew = self._draw.choice(self._workers).executors
        if crew:
            self._draw.choice(crew).kill()

    def kill_a_worker(self) -> None:
        self._draw.choice(self._workers).kill()

    def stop_a_worker(self) -> None:
        self._draw.choice(self._workers).send(signal.SIGTERM)

    def freeze_a_worker(self) -> None:
        worker = self._draw.choice(self._workers)
        worker.send(signal.SIGSTOP)
        self._later(self._draw.choice((0.5, 2, 6)), lambda: worker.send(signal.SIGCONT))

    def kill_a_fork_server(self) -> None:
        self._draw.choice(self._workers).fork_server.kill()

    def kill_a_producer(self) -> None:
        self._draw.choice(self._producers).kill()

    def terminate_sessions(self) -> None:
        with self._server.connect() as connection:
            connection.execute(
                "select pg_terminate_backend(pid) from pg_stat_activity where datname = %s and random() < %s",
                [self._scene.database, self._draw.choice((0.2, 1.0))],
            )

    def freeze_a_server_process(self) -> None:
        with self._server.connect() as connection:
            query = "select pid from pg_stat_activity where datname = %s order by random() limit 1"
            row = connection.execute(query, [self._scene.database]).fetchone()
        if row is not None:
            process = psutil.Process(row[0])
            process.suspend()
            self._later(self._draw.choice((0.2, 1, 3)), process.resume)

    def hold_locks(self) -> None:
        with psycopg.connect(self._scene.dsn) as connection:
            connection.execute("set lock_timeout = '500ms'")
            for table in ("workers", "wake"):
                connection.execute(f"select from pgqueue.{table} for update".encode())
            connection.execute("select from pgqueue.jobs order by random() limit 100 for update")
            time.sleep(self._draw.uniform(0.1, 2))

    def restart_the_database(self) -> None:
        self._server.stop(signal.SIGINT)
        time.sleep(self._draw.uniform(0, 2))
        self._server.start()

    def crash_the_database(self) -> None:
        self._server.kill()
        time.sleep(self._draw.uniform(0, 3))
        self._server.start()

    def _later(self, seconds: float, act: Callable[[], None]) -> None:
        def guarded() -> None:
            with contextlib.suppress(psutil.NoSuchProcess, ProcessLookupError):
                act()

        timer = threading.Timer(seconds, guarded)
        timer.daemon = True
        timer.start()
