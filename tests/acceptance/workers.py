"""Real workers for the acceptance tests: the command itself, in a session of its own, with its log in a file.

What task bodies did is read from the ledger, a file that they append to: it outlives every process and every
database of a test. Every process that descends from a worker carries a mark in its environment, so one that
escapes its parent is still found.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import secrets
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

import psutil
import psycopg
import pytest
from psycopg.abc import Buffer
from psycopg.rows import dict_row
from psycopg.types.datetime import TimestamptzLoader
from psycopg.types.json import set_json_loads

import pgqueue
from pgqueue import PgQueue, Signature

T = TypeVar("T")
Row = dict[str, Any]

APPS = Path(__file__).with_name("apps")
PACKAGE = Path(pgqueue.__file__).parents[1]
PATIENCE = 45.0
"""Seconds until a test gives up: how long things take on a busy machine is not what these tests check."""
MARK = "ACCEPTANCE_MARK"


def eventually(look: Callable[[], T], what: str, within: float = PATIENCE) -> T:
    """The first true answer of `look`."""
    deadline = time.monotonic() + within
    while not (found := look()):
        if time.monotonic() > deadline:
            pytest.fail(f"not within {within:g} s: {what}; the last look gave {found!r}")
        time.sleep(0.01)
    return found


def _loads(text: bytes | str) -> Any:
    """JSON, or its text where Python cannot read it."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return text.decode() if isinstance(text, bytes) else text


class _AnyTime(TimestamptzLoader):
    """A time, or None where Python's calendar does not reach."""

    def load(self, data: Buffer) -> Any:
        try:
            return super().load(data)
        except psycopg.DataError:
            return None


class Jobs:
    """The queue in the eyes of its users: enqueues jobs of `tests_app` and looks what became of them."""

    def __init__(self, dsn: str) -> None:
        self.dsn = dsn
        self._app = PgQueue("client")
        self._connection: psycopg.Connection[Row] | None = None

    @property
    def connection(self) -> psycopg.Connection[Row]:
        if self._connection is None or self._connection.closed:
            self._connection = psycopg.connect(self.dsn, autocommit=True, row_factory=dict_row)
            set_json_loads(_loads, self._connection)
            self._connection.adapters.register_loader("timestamptz", _AnyTime)
        return self._connection

    def close(self) -> None:
        if self._connection is not None:
            self._connection.close()

    def sql(self, query: str, *parameters: object) -> list[Row]:
        """Run a statement; connects again, and again for a while, when the database was away."""
        deadline = time.monotonic() + PATIENCE
        while True:
            try:
                cursor = self.connection.execute(query, parameters)
                return cursor.fetchall() if cursor.description else []
            except psycopg.OperationalError:
                self.close()
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.05)

    def add(self, task: str, *args: object, **options: Any) -> str:
        """Enqueue one job of `tests_app`; its id."""
        with self.connection.transaction():
            return self._app.send_task(_named(task), args, connection=self.connection, **options).id

    def add_many(self, task: str, arguments: Iterable[Sequence[object]], **options: Any) -> list[str]:
        """Enqueue one job for each element of `arguments`; their ids in order."""
        calls = [Signature(_named(task), tuple(args), {}, options) for args in arguments]
        with self.connection.transaction():
            return self._app.enqueue_many(calls, connection=self.connection)

    def add_row(self, **columns: object) -> str:
        """Insert into the table as nobody should, and wake the worker; the job's id."""
        columns.setdefault("queue", "default")
        names = ", ".join(columns)
        values = ", ".join("%s" for _ in columns)
        (row,) = self.sql(
            f"insert into pgqueue.jobs (id, {names}) values (gen_random_uuid(), {values}) returning id::text",
            *columns.values(),
        )
        self.sql("select pgqueue.wake_workers(array[%s])", columns["queue"])
        return str(row["id"])

    def live(self, job: str) -> Row:
        """The job while it waits or runs."""
        (row,) = self.sql("select * from pgqueue.jobs where id = %s", job)
        return row

    def wait(self, ids: str | Sequence[str], within: float = PATIENCE) -> None:
        """Until the jobs have ended."""
        wanted = [ids] if isinstance(ids, str) else list(ids)

        def all_ended() -> bool:
            query = "select count(*) as live from pgqueue.jobs where id = any(%s::uuid[])"
            return bool(self.sql(query, wanted)[0]["live"] == 0)

        eventually(all_ended, f"{len(wanted)} jobs end", within)

    def ends(self, ids: Sequence[str], within: float = PATIENCE) -> Counter[str]:
        """How many ended in which state, once all have; fails if a job was lost or ended twice."""
        self.wait(ids, within)
        found = self.sql(
            "select id::text as id, state from pgqueue.all_jobs where id = any(%s::uuid[])", list(ids)
        )
        times = Counter(row["id"] for row in found)
        assert len(ids) == len(set(ids))
        assert [job for job in ids if times[job] != 1] == [], "jobs that did not end exactly once"
        return Counter(row["state"] for row in found)

    def finished(self, job: str, within: float = PATIENCE) -> Row:
        """The job's row in history."""
        return self._ended(job, "finished_jobs", within)

    def dead(self, job: str, within: float = PATIENCE) -> Row:
        """The job's dead letter."""
        return self._ended(job, "dead_letters", within)

    def failures(self, job: str) -> list[Row]:
        return self.sql("select * from pgqueue.failures where job_id = %s order by failed_at", job)

    def until(self, job: str, state: str, within: float = PATIENCE) -> Row:
        """The live job, once it is in this state."""

        def look() -> Row | None:
            found = self.sql("select * from pgqueue.jobs where id = %s and state = %s", job, state)
            return found[0] if found else None

        found = eventually(look, f"job {job} is {state}", within)
        assert found is not None
        return found

    def make_due(self, job: str) -> None:
        """Let a scheduled job run now, and tell the workers."""
        self.sql("update pgqueue.jobs set eta = clock_timestamp() where id = %s and state = 'scheduled'", job)
        self.sql("select pg_notify('pgqueue', 'default')")

    def _ended(self, job: str, table: str, within: float) -> Row:
        self.wait(job, within)
        found = self.sql(f"select * from pgqueue.{table} where id = %s", job)
        if len(found) != 1:
            state = self.sql("select * from pgqueue.all_jobs where id = %s", job)
            pytest.fail(f"job {job} is not once in {table}, it is {state}")
        return found[0]


def _named(task: str) -> str:
    return task if "." in task else f"tests_app.{task}"


def whole_lines(text: str) -> list[Any]:
    """The values of a log with one in JSON per line.

    A line is written at once, but may be seen before it is whole; and the kernel cuts a write at the end of a
    page when its process is killed.
    """
    found = []
    for line in text.splitlines(keepends=True):
        if line.endswith("}\n") or line.endswith("]\n"):
            found.append(json.loads(line))
    return found


class Ledger:
    """What task bodies noted, in the order they did."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def entries(self, event: str | None = None) -> list[Row]:
        if not self.path.exists():
            return []
        found: list[Row] = whole_lines(self.path.read_text())
        return [entry for entry in found if event is None or entry["event"] == event]

    def of(self, job: str, event: str = "start") -> list[Row]:
        return [entry for entry in self.entries(event) if entry["job"] == job]

    def count(self, event: str = "start") -> int:
        return len(self.entries(event))

    def runs(self) -> Counter[str]:
        """How often each job was started."""
        return Counter(entry["job"] for entry in self.entries("start"))

    def labels(self) -> list[Any]:
        """The first argument of each job started, in order."""
        return [entry["label"] for entry in self.entries("start")]


@dataclass
class Worker:
    """A running `pgqueue worker`."""

    process: subprocess.Popen[bytes]
    log_path: Path

    @property
    def log(self) -> str:
        return self.log_path.read_text(errors="replace")

    @property
    def id(self) -> str:
        return self.wait_for_log(r"worker_started id=(\S+)").group(1)

    @property
    def pid(self) -> int:
        return self.process.pid

    def wait_for_log(self, pattern: str, within: float = PATIENCE) -> re.Match[str]:
        """The first match of `pattern` in the log, as soon as there is one."""

        def look() -> re.Match[str] | None:
            found = re.search(pattern, self.log)
            if found is None and self.process.poll() is not None:
                found = re.search(pattern, self.log)
                if found is None:
                    pytest.fail(f"the worker ended with status {self.process.returncode} before {pattern!r}")
            return found

        found = eventually(look, f"{pattern!r} in the worker's log", within)
        assert found is not None
        return found

    @property
    def fork_server(self) -> psutil.Process:
        return next(each for each in living(psutil.Process(self.pid).children()))

    @property
    def executors(self) -> list[psutil.Process]:
        return living(self.fork_server.children())

    def full_crew(self) -> list[psutil.Process]:
        """All its executors: a worker is started when it has asked for them, they follow within moments."""
        count = int(self.wait_for_log(r"worker_started .* concurrency=(\d+)").group(1))

        def look() -> list[psutil.Process]:
            found = self.executors
            return found if len(found) == count else []

        return eventually(look, f"{count} executors")

    def tree(self) -> list[psutil.Process]:
        """The worker and all below it."""
        top = psutil.Process(self.pid)
        return [top, *top.children(recursive=True)]

    def send(self, number: signal.Signals) -> None:
        self.process.send_signal(number)

    def wait(self, within: float = PATIENCE) -> int:
        """Its exit status, once it has ended."""
        try:
            return self.process.wait(within)
        except subprocess.TimeoutExpired:
            pytest.fail(f"the worker did not end within {within:g} s")

    def stop(self, number: signal.Signals = signal.SIGTERM, within: float = PATIENCE) -> int:
        """Ask it to stop; its exit status."""
        self.send(number)
        return self.wait(within)

    def kill(self) -> None:
        """kill -9 the supervisor; returns when all its processes are gone."""
        tree = self.tree()
        self.process.kill()
        self.process.wait()
        gone(tree)


def living(processes: Iterable[psutil.Process]) -> list[psutil.Process]:
    found = []
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            if process.status() not in (psutil.STATUS_ZOMBIE, psutil.STATUS_DEAD):
                found.append(process)
    return found


def gone(processes: Sequence[psutil.Process]) -> None:
    """Until none of the processes lives."""
    eventually(lambda: not living(processes), f"processes {[p.pid for p in processes]} end", 15)


class Workers:
    """Starts workers, and sees to it that no process of theirs is left."""

    def __init__(self, dsn: str | None, folder: Path, apps: Path = APPS) -> None:
        self._dsn = dsn
        self._folder = folder
        self._apps = apps
        self._mark = secrets.token_hex(8)
        self._started: list[Worker] = []
        self.ledger = Ledger(folder / "ledger")

    def __enter__(self) -> Workers:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def environment(self, **changes: str | None) -> dict[str, str]:
        """What a command of ours is started with; None takes a variable out."""
        inherited = {
            key: value for key, value in os.environ.items() if not key.startswith(("PGQUEUE_", "PG"))
        }
        path = os.pathsep.join([str(PACKAGE), *filter(None, [os.environ.get("PYTHONPATH")])])
        given: dict[str, str | None] = {
            "PYTHONPATH": path,
            "PGQUEUE_DSN": self._dsn,
            "LEDGER": str(self.ledger.path),
            MARK: self._mark,
        }
        merged = inherited | given | changes
        return {key: value for key, value in merged.items() if value is not None}

    def run(
        self, *arguments: str, env: Mapping[str, str | None] | None = None, cwd: Path | None = None
    ) -> subprocess.CompletedProcess[str]:
        """Run a command of ours to its end."""
        return subprocess.run(
            [sys.executable, "-m", "pgqueue.cli.main", *arguments],
            cwd=cwd or self._apps,
            env=self.environment(**(env or {})),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=90,
            start_new_session=True,
        )

    def start(
        self,
        *flags: str,
        app: str = "tests_app:app",
        env: Mapping[str, str | None] | None = None,
        options: Sequence[str] = (),
        ready: bool = True,
        all_queues: bool = False,
    ) -> Worker:
        """Start a worker, of the queue `default` unless the flags name others.

        Args:
            options: Come before the command.
            ready: Return when it serves.
            all_queues: Serve every queue there is; it finds each within a second.
        """
        log_path = self._folder / f"worker-{len(self._started) + 1}.log"
        command = [sys.executable, "-m", "pgqueue.cli.main", "-A", app, *options, "worker", *flags]
        if "-Q" not in flags and not all_queues:
            command += ["-Q", "default"]
        if "--shutdown-timeout" not in flags:
            command += ["--shutdown-timeout", "10"]
        with log_path.open("wb") as log:
            process = subprocess.Popen(
                command,
                cwd=self._apps,
                env=self.environment(**(env or {})),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        worker = Worker(process, log_path)
        self._started.append(worker)
        if ready:
            worker.wait_for_log("worker_started")
        return worker

    @property
    def started(self) -> list[Worker]:
        """All the workers there were."""
        return list(self._started)

    def processes(self) -> list[psutil.Process]:
        """All living processes that descend from these workers, wherever they are now."""
        found = []
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error, OSError):
                if process.environ().get(MARK) == self._mark:
                    found.append(process)
        return living(found)

    def close(self) -> None:
        """Stop what still runs; shows the logs, and fails if a worker does not stop or left a process
        behind.
        """
        complaints = []
        for number, worker in enumerate(self._started, 1):
            if worker.process.poll() is None:
                worker.send(signal.SIGCONT)
                worker.send(signal.SIGTERM)
                try:
                    worker.process.wait(20)
                except subprocess.TimeoutExpired:
                    complaints.append(f"worker {number} did not stop")
                    worker.process.kill()
                    worker.process.wait()
            print(f"--- worker {number}, exit status {worker.process.returncode}")
            print(
                worker.log
                if len(worker.log) < 20_000
                else worker.log[:10_000] + "\n[…]\n" + worker.log[-10_000:]
            )
        deadline = time.monotonic() + 5
        while (left := self.processes()) and time.monotonic() < deadline:
            time.sleep(0.05)
        for process in left:
            with contextlib.suppress(psutil.NoSuchProcess):
                complaints.append(f"process {process.pid} is left: {' '.join(process.cmdline())[:200]}")
                process.kill()
        if complaints:
            pytest.fail("; ".join(complaints), pytrace=False)


class Gate:
    """Lets a task body wait until the test says go: `jobs.add("gated", gate.path)`."""

    def __init__(self, folder: Path) -> None:
        self.path = str(folder / f"gate-{secrets.token_hex(4)}")

    def open(self) -> None:
        Path(self.path).touch()
