"""How fast a worker drains a queue, next to the bare SQL loop on the same server in the same run.

    python benchmarks/drain.py                      # an embedded PostgreSQL 18, fsync on
    python benchmarks/drain.py --dsn postgresql://localhost/bench --jobs 100000
    python benchmarks/drain.py --only drain --check 0.25

Speeds of one machine drift by a third within an hour, so read the ratios: each run of the worker stands
next to a run of the bare loop. Figures are medians, with minimum and maximum behind them. Measures:

drain       no-op jobs waiting, history on, prefork; from the first start to the last end, by the database's
            clock.
bare loop   one connection that claims 500 with SKIP LOCKED and deletes them: no execution, no history, no
            fencing.
wake-up     a lone job for an idle worker, from the enqueue's commit to the start of its body.
producers   64 connections enqueue one job per transaction, with no worker, then with one that has to keep up.
"""

from __future__ import annotations

import argparse
import json
import os
import secrets
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from urllib.parse import urlsplit, urlunsplit

import psutil
import psycopg

from pgqueue.database import embedded, migrate

HERE = Path(__file__).parent
MEASURES = ("drain", "wake-up", "producers")

FILL = """
INSERT INTO pgqueue.jobs (id, task) SELECT pgqueue.uuid7(), 'noop' FROM generate_series(1, %s)
"""

BARE_CLAIM = """
UPDATE pgqueue.jobs SET state = 'running', attempt = attempt + 1, worker_id = 'bare', claimed_at = now()
WHERE id = ANY (ARRAY(
    SELECT id FROM pgqueue.jobs
    WHERE state = 'ready' AND queue = 'default' AND priority = 5 AND position > %s
    ORDER BY position LIMIT 500 FOR UPDATE SKIP LOCKED))
RETURNING id, position
"""


@contextmanager
def database(server_dsn: str) -> Iterator[str]:
    """A migrated database of this run."""
    name = f"pgqueue_bench_{secrets.token_hex(4)}"
    with psycopg.connect(server_dsn, autocommit=True) as connection:
        connection.execute(f"CREATE DATABASE {name}")
    dsn = urlunsplit(urlsplit(server_dsn)._replace(path=f"/{name}"))
    try:
        migrate.upgrade(dsn)
        yield dsn
    finally:
        with psycopg.connect(server_dsn, autocommit=True) as connection:
            connection.execute(f"DROP DATABASE {name} WITH (FORCE)")


@contextmanager
def worker(dsn: str, executors: int) -> Iterator[psutil.Process]:
    """A real worker process, ready to run."""
    command = [sys.executable, "-m", "pgqueue.cli.main", "-A", "noop:app", "--dsn", dsn, "worker"]
    with tempfile.TemporaryFile("w+") as log:
        process = subprocess.Popen([*command, "-c", str(executors)], cwd=HERE, stdout=log, stderr=log)
        try:
            deadline = time.monotonic() + 30
            while "worker_started" not in _text(log):
                if process.poll() is not None or time.monotonic() > deadline:
                    raise SystemExit(f"drain: the worker did not start:\n{_text(log)}")
                time.sleep(0.01)
            yield psutil.Process(process.pid)
        finally:
            process.send_signal(signal.SIGTERM)
            if process.wait(60) != 0:
                print(_text(log), file=sys.stderr)


def _text(log: object) -> str:
    log.seek(0)  # type: ignore[attr-defined]
    return str(log.read())  # type: ignore[attr-defined]


def fill(connection: psycopg.Connection, jobs: int) -> None:
    """Empty tables, then so many ready jobs."""
    connection.execute("TRUNCATE pgqueue.jobs, pgqueue.finished_jobs, pgqueue.failures")
    connection.execute(FILL, [jobs])
    connection.execute("VACUUM ANALYZE pgqueue.jobs")
    connection.execute("CHECKPOINT")


def bare_loop(dsn: str, jobs: int) -> float:
    """Jobs per second of claiming and deleting with nothing in between."""
    with psycopg.connect(dsn, autocommit=True) as connection:
        fill(connection, jobs)
        started, cursor = time.perf_counter(), 0
        while rows := connection.execute(BARE_CLAIM, [cursor]).fetchall():
            cursor = max(row[1] for row in rows)
            connection.execute("DELETE FROM pgqueue.jobs WHERE id = ANY (%s)", [[row[0] for row in rows]])
        return jobs / (time.perf_counter() - started)


def cpu_seconds(processes: list[psutil.Process]) -> float:
    """User and system time these processes have used so far."""
    total = 0.0
    for process in processes:
        try:
            times = process.cpu_times()
        except psutil.NoSuchProcess:
            continue
        total += times.user + times.system
    return total


def backends(connection: psycopg.Connection) -> list[psutil.Process]:
    """All processes of the server, as far as they are on this machine."""
    row = connection.execute("SELECT pg_backend_pid()").fetchone()
    assert row is not None
    try:
        postmaster = psutil.Process(row[0]).parent()
    except psutil.NoSuchProcess:
        return []
    return [] if postmaster is None else [postmaster, *postmaster.children(recursive=True)]


def drain(dsn: str, jobs: int, executors: int) -> dict[str, float]:
    """Jobs per second of a worker with a full queue, and the CPU it and the server spend on each."""
    with psycopg.connect(dsn, autocommit=True) as connection:
        connection.execute("DELETE FROM pgqueue.wake")
        fill(connection, 1)
        with worker(dsn, executors) as process:
            _wait_until_finished(connection, 1)
            # The worker is up and idle: what is measured is the drain, not the start of Python.
            connection.execute("TRUNCATE pgqueue.finished_jobs")
            family = [process, *process.children(recursive=True)]
            before = cpu_seconds(family), cpu_seconds(backends(connection))
            with connection.transaction():
                connection.execute(FILL, [jobs])
                inserting = cpu_seconds(backends(connection)) - before[1]
                connection.execute("SELECT pgqueue.wake_workers('{default}')")
            _wait_until_finished(connection, jobs)
            after = cpu_seconds(family), cpu_seconds(backends(connection))
        row = connection.execute(
            "SELECT count(*), count(DISTINCT id),"
            " extract(epoch FROM max(finished_at) - min(started_at))::float8 FROM pgqueue.finished_jobs"
        ).fetchone()
        assert row is not None
        assert row[:2] == (jobs, jobs), f"{row[:2]} of {jobs} jobs finished once"
    return {
        "rate": jobs / row[2],
        "worker_us": (after[0] - before[0]) / jobs * 1e6,
        "server_us": (after[1] - before[1] - inserting) / jobs * 1e6,
    }


def _wait_until_finished(connection: psycopg.Connection, jobs: int, patience: float = 120) -> None:
    deadline = time.monotonic() + patience
    while time.monotonic() < deadline:
        row = connection.execute("SELECT NOT EXISTS (SELECT FROM pgqueue.jobs)").fetchone()
        if row is not None and row[0]:
            return
        time.sleep(0.05)
    raise SystemExit(f"drain: {jobs} jobs were not done in {patience:.0f} s")


def wake_up(dsn: str, samples: int) -> list[float]:
    """Milliseconds from the enqueue of a lone job to the start of its body, for an idle worker."""
    with psycopg.connect(dsn, autocommit=True) as connection, worker(dsn, 2):
        connection.execute("SELECT pgqueue.enqueue('noop')")
        _wait_until_finished(connection, 1)  # the worker knows the queue now
        connection.execute("TRUNCATE pgqueue.jobs, pgqueue.finished_jobs")
        for n in range(samples):
            connection.execute("SELECT pgqueue.enqueue('noop')")
            time.sleep(0.05 + 0.001 * (n % 7))
        _wait_until_finished(connection, samples)
        rows = connection.execute(
            "SELECT extract(epoch FROM started_at - enqueued_at)::float8 * 1000 FROM pgqueue.finished_jobs"
        ).fetchall()
        return [row[0] for row in rows]


def producers(dsn: str, pgbench: Path, seconds: int, executors: int | None) -> float:
    """Enqueues per second of 64 connections, each its own transaction; `executors` None: no worker."""
    with psycopg.connect(dsn, autocommit=True) as connection, ExitStack() as stack:
        connection.execute("TRUNCATE pgqueue.jobs, pgqueue.finished_jobs")
        connection.execute("DELETE FROM pgqueue.wake")
        if executors is not None:
            stack.enter_context(worker(dsn, executors))
        script = Path(stack.enter_context(tempfile.TemporaryDirectory())) / "enqueue.sql"
        script.write_text("SELECT pgqueue.enqueue('noop');\n")
        command = [
            pgbench,
            "-n",
            "-M",
            "prepared",
            "-c",
            "64",
            "-j",
            "2",
            "-T",
            str(seconds),
            "-f",
            script,
            dsn,
        ]
        done = subprocess.run([str(part) for part in command], capture_output=True, text=True)
        if done.returncode != 0:
            raise SystemExit(f"drain: pgbench failed: {done.stderr}")
        if executors is not None:
            _wait_until_finished(connection, 0)
        tps = next(line for line in done.stdout.splitlines() if line.startswith("tps = "))
        return float(tps.split()[2])


def middle(values: list[float], unit: str = "", digits: int = 0) -> str:
    """median (min–max) of the values."""
    low, mid, high = min(values), statistics.median(values), max(values)
    return f"{mid:,.{digits}f}{unit} ({low:,.{digits}f}–{high:,.{digits}f})"


def measure(dsn: str, arguments: argparse.Namespace) -> dict[str, object]:
    """Run what was asked for, print as it comes; returns all figures."""
    figures: dict[str, object] = {}
    wanted = arguments.only or MEASURES
    if "drain" in wanted:
        bare: list[float] = []
        runs: list[dict[str, float]] = []
        for n in range(arguments.runs):
            bare.append(bare_loop(dsn, arguments.jobs))
            runs.append(drain(dsn, arguments.jobs, arguments.executors))
            print(
                f"  run {n + 1}: worker {runs[-1]['rate']:,.0f} jobs/s, bare loop {bare[-1]:,.0f} jobs/s",
                flush=True,
            )
        ratios = [run["rate"] / loop for run, loop in zip(runs, bare, strict=True)]
        print(
            f"drain       {middle([run['rate'] for run in runs])} jobs/s, {arguments.jobs:,} no-op jobs,"
            f" history on, {arguments.executors} executors"
        )
        print(f"bare loop   {middle(bare)} jobs/s, claim and delete")
        print(f"ratio       {middle(ratios, digits=2)} worker / bare loop")
        print(
            f"CPU         {middle([run['worker_us'] for run in runs])} µs per job worker,"
            f" {middle([run['server_us'] for run in runs])} µs server"
        )
        figures |= {"drain": runs, "bare_loop": bare, "ratio": ratios}
    if "wake-up" in wanted:
        latencies = sorted(wake_up(dsn, arguments.samples))
        p50, p99 = latencies[len(latencies) // 2], latencies[int(len(latencies) * 0.99)]
        print(
            f"wake-up     p50 {p50:.1f} ms, p99 {p99:.1f} ms, {len(latencies)} lone jobs for an idle worker"
        )
        figures["wake_up"] = latencies
    if "producers" in wanted:
        pgbench = embedded.wheel_binaries(18) / "pgbench"
        alone, served = [], []
        for _ in range(arguments.runs):
            alone.append(producers(dsn, pgbench, arguments.seconds, None))
            served.append(producers(dsn, pgbench, arguments.seconds, arguments.executors))
        print(f"producers   {middle(alone)} enqueues/s with no worker, {middle(served)} with one")
        kept = [with_worker / without for with_worker, without in zip(served, alone, strict=True)]
        print(f"ratio       {middle(kept, digits=2)} with / without a worker")
        figures |= {"producers_alone": alone, "producers_served": served, "producers_ratio": kept}
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--dsn", help="a server to make a database on (default: an embedded PostgreSQL)")
    parser.add_argument("--jobs", type=int, default=50_000)
    parser.add_argument("--executors", type=int, default=2)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--samples", type=int, default=200, help="lone jobs of the wake-up measure")
    parser.add_argument("--seconds", type=int, default=5, help="length of one producers run")
    parser.add_argument("--only", action="append", choices=MEASURES, help="measure just this (repeatable)")
    parser.add_argument(
        "--check", type=float, metavar="RATIO", help="exit 1 if drain / bare loop is below this"
    )
    parser.add_argument("--json", type=Path, help="write all figures there")
    arguments = parser.parse_args()
    with ExitStack() as stack:
        server = arguments.dsn or stack.enter_context(embedded.EmbeddedPostgres()).dsn
        dsn = stack.enter_context(database(server))
        with psycopg.connect(dsn) as connection:
            row = connection.execute(
                "SELECT current_setting('server_version'), current_setting('fsync'),"
                " current_setting('synchronous_commit')"
            ).fetchone()
        assert row is not None
        print(
            f"PostgreSQL {row[0]}, fsync {row[1]}, synchronous_commit {row[2]}, "
            f"{os.cpu_count()} CPUs shared by all"
        )
        figures = measure(dsn, arguments)
    if arguments.json:
        arguments.json.write_text(json.dumps(figures, indent=2) + "\n")
    if arguments.check is not None:
        ratio = statistics.median(figures["ratio"])  # type: ignore[arg-type]
        if ratio < arguments.check:
            raise SystemExit(
                f"drain: the ratio to the bare loop is {ratio:.2f}, it must be at least {arguments.check}"
            )
        print(f"drain: the ratio to the bare loop is {ratio:.2f}, at least {arguments.check} is asked for")


if __name__ == "__main__":
    main()
