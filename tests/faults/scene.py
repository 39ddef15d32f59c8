"""One scene of the fault suite: a queue under load, something that goes wrong, and the verdict."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

import psycopg
import pytest

from pgqueue.database.migrate import upgrade
from tests.acceptance.workers import PACKAGE, Jobs, Ledger, Worker, Workers, eventually
from tests.faults.oracle import SET_UP, Verdict, drained, judge, read_lines
from tests.faults.report import Report

APPS = Path(__file__).with_name("apps")
PRODUCER = Path(__file__).with_name("producer.py")

BRISK = ("--heartbeat", "0.5", "--lease", "3")
"""Flags of workers in most scenes: the rules are the same, the waiting is shorter."""


class Producer:
    """A process that enqueues at a steady rate; see producer.py."""

    def __init__(self, process: subprocess.Popen[bytes], log: Path) -> None:
        self.process = process
        self.log = log

    def count(self, event: str = "acked") -> int:
        return sum(line[0] == event for line in read_lines(self.log))

    def wait_for(self, acked: int) -> None:
        """Until so many more enqueues have been acknowledged."""
        wanted = self.count() + acked

        def look() -> bool:
            assert self.process.poll() is None, "the producer has ended"
            return self.count() >= wanted

        eventually(look, f"{wanted} acknowledged enqueues", 100)

    def stop(self) -> None:
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGCONT)
            eventually(self.log.exists, "the producer has come up", 60)
            self.process.terminate()
        assert self.process.wait(60) == 0, "the producer failed"

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()


class Scene:
    """A queue of its own with producers and workers.

    Args:
        dsn: An empty database of this scene's own; what the oracle needs is put into it.
        folder: For logs.
        dsn_of_producers, dsn_of_workers: Where they find the database, if by another way (a proxy, say).
    """

    def __init__(
        self,
        dsn: str,
        folder: Path,
        report: Report,
        *,
        dsn_of_producers: str | None = None,
        dsn_of_workers: str | None = None,
    ) -> None:
        self.dsn = dsn
        self._dsn_of_producers = dsn_of_producers or dsn
        self._folder = folder
        self._report = report
        self._producers: list[Producer] = []
        self._ended = 0.0
        self.workers = Workers(dsn_of_workers or dsn, folder, APPS)
        self.jobs = Jobs(dsn)
        upgrade(dsn)
        with psycopg.connect(dsn, autocommit=True) as connection:
            connection.execute(SET_UP.encode())

    @property
    def database(self) -> str:
        """The name of its database."""
        return urlsplit(self.dsn).path.removeprefix("/")

    @property
    def ledger(self) -> Ledger:
        return self.workers.ledger

    def worker(self, *flags: str, **options: object) -> Worker:
        """Start a worker of the queue `default`."""
        return self.workers.start(*BRISK, *flags, app="faults_app:app", **options)  # type: ignore[arg-type]

    def produce(self, rate: float = 100, mix: str = "quick", env: dict[str, str] | None = None) -> Producer:
        """Start a producer of so many jobs a second."""
        number = len(self._producers) + 1
        log = self._folder / f"producer-{number}.jsonl"
        given = {"PGQUEUE_DSN": self._dsn_of_producers, **(env or {})}
        given["PYTHONPATH"] = os.pathsep.join([str(PACKAGE), str(APPS)])
        process = subprocess.Popen(
            [sys.executable, str(PRODUCER), str(log), str(rate), f"p{number}", mix],
            env=self.workers.environment(**given),
            cwd=APPS,
            start_new_session=True,
        )
        producer = Producer(process, log)
        self._producers.append(producer)
        return producer

    def healed(self) -> None:
        """The fault is over: recovery counts from here."""
        self._ended = time.monotonic()

    def settle(self, fault: str, within: float = 60) -> Verdict:
        """Stop the producers, wait for the queue to drain, stop the workers, and judge.

        Args:
            fault: Name of the row in the report.
            within: Seconds until everything must have ended.
        """
        ended = self._ended or time.monotonic()
        # Recovered: what was waiting or running when the fault ended, has ended.
        self._wait_for_recovery(within)
        recovery = time.monotonic() - ended
        for producer in self._producers:
            if producer.process.poll() is None:
                producer.stop()
        in_time = drained(self.dsn, max(within - recovery, 10))
        for worker in self.workers.started:
            if worker.process.poll() is None:
                worker.send(signal.SIGCONT)
                worker.send(signal.SIGTERM)
        for worker in self.workers.started:
            worker.wait()
        verdict = judge(self.dsn, [producer.log for producer in self._producers], self.ledger.path)
        verdict.recovery = recovery
        logs = "".join(worker.log for worker in self.workers.started)
        verdict.stale = sum(int(count) for count in re.findall(r"ack_stale count=(\d+)", logs))
        if not in_time:
            verdict.broken.append(f"8: not drained within {within:g} s: {self.jobs.sql(_LEFT)}")
        self._report.add(fault, verdict)
        if verdict.broken:
            shown = "\n  ".join(verdict.broken[:20])
            pytest.fail(
                f"{fault}: {len(verdict.broken)} things are wrong, {verdict.lost} jobs lost:\n  {shown}",
                pytrace=False,
            )
        return verdict

    def close(self) -> None:
        for producer in self._producers:
            if producer.process.poll() is None:
                producer.process.send_signal(signal.SIGCONT)
                producer.kill()
        self.jobs.close()
        self.workers.close()

    def _wait_for_recovery(self, within: float) -> None:
        query = "select coalesce(max(position), 0) as mark from pgqueue.jobs"
        mark = self.jobs.sql(query)[0]["mark"]
        deadline = time.monotonic() + within
        while time.monotonic() < deadline:
            if not self.jobs.sql(_OLDER, mark)[0]["some"]:
                return
            time.sleep(0.02)


_OLDER = "select exists (select from pgqueue.jobs where position <= %s and state <> 'scheduled') as some"
_LEFT = "select state, task, attempt, worker_id, count(*) from pgqueue.jobs group by 1, 2, 3, 4 limit 10"


@contextlib.contextmanager
def own_scene(dsn: str, folder: Path, report: Report, **options: str) -> Iterator[Scene]:
    """A scene, and nothing of it left afterwards."""
    folder.mkdir(parents=True, exist_ok=True)
    scene = Scene(dsn, folder, report, **options)
    try:
        yield scene
    finally:
        scene.close()
