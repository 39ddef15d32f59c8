"""pgqueue's driver: its own command as the worker, `delay`, `enqueue_many` and `.on()` as producers."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from typing import Any

import driving
import psycopg
from jobs import app, noop, stamp

from pgqueue.database import migrate


class Client:
    """The application's own connections; the one here is for transactions of ours."""

    def __init__(self) -> None:
        self._connection: psycopg.Connection[Any] | None = None

    def single(self) -> None:
        noop.delay()

    def bulk(self, jobs: int, text: str | None) -> None:
        arguments = () if text is None else (text,)
        app.enqueue_many([noop.s(*arguments) for _ in range(jobs)])

    def transaction(self) -> None:
        if self._connection is None:
            self._connection = psycopg.connect(driving.url())
        with self._connection.transaction():
            self._connection.execute(driving.ORDER)
            noop.on(self._connection).delay()

    def stamp(self, nanoseconds: int) -> None:
        stamp.delay(nanoseconds)

    def close(self) -> None:
        if self._connection is not None:
            self._connection.close()


class Driver:
    clients = 1
    asynchronous = False

    def setup(self) -> None:
        migrate.upgrade(driving.url())
        with psycopg.connect(driving.url()) as connection:
            connection.execute(driving.ORDERS)

    def connect(self) -> Client:
        return Client()

    def worker(self, options: argparse.Namespace) -> None:
        os.environ["BENCH_HISTORY"] = options.history
        pool = options.pool or "prefork"
        os.environ["BENCH_POOL"] = pool
        # Processes as many as asked for, whatever runs in them: the pools' own sizes within each.
        size = {"prefork": ["-c", str(options.concurrency)], "solo": []}
        flags = size.get(pool, ["--processes", str(options.concurrency)])
        command = [sys.executable, "-m", "pgqueue.cli.main", "-A", "jobs:app", "--dsn", driving.url()]
        os.chdir(Path(__file__).parent)
        os.execv(sys.executable, [*command, "worker", "--pool", pool, *flags])  # noqa: S606


if __name__ == "__main__":
    driving.main(Driver())
