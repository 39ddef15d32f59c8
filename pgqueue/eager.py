"""Jobs that run where they are enqueued, at once and without a database: for tests.

The same code encodes and decodes arguments and results and decides about retries, so what would fail in a
worker for its types or its errors fails here. What only a worker and a database can do is not played:
waiting, time limits, processes that die, unique keys, other transactions.
"""

from __future__ import annotations

import asyncio
import inspect
import json
import time
from collections.abc import Callable, Coroutine, Generator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextvars import copy_context
from datetime import UTC, datetime
from random import Random
from typing import TYPE_CHECKING, Any, Final, TypeVar

from msgspec import structs

from pgqueue.codec import decode_headers, encode_result
from pgqueue.context import Request
from pgqueue.database.connection import adrive, drive
from pgqueue.enqueue import Client
from pgqueue.errors import PayloadError, Retry, TaskCancelled, UnknownTask
from pgqueue.graph import CanvasNode, CanvasRequest
from pgqueue.hooks import TaskFailed, TaskRetried, TaskStarted, TaskSucceeded
from pgqueue.job import JobRequest, Progress, State, current_request
from pgqueue.result import Outcome
from pgqueue.retry import Again
from pgqueue.tracebacks import describe

if TYPE_CHECKING:
    from pgqueue.database.connection import AsyncCaller, Plan, Statement, SyncCaller

T = TypeVar("T")

MOST_RUNS: Final = 100
"""Of one job, which stays `scheduled` then: it retries for ever, or snoozes until something happens."""


class _Transaction:
    """What a transactional task sees: the connection that it was enqueued on, if it fits."""

    def __init__(self, connection: object) -> None:
        self._connection = connection

    @property
    def connection(self) -> Any:
        return self._fitting("connection", "psycopg")

    @property
    def session(self) -> Any:
        return self._fitting("session", "sqlalchemy")

    def _fitting(self, name: str, library: str) -> Any:
        for kind in type(self._connection).__mro__:
            if kind.__module__.partition(".")[0] == library:
                return self._connection
        raise RuntimeError(
            f"self.{name} inside app.eager() is what the job was enqueued on: use .on({name}) with one of "
            f"{library}, not {type(self._connection).__name__}"
        )


class _Control:
    """What a run can ask and say here."""

    is_cancelled = False

    def __init__(self, transaction: _Transaction | None) -> None:
        self.transaction = transaction

    def report(self, progress: Progress) -> None:
        """Nobody looks while it runs."""


class _Ends:
    """Stands for the database where results are read."""

    def __init__(self) -> None:
        self._outcomes: dict[str, Outcome] = {}
        self._canvases: dict[str, list[str]] = {}

    def outcome(self, job_id: str) -> Outcome:
        """How the job, or the canvas, has ended."""
        return self._outcomes[job_id]

    def keep_canvas(self, canvas_id: str, outcome: Outcome, jobs: list[str]) -> None:
        """This is how the canvas of these jobs has ended."""
        self._outcomes[canvas_id] = outcome
        self._canvases[canvas_id] = jobs

    def keep(self, job_id: str, outcome: Outcome) -> None:
        """This is how the job has ended."""
        self._outcomes[job_id] = outcome

    def run(self, plan: Plan[T]) -> T:
        """As `Database.run`."""
        return drive(plan(None), self._answer)  # type: ignore[arg-type]

    async def arun(self, plan: Plan[T]) -> T:
        """As `Database.arun`."""
        return self.run(plan)

    def _answer(self, step: Statement) -> list[tuple[Any, ...]]:
        wanted = str(step.parameters.get("id"))
        if step.name in ("cancel_job", "cancel_canvas"):
            return [("too_late",)]
        if step.name == "list_canvas_jobs":
            return [(job_id,) for job_id in self._canvases.get(wanted, ())]
        if step.name == "find_canvas_progress":
            jobs = self._canvases.get(wanted)
            return [] if jobs is None else [(len(jobs), len(jobs))]
        found = self._outcomes.get(wanted) if step.name in ("find_job", "find_canvas") else None
        return [] if found is None else [tuple(getattr(found, name) for name in Outcome.__struct_fields__)]


class Eager(Client):
    """Runs what it is asked to enqueue.

    Args:
        app: Whose tasks they are.
        propagate: Raise what ends a job.
    """

    def __init__(self, app: Any, *, propagate: bool) -> None:
        super().__init__(app.schema, None)
        self._app = app
        self._propagate = propagate
        self._ends = _Ends()
        self._random = Random()

    @property
    def database(self) -> Any:
        """Where results are."""
        return self._ends

    def enqueue(self, request: JobRequest, caller: SyncCaller | None) -> str:
        """Run one job to its end; its id."""
        return drive(self._job(request, caller), _run_anywhere)

    async def aenqueue(self, request: JobRequest, caller: AsyncCaller | None) -> str:
        """Run one job to its end; its id."""
        return await adrive(self._job(request, caller), _await)

    def enqueue_many(self, requests: Sequence[JobRequest], caller: SyncCaller | None) -> list[str]:
        """Run jobs one after another; their ids."""
        return [self.enqueue(request, caller) for request in requests]

    async def aenqueue_many(self, requests: Sequence[JobRequest], caller: AsyncCaller | None) -> list[str]:
        """Run jobs one after another; their ids."""
        return [await self.aenqueue(request, caller) for request in requests]

    def enqueue_canvas(self, request: CanvasRequest, caller: SyncCaller | None) -> None:
        """Run the jobs of a canvas in order."""
        drive(self._canvas(request, caller), _run_anywhere)

    async def aenqueue_canvas(self, request: CanvasRequest, caller: AsyncCaller | None) -> None:
        """Run the jobs of a canvas in order."""
        await adrive(self._canvas(request, caller), _await)

    def _canvas(
        self, request: CanvasRequest, caller: SyncCaller | AsyncCaller | None
    ) -> Generator[Coroutine[Any, Any, Any], Any, None]:
        """What is waited for comes before what waits, and members of a join before what waits for it."""
        ends: dict[str, Outcome] = {}
        members: dict[str, list[CanvasNode]] = {}
        nodes = {node.id: node for node in request.nodes}

        def end_of(node: CanvasNode) -> Outcome:
            if node.id not in ends:
                ends[node.id] = _joined(node, [(member, end_of(member)) for member in members[node.id]])
            return ends[node.id]

        for node in request.nodes:
            if node.member_of is not None:
                members.setdefault(node.member_of, []).append(node)
            if node.request is None:
                continue
            before = None if node.after is None else end_of(nodes[node.after])
            lacks = before is not None and node.takes_result and before.result_error is not None
            if before is not None and (lacks or before.state != "succeeded"):
                ends[node.id] = _not_run(before, node.after)
                self._ends.keep(node.id, ends[node.id])
            else:
                job = node.request
                if before is not None and node.takes_result:
                    job = structs.replace(job, args=_in_front(before.result or "null", job.args))
                yield from self._job(job, caller)
                ends[node.id] = self._ends.outcome(node.id)
        spared = {node.id for node in request.nodes if self._was_cancelled(end_of(node).fault)}
        for node in request.nodes:
            end = end_of(node)
            for handler in node.on_error:
                if node.id in spared:
                    continue
                if end.state in ("dead", "expired") and (not handler.own or end.reason != "member_failed"):
                    job = handler.request
                    fault = json.dumps(end.fault or node.id)
                    yield from self._job(
                        structs.replace(job, args=_in_front(fault, job.args)) if handler.takes_id else job,
                        caller,
                    )
        jobs = [node.id for node in request.nodes if node.request is not None]
        whole = end_of(nodes[request.output])
        if whole.state == "dead" and whole.fault in ends and ends[whole.fault].state == "dead":
            whole = structs.replace(ends[whole.fault], fault=whole.fault)
        self._ends.keep_canvas(request.id, whole, jobs)

    def _was_cancelled(self, job_id: str | None) -> bool:
        return job_id is not None and self._ends.outcome(job_id).state == "cancelled"

    def _job(
        self, request: JobRequest, caller: SyncCaller | AsyncCaller | None
    ) -> Generator[Coroutine[Any, Any, Any], Any, str]:
        """Run after run until the job has ended; what it yields is to be awaited."""
        if request.expires_at is not None and request.expires_at <= datetime.now(UTC):
            self._ends.keep(request.id, Outcome("expired"))
            return request.id
        retries = 0
        for attempt in range(1, MOST_RUNS + 1):
            run, task, seen = _request(request, retries, attempt), None, False
            seconds = _stopwatch()
            try:
                task = self._app.find_task(request.task)
                args, kwargs = task.codec.decode(request.args, request.kwargs)
                run, seen = _request(request, retries, attempt, args, kwargs), True
                self._app.hooks.tell("task_started", TaskStarted(run))
                control = _Control(_Transaction(caller and caller.connection) if task.transactional else None)
                value = copy_context().run(_called, task, run, control)
                if inspect.iscoroutine(value):
                    value = yield _in_request(run, value)
            except TaskCancelled:
                self._ends.keep(request.id, Outcome("cancelled"))
                return request.id
            except BaseException as error:
                decision = _decide(task, seen, error, retries, request.max_retries, self._random)
                cause = error.cause if isinstance(error, Retry) and error.cause is not None else error
                if isinstance(decision, Again):
                    if decision.burned:
                        retries += 1
                        self._app.hooks.tell(
                            "task_retried", TaskRetried(run, cause, decision.delay, seconds())
                        )
                    continue
                self._app.hooks.tell("task_failed", TaskFailed(run, cause, decision, seconds()))
                self._ends.keep(request.id, Outcome("dead", None, None, decision, *describe(cause)))
                if self._propagate:
                    raise cause  # noqa: B904
                return request.id
            self._app.hooks.tell("task_succeeded", TaskSucceeded(run, value, seconds()))
            stored = (None, None) if value is None or task.ignore_result else encode_result(value)
            self._ends.keep(request.id, Outcome("succeeded", *stored))
            return request.id
        self._ends.keep(request.id, Outcome("scheduled"))
        return request.id


def _joined(join: CanvasNode, members: list[tuple[CanvasNode, Outcome]]) -> Outcome:
    """How a join ends whose members have ended so."""
    failed = [
        (member, end) for member, end in members if end.state != "succeeded" or end.result_error is not None
    ]
    if failed and not join.skips_failed:
        member, end = failed[0]
        cancelled = all(end.state == "cancelled" for _, end in failed)
        reason = end.reason or "member_failed"
        state: State = "cancelled" if cancelled else "dead"
        fault = end.fault or member.id
        return structs.replace(end, state=state, reason=reason, result_error=None, fault=fault)
    left_out = {member.id for member, _ in failed}
    results = [end.result or "null" for member, end in members if member.id not in left_out]
    return Outcome("succeeded", f"[{','.join(results)}]")


def _not_run(before: Outcome, waited_for: str | None) -> Outcome:
    wrong = before.error_message or before.result_error or before.state
    why = f"what it waits for did not succeed: {wrong}"
    return Outcome("dead", None, None, "member_failed", "MemberFailed", why, None, before.fault or waited_for)


def _in_front(value: str, args: str) -> str:
    return f"[{value}]" if args == "[]" else f"[{value},{args[1:]}"


def _decide(
    task: Any, decoded: bool, error: BaseException, retries: int, max_retries: int | None, random: Random
) -> Again | str:
    """Whether it runs again, or why it is dead; as in a worker."""
    if task is None:
        return "unknown_task" if isinstance(error, UnknownTask) else "not_retryable"
    if not decoded and isinstance(error, PayloadError):
        return "bad_payload"
    decision = task.policy.decide(error, retries=retries, max_retries=max_retries, random=random)
    return decision if isinstance(decision, Again) else str(decision.reason)


def _request(
    request: JobRequest, retries: int, attempt: int, args: Sequence[Any] = (), kwargs: Any = None
) -> Request:
    headers, _ = decode_headers(request.headers)
    return Request(
        id=request.id,
        task=request.task,
        args=args,
        kwargs=kwargs or {},
        retries=retries,
        attempt=attempt,
        eta=request.eta,
        queue=request.queue,
        priority=request.priority,
        headers=headers,
        worker="eager",
    )


def _stopwatch() -> Callable[[], float]:
    """Seconds since now."""
    start = time.perf_counter()
    return lambda: time.perf_counter() - start


def _called(task: Any, run: Request, control: _Control) -> Any:
    current_request.set(run)
    return task.run(run, control)


async def _in_request(run: Request, coroutine: Coroutine[Any, Any, T]) -> T:
    token = current_request.set(run)
    try:
        return await coroutine
    finally:
        current_request.reset(token)


async def _await(coroutine: Coroutine[Any, Any, T]) -> T:
    return await coroutine


def _run_anywhere(coroutine: Coroutine[Any, Any, T]) -> T:
    """Run it to its end, also below an event loop, which would not let another run in its thread."""
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return asyncio.run(coroutine)
    with ThreadPoolExecutor(1) as thread:
        return thread.submit(copy_context().run, asyncio.run, coroutine).result()
