"""Measure a queue on somebody's own server: what `pgqueue bench` does.

The queue is a schema of its own, with a real worker process of the application `pgqueue.noop`. Both are gone
at the end, however that comes: by return, by an exception, and when this process is killed, through a
*keeper* process that sees the end of its pipe, stops the worker and drops the schema. When the database is
gone as well, the schema stays, and the exception names the statement that drops it.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from types import TracebackType
from typing import IO, Final

from pgqueue.app import PgQueue
from pgqueue.config import PREFIX
from pgqueue.database import benchmark as stage
from pgqueue.database.benchmark import Server, Speed, Tick
from pgqueue.database.migrate import upgrade
from pgqueue.database.session import Session, open_session
from pgqueue.errors import DatabaseError, WorkerError
from pgqueue.noop import TASK, noop

Bar = Callable[[str, int], AbstractContextManager[Tick]]
"""Shows a measure's progress: its name and how many ticks it takes."""

BULK: Final = 1000
"""Jobs of one `enqueue_many`."""
MOST_BULK: Final = 300_000
"""Jobs that are enqueued in bulk at most: 70 MB of tables, and 100 MB of the server's log."""
LONE_PAUSE: Final = 0.05
"""Seconds between two lone jobs: the worker is asleep again by then, and still listens."""
FEWEST_LONE: Final = 20
PATIENCE: Final = 60.0
"""Seconds in which a worker must end some jobs, or come up, or stop."""

# Its input: the dsn and the schema, then the worker's pid. End of input without "done": we were killed.
_KEEPER = """
import json, os, signal, sys, time
dsn, schema = json.loads(sys.stdin.readline())
worker = None
for line in sys.stdin:
    if line == "done\\n":
        sys.exit()
    worker = int(line)
if worker:
    deadline = time.monotonic() + 30
    try:
        os.kill(worker, signal.SIGTERM)
        while time.monotonic() < deadline:
            os.kill(worker, 0)
            time.sleep(0.05)
        os.killpg(worker, signal.SIGKILL)
    except ProcessLookupError:
        pass
from pgqueue.database.benchmark import drop_schema
drop_schema(dsn, schema)
"""


@dataclass(frozen=True)
class Plan:
    """How much to measure.

    Attributes:
        jobs: That wait when the worker, or the bare loop, begins.
        seconds: Of each measure that goes by time.
        executors: Of the worker.
    """

    jobs: int
    seconds: float
    executors: int


@dataclass(frozen=True)
class Spread:
    """Some times in milliseconds: their mean, percentiles, and all of them, the shortest first."""

    samples: int
    mean: float
    p50: float
    p95: float
    p99: float
    all: tuple[float, ...]

    @classmethod
    def of(cls, seconds: Sequence[float]) -> Spread:
        ordered = tuple(sorted(1000 * each for each in seconds))
        p50, p95, p99 = (ordered[int(len(ordered) * part)] for part in (0.50, 0.95, 0.99))
        return cls(len(ordered), sum(ordered) / len(ordered), p50, p95, p99, ordered)


@dataclass(frozen=True)
class Figures:
    """What was found.

    Attributes:
        round_trip: Of a statement that does nothing.
        commit: From COMMIT to its answer.
        single: A job per call and commit, one after the other.
        single_calls: How long each of those calls took.
        bulk: `enqueue_many` with `BULK` jobs each.
        bare_loop: Claiming and deleting without a worker: what this server can do at best.
        drain: A worker with a full queue, by the database's clock.
        wake_up: From the enqueue of a lone job to its start, for an idle worker.
    """

    server: Server
    plan: Plan
    round_trip: Spread
    commit: Spread
    single: Speed
    single_calls: Spread
    bulk: Speed
    bare_loop: Speed
    drain: Speed
    wake_up: Spread


def measure(dsn: str, plan: Plan, bar: Bar, *, settings: Mapping[str, str] | None = None) -> Figures:
    """Run all measures, one after the other.

    Args:
        bar: What its ticks raise ends the benchmark.
        settings: Of the worker beside `dsn` and `schema`, as variables without their prefix.

    Raises:
        PermissionDenied: The role may not create a schema.
        WorkerError: The worker ended, or does nothing.
        DatabaseError: The database cannot be reached, refused something, or keeps the schema.
    """
    with queue_for_benchmark(dsn) as (session, keeper):
        milliseconds = round(1000 * plan.seconds)
        with bar("round trips", milliseconds // 4) as tick:
            round_trip = Spread.of(stage.round_trips(session, plan.seconds / 4, tick))
        with bar("commits", milliseconds // 2) as tick:
            commit = Spread.of(stage.commits(session, plan.seconds / 2, tick))
        with contextlib.closing(PgQueue("pgqueue-bench", dsn=dsn, schema=session.schema)) as app:
            with bar("single enqueues", milliseconds) as tick:
                single, single_calls = enqueue_singly(app, plan.seconds, tick)
            stage.truncate(session)
            with bar("bulk enqueues", milliseconds) as tick:
                bulk = enqueue_in_bulk(app, plan.seconds, tick)
            with bar("the bare loop", plan.jobs) as tick:
                stage.fill(session, plan.jobs, TASK)
                bare_loop = stage.bare_loop(session, tick)
            stage.truncate(session)
            command = ["-c", str(plan.executors)]
            with Worker(session, dsn, command, keeper=keeper, settings=settings) as worker:
                with bar("a worker", plan.jobs) as tick:
                    drained = worker.drain(plan.jobs, tick)
                stage.truncate(session)
                pause = LONE_PAUSE + 5 * (round_trip.p50 + commit.p50) / 1000
                with bar("lone jobs", 2 * milliseconds) as tick:
                    wake_up = worker.lone_jobs(app, 2 * plan.seconds, pause, tick)
        server = stage.describe(session)
    return Figures(
        server,
        plan,
        round_trip,
        commit,
        single,
        Spread.of(single_calls),
        bulk,
        bare_loop,
        drained,
        Spread.of(wake_up),
    )


@contextlib.contextmanager
def queue_for_benchmark(dsn: str) -> Iterator[tuple[Session, Keeper]]:
    """A session on a new, empty queue in a schema of its own, which is dropped at the end."""
    stage.require_right(dsn)
    schema = stage.new_schema_name()
    with Keeper(dsn, schema) as keeper, contextlib.ExitStack() as stack:
        stack.callback(stage.drop_schema, dsn, schema)
        try:
            upgrade(dsn, schema=schema)
        except DatabaseError:
            stack.pop_all()  # it is one transaction: there is nothing to drop
            raise
        session = stack.enter_context(open_session(dsn, schema=schema))
        stage.settle(session)
        yield session, keeper


def enqueue_singly(app: PgQueue, seconds: float, tick: Tick) -> tuple[Speed, list[float]]:
    """A job per call and commit; how long each call took comes second."""
    task = app.task(name=TASK)(noop.function)
    task.delay()  # connects
    calls = []
    began = time.perf_counter()
    for _ in stage.for_seconds(seconds, tick):
        called = time.perf_counter()
        task.delay()
        calls.append(time.perf_counter() - called)
    return Speed(len(calls), time.perf_counter() - began), calls


def enqueue_in_bulk(app: PgQueue, seconds: float, tick: Tick) -> Speed:
    """`BULK` jobs per call, for so long or until it is enough."""
    task, jobs = app.tasks[TASK], 0
    began = time.perf_counter()
    for _ in stage.for_seconds(seconds, tick):
        app.enqueue_many(task.s() for _ in range(BULK))
        jobs += BULK
        if jobs >= MOST_BULK:
            break
    return Speed(jobs, time.perf_counter() - began)


class Keeper:
    """Cleans up when this process is killed before its block has ended."""

    def __init__(self, dsn: str, schema: str) -> None:
        self._order = json.dumps([dsn, schema])

    def __enter__(self) -> Keeper:
        self._process = subprocess.Popen(
            [sys.executable, "-c", _KEEPER],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
            text=True,
        )
        self.tell(self._order)  # not as an argument, which everybody could read
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.tell("done")
        with contextlib.suppress(BrokenPipeError):
            self._process.communicate()

    def tell(self, line: object) -> None:
        """The pid of what is to be stopped, 0 for nothing."""
        if self._process.stdin is not None:
            with contextlib.suppress(BrokenPipeError):  # somebody has killed it; it goes without
                self._process.stdin.write(f"{line}\n")
                self._process.stdin.flush()


class Worker:
    """A real worker process on the session's queue; within its block it is up, has run a job and is idle.

    Attributes:
        process: The supervisor.

    Args:
        arguments: Behind `pgqueue -A pgqueue.noop:app worker`.
        settings: Beside `dsn` and `schema`; other variables of ours are not handed on, so that they change
            nothing that is measured.
    """

    def __init__(
        self,
        session: Session,
        dsn: str,
        arguments: Sequence[str],
        *,
        keeper: Keeper,
        settings: Mapping[str, str] | None = None,
    ) -> None:
        self._session = session
        ours = {**(settings or {}), "dsn": dsn, "schema": session.schema}
        self._environment = {key: value for key, value in os.environ.items() if not key.startswith(PREFIX)}
        self._environment |= {f"{PREFIX}{name.upper()}": value for name, value in ours.items()}
        application = ["-A", f"{noop.function.__module__}:app"]
        self._command = [
            sys.executable,
            "-m",
            "pgqueue.cli.main",
            *application,
            "worker",
            "-Q",
            "default",
            *arguments,
        ]
        self._keeper = keeper
        self._log: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115  (closed by `_end`)

    def __enter__(self) -> Worker:
        self.process = subprocess.Popen(
            self._command,
            env=self._environment,
            stdin=subprocess.DEVNULL,
            stdout=self._log,
            stderr=self._log,
            start_new_session=True,  # Ctrl-C is for us, who stop it
        )
        self._keeper.tell(self.process.pid)
        try:
            self._await_start()
            self._run(1, lambda _: None)
        except BaseException:
            self._end()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._end()

    def _await_start(self) -> None:
        deadline = time.monotonic() + PATIENCE
        while b"worker_started" not in self._said():
            self.check()
            if time.monotonic() > deadline:
                raise self._error(f"did not start within {PATIENCE:g} s")
            time.sleep(0.02)

    def _end(self) -> None:
        self.process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(PATIENCE)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)  # what is left of it
        self.process.wait()
        self._keeper.tell(0)
        self._log.close()

    def check(self) -> None:
        """WorkerError if it has ended."""
        status = self.process.poll()
        if status is not None:
            how = f"signal {-status}" if status < 0 else f"exit status {status}"
            raise self._error(f"ended with {how}")

    def drain(self, jobs: int, tick: Tick) -> Speed:
        """Let it run so many jobs that appear at once; ticks are jobs."""
        stage.truncate(self._session)
        self._run(jobs, tick)
        (row,) = self._session.run("measure_drain")
        if (row["jobs"], row["different"]) != (jobs, jobs):
            raise self._error(f"ran {row['different']} of {jobs} jobs, in {row['jobs']} runs")
        return Speed(jobs, row["seconds"])

    def _run(self, jobs: int, tick: Tick) -> None:
        with self._session.connection.transaction():
            self._session.run("fill_queue", jobs=jobs, task=TASK)
            self._session.run("wake_workers", queues=["default"], eta=None)
        self.await_end(jobs, tick)

    def await_end(self, jobs: int, tick: Tick) -> None:
        """Until no job is left of so many."""
        left, deadline = jobs, time.monotonic() + PATIENCE
        while left:
            time.sleep(0.05 if jobs < 1000 else 0.2)  # a look reads the whole table
            self.check()
            now = stage.live_jobs(self._session)
            tick(left - now)
            if now < left:
                left, deadline = now, time.monotonic() + PATIENCE
            elif time.monotonic() > deadline:
                raise self._error(f"has run no job for {PATIENCE:g} s")

    def lone_jobs(self, app: PgQueue, seconds: float, pause: float, tick: Tick) -> list[float]:
        """Seconds from the enqueue of each to its start; ticks are milliseconds."""
        jobs = max(FEWEST_LONE, int(seconds / pause))
        for number in range(jobs):
            app.tasks[TASK].delay()
            time.sleep(pause + 0.001 * (number % 7))  # in step with nothing
            tick(round(1000 * seconds / jobs))
            self.check()
        self.await_end(jobs, lambda _: None)
        return [row["seconds"] for row in self._session.run("list_waits")]

    def _error(self, what: str) -> WorkerError:
        lines = self._said().decode(errors="replace").splitlines()[-20:]
        return WorkerError("\n".join([f"the benchmark's worker {what}; the end of its log:", *lines]))

    def _said(self) -> bytes:
        return os.pread(self._log.fileno(), 1 << 24, 0)
