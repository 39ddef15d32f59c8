"""Running jobs in this process with the statements and the decisions of a worker.

One job at a time is promoted, claimed, run and acked as a worker with one slot would, each step in a
transaction of its own. What a worker decides about an outcome `Body` and `Dispatcher` decide here too. There
is no supervisor: nothing is killed, and no time limit holds.
"""

from __future__ import annotations

import mmap
from collections import Counter
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any, Final, Literal

import msgspec

from pgqueue.app import PgQueue
from pgqueue.database.session import Session
from pgqueue.database.store import Outcome, ack_calls, decode_claim, decode_claimed
from pgqueue.errors import Retry, Signal, UnknownTask
from pgqueue.job import ClaimedJob, Progress
from pgqueue.task import Task
from pgqueue.testing.timeline import Timeline
from pgqueue.worker.body import Body
from pgqueue.worker.dispatcher import Dispatcher, Executor, Slot
from pgqueue.worker.forkserver import facts_of
from pgqueue.worker.wire import Board, Ended, Failed, Snoozed, Succeeded, clock

End = Literal["succeeded", "retried", "snoozed", "dead", "cancelled", "expired", "released", "stale"]

_PROMOTE_BATCH: Final = 500


@dataclass(frozen=True, slots=True)
class Run:
    """What became of one run of a job.

    Attributes:
        end: `succeeded`, `cancelled`, `expired` (it was not run) or `dead`: the job has ended. `retried` or
            `snoozed`: it runs again after `delay`. `released`, `stale`: nothing of the run is there.
        result: What the task returned.
        error: What it raised, None for an error that did not come from the run.
        reason: Why it is dead, as in `dead_letters`.
        delay: Seconds until it is due again.
        seconds: How long it took.
        progress: The last that it said with `self.progress()`.
    """

    job_id: str
    task: str
    queue: str
    attempt: int
    end: End
    result: Any = None
    error: BaseException | None = None
    reason: str | None = None
    delay: float | None = None
    seconds: float = 0.0
    progress: Progress | None = None

    def __str__(self) -> str:
        what = f"{self.task} {self.end}"
        if self.attempt > 1:
            what += f", attempt {self.attempt}"
        if self.reason:
            what += f", {self.reason}"
        if self.delay is not None:
            what += f", again in {self.delay:g} s"
        if self.error is not None:
            what += f": {type(self.error).__name__}: {self.error}".rstrip(": ")
        return what


@dataclass(frozen=True, slots=True, repr=False)
class Drained:
    """What a `drain()` has done; printed, it is a page to read.

    Attributes:
        runs: Each run, in order.
        left: How many jobs have not ended, by state.
    """

    runs: list[Run] = field(default_factory=list)
    left: Mapping[str, int] = field(default_factory=dict)

    @property
    def counts(self) -> dict[str, int]:
        """How many runs have come to which end."""
        return dict(Counter(run.end for run in self.runs))

    def of(self, task: Task[..., Any] | str) -> list[Run]:
        """The runs of this task."""
        name = task if isinstance(task, str) else task.name
        return [run for run in self.runs if run.task == name]

    def __repr__(self) -> str:
        counts = ", ".join(f"{count} {end}" for end, count in self.counts.items()) or "nothing was ready"
        left = ", ".join(f"{count} {state}" for state, count in self.left.items())
        return "\n".join([f"{counts}; left: {left or 'nothing'}", *(f"  {run}" for run in self.runs)])


class Patience:
    """Lets a body run for as long as it likes; it is told of its cancellation when it asks."""

    def __init__(self, session: Session, worker: str) -> None:
        self._session = session
        self._worker = worker
        self.job = ""

    def enter(self, number: int) -> None:
        """Nothing will be raised in it."""

    def leave(self) -> None:
        """Nothing was."""

    def hold(self) -> None:
        """Nothing will be raised in an event loop either."""

    def hand_over(self, raise_in: Any) -> None:
        """Nor in a coroutine."""

    def set(self, seconds: float, error: Signal) -> AbstractContextManager[None]:
        """No limit."""
        return nullcontext()

    def look(self) -> None:
        """Nothing is raised."""

    @property
    def is_cancelled(self) -> bool:
        """Somebody wants the job that runs cancelled."""
        with self._session.transaction():
            return bool(self._session.run("find_cancelled", ids=[self.job], worker=self._worker))


class _Body(Body):
    """Remembers what a body has returned or raised, for whoever looks at the run."""

    value: Any = None
    error: BaseException | None = None

    def forget(self) -> None:
        self.value = self.error = None

    def _returned(self, job: ClaimedJob, started: float, call: Any, value: Any) -> Succeeded:
        self.value = value
        return super()._returned(job, started, call, value)

    def _raised(
        self, job: ClaimedJob, started: float, task: Task[Any, Any] | None, call: Any, error: BaseException
    ) -> Ended:
        self.error = error
        return super()._raised(job, started, task, call, error)


class Bench:
    """Claims jobs of an application and settles their runs.

    Args:
        worker: Under which name.
    """

    def __init__(self, app: PgQueue, session: Session, worker: str) -> None:
        self._app = app
        self._session = session
        self._worker = worker
        self.timeline: Timeline
        board = Board(mmap.mmap(-1, Board.SIZE))
        self._slot = Slot(Executor(0, pool="solo", ready=True), 0, board)
        self._slot.executor.slots.append(self._slot)
        self._control = Patience(session, worker)
        self.body = _Body(app, self._control, board)
        self._new_dispatcher()

    def _new_dispatcher(self) -> None:
        config = self._app.config
        self._dispatcher = Dispatcher(max_crashes=config.max_crashes, limited=config.limited)
        self._dispatcher.executors[0] = self._slot.executor
        self._slot.in_flight.clear()

    def close(self) -> None:
        """Let go of what tasks have needed."""
        self.body.close()
        self._slot.board.close()

    def is_async(self, job: ClaimedJob) -> bool:
        """Whether its task is an `async def` one."""
        try:
            return self._app.find_task(job.task).is_async
        except UnknownTask:
            return False

    def peek(self) -> bool:
        """Whether a job is ready."""
        return self._pick_settled(None, None) is not None

    def take(self, queue: str | None = None, task: str | None = None) -> ClaimedJob | Run | None:
        """Claim the next job: to be run, or already at its end; None if nothing is ready."""
        self._new_dispatcher()
        while True:
            picked = self._pick_settled(queue, task)
            if picked is None:
                return None
            claimed = self._claim(picked)
            if claimed is not None:
                break
        if isinstance(claimed, Outcome):
            self._ack([claimed])
            run = Run(claimed.id, picked["task"], picked["queue"], claimed.attempt, "dead")
            return replace(run, reason=claimed.reason)
        if claimed.task in self._app.tasks:
            self._dispatcher.tasks = {claimed.task: facts_of(self._app.tasks[claimed.task])}
        self._dispatcher.add([claimed], clock())
        if self._dispatcher.outcomes:
            return self._settled(claimed, None)
        ((_, (job,)),) = self._dispatcher.assign(clock())
        if claimed.args is None and not self._load(job):
            return self._settled(claimed, None)
        self._claimed = claimed
        self._control.job = claimed.id
        self._slot.board.start(job.number)
        self.body.forget()
        return job

    def settle(self, ended: Ended) -> Run:
        """Record how the job's run has ended."""
        if not isinstance(ended, Succeeded) and self._control.is_cancelled:
            self._dispatcher.cancel({self._claimed.id}, clock())
        said = self._dispatcher.progress().get(self._claimed.id)
        self._dispatcher.finished(self._slot, ended)
        return replace(self._settled(self._claimed, ended), progress=said)

    def _pick_settled(self, queue: str | None, task: str | None) -> Mapping[str, Any] | None:
        """As `_pick`, after what the test itself has ended, such as by cancelling it, is passed on too."""
        picked = self._pick(queue, task)
        if picked is None and self._settle_canvases():
            picked = self._pick(queue, task)
        return picked

    def _pick(self, queue: str | None, task: str | None) -> Mapping[str, Any] | None:
        """The job to claim next, after all that are due are ready; None if none is."""
        now = self.timeline.shown_to_statements
        with self._session.transaction(by_index=True):
            promoted = _PROMOTE_BATCH
            while promoted == _PROMOTE_BATCH:
                answer = self._session.run(
                    "promote_jobs", after=0.0, upto=None, mark=False, now=now, batch=_PROMOTE_BATCH
                )
                promoted = answer[0]["promoted"]
            rows = self._session.run("pick_job", queue=queue, task=task, now=now)
        return rows[0] if rows else None

    def _claim(self, picked: Mapping[str, Any]) -> ClaimedJob | Outcome | None:
        """The job that was picked, claimed; how it ends, if it cannot be read; None if it is gone."""
        parameters = {
            "worker": self._worker,
            "queues": [picked["queue"]],
            "priorities": [picked["priority"]],
            "after": [picked["position"] - 1],
            "upto": [picked["position"]],
            "most": [1],
            "batch": 1,
            "tasks": None,
            "but": True,
            "bare": False,
        }
        with self._session.transaction(by_index=True):
            rows = self._session.run("claim_jobs", **parameters)
        try:
            jobs = decode_claim([tuple(row.values()) for row in rows], self._worker).jobs
        except (msgspec.DecodeError, RecursionError):
            with self._session.transaction(by_index=True):
                rows = self._session.run("list_claimed", worker=self._worker)
            jobs, unreadable = decode_claimed([tuple(row.values()) for row in rows], self._worker)
            if unreadable:
                return unreadable[0]
        if jobs:
            jobs[0].expired = jobs[0].expired or picked["expired"]
            return jobs[0]
        again = self._pick(None, picked["task"])
        if again is not None and again["id"] == picked["id"]:
            raise RuntimeError(
                f"job {picked['id']} is ready and cannot be claimed: an open transaction of the test has "
                "locked its row; commit it or roll it back first"
            )
        return None

    def _load(self, job: ClaimedJob) -> bool:
        """Fetch arguments that are too large to travel with a claim; False if they are not readable."""
        with self._session.transaction():
            rows = self._session.run(
                "load_payloads", ids=[job.id], attempts=[job.attempt], workers=[self._worker]
            )
        if not rows:
            self._dispatcher.unreadable(self._slot, job.number, "the row is gone")
            return False
        job.args, job.kwargs, job.headers = rows[0]["args"], rows[0]["kwargs"], rows[0]["headers"]
        return True

    def _settled(self, job: ClaimedJob, ended: Ended | None) -> Run:
        outcomes, self._dispatcher.outcomes = self._dispatcher.outcomes, []
        run = self._run(job, outcomes[0] if outcomes else None, ended)
        self._ack(outcomes)
        if nodes := [outcome.id for outcome in outcomes if outcome.settles] + self._dispatcher.ended_nodes:
            self._settle_canvases(nodes)
        return run

    def _settle_canvases(self, nodes: list[str] | None = None) -> bool:
        """Pass on the ends of these jobs of canvases, or of all that nobody has; whether any was released."""
        ids = None if nodes is None else "{" + ",".join(nodes) + "}"
        released = 0
        while True:
            with self._session.transaction(by_index=True):
                (row,) = self._session.run("settle_canvases", ids=ids)
            released += int(row["released"])
            ids = row["left_over"]
            if ids is None and not (nodes is None and row["more"]):
                return released > 0

    def _ack(self, outcomes: list[Outcome]) -> None:
        """Record outcomes by the test's clock: what runs again is due by it, and history says it."""
        ahead = self.timeline.offset.total_seconds()
        for outcome in outcomes:
            if outcome.verb in ("retry", "snooze"):
                outcome.delay += ahead
        for call, _ in ack_calls(outcomes, clock() - ahead):
            with self._session.transaction(by_index=True):
                self._session.run(call.name, **call.parameters)

    def _run(self, job: ClaimedJob, outcome: Outcome | None, ended: Ended | None) -> Run:
        run = Run(job.id, job.task, job.queue, job.attempt, _end_of(outcome, ended))
        if isinstance(ended, Succeeded):
            return replace(run, result=self.body.value, seconds=ended.finished - ended.started)
        if outcome is not None and outcome.verb in ("retry", "snooze"):
            run = replace(run, delay=round(outcome.delay, 6))
        if outcome is not None and outcome.verb == "bury":
            run = replace(run, reason=outcome.reason)
        if isinstance(ended, Failed | Snoozed):
            run = replace(run, seconds=ended.finished - ended.started)
        return replace(run, error=_cause(self.body.error) if isinstance(ended, Failed) else None)


def _end_of(outcome: Outcome | None, ended: Ended | None) -> End:
    if outcome is None:
        return "succeeded" if isinstance(ended, Succeeded) else "stale"
    if outcome.verb == "finish":
        return outcome.state
    ends: dict[str, End] = {"retry": "retried", "snooze": "snoozed", "bury": "dead", "release": "released"}
    return ends[outcome.verb]


def _cause(error: BaseException | None) -> BaseException | None:
    """What was wrong; None if the task has only asked to be run again."""
    return error.cause if isinstance(error, Retry) else error
