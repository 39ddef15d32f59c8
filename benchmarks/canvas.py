"""What waiting for others costs: a chord, and a chain, next to jobs that wait for nobody, in the same run.

    python benchmarks/canvas.py                     # an embedded PostgreSQL 18, fsync on; 10,000 members
    python benchmarks/canvas.py --dsn postgresql://localhost/bench --members 50000 --runs 5

Measures, each as its median with minimum and maximum behind it:

plain       so many no-op jobs: `enqueue_many`, then from the start of the first to the end of the last.
chord       the same jobs as members of a chord, and its body: `delay`, then until the body has ended.
chain       a thousand steps, one after the other: from the first's start to the last's end, per step.

The ratios are those of the times.
"""

from __future__ import annotations

import argparse
import statistics
import time
from contextlib import ExitStack

import psycopg
from server import migrated_database as database
from server import pgqueue_worker

from pgqueue import PgQueue, chain, chord
from pgqueue.database import embedded

STEPS = 1_000
TOOK = """
SELECT extract(epoch FROM max(finished_at) - min(started_at))::float8
FROM pgqueue.finished_jobs WHERE task = ANY (%s)
"""


def took(connection: psycopg.Connection, *tasks: str) -> float:
    """Seconds from the first start to the last end of these tasks' jobs, which are forgotten then."""
    row = connection.execute(TOOK, (list(tasks),)).fetchone()
    assert row is not None
    connection.execute("TRUNCATE pgqueue.finished_jobs")
    return float(row[0])


def plain(app: PgQueue, connection: psycopg.Connection, jobs: int) -> tuple[float, float]:
    """Seconds to enqueue, and to run."""
    start = time.perf_counter()
    ids = app.enqueue_many(app.signature("noop") for _ in range(jobs))
    enqueued = time.perf_counter() - start
    while connection.execute("SELECT count(*) FROM pgqueue.finished_jobs").fetchone() != (len(ids),):
        time.sleep(0.02)
    return enqueued, took(connection, "noop")


def whole_chord(app: PgQueue, connection: psycopg.Connection, members: int) -> tuple[float, float]:
    """Seconds to enqueue, and to run to the end of the body."""
    start = time.perf_counter()
    canvas = chord((app.signature("noop") for _ in range(members)), app.signature("body"))
    result = canvas.delay()
    enqueued = time.perf_counter() - start
    assert result.get(timeout=300) == members
    return enqueued, took(connection, "noop", "body")


def whole_chain(app: PgQueue, connection: psycopg.Connection) -> float:
    """Seconds for a step."""
    result = chain(app.signature("noop", immutable=True) for _ in range(STEPS)).delay()
    result.get(timeout=300)
    return took(connection, "noop") / STEPS


def main() -> None:
    """Measure, and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--dsn", help="the server; a database is made there and dropped")
    parser.add_argument("--members", type=int, default=10_000, help="of the chord, and plain jobs")
    parser.add_argument("--executors", type=int, default=2)
    parser.add_argument("--runs", type=int, default=3)
    arguments = parser.parse_args()
    figures: dict[str, list[float]] = {}
    with ExitStack() as stack:
        server = arguments.dsn
        if server is None:
            server = stack.enter_context(embedded.EmbeddedPostgres()).dsn
        dsn = stack.enter_context(database(server))
        connection = stack.enter_context(psycopg.connect(dsn, autocommit=True))
        stack.enter_context(pgqueue_worker(dsn, "-c", str(arguments.executors)))
        app = PgQueue("bench", dsn=dsn)
        stack.callback(app.close)
        plain(app, connection, 1_000)  # what is done once is done
        for _ in range(arguments.runs):
            jobs = plain(app, connection, arguments.members)
            members = whole_chord(app, connection, arguments.members)
            step = whole_chain(app, connection)
            for name, value in (
                ("plain: enqueued in", jobs[0]), ("plain: run in", jobs[1]),
                ("chord: enqueued in", members[0]), ("chord: run in", members[1]),
                ("chord / plain, enqueueing", members[0] / jobs[0]),
                ("chord / plain, running", members[1] / jobs[1]),
                ("chain: a step in", step),
            ):  # fmt: skip
                figures.setdefault(name, []).append(value)
    print(f"{arguments.members} members, {arguments.executors} executors, {arguments.runs} runs")
    for name, values in figures.items():
        unit, scale = ("", 1.0) if "/" in name else (" ms", 1000.0)
        low, high = min(values) * scale, max(values) * scale
        print(f"  {name:28} {statistics.median(values) * scale:8.2f}{unit}  ({low:.2f}-{high:.2f})")


if __name__ == "__main__":
    main()
