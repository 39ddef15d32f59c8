"""What a queue could do at best here: raw psycopg on a table like `pgqueue.jobs`, with its columns, checks
and indexes. No history or fencing; of the tasks, only `stamp` does something, in the loop that claims.
"""

from __future__ import annotations

import argparse
import json
import signal
from typing import Any

import driving
import psycopg

from pgqueue.database import migrate
from pgqueue.job import new_id

TABLE = """
CREATE TABLE IF NOT EXISTS bench_jobs (LIKE pgqueue.jobs INCLUDING ALL) WITH (
    fillfactor = 85,
    autovacuum_vacuum_scale_factor = 0, autovacuum_vacuum_threshold = 10000, autovacuum_vacuum_cost_delay = 0
)
"""
INSERT = "INSERT INTO bench_jobs (id, task, args) VALUES (%s, %s, %s)"
INSERT_AND_NOTIFY = f"WITH job AS ({INSERT}) SELECT pg_notify('bench_jobs', '')"
COPY = "COPY bench_jobs (id, task, args) FROM STDIN"
CLAIM = """
UPDATE bench_jobs SET state = 'running' WHERE id = ANY (ARRAY(
    SELECT id FROM bench_jobs WHERE state = 'ready' AND queue = 'default' AND priority = 5 AND position > %s
    ORDER BY position LIMIT 500 FOR UPDATE SKIP LOCKED))
RETURNING id, position, task, args
"""
DELETE = "DELETE FROM bench_jobs WHERE id = ANY (%s)"
LOOK_AGAIN = 0.05
"""Seconds: COPY notifies nobody."""


class Client:
    def __init__(self) -> None:
        self._connection: psycopg.Connection[Any] = psycopg.connect(driving.url())

    def single(self) -> None:
        self._connection.execute(INSERT, [new_id(), "noop", "[]"])
        self._connection.commit()

    def bulk(self, jobs: int, text: str | None) -> None:
        args = json.dumps([] if text is None else [text])
        with self._connection.cursor() as cursor, cursor.copy(COPY) as copy:
            for _ in range(jobs):
                copy.write_row((new_id(), "noop", args))
        self._connection.commit()

    def transaction(self) -> None:
        with self._connection.transaction():
            self._connection.execute(driving.ORDER)
            self._connection.execute(INSERT, [new_id(), "noop", "[]"])

    def stamp(self, nanoseconds: int) -> None:
        self._connection.execute(INSERT_AND_NOTIFY, [new_id(), "stamp", json.dumps([nanoseconds])])
        self._connection.commit()

    def close(self) -> None:
        self._connection.close()


class Driver:
    clients = 1
    asynchronous = False

    def setup(self) -> None:
        migrate.upgrade(driving.url())
        with psycopg.connect(driving.url()) as connection:
            connection.execute(TABLE)
            connection.execute(driving.ORDERS)

    def connect(self) -> Client:
        return Client()

    def worker(self, options: argparse.Namespace) -> None:
        stopped = False

        def stop(number: int, frame: object) -> None:
            nonlocal stopped
            stopped = True

        signal.signal(signal.SIGTERM, stop)
        with psycopg.connect(driving.url(), autocommit=True) as connection:
            connection.execute("LISTEN bench_jobs")
            print("ready", flush=True)
            cursor = 0
            while not stopped:
                rows = connection.execute(CLAIM, [cursor]).fetchall()
                # From the start again when nothing is left: a late commit may be behind the cursor.
                cursor = max(row[1] for row in rows) if rows else 0
                for _, _, task, args in rows:
                    if task == "stamp":
                        driving.record_stamp(*args)
                if rows:
                    connection.execute(DELETE, [[row[0] for row in rows]])
                else:
                    list(connection.notifies(timeout=LOOK_AGAIN, stop_after=1))


if __name__ == "__main__":
    driving.main(Driver())
