"""`pgqueue bench`: it measures for real, touches nobody's jobs, and leaves nothing behind however it ends."""

from __future__ import annotations

import contextlib
import json
import os
import pty
import re
import secrets
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit, urlunsplit

import psutil
import psycopg
import pytest

import pgqueue
from pgqueue.database.migrate import upgrade
from tests.acceptance.marked import Marked, environment
from tests.acceptance.workers import eventually

TINY = ("--jobs", "1000", "--seconds", "0.2", "-c", "1")
MEASURES = ("round_trip", "commit", "single", "single_calls", "bulk", "bare_loop", "drain", "wake_up")


@dataclass
class Bench(Marked):
    """A running `pgqueue bench`."""

    def worker(self) -> psutil.Process:
        """Its worker's supervisor, once it serves."""

        def look() -> list[psutil.Process]:
            below = psutil.Process(self.process.pid).children()
            found = [each for each in below if "worker" in each.cmdline()]
            return found if found and found[0].children(recursive=True) else []

        return eventually(look, "the worker is there")[0]


class Benches:
    """Starts benchmarks on one database."""

    def __init__(self, dsn: str) -> None:
        self.dsn = dsn
        self.started: list[Bench] = []

    def start(self, *flags: str, dsn: str | None = None, **streams: Any) -> Bench:
        mark = secrets.token_hex(8)
        surroundings = environment(mark) | {
            "PGQUEUE_DSN": self.dsn if dsn is None else dsn,
            "PGQUEUE_LOG_LEVEL": "ERROR",  # what is meant for other workers changes nothing here
        }
        process = subprocess.Popen(
            [sys.executable, "-m", "pgqueue.cli.main", "bench", *flags],
            env=surroundings,
            stdin=subprocess.DEVNULL,
            text=True,
            **({"stdout": subprocess.PIPE, "stderr": subprocess.PIPE} | streams),
        )
        bench = Bench(process, mark)
        self.started.append(bench)
        return bench

    def sql(self, query: str, *parameters: object) -> list[tuple[Any, ...]]:
        with psycopg.connect(self.dsn, autocommit=True) as connection:
            return connection.execute(query.encode(), parameters or None).fetchall()

    def left(self) -> list[str]:
        """What they have not cleaned up."""
        schemas = self.sql("select nspname from pg_namespace where nspname ~ '^pgqueue_bench_'")
        processes = [str(process) for bench in self.started for process in bench.processes()]
        return [name for (name,) in schemas] + processes


@pytest.fixture
def benches(fresh_dsn: str) -> Iterator[Benches]:
    """Starts benchmarks; fails if one of them leaves a process or a schema."""
    benches = Benches(fresh_dsn)
    yield benches
    for bench in benches.started:
        if bench.process.poll() is None:
            bench.process.terminate()
        bench.process.communicate(timeout=60)
    eventually(lambda: not benches.left(), "the schemas and processes of the benchmarks are gone", 40)


def test_all_figures_are_there_and_nothing_is_left(benches: Benches) -> None:
    upgrade(benches.dsn)
    with psycopg.connect(benches.dsn) as connection:
        connection.execute("select pgqueue.enqueue('shop.send_email')")
    before = benches.sql("select id, state, attempt from pgqueue.all_jobs")
    tables = benches.sql("select oid from pg_class order by 1")

    status, out, err = benches.start("--json", *TINY).finish()

    assert (status, err) == (0, "")
    found = json.loads(out)
    assert found["embedded"] is False
    assert found["plan"] == {"jobs": 1000, "seconds": 0.2, "executors": 1}
    assert found["server"]["fsync"] in ("on", "off")
    assert found.keys() == {"pgqueue", "embedded", "server", "plan", "verdict", *MEASURES}
    for name in ("round_trip", "commit", "single_calls", "wake_up"):
        times = found[name]
        assert 0 < times["p50_ms"] <= times["p95_ms"] <= times["p99_ms"] <= times["all_ms"][-1]
        assert times["samples"] == len(times["all_ms"]) >= 1
        assert times["mean_ms"] > 0
    for name in ("single", "bulk", "bare_loop", "drain"):
        assert found[name]["jobs_per_second"] == pytest.approx(found[name]["jobs"] / found[name]["seconds"])
    assert found["drain"]["jobs"] == found["bare_loop"]["jobs"] == 1000
    assert found["wake_up"]["samples"] == 20
    assert all(isinstance(line, str) for line in found["verdict"])

    assert benches.left() == []
    assert benches.sql("select id, state, attempt from pgqueue.all_jobs") == before
    assert benches.sql("select oid from pg_class order by 1") == tables


def test_without_a_dsn_it_has_a_server_of_its_own_and_in_a_pipe_the_picture_is_plain(
    benches: Benches,
) -> None:
    status, out, err = benches.start(*TINY, dsn="").finish()
    assert (status, err) == (0, "")
    assert out.isascii()
    assert out.startswith(f"pgqueue {pgqueue.__version__} on an embedded PostgreSQL 18")
    for words in ("fsync on", "jobs per second", "bare loop", "wake-up, 20 lone jobs", "19 of 20 within"):
        assert words in out
    assert re.search(r"^  a worker +[\d,]+  #+$", out, re.MULTILINE)
    assert re.search(r"^  round trip +\d+\.\d\d +\d+\.\d\d +\d+\.\d\d$", out, re.MULTILINE)
    assert re.search(r"^- Your server commits in [\d.]+ ms and answers in [\d.]+ ms", out, re.MULTILINE)


def test_on_a_terminal_it_has_bars(benches: Benches) -> None:
    ours, theirs = pty.openpty()
    try:
        bench = benches.start(*TINY, stdout=theirs, stderr=theirs)
        os.close(theirs)
        shown = b""
        with contextlib.suppress(OSError):  # Linux says so when the other side is closed
            while chunk := os.read(ours, 65536):
                shown += chunk
    finally:
        os.close(ours)
    assert bench.process.wait(60) == 0
    text = shown.decode()
    for bar in ("round trips", "commits", "single enqueues", "bulk enqueues", "the bare loop", "lone jobs"):
        assert bar in text
    assert "█" in text


@pytest.mark.parametrize(
    ("number", "status", "says"),
    [
        (signal.SIGINT, 130, "pgqueue: interrupted\n"),
        (signal.SIGTERM, 143, "pgqueue: stopped by Terminated; nothing it made is left\n"),
    ],
)
def test_stopped_it_leaves_nothing(benches: Benches, number: signal.Signals, status: int, says: str) -> None:
    bench = benches.start("--jobs", "1000", "--seconds", "30", "-c", "1")
    eventually(lambda: benches.sql("select from pg_namespace where nspname ~ '^pgqueue_bench_'"), "it began")
    bench.process.send_signal(number)
    assert bench.finish() == (status, "", says)
    assert benches.left() == []


def test_stopped_with_a_worker_at_work_it_leaves_nothing(benches: Benches) -> None:
    bench = benches.start("--jobs", "30000", "--seconds", "0.2")
    bench.worker()
    bench.process.send_signal(signal.SIGINT)
    assert bench.finish() == (130, "", "pgqueue: interrupted\n")
    assert benches.left() == []


def test_killed_it_still_leaves_nothing(benches: Benches) -> None:
    bench = benches.start("--jobs", "30000", "--seconds", "0.2")
    bench.worker()
    bench.process.kill()
    bench.process.wait()
    eventually(lambda: not benches.left(), "the keeper has cleaned up", 40)


def test_a_worker_that_dies_ends_it_with_its_log(benches: Benches) -> None:
    bench = benches.start("--jobs", "30000", "--seconds", "0.2")
    bench.worker().kill()
    status, out, err = bench.finish()
    assert (status, out) == (1, "")
    assert err.startswith("pgqueue: the benchmark's worker ended with signal 9; the end of its log:\n")
    assert benches.left() == []


def test_without_the_right_to_make_a_schema_it_says_what_to_grant(benches: Benches) -> None:
    role = f"visitor_{secrets.token_hex(4)}"
    parts = urlsplit(benches.dsn)
    database = parts.path.removeprefix("/")
    address = f"{role}:visitor@{parts.netloc.rpartition('@')[2]}"
    with psycopg.connect(benches.dsn, autocommit=True) as connection:
        connection.execute(f"create role {role} login password 'visitor'".encode())
        try:
            dsn = urlunsplit(parts._replace(netloc=address))
            status, out, err = benches.start(*TINY, dsn=dsn).finish()
            assert (status, out) == (1, "")
            assert f'GRANT CREATE ON DATABASE "{database}" TO "{role}"' in err
            assert err.count("\n") == 1

            # That right is all it needs.
            connection.execute(f"grant create on database {database} to {role}".encode())
            assert benches.start(*TINY, dsn=dsn).finish()[0] == 0
            assert benches.left() == []
        finally:
            connection.execute(f"revoke all on database {database} from {role}".encode())
            connection.execute(f"drop role {role}".encode())


def test_without_a_database_it_is_one_line(benches: Benches) -> None:
    status, out, err = benches.start(*TINY, dsn="postgresql://127.0.0.1:1/nowhere").finish()
    assert (status, out) == (4, "")
    assert err.startswith("pgqueue: cannot reach the database: ")
    assert err.count("\n") == 1
