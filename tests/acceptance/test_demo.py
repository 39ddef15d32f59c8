"""`pgqueue demo`: its audit is true and can fail, and it leaves nothing behind however it ends."""

from __future__ import annotations

import contextlib
import os
import re
import secrets
import signal
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import psycopg
import pytest
from psycopg.rows import dict_row

from pgqueue.database.migrate import upgrade
from tests.acceptance.marked import PACKAGE, Marked, environment
from tests.acceptance.workers import PATIENCE, eventually

LAST_LINE = re.compile(
    r"demo: (\d+) orders, (\d+) rolled back, (\d+) jobs: (\d+) succeeded, (\d+) dead-lettered, (\d+) lost\n"
)
OURS = "queue like 'shop\\_demo\\_%%'"


@dataclass
class Demo(Marked):
    """A running demo, started in a folder of its own in which it also keeps its temporary files."""

    folder: Path

    def child(self, *words: str) -> psutil.Process:
        """The one process below it that has all these words in its command."""

        def look() -> list[psutil.Process]:
            below = psutil.Process(self.process.pid).children()
            return [each for each in below if set(words) <= set(each.cmdline())]

        return eventually(look, f"a process with {words}")[0]

    def left(self) -> list[str]:
        """What it has not cleaned up."""
        files = [str(path) for path in self.folder.iterdir()]
        return files + [str(process) for process in self.processes()]


class Demos:
    """Starts demos."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.started: list[Demo] = []

    def start(self, *flags: str, dsn: str | None) -> Demo:
        mark = secrets.token_hex(8)
        folder = self._folder / mark
        folder.mkdir()
        surroundings = environment(mark) | {
            "TMPDIR": str(folder),
        }
        if dsn is not None:
            surroundings["PGQUEUE_DSN"] = dsn
        process = subprocess.Popen(
            [sys.executable, "-m", "pgqueue.cli.main", "demo", *flags],
            cwd=self._folder,
            env=surroundings,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        demo = Demo(process, mark, folder)
        self.started.append(demo)
        return demo


@pytest.fixture
def demos() -> Iterator[Demos]:
    """Starts demos; fails if one of them leaves a process or a file."""
    with tempfile.TemporaryDirectory(prefix="pgqueue-test-demo-") as folder:
        os.chmod(folder, 0o755)  # noqa: S103  (an embedded server that root starts runs as somebody else)
        demos = Demos(Path(folder))
        yield demos
        for demo in demos.started:
            if demo.process.poll() is None:
                demo.process.terminate()
            demo.process.communicate(timeout=60)
            eventually(lambda demo=demo: not demo.left(), "the demo's processes and files are gone", 20)


class Database:
    """What the demo wrote, in the eyes of somebody else."""

    def __init__(self, dsn: str) -> None:
        self._connection = psycopg.connect(dsn, autocommit=True, row_factory=dict_row)

    def close(self) -> None:
        self._connection.close()

    def sql(self, query: str, *parameters: object) -> list[dict[str, Any]]:
        cursor = self._connection.execute(query.encode(), parameters or None)
        return cursor.fetchall() if cursor.description else []

    def count(self, query: str) -> int:
        (row,) = self.sql(f"select count(*) as number {query}")
        return int(row["number"])

    def shops(self) -> list[str]:
        """The schemas of demos."""
        found = self.sql("select nspname as name from pg_namespace where nspname ~ '^shop_demo_' order by 1")
        return [row["name"] for row in found]

    def until_finished(self, jobs: int) -> None:
        """Until so many of the demo's jobs have ended, in a schema that the demo may still have to make."""

        def look() -> bool:
            with contextlib.suppress(psycopg.errors.UndefinedTable):
                return self.count("from pgqueue.finished_jobs") >= jobs
            return False

        eventually(look, f"{jobs} jobs are finished")


@pytest.fixture
def database(fresh_dsn: str) -> Iterator[Database]:
    with contextlib.closing(Database(fresh_dsn)) as database:
        yield database


def test_every_job_is_accounted_for(demos: Demos, fresh_dsn: str, database: Database) -> None:
    upgrade(fresh_dsn)
    # Other people's jobs, one of them on a queue with a name as the shop's.
    foreign = [
        database.sql("select pgqueue.enqueue('other.task', queue => %s)::text as id", queue)[0]["id"]
        for queue in ("email", "default")
    ]

    status, out, err = demos.start("--orders", "30", dsn=fresh_dsn).finish()

    assert (status, err) == (0, "")
    last = LAST_LINE.fullmatch(out.splitlines(keepends=True)[-1])
    assert last is not None, out
    orders, rolled_back, jobs, succeeded, dead, lost = map(int, last.groups())
    assert (orders, rolled_back, jobs, lost) == (30, 3, 81, 0)
    assert succeeded + dead == jobs
    assert "does not hold" not in out
    assert out.count("-> holds") == 5

    # The same, asked by somebody else: by the jobs' arguments, not by what the shop wrote down.
    (shop,) = database.shops()
    committed = {row["id"] for row in database.sql(f"select id from {shop}.orders")}
    assert len(committed) == 27
    ended = database.sql(f"select task, state, args, retries from pgqueue.all_jobs where {OURS}")
    tasks = ("shop.tasks.send_email", "shop.tasks.generate_invoice", "shop.tasks.notify_shipping")
    assert Counter((row["task"], row["args"][0]) for row in ended) == Counter(
        {(task, order): 1 for task in tasks for order in committed}
    )
    assert Counter(row["state"] for row in ended) == {"succeeded": succeeded, "dead": dead}
    assert database.count(f"from pgqueue.jobs where {OURS}") == 0
    assert sum(row["retries"] for row in ended) > 5
    letters = database.sql("select dead_letter_queue, reason, task, error_message from pgqueue.dead_letters")
    assert [row["dead_letter_queue"] for row in letters] == ["failed_emails"] * dead
    assert {row["reason"] for row in letters} == {"not_retryable"}
    # Both ways to be retried were taken: the task's policy, and the task's own wish.
    failures = {row["error_class"] for row in database.sql("select error_class from pgqueue.failures")}
    assert {"smtplib.SMTPRecipientsRefused", "urllib.error.URLError", "urllib.error.HTTPError"} <= failures

    waiting = database.sql("select id::text, state, attempt from pgqueue.jobs order by position")
    assert waiting == [{"id": job, "state": "ready", "attempt": 0} for job in foreign]


def test_without_a_database_it_brings_its_own(demos: Demos) -> None:
    status, out, _ = demos.start("--orders", "5", "-c", "1", "--seed", "3", dsn=None).finish()
    assert status == 0
    assert "embedded PostgreSQL" in out
    assert out.endswith("demo: 5 orders, 0 rolled back, 15 jobs: 15 succeeded, 0 dead-lettered, 0 lost\n")


def test_a_job_that_vanishes_fails_the_audit(demos: Demos, fresh_dsn: str, database: Database) -> None:
    demo = demos.start("--orders", "30", dsn=fresh_dsn)
    database.until_finished(1)
    stolen = database.sql(
        "delete from pgqueue.finished_jobs"
        " where id = (select id from pgqueue.finished_jobs limit 1) returning id"
    )
    assert len(stolen) == 1
    status, out, err = demo.finish()
    assert status == 1
    assert "each of them ended exactly once: lost must be 0, got 1" in err
    assert "-> does not hold: lost must be 0, got 1" in out
    assert not LAST_LINE.search(out)
    assert len(database.shops()) == 1, "the evidence is gone"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_interrupted_it_takes_everything_away(
    demos: Demos, fresh_dsn: str, database: Database, number: signal.Signals
) -> None:
    demo = demos.start("--orders", "200", dsn=fresh_dsn)
    database.until_finished(1)
    demo.process.send_signal(number)
    status, _, err = demo.finish(within=PATIENCE)
    assert status == 128 + number
    assert re.fullmatch(r"demo: stopped by .*; nothing it started is left\n", err)
    assert demo.left() == []
    assert database.shops() == []
    assert database.count("from pgqueue.jobs") == 0


def test_killed_it_still_leaves_no_process_and_no_file(
    demos: Demos, fresh_dsn: str, database: Database
) -> None:
    demo = demos.start("--orders", "200", dsn=fresh_dsn)
    database.until_finished(1)
    assert len(demo.processes()) > 5
    demo.process.kill()
    demo.process.wait()
    eventually(lambda: not demo.left(), "the keeper has cleaned up", 20)


def test_a_worker_that_dies_ends_the_demo_with_its_log(
    demos: Demos, fresh_dsn: str, database: Database
) -> None:
    demo = demos.start("--orders", "200", dsn=fresh_dsn)
    database.until_finished(1)
    demo.child("worker", "shop.app:app").kill()
    status, _, err = demo.finish(within=PATIENCE)
    assert status == 1
    assert err.startswith("demo: error: the worker was ended by signal 9 (Killed); the end of its log:\n")
    assert "worker_started" in err
    assert database.shops() == []
    assert database.count("from pgqueue.jobs") == 0


def test_an_executor_that_dies_costs_no_job(demos: Demos, fresh_dsn: str, database: Database) -> None:
    demo = demos.start("--orders", "30", dsn=fresh_dsn)
    worker = demo.child("worker", "shop.app:app")
    database.until_finished(1)
    executors = [each for each in worker.children(recursive=True) if not each.children()]
    executors[0].kill()
    status, out, _ = demo.finish()
    assert status == 0
    assert "0 lost" in out.splitlines()[-1]


def test_a_database_that_is_not_there_is_one_line(demos: Demos) -> None:
    status, out, err = demos.start("--dsn", "postgresql://127.0.0.1:1/nowhere", dsn=None).finish()
    assert (status, out) == (4, "")
    assert err.startswith("pgqueue: cannot migrate: ")
    assert "Traceback" not in err


def test_help_has_an_example() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "pgqueue.cli.main", "demo", "--help"],
        cwd=PACKAGE,
        capture_output=True,
        text=True,
        check=True,
    )
    assert "pgqueue demo --orders 1000 -c 4" in done.stdout
    assert "Exit status: 0 the audit holds" in done.stdout
