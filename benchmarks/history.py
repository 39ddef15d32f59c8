"""What a long history costs: look-ups, searches and pruning among millions of finished jobs.

    python benchmarks/history.py                 # ten million in an embedded PostgreSQL 18: 8 GB
    python benchmarks/history.py --jobs 1000000 --dsn postgresql://localhost/postgres

Figures are medians of so many different jobs, with the 99th percentile behind them, in milliseconds and seen
from the client. Measures:

result      what `AsyncResult` reads: one job by its id, of history only the days it can be in.
all_jobs    one job by its id in the view, which looks at every day.
order       the jobs of one correlation id, in the view.
label       twenty jobs with a rare label.
job list    the last fifty of a task, by the statement of `pgqueue job list`.
queues      what `pgqueue inspect queues` reads.
task_stats  the view, a day of history: once.
a day goes  dropping the oldest day.
a step      of the walk over the next one, of which a twentieth stays: 500 blocks, copied.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from datetime import date, timedelta
from typing import Any

import psycopg
from server import migrated_database as database

from pgqueue.cli.output import progress_bar
from pgqueue.database import embedded
from pgqueue.database.jobs import list_jobs
from pgqueue.database.queries import query
from pgqueue.database.retention import General, prune, set_retention
from pgqueue.database.session import Session, open_session
from pgqueue.database.stats import list_queues
from pgqueue.job import JobFilter

DAYS = 7

# The ids of a day are made in it, as UUIDv7 are.
FILL = """
INSERT INTO pgqueue.finished_jobs (id, state, queue, task, args, kwargs, priority, attempt, retries, crashes,
    rescues, worker_id, enqueued_at, enqueued_by, claimed_at, started_at, finished_at, headers, result)
SELECT (lpad(to_hex((extract(epoch FROM at) * 1000)::bigint), 12, '0') || '7' || substr(hash, 1, 3)
           || '8' || substr(hash, 4, 15))::uuid,
       'succeeded', 'default', 'shop.task_' || n %% 20, jsonb_build_array(n, 'a@b.c'), '{}', 5, 1, 0, 0, 0,
       '01890a5d-ac96-774b-bcce-b302099a8057', at, 'shop', at, at, at + interval '20 ms',
       jsonb_build_object('correlation_id', 'order ' || n / 4)
           || CASE WHEN n %% 100000 = 0 THEN '{"tags": ["rare"]}' ELSE '{}' END::jsonb, '"done"'
FROM (SELECT n, md5(n::text) AS hash, %(day)s::date::timestamp AT TIME ZONE 'UTC'
             + (n - %(from)s::bigint) * (interval '1 day' / %(each)s) AS at
      FROM generate_series(%(from)s::bigint + %(done)s, %(from)s::bigint + %(done)s + %(count)s - 1) AS n
) AS jobs
"""
VIEW = "SELECT * FROM pgqueue.all_jobs WHERE"
SOME = "SELECT id::text FROM pgqueue.finished_jobs TABLESAMPLE SYSTEM (0.01) LIMIT %s"


def fill(connection: psycopg.Connection, jobs: int) -> None:
    """So many jobs, in equal parts over the last seven days, today not included."""
    (today,) = connection.execute("SELECT (now() AT TIME ZONE 'UTC')::date").fetchone() or (date.today(),)
    each, batch, first = jobs // DAYS, 250_000, 0
    with progress_bar("fill", jobs, shown=True) as advance:
        for ago in range(DAYS, 0, -1):
            day = today - timedelta(days=ago)
            name = f"pgqueue.finished_jobs_p{day:%Y%m%d}"
            if connection.execute("SELECT to_regclass(%s)", [name]).fetchone() == (None,):
                connection.execute(f"CREATE TABLE {name} (LIKE pgqueue.finished_jobs INCLUDING ALL)")
                connection.execute(
                    f"ALTER TABLE pgqueue.finished_jobs ATTACH PARTITION {name}"
                    f" FOR VALUES FROM ('{day} 00:00+00') TO ('{day + timedelta(days=1)} 00:00+00')"
                )
            for done in range(0, each, batch):
                count = min(batch, each - done)
                connection.execute(
                    FILL, {"day": day, "from": first, "each": each, "done": done, "count": count}
                )
                advance(count)
            first += each
    connection.execute("VACUUM ANALYZE pgqueue.finished_jobs")


def timed(calls: Iterable[Callable[[], Any]]) -> dict[str, float]:
    """Milliseconds of each call; the first three are not counted."""
    times = []
    for call in calls:
        started = time.perf_counter()
        call()
        times.append(1000 * (time.perf_counter() - started))
    times = sorted(times[3:])
    return {"p50": statistics.median(times), "p99": times[int(0.99 * (len(times) - 1))]}


def measure(dsn: str, connection: psycopg.Connection, jobs: int, looks: int) -> dict[str, dict[str, float]]:
    ids = [row[0] for row in connection.execute(SOME, [looks]).fetchall()]
    orders = [f"order {n * (jobs // 4 // looks)}" for n in range(looks)]
    find = query("find_job").text

    def rows(text: str, parameters: Any) -> list[Any]:
        return connection.execute(text.encode(), parameters).fetchall()

    def found(text: str, parameters: Any) -> Callable[[], None]:
        def look() -> None:
            assert rows(text, parameters)

        return look

    with open_session(dsn) as session:
        return {
            "result": timed([found(find, {"id": each}) for each in ids]),
            "all_jobs": timed(
                [found("SELECT * FROM pgqueue.all_jobs WHERE id = %s", [each]) for each in ids]
            ),
            "order": timed(
                [found("SELECT * FROM pgqueue.all_jobs WHERE correlation_id = %s", [each]) for each in orders]
            ),
            "label": timed(
                [found("SELECT * FROM pgqueue.all_jobs WHERE tags ? 'rare' LIMIT 20", None)] * looks
            ),
            "job list": timed(
                [lambda: list_jobs(session, JobFilter(task="shop.task_7", since=timedelta(days=3)))] * looks
            ),
            "queues": timed([lambda: list_queues(session)] * looks),
            "task_stats": timed([found("SELECT * FROM pgqueue.task_stats", None)] * 4),
            "a day goes": timed([lambda: None] * 3 + [lambda: drop_oldest(session)]),
            "a step": timed(walk_oldest(session)),
        }


def drop_oldest(session: Session) -> None:
    done = prune(session, General(finished=DAYS - 1, failures=30, dead_letters=90, audit=365))
    assert done.days == 1


def walk_oldest(session: Session) -> Iterator[Callable[[], None]]:
    """Steps, until the walk is through."""
    set_retention(session, "task", "shop.task_7", finished=365)
    left: list[dict[str, Any]] = [{}]

    def step() -> None:
        with session.transaction(by_index=True):
            left[:] = session.run("prune_history", what="finished", days=DAYS - 2)

    while left:
        yield step


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--dsn", help="a server; each run makes a database of its own there")
    parser.add_argument("--jobs", type=int, default=10_000_000, help="finished jobs")
    parser.add_argument("--looks", type=int, default=200, help="times that each look is taken")
    parser.add_argument("--json", metavar="FILE", help="write the figures there too")
    options = parser.parse_args()
    with ExitStack() as stack:
        server = options.dsn or stack.enter_context(embedded.EmbeddedPostgres()).dsn
        dsn = stack.enter_context(database(server))
        connection = stack.enter_context(psycopg.connect(dsn, autocommit=True))
        fill(connection, options.jobs)
        figures = measure(dsn, connection, options.jobs, options.looks)
        (size,) = connection.execute(
            "SELECT sum(pg_total_relation_size(inhrelid))::bigint FROM pg_inherits"
            " WHERE inhparent = 'pgqueue.finished_jobs'::regclass"
        ).fetchone() or (0,)
    print(f"{options.jobs:,} finished jobs, {size / 2**30:.1f} GiB")
    for name, each in figures.items():
        print(f"{name:<11} {each['p50']:10,.2f} ms   p99 {each['p99']:10,.2f} ms")
    if options.json:
        with open(options.json, "w") as file:
            json.dump({"jobs": options.jobs, "bytes": size, "milliseconds": figures}, file, indent=2)


if __name__ == "__main__":
    main()
