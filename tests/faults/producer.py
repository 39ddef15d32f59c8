"""A process that enqueues at a steady rate until SIGTERM, and writes down what it attempts, what was
acknowledged and how long each took: `python producer.py LOG RATE PREFIX [MIX]`.

Ways of enqueueing, in turn: `delay` on its own connection, `.on()` in a transaction that also inserts an
order, the same rolled back, in bulk, for later, and with a job id of its own, repeated until it is certain.
Each line of the log is `[event, label, seconds, text]`; a label is unique, and the job's first argument.
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import time
import uuid
from collections.abc import Callable
from typing import Any

import psycopg
from faults_app import acharge, app, charge, charge_carelessly, work

from pgqueue import Task
from pgqueue.errors import DatabaseError, EnqueueUncertain, PgQueueError

MIXES = {
    "quick": {"seconds": (0.0, 0.002), "hiccup": 0.02, "hopeless": 0.01},
    "long": {"seconds": (0.0, 0.1), "hiccup": 0.02, "hopeless": 0.01},
    "plain": {"seconds": (0.0, 0.0), "hiccup": 0.0, "hopeless": 0.0},
}
MIXES["mixed"] = MIXES["effects"] = MIXES["careless"] = MIXES["quick"]

TASKS: dict[str, list[Task[..., str]]] = {
    "mixed": [work, work, work, charge, work, work, work, acharge],
    "effects": [charge, acharge],
    "careless": [charge_carelessly],
}
"""What is enqueued in turn; by default `work`."""


class Producer:
    def __init__(self, log: str, prefix: str, mix: str) -> None:
        self._log = os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        self._prefix = prefix
        self._mix = MIXES[mix]
        self._tasks = TASKS.get(mix, [work])
        self._random = random.Random(prefix)
        self._number = 0
        self._connection: psycopg.Connection | None = None
        self.stopping = False

    def note(self, event: str, label: str, seconds: float = 0.0, text: str = "") -> None:
        os.write(self._log, (json.dumps([event, label, round(seconds, 6), text]) + "\n").encode())

    def arguments(self) -> tuple[str, dict[str, Any]]:
        """A fresh label, and what its job shall do."""
        self._number += 1
        draw, mix = self._random, self._mix
        kwargs: dict[str, Any] = {"seconds": round(draw.uniform(*mix["seconds"]), 4)}
        chance = draw.random()
        if chance < mix["hiccup"]:
            kwargs["hiccups"] = 1
        elif chance < mix["hiccup"] + mix["hopeless"]:
            kwargs["hopeless"] = True
        return f"{self._prefix}-{self._number}", kwargs

    @property
    def task(self) -> Task[..., str]:
        """Whose turn it is."""
        return self._tasks[self._number % len(self._tasks)]

    def run(self, rate: float) -> None:
        ways: list[Callable[[], None]] = [self.delay, self.on, self.delay, self.many, self.later, self.own_id]
        ways += [self.on, self.delay, self.rolled_back, self.delay]
        due = time.monotonic()
        while not self.stopping:
            before = self._number
            ways[self._random.randrange(len(ways))]()
            due = max(due + (self._number - before) / rate, time.monotonic() - 0.5)
            time.sleep(max(due - time.monotonic(), 0.0))
        app.close()
        if self._connection is not None:
            self._connection.close()

    def timed(self, labels: list[str], act: Callable[[], object]) -> None:
        """Do it; acknowledged, uncertain or failed, it is written down."""
        for label in labels:
            self.note("attempt", label)
        start = time.perf_counter()
        try:
            act()
        except EnqueueUncertain as error:
            event, text = "uncertain", str(error)
        except (PgQueueError, psycopg.Error) as error:
            # Whether it took effect is known only when nothing was sent.
            event, text = "failed", f"{type(error).__name__}: {error}".splitlines()[0]
        else:
            event, text = "acked", ""
        seconds = time.perf_counter() - start
        for label in labels:
            self.note(event, label, seconds, text)

    def delay(self) -> None:
        label, kwargs = self.arguments()
        self.timed([label], lambda: self.task.delay(label, **kwargs))

    def later(self) -> None:
        label, kwargs = self.arguments()
        countdown = self._random.uniform(0.05, 0.5)
        self.timed([label], lambda: self.task.apply_async((label,), kwargs, countdown=countdown))

    def many(self) -> None:
        jobs = [self.arguments() for _ in range(5)]
        signatures = [self.task.s(label, **kwargs) for label, kwargs in jobs]
        self.timed([label for label, _ in jobs], lambda: app.enqueue_many(signatures))

    def own_id(self) -> None:
        label, kwargs = self.arguments()
        job_id = str(uuid.uuid4())

        def until_certain() -> None:
            for _ in range(200):
                try:
                    self.task.apply_async((label,), kwargs, job_id=job_id)
                    return
                except (DatabaseError, EnqueueUncertain):
                    if self.stopping:
                        raise
                    time.sleep(0.1)
            raise DatabaseError("the database has been away for too long")

        self.timed([label], until_certain)

    def on(self) -> None:
        label, kwargs = self.arguments()
        self.timed([label], lambda: self.order(label, kwargs))

    def rolled_back(self) -> None:
        label, kwargs = self.arguments()
        self.note("rolled back", label)
        try:
            with self.connection().transaction(force_rollback=True):
                self.task.on(self.connection()).delay(label, **kwargs)
        except (PgQueueError, psycopg.Error):
            self._connection = None

    def order(self, label: str, kwargs: dict[str, Any]) -> None:
        try:
            with self.connection().transaction():
                self.connection().execute("insert into orders (label) values (%s)", [label])
                self.task.on(self.connection()).delay(label, **kwargs)
        except BaseException:
            connection, self._connection = self._connection, None
            if connection is not None:
                connection.close()
            raise

    def connection(self) -> psycopg.Connection:
        if self._connection is None or self._connection.closed:
            self._connection = psycopg.connect(
                os.environ["PGQUEUE_DSN"], autocommit=True, connect_timeout=5, application_name="producer"
            )
        return self._connection


def main() -> None:
    log, rate, prefix = sys.argv[1], float(sys.argv[2]), sys.argv[3]
    # Until it listens there is no log.
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])
    producer = Producer(log, prefix, sys.argv[4] if len(sys.argv) > 4 else "quick")

    def stop(*_: object) -> None:
        producer.stopping = True

    signal.signal(signal.SIGTERM, stop)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGTERM])
    producer.run(rate)


if __name__ == "__main__":
    main()
