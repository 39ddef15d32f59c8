"""A queue in a test's hands: what is enqueued, running it, and time."""

from __future__ import annotations

import asyncio
import bdb
import contextlib
import json
import os
import socket
import sys
from collections import Counter
from collections.abc import Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextvars import copy_context
from dataclasses import asdict
from datetime import datetime, timedelta
from typing import Any, Final, Unpack

import psycopg

from pgqueue import __version__
from pgqueue.app import PgQueue
from pgqueue.database.connection import (
    AsyncConnection,
    Channel,
    Rows,
    Statement,
    Steps,
    SyncConnection,
    adrive,
    drive,
    recognise_async,
    recognise_sync,
)
from pgqueue.database.dsn import is_pooled
from pgqueue.database.queries import query
from pgqueue.database.session import Session, open_session
from pgqueue.errors import shown
from pgqueue.job import ClaimedJob, current_request
from pgqueue.task import Task
from pgqueue.testing.enqueued import (
    EnqueuedJob,
    JobMatch,
    check_match,
    described,
    differences,
    name_of,
    read_jobs,
    table,
)
from pgqueue.testing.runs import Bench, Drained, Run
from pgqueue.testing.server import QueueDatabase, open_database
from pgqueue.testing.timeline import Moment, Timeline, TravellingClient, is_in_event_loop
from pgqueue.worker.identity import new_worker_id
from pgqueue.worker.wire import Ended

MOST_RUNS: Final = 1000
"""Of one `drain()`, unless the test says otherwise."""

_COLUMNS: Final = (
    "id", "state", "task", "queue", "args", "kwargs", "priority", "eta", "expires_at", "attempt", "retries",
    "unique_key", "headers",
)  # fmt: skip
"""Of `list_live_jobs`."""


class QueueTester:
    """An application's queue in one test: made by `Workbench.test()`, and as the fixture `pgqueue_app`.

    Attributes:
        app: The application, whose jobs go to the tests' database now.
        dsn: That database's URL.
        schema: Where the queue is in it.
    """

    def __init__(self, bench: Bench, session: Session, timeline: Timeline, app: PgQueue) -> None:
        self.app = app
        self.dsn = app.dsn
        self.schema = app.schema
        self.runs: list[Run] = []
        """All runs of this test, in order."""
        self._bench = bench
        self._session = session
        self._timeline = timeline

    def __str__(self) -> str:
        """What has been run in this test, and what is enqueued."""
        jobs = self.enqueued()
        lines = [f"  {run}" for run in self.runs] or ["  nothing"]
        waiting = [table([(job, ()) for job in jobs], self.now)] if jobs else ["  nothing"]
        return "\n".join(["run:", *lines, "enqueued:", *waiting])

    # Running jobs.

    def drain(
        self,
        *,
        until: datetime | timedelta | None = None,
        with_scheduled: bool = False,
        raise_errors: bool = False,
        limit: int = MOST_RUNS,
    ) -> Drained:
        """Run all jobs that are ready, and what they enqueue, here and to the end, as a worker would.

        A job that waits, for its eta or for a retry, is left waiting, unless you let time pass:

        Args:
            until: Let time pass until then, or for so long: each job that falls due on the way is run at its
                time, and schedules fire. Afterwards it is that time.
            with_scheduled: Go on to whatever waits, as often as it takes, until nothing does. Schedules do
                not fire, they would never end.
            raise_errors: Raise the first error that a task raises, once its outcome is recorded.
            limit: Runs after which something must be wrong.

        Raises:
            RuntimeError: More is ready after `limit` runs.
        """
        end = self._end(until, with_scheduled)
        return drive(self._drain(end, with_scheduled, raise_errors, limit), self._run)

    async def adrain(
        self,
        *,
        until: datetime | timedelta | None = None,
        with_scheduled: bool = False,
        raise_errors: bool = False,
        limit: int = MOST_RUNS,
    ) -> Drained:
        """`drain` on the event loop that runs: `async def` tasks run on it, others in a thread."""
        end = self._end(until, with_scheduled)
        return await adrive(self._drain(end, with_scheduled, raise_errors, limit), self._arun)

    def run_one(
        self,
        task: Task[..., Any] | str | None = None,
        *,
        queue: str | None = None,
        raise_errors: bool = False,
    ) -> Run | None:
        """Run the next job that is ready, of this task, from this queue; None if there is none."""
        return drive(self._one(queue, name_of(task), raise_errors), self._run)

    async def arun_one(
        self,
        task: Task[..., Any] | str | None = None,
        *,
        queue: str | None = None,
        raise_errors: bool = False,
    ) -> Run | None:
        """`run_one` where an event loop runs."""
        return await adrive(self._one(queue, name_of(task), raise_errors), self._arun)

    # What is enqueued.

    def enqueued(
        self, task: Task[..., Any] | str | None = None, *, connection: SyncConnection | None = None
    ) -> list[EnqueuedJob]:
        """The jobs that have not ended, of this task if one is named, in the order in which they came.

        Args:
            connection: Look through this one, which sees what its open transaction has enqueued.
        """
        name = name_of(task)
        return [job for job in self._jobs(connection) if name in (None, job.task)]

    async def aenqueued(
        self, task: Task[..., Any] | str | None = None, *, connection: AsyncConnection
    ) -> list[EnqueuedJob]:
        """`enqueued` through an async connection, which sees what its open transaction has enqueued."""
        name = name_of(task)
        rows = await recognise_async(connection, "aenqueued").run(self.schema, _list_live_jobs)
        return [job for job in self._read(rows) if name in (None, job.task)]

    def assert_enqueued(
        self,
        task: Task[..., Any] | str | None = None,
        *,
        count: int | None = None,
        connection: SyncConnection | None = None,
        **match: Unpack[JobMatch],
    ) -> EnqueuedJob:
        """A job like this has been enqueued and has not ended; returns the first one.

        Args:
            task: Of which task.
            count: Exactly so many are like this.
            connection: As for `enqueued`.
            match: See `JobMatch`.

        Raises:
            AssertionError: There is none, or another number of them; the message lists what there is.
        """
        __tracebackhide__ = True
        if count == 0:
            raise ValueError("count must be at least 1, got 0; use assert_not_enqueued()")
        found, judged = self._judge(task, match, connection)
        if found and count in (None, len(found)):
            return found[0]
        wanted = described(name_of(task), match)
        if count is not None and found:
            wanted = f"{count} x {wanted}"
        what = f"{wanted} must be enqueued, got {len(found)}" if found else f"no {wanted} is enqueued"
        raise AssertionError(what + self._instead(judged))

    def assert_not_enqueued(
        self,
        task: Task[..., Any] | str | None = None,
        *,
        connection: SyncConnection | None = None,
        **match: Unpack[JobMatch],
    ) -> None:
        """No job like this is enqueued; the opposite of `assert_enqueued`."""
        __tracebackhide__ = True
        found, _ = self._judge(task, match, connection)
        if found:
            wanted = described(name_of(task), match)
            lines = table([(job, ()) for job in found], self.now)
            raise AssertionError(f"no {wanted} may be enqueued, got {len(found)}:\n{lines}")

    # Time.

    @property
    def now(self) -> datetime:
        """The test's time: the database's, and what was travelled."""
        return self._timeline.now

    def travel(
        self,
        by: timedelta | None = None,
        *,
        days: float = 0,
        hours: float = 0,
        minutes: float = 0,
        seconds: float = 0,
        ticks: bool = True,
    ) -> datetime:
        """Let so much time pass; returns the time it is then. Runs nothing.

        Jobs that fall due are ready for the next `drain()`; schedules enqueue their jobs at each tick.

        Args:
            by: The same in one.
            ticks: False lets the ticks of schedules pass unnoticed.
        """
        given = timedelta(days=days, hours=hours, minutes=minutes, seconds=seconds)
        if not isinstance(by, timedelta | None):
            raise TypeError(f"travel takes a timedelta, or hours=, minutes= and so on, got {shown(by)}")
        self._timeline.travel(self._timeline.later((by or timedelta(0)) + given), ticks=ticks)
        return self.now

    def travel_to(self, when: datetime, *, ticks: bool = True) -> datetime:
        """Let time pass until then: `travel`, to a time in the future."""
        self._timeline.travel(self._timeline.at(when), ticks=ticks)
        return self.now

    def _end(self, until: datetime | timedelta | None, with_scheduled: bool) -> Moment | None:
        if until is None:
            return None
        if with_scheduled:
            raise ValueError("until and with_scheduled exclude each other: give one of them")
        if isinstance(until, timedelta):
            return self._timeline.later(until)
        if not isinstance(until, datetime):
            raise TypeError(f"until must be a datetime with a timezone, or a timedelta, got {shown(until)}")
        return self._timeline.at(until, "until")

    def _drain(
        self, end: Moment | None, with_scheduled: bool, raise_errors: bool, limit: int
    ) -> Generator[ClaimedJob, Ended, Drained]:
        _refuse_in_task("drain")
        runs: list[Run] = []
        while True:
            while (run := (yield from self._next(None, None))) is not None:
                runs.append(run)
                if raise_errors:
                    self._raise(run)
                if len(runs) >= limit and self._bench.peek():
                    raise RuntimeError(_endless(runs, limit))
            if not self._go_on(end, with_scheduled):
                break
            if len(runs) >= limit and self._bench.peek():
                raise RuntimeError(_endless(runs, limit))
        if end is not None:
            self._timeline.travel(end)
        with self._session.transaction():
            left = {row["state"]: row["jobs"] for row in self._session.run("count_live_jobs")}
        return Drained(runs, left)

    def _go_on(self, end: Moment | None, with_scheduled: bool) -> bool:
        """Go to where something is due next; False if there is nothing more to come."""
        self._timeline.look_again()
        if self._bench.peek():
            return True
        if end is None and not with_scheduled:
            return False
        tick = self._timeline.next_tick(end) if end is not None else None
        eta = self._timeline.next_eta(end)
        if tick is not None and (eta is None or tick <= eta):
            self._timeline.tick(tick)
        elif eta is not None:
            self._timeline.put_forward(eta)
        else:
            return False
        return True

    def _one(
        self, queue: str | None, task: str | None, raise_errors: bool
    ) -> Generator[ClaimedJob, Ended, Run | None]:
        _refuse_in_task("run_one")
        run = yield from self._next(queue, task)
        if run is not None and raise_errors:
            self._raise(run)
        return run

    def _next(self, queue: str | None, task: str | None) -> Generator[ClaimedJob, Ended, Run | None]:
        taken = self._bench.take(queue, task)
        if isinstance(taken, ClaimedJob):
            ended = yield taken
            taken = self._bench.settle(ended)
            _let_through(self._bench.body.error)
        if taken is not None:
            self.runs.append(taken)
        return taken

    def _run(self, job: ClaimedJob) -> Ended:
        if not (is_in_event_loop() and self._bench.is_async(job)):
            return self._bench.body.run(job)
        with ThreadPoolExecutor(1) as thread:  # below a loop, which would not let another run in its thread
            return thread.submit(copy_context().run, self._bench.body.run, job).result()

    async def _arun(self, job: ClaimedJob) -> Ended:
        if self._bench.is_async(job):
            return await self._bench.body.arun(job)
        return await asyncio.to_thread(self._bench.body.run, job)

    def _raise(self, run: Run) -> None:
        if run.error is not None and run.end in ("retried", "dead"):
            run.error.add_note(f"raised by {run.task}, job {run.job_id}, attempt {run.attempt}: {run.end}")
            raise run.error

    def _jobs(self, connection: SyncConnection | None) -> list[EnqueuedJob]:
        if connection is not None:
            return self._read(recognise_sync(connection, "enqueued").run(self.schema, _list_live_jobs))
        with self._session.transaction():
            return read_jobs(self.app, self._session.run("list_live_jobs"))

    def _read(self, rows: Rows) -> list[EnqueuedJob]:
        return read_jobs(self.app, [dict(zip(_COLUMNS, row, strict=True)) for row in rows])

    def _judge(
        self, task: Task[..., Any] | str | None, match: JobMatch, connection: SyncConnection | None
    ) -> tuple[list[EnqueuedJob], list[tuple[EnqueuedJob, list[str]]]]:
        """The jobs that match, and all, those of the task first, each with what is wrong with it."""
        name, now, found, judged = name_of(task), self.now, [], []
        check_match(self.app, name, match)
        for job in self._jobs(connection):
            wrong = ["task"] if name not in (None, job.task) else differences(self.app, job, match, now)
            judged.append((job, wrong))
            if not wrong:
                found.append(job)
        return found, sorted(judged, key=lambda each: each[1] == ["task"])

    def _instead(self, judged: list[tuple[EnqueuedJob, list[str]]]) -> str:
        ended = Counter(f"{run.task} {run.end}" for run in self.runs)
        ran = ", ".join(f"{count} x {what}" for what, count in ended.items())
        there = f"; enqueued are:\n{table(judged, self.now)}" if judged else "; nothing is enqueued"
        there += f"\nrun in this test: {ran}" if ran else ""
        with self._session.transaction():
            if self._session.run("count_open_writers")[0]["writers"]:
                there += (
                    "\na transaction is open: what it has enqueued is seen when it commits, or by connection="
                )
        return there


class Workbench:
    """What a run of tests keeps for one application: its schema, one connection, a worker's name.

    Made by `open_workbench`.
    """

    def __init__(self, app: PgQueue, session: Session, dsn: str) -> None:
        self._app = app
        self._session = session
        self._settings = {"dsn": dsn, "schema": session.schema, "pool": "solo"}
        self._client = TravellingClient(session.schema, dsn)
        self._worker = new_worker_id()
        self._prepare_statements()
        with self._standing_in():
            app.import_tasks()
            self._bench = Bench(app, session, self._worker)

    @contextlib.contextmanager
    def test(self) -> Iterator[QueueTester]:
        """A test's own, empty queue: in the block the application enqueues into it."""
        with self._standing_in():
            schedules = [asdict(schedule) for schedule in self._app.schedules.in_code()]
            self._begin(schedules)
            timeline = Timeline(self._session, self._worker, schedules)
            self._bench.timeline = self._client.timeline = timeline
            yield QueueTester(self._bench, self._session, timeline, self._app)

    def close(self) -> None:
        """Close its connections."""
        self._bench.close()
        self._client.close()

    def _standing_in(self) -> contextlib.AbstractContextManager[None]:
        return self._app.standing_in(self._app.read_config(**self._settings), self._client)

    def _prepare_statements(self) -> None:
        """Have the server plan each statement once, unless there is a pooler in between."""
        ((pid,),) = (row.values() for row in self._session.execute("SELECT pg_backend_pid() AS pid", {}))
        if not is_pooled(pid, self._session.connection):
            self._session.connection.prepare_threshold = 1

    def _register(self, schedules: list[dict[str, Any]]) -> None:
        """Be a worker, which has these schedules in its code; anew for each test, because a real worker would
        in the end take us for dead.
        """
        self._session.run(
            "register_worker",
            worker=self._worker,
            host=socket.gethostname(),
            pid=os.getpid(),
            queues=[],
            pool="tests",
            concurrency=1,
            version=__version__,
        )
        if schedules:
            document = json.dumps(schedules)
            self._session.run("put_schedules", schedules=document, source="code", replace=True)
            names = [each["name"] for each in schedules]
            self._session.run("hold_schedules", names=names, worker=self._worker)

    def _begin(self, schedules: list[dict[str, Any]]) -> None:
        """Delete what the test before has left."""
        try:
            with self._session.transaction():
                self._session.connection.execute(query("empty_queue", self._session.schema).text.encode())
                self._register(schedules)
        except psycopg.errors.LockNotAvailable as error:
            raise RuntimeError(
                "the queue cannot be emptied for this test: a transaction that an earlier one has left open "
                "holds its rows; close what tests open"
            ) from error


@contextlib.contextmanager
def open_workbench(app: PgQueue, database: QueueDatabase) -> Iterator[Workbench]:
    """What tests of this application need, on that database.

    Raises:
        AppNotLoaded: A module of its tasks cannot be imported.
    """
    schema = database.schema_for(app.read_config().schema)
    with open_session(database.dsn, schema=schema) as session:
        workbench = Workbench(app, session, database.dsn)
        try:
            yield workbench
        finally:
            workbench.close()


@contextlib.contextmanager
def queue_tester(app: PgQueue, dsn: str | None = None, *, server: str | None = None) -> Iterator[QueueTester]:
    """A queue for one test, or for a few, where there is no pytest: `with queue_tester(app) as queue:`.

    The fixture `pgqueue_app` is the same, with a database for all tests of the run.

    Args:
        dsn, server: See `open_database`.
    """
    with open_database(dsn, server=server) as database, open_workbench(app, database) as workbench:
        with workbench.test() as tester:
            yield tester


def _list_live_jobs(channel: Channel) -> Steps[Rows]:
    return (yield Statement("list_live_jobs", {}))


def _refuse_in_task(call: str) -> None:
    if current_request.get() is not None:
        raise RuntimeError(f"{call}() was called in a task, which {call}() is running: call it in the test")


def _let_through(error: BaseException | None) -> None:
    """Raise what is meant for the test run and not for the job that was running: Ctrl-C, pytest's time limit,
    the end of a debugger, the end of the test's own event loop.
    """
    if error is None:
        return
    pytests = sys.modules.get("_pytest.outcomes")
    others = (pytests.OutcomeException, pytests.Exit) if pytests is not None else ()
    if isinstance(error, (KeyboardInterrupt, bdb.BdbQuit, *others)):
        raise error
    if isinstance(error, asyncio.CancelledError) and is_in_event_loop():
        task = asyncio.current_task()
        if task is not None and task.cancelling():
            raise error


def _endless(runs: list[Run], limit: int) -> str:
    often = Counter(run.task for run in runs).most_common(3)
    most = ", ".join(f"{task} {count} times" for task, count in often)
    return (
        f"drain() has run {limit} jobs and more are ready ({most}): does a task enqueue itself, or retry or "
        "snooze for ever? if it must be so many, say drain(limit=…)"
    )
