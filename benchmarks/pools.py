"""What the pools promise: nobody waits behind a long job, memory stays bounded, coroutines wait together.

    python benchmarks/pools.py                      # an embedded PostgreSQL 18, fsync on
    python benchmarks/pools.py --only head-of-line

Measures, each by the database's clock:

head-of-line   4 slots, one job of 30 s and 400 of 10 ms enqueued after it in the same queue: when the last
               short one ended, beyond their own work on the three slots that are left. For each pool.
two-workers    the same jobs for two workers of 2 slots each: how the short ones were shared.
surprise       a task that took 1 ms 500 times takes 10 s four times, for workers of 4 slots and of 1, with
               200 more of 1 ms behind: the longest that one of those waited for the slot that is left.
coroutines     1,000 `async def` jobs that wait 1 s, in one asyncio executor.
memory         PSS of 4 idle prefork executors, in MB each, and of their fork server and supervisor.
leak           10,000 jobs that leak 100 KiB each, under --max-memory-per-child: the most that an
               executor grew to, and how many jobs were run.
"""

from __future__ import annotations

import argparse
import json
import time
from contextlib import AbstractContextManager, ExitStack
from pathlib import Path
from typing import Any

import psutil
import psycopg
from server import migrated_database as database
from server import pgqueue_worker

from pgqueue.database import embedded

HERE = Path(__file__).parent
POOLS = {"prefork": "wait", "threads": "wait", "asyncio": "wait_async"}
MEASURES = ("head-of-line", "two-workers", "surprise", "coroutines", "memory", "leak")
SHORT, COUNT, SLOTS = 0.01, 400, 4


def worker(
    dsn: str, *flags: str, app: str = "pooled:app", folder: Path = HERE
) -> AbstractContextManager[psutil.Process]:
    """A real worker process, ready to run; what it runs when it is stopped goes back at once."""
    return pgqueue_worker(dsn, "--shutdown-timeout", "0", *flags, app=app, folder=folder)


class Queue:
    """The database of one measure."""

    def __init__(self, dsn: str) -> None:
        self._connection = psycopg.connect(dsn, autocommit=True)

    def empty(self) -> None:
        """No jobs and no history."""
        self._connection.execute("TRUNCATE pgqueue.jobs, pgqueue.finished_jobs, pgqueue.failures")

    def add(self, task: str, argument: float, count: int = 1) -> None:
        """Enqueue in one transaction, as producers do."""
        self._connection.execute(
            "SELECT pgqueue.enqueue(%s, jsonb_build_array(%s::float8)) FROM generate_series(1, %s)",
            [task, argument, count],
        )

    def ask(self, query: str, *parameters: object) -> Any:
        """The first row."""
        return self._connection.execute(query, parameters).fetchone()  # type: ignore[arg-type]

    def wait(self, query: str, patience: float = 120) -> None:
        """Until a query says true."""
        deadline = time.monotonic() + patience
        while not self.ask(query)[0]:
            if time.monotonic() > deadline:
                raise SystemExit(f"pools: not so in {patience:.0f} s: {query}")
            time.sleep(0.02)


def short_ended(count: int) -> str:
    """Whether so many short jobs have ended."""
    return f"SELECT count(*) >= {count} FROM pgqueue.finished_jobs WHERE args = '[{SHORT}]'"


RUNNING = "SELECT count(*) = {} FROM pgqueue.jobs WHERE state = 'running'"


def warm(queue: Queue, task: str) -> None:
    """Executors are up and have run something."""
    queue.empty()
    queue.add(task, 0.02, 50)
    queue.wait("SELECT NOT EXISTS (SELECT FROM pgqueue.jobs)")
    queue.empty()


def head_of_line(dsn: str) -> dict[str, Any]:
    """Seconds beyond the short jobs' own work, per pool."""
    found = {}
    for pool, task in POOLS.items():
        queue = Queue(dsn)
        with worker(dsn, "--pool", pool, "-c", str(SLOTS)):
            warm(queue, task)
            queue.add(task, 30)
            queue.add(task, SHORT, COUNT)
            queue.wait(short_ended(COUNT))
            (took,) = queue.ask(
                "SELECT extract(epoch FROM max(finished_at) - min(enqueued_at))::float8"
                f" FROM pgqueue.finished_jobs WHERE args = '[{SHORT}]'"
            )
            beyond = took - SHORT * COUNT / (SLOTS - 1)
            found[pool] = {"took": took, "beyond_their_work": beyond}
            print(
                f"head-of-line  {pool:8} {COUNT} short ones in {took:.2f} s, {beyond:.2f} s beyond their work"
            )
    return found


def two_workers(dsn: str) -> dict[str, Any]:
    """How two workers share the short jobs."""
    queue = Queue(dsn)
    with worker(dsn, "-c", "2"), worker(dsn, "-c", "2"):
        warm(queue, "wait")
        queue.add("wait", 30)
        queue.add("wait", SHORT, COUNT)
        queue.wait(short_ended(COUNT))
        took, most, least = queue.ask(
            "SELECT extract(epoch FROM max(ended) - min(begun))::float8, max(n), min(n) FROM ("
            " SELECT count(*) AS n, max(finished_at) AS ended, min(enqueued_at) AS begun"
            f" FROM pgqueue.finished_jobs WHERE args = '[{SHORT}]' GROUP BY worker_id) AS each"
        )
        beyond = took - SHORT * COUNT / (SLOTS - 1)
        print(f"two-workers   {took:.2f} s, {beyond:.2f} s beyond their work; {most} and {least} jobs")
    return {"took": took, "beyond_their_work": beyond, "jobs": [most, least]}


def surprise(dsn: str) -> dict[str, Any]:
    """The longest wait of jobs that came while a task had become slow."""
    queue = Queue(dsn)
    with worker(dsn, "-c", str(SLOTS)), worker(dsn, "-c", "1"):
        queue.empty()
        queue.add("wait", 0.001, 500)
        queue.wait("SELECT NOT EXISTS (SELECT FROM pgqueue.jobs)")
        queue.add("wait", 10, SLOTS)
        queue.add("wait", 0.001, 200)
        queue.wait("SELECT count(*) >= 700 FROM pgqueue.finished_jobs")
        (worst,) = queue.ask(
            "SELECT extract(epoch FROM max(started_at) - min(enqueued_at))::float8 FROM ("
            " SELECT * FROM pgqueue.finished_jobs ORDER BY enqueued_at DESC, id DESC LIMIT 200) AS last"
        )
        print(f"surprise      200 jobs of 1 ms behind {SLOTS} of 10 s waited {worst:.2f} s at most")
    return {"longest_wait": worst}


def coroutines(dsn: str) -> dict[str, Any]:
    """1,000 coroutines that wait."""
    queue = Queue(dsn)
    with worker(dsn, "--pool", "asyncio", "-c", "1000"):
        warm(queue, "wait_async")
        queue.add("wait_async", 1, 1000)
        queue.wait("SELECT NOT EXISTS (SELECT FROM pgqueue.jobs)")
        (took,) = queue.ask(
            "SELECT extract(epoch FROM max(finished_at) - min(enqueued_at))::float8"
            " FROM pgqueue.finished_jobs"
        )
        print(f"coroutines    1,000 that wait 1 s in {took:.2f} s")
    return {"took": took}


def memory(dsn: str) -> dict[str, Any]:
    """PSS of idle processes, with the example's shop imported."""
    with worker(dsn, "-c", "4", app="shop.app:app", folder=HERE.parent / "examples") as supervisor:
        time.sleep(3)
        (server,) = supervisor.children()
        pss = [each.memory_full_info().pss / 1e6 for each in (supervisor, server, *server.children())]
        executors = pss[2:]
        print(
            f"memory        {len(executors)} executors {sum(executors):.1f} MB, "
            f"fork server {pss[1]:.1f} MB, supervisor {pss[0]:.1f} MB (PSS)"
        )
    return {"executors": executors, "fork_server": pss[1], "supervisor": pss[0]}


def leak(dsn: str) -> dict[str, Any]:
    """The most that an executor grew to."""
    queue = Queue(dsn)
    queue.empty()
    limit = 200_000
    most = 0.0
    with worker(dsn, "-c", "2", "--max-memory-per-child", str(limit)) as supervisor:
        queue.add("leak", 100, 10_000)
        while queue.ask("SELECT EXISTS (SELECT FROM pgqueue.jobs)")[0]:
            for each in supervisor.children(recursive=True):
                try:
                    most = max(most, each.memory_info().rss / 1024)
                except psutil.NoSuchProcess:
                    continue
            time.sleep(0.02)
    ended, runs = queue.ask(
        "SELECT count(*), sum(attempt) FROM pgqueue.finished_jobs WHERE state = 'succeeded'"
    )
    print(f"leak          {ended:,} jobs in {runs:,} runs; {most:,.0f} KiB at most, limit {limit:,} KiB")
    return {"succeeded": ended, "runs": int(runs), "most_kib": most, "limit_kib": limit}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--dsn", help="a server to make a database on (default: an embedded PostgreSQL)")
    parser.add_argument("--only", action="append", choices=MEASURES, help="measure just this (repeatable)")
    parser.add_argument("--json", type=Path, help="write all figures there")
    arguments = parser.parse_args()
    figures = {}
    with ExitStack() as stack:
        server = arguments.dsn or stack.enter_context(embedded.EmbeddedPostgres()).dsn
        for measure in arguments.only or MEASURES:
            with database(server) as dsn:
                figures[measure] = globals()[measure.replace("-", "_")](dsn)
    if arguments.json:
        arguments.json.write_text(json.dumps(figures, indent=2) + "\n")


if __name__ == "__main__":
    main()
