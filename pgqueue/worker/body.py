"""One run of a job: decode its arguments, call the task's function, decide what its end means.

Knows nothing of processes and channels: it takes a `ClaimedJob` and returns the message that tells how it
ended.
"""

from __future__ import annotations

import asyncio
import logging
import sys
from collections.abc import Callable, Coroutine
from contextlib import suppress
from contextvars import copy_context
from datetime import UTC, datetime
from random import Random
from types import CoroutineType
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

from pgqueue.codec import clean_text, decode_headers, encode_result
from pgqueue.context import Request
from pgqueue.errors import PayloadError, Retry, SoftTimeLimitExceeded, TaskCancelled, UnknownTask
from pgqueue.failpoints import failpoint
from pgqueue.hooks import TaskFailed, TaskRetried, TaskStarted, TaskSucceeded
from pgqueue.job import ClaimedJob, current_request
from pgqueue.retry import Again
from pgqueue.shapes import class_name
from pgqueue.tracebacks import describe
from pgqueue.worker.interrupts import Interrupter, interruptible
from pgqueue.worker.wire import (
    Board,
    Cancelled,
    Ended,
    Failed,
    Released,
    Snoozed,
    Stale,
    Succeeded,
    clock,
)

if TYPE_CHECKING:
    from pgqueue.app import PgQueue
    from pgqueue.context import Transaction
    from pgqueue.database.store import Outcome
    from pgqueue.database.transaction import AsyncTransactions, Transactions
    from pgqueue.job import DeadReason, Progress
    from pgqueue.task import Task

log = logging.getLogger("pgqueue.worker")

T = TypeVar("T")

COUNT_LIMIT = 1_000_000_000
"""Retries that the table can count."""


class _Call(NamedTuple):
    """What is to be called, and its limits in seconds, the hard one where it is transactional."""

    task: Task[Any, Any]
    request: Request
    number: int
    soft: float | None
    hard: float | None


class _Run:
    """What a task can ask and say of its run."""

    __slots__ = ("_board", "_interrupter", "_number", "transaction")

    def __init__(
        self, number: int, interrupter: Interrupter, board: Board | None, transaction: Transaction | None
    ) -> None:
        self._number = number
        self._interrupter = interrupter
        self._board = board
        self.transaction = transaction

    @property
    def is_cancelled(self) -> bool:
        return self._interrupter.is_cancelled

    def report(self, progress: Progress) -> None:
        if self._board is not None:
            self._board.report(self._number, progress)


class Body:
    """Runs jobs of `app`, one at a time, where `control` can interrupt them; what they say of themselves goes
    to the `board`.
    """

    def __init__(self, app: PgQueue, control: Interrupter, board: Board | None = None) -> None:
        self._app = app
        self._hooks = app.hooks
        self._limited = app.config.limited
        self._control = control
        self._board = board
        self._runner: asyncio.Runner | None = None
        self._transactions: Transactions | None = None
        self._async_transactions: AsyncTransactions | None = None
        self._random = Random()
        self._recursion_limit = sys.getrecursionlimit()

    def run(self, job: ClaimedJob) -> Ended:
        """Run one job to its end; never raises, whatever the body does."""
        started = clock()
        task: Task[Any, Any] | None = None
        call: _Call | None = None
        try:
            try:
                task = self._app.find_task(job.task)
                call = self._prepare(job, task)
                if task.transactional and task.is_async:
                    value = self._await(self._atransact(job, call, started), call.request)
                elif task.transactional:
                    value = self._transact(job, call, started)
                else:
                    value = self._call(call)
            except BaseException as error:
                return self._raised(job, started, task, call, error)
            return self._returned(job, started, call, value)
        except BaseException as error:
            # Looking at what the body raised, or returned, has raised in turn.
            return _shapeless(job, started, error, task)

    async def arun(self, job: ClaimedJob) -> Ended:
        """Run one job of an `async def` task on the loop that runs already; else the same."""
        started = clock()
        task: Task[Any, Any] | None = None
        call: _Call | None = None
        try:
            try:
                task = self._app.find_task(job.task)
                call = self._prepare(job, task)
                if task.transactional:
                    value = await self._atransact(job, call, started)
                else:
                    value = await self._acall(call)
            except BaseException as error:
                return self._raised(job, started, task, call, error)
            return self._returned(job, started, call, value)
        except BaseException as error:
            return _shapeless(job, started, error, task)

    def close(self) -> None:
        """Let go of its connections and of its event loop; it can run no more jobs."""
        for transactions in (self._transactions, self._async_transactions):
            if transactions is not None:
                transactions.finish()
        if self._runner is not None:
            self._runner.close()

    def _prepare(self, job: ClaimedJob, task: Task[Any, Any]) -> _Call:
        args, kwargs = task.codec.decode(job.args or "", job.kwargs or "")
        failpoint("body_before")
        headers, own = decode_headers(job.headers)
        soft = own.get("soft_time_limit", task.soft_time_limit) if self._limited else None
        hard = None
        if task.transactional and self._limited:
            hard = own.get("time_limit", task.time_limit)
        request = _request(job, args, kwargs, headers)
        if self._hooks.has("task_started"):
            self._hooks.tell("task_started", TaskStarted(request))
        return _Call(task, request, job.number, soft, hard)

    def _transact(self, job: ClaimedJob, call: _Call, started: float) -> Any:
        """Run the body in a transaction that ends with the job's end."""
        if self._transactions is None:
            from pgqueue.database.transaction import Transactions

            self._transactions = Transactions(*self._database())

        value = None

        def body(transaction: Transaction) -> Outcome:
            nonlocal value
            value = self._call(call, transaction)
            return _recorded(job, _encoded(job, started, call.task, value))

        self._transactions.run(body, limit=call.hard, clock=clock)
        return value

    async def _atransact(self, job: ClaimedJob, call: _Call, started: float) -> Any:
        if self._async_transactions is None:
            from pgqueue.database.transaction import AsyncTransactions

            self._async_transactions = AsyncTransactions(*self._database())

        value = None

        async def body(transaction: Transaction) -> Outcome:
            nonlocal value
            value = await self._acall(call, transaction)
            return _recorded(job, _encoded(job, started, call.task, value))

        await self._async_transactions.run(body, limit=call.hard, clock=clock)
        return value

    def _database(self) -> tuple[str, str, Callable[..., Any] | None, Callable[[int], None]]:
        app, board = self._app, self._board

        def tell(pid: int) -> None:
            if board is not None:
                board.backend = pid

        return app.dsn, app.schema, app.session_factory, tell

    def _returned(self, job: ClaimedJob, started: float, call: _Call, value: Any) -> Succeeded:
        if call.task.transactional:
            succeeded = Succeeded(job.number, started, clock(), acked=True)
        else:
            succeeded = _encoded(job, started, call.task, value)
        if self._hooks.has("task_succeeded"):
            event = TaskSucceeded(call.request, value, succeeded.finished - started)
            self._hooks.tell("task_succeeded", event)
        return succeeded

    def _raised(
        self,
        job: ClaimedJob,
        started: float,
        task: Task[Any, Any] | None,
        call: _Call | None,
        error: BaseException,
    ) -> Ended:
        ended = self._judged(job, started, task, call, error)
        if self._hooks and isinstance(ended, Failed) and ended.reason != "crashed":
            headers, _ = decode_headers(job.headers)
            request = call.request if call is not None else _request(job, [], {}, headers)
            if issubclass(type(error), Retry) and error.cause is not None:  # type: ignore[attr-defined]
                error = error.cause  # type: ignore[attr-defined]
            seconds = ended.finished - started
            if ended.delay is not None:
                self._hooks.tell("task_retried", TaskRetried(request, error, ended.delay, seconds))
            else:
                self._hooks.tell("task_failed", TaskFailed(request, error, ended.reason, seconds))
        return ended

    def _judged(
        self,
        job: ClaimedJob,
        started: float,
        task: Task[Any, Any] | None,
        call: _Call | None,
        error: BaseException,
    ) -> Ended:
        """What becomes of a job whose body raised, or was never called."""
        kind = type(error)  # asking for the class it claims may run its code
        if task is not None and task.transactional and (ended := _cut_off(job, started, error)) is not None:
            return ended
        if issubclass(kind, TaskCancelled):
            return Cancelled(job.number, started, clock())
        if issubclass(kind, UnknownTask) and task is None:  # else the body looked for another one
            return _dead(job, started, error, "unknown_task", self._app.route(job.task).dead_letter_queue)
        if issubclass(kind, PayloadError) and task is not None and call is None:
            return _dead(job, started, error, "bad_payload", task.dead_letter_queue)
        return self._failed(job, started, error, task)

    def _call(self, call: _Call, transaction: Transaction | None = None) -> Any:
        """Run the function, and what it returns if that is a coroutine."""
        control, task, soft = self._control, call.task, call.soft
        run = _Run(call.number, control, self._board, transaction)
        token = current_request.set(call.request)
        try:
            control.enter(call.number)
            if soft and not task.is_async:
                with control.set(soft, _told(soft)):
                    value = task.run(call.request, run)
            else:
                value = task.run(call.request, run)
            if type(value) is CoroutineType:  # asking for the class it claims may run its code
                control.hold()
                told = _told(soft) if soft else None
                value = self._await(
                    interruptible(value, told, soft, hand_over=control.hand_over), call.request
                )
        finally:
            control.leave()
            current_request.reset(token)
            if sys.getrecursionlimit() < self._recursion_limit:  # the rest must not be cut short
                sys.setrecursionlimit(self._recursion_limit)
        failpoint("body_after")
        return value

    async def _acall(self, call: _Call, transaction: Transaction | None = None) -> Any:
        control, soft = self._control, call.soft
        run = _Run(call.number, control, self._board, transaction)
        token = current_request.set(call.request)
        try:
            control.enter(call.number)
            control.hold()
            told = _told(soft) if soft else None
            coroutine = call.task.run(call.request, run)
            value = await interruptible(coroutine, told, soft, hand_over=control.hand_over)
        finally:
            control.leave()
            current_request.reset(token)
        failpoint("body_after")
        return value

    def _await(self, coroutine: Coroutine[Any, Any, T], request: Request) -> T:
        """Run it on this process's event loop, which lives across jobs, and with it the pools of the
        application.
        """
        if self._runner is None or self._runner.get_loop().is_closed():
            self._runner = asyncio.Runner()
        loop = self._runner.get_loop()
        before = asyncio.all_tasks(loop)
        try:
            return self._runner.run(coroutine, context=copy_context())
        finally:
            if left := asyncio.all_tasks(loop) - before:
                log.warning(
                    "tasks_left job=%s task=%s count=%d first=%s",
                    request.id,
                    request.task,
                    len(left),
                    next(iter(left)).get_name(),
                )

    def _failed(
        self, job: ClaimedJob, started: float, error: BaseException, task: Task[Any, Any] | None
    ) -> Failed | Snoozed:
        dead_letter_queue = task.dead_letter_queue if task is not None else None
        if task is None:
            return _dead(job, started, error, "not_retryable", dead_letter_queue)
        try:
            decision = task.policy.decide(
                error, retries=job.retries, max_retries=job.max_retries, random=self._random
            )
        except BaseException:  # its class says what it is, unless asking for the class raises
            return _dead(job, started, error, "not_retryable", dead_letter_queue)
        wish = error if isinstance(error, Retry) else None
        shown = error
        if wish is not None and wish.cause is not None:
            shown = wish.cause
            if (
                shown.__traceback__ is None
            ):  # made for self.retry(exc=…): show where, and what was being handled
                shown = shown.with_traceback(error.__traceback__)
                shown.__context__ = shown.__context__ or error.__context__
        if isinstance(decision, Again) and not decision.burned:
            return Snoozed(job.number, started, clock(), decision.delay)
        if not isinstance(decision, Again):
            return _dead(job, started, shown, decision.reason, dead_letter_queue)
        if job.retries >= COUNT_LIMIT:  # a row that cannot be counted up could not be acked
            return _dead(job, started, shown, "retries_exhausted", dead_letter_queue)
        failed = _dead(job, started, shown, "not_retryable", dead_letter_queue)
        failed.reason = ""
        failed.delay = decision.delay
        failed.max_retries = wish.max_retries if wish is not None else None
        return failed


def _cut_off(job: ClaimedJob, started: float, error: BaseException) -> Ended | None:
    """What it means for the job that its transaction could not be, or was broken; None for any other error.

    A run that was cut off counts as a crash: one that kills its connection each time must come to an end.
    """
    from pgqueue.database.transaction import AnswerLost, ConnectionLost, JobLost, NotBegun

    kind = type(error)
    if issubclass(kind, JobLost):
        return Stale(job.number)
    if issubclass(kind, NotBegun):
        log.warning("transaction_not_begun job=%s attempt=%d error=%s", job.id, job.attempt, error)
        return Released(job.number)
    if issubclass(kind, AnswerLost):
        log.warning("transaction_uncertain job=%s attempt=%d error=%s", job.id, job.attempt, error)
        return Released(job.number, uncertain=True)
    if issubclass(kind, ConnectionLost):
        return _dead(job, started, error.__cause__ or error, "crashed", None)
    return None


def _recorded(job: ClaimedJob, succeeded: Succeeded) -> Outcome:
    """As the transaction writes it."""
    from pgqueue.database.store import Outcome

    return Outcome(
        job.id,
        job.attempt,
        job.worker,
        "finish",
        result=succeeded.result,
        result_error=succeeded.result_error,
        started=succeeded.started,
        finished=succeeded.finished,
    )


def _encoded(job: ClaimedJob, started: float, task: Task[Any, Any], value: Any) -> Succeeded:
    finished = clock()
    if value is None or task.ignore_result:
        return Succeeded(job.number, started, finished)
    result, result_error = encode_result(value)
    return Succeeded(job.number, started, finished, result, result_error)


def _shapeless(job: ClaimedJob, started: float, error: BaseException, task: Task[Any, Any] | None) -> Failed:
    name = clean_text(class_name(type(error)), 512)
    return Failed(
        job.number,
        started,
        clock(),
        name,
        f"(looking at the error of the task raised {name})",
        "",
        reason="not_retryable",
        dead_letter_queue=task.dead_letter_queue if task is not None else None,
    )


def _dead(
    job: ClaimedJob, started: float, error: BaseException, reason: DeadReason, dead_letter_queue: str | None
) -> Failed:
    error_class, message, text = describe(error)
    return Failed(
        job.number,
        started,
        clock(),
        error_class,
        message,
        text,
        reason=reason,
        dead_letter_queue=dead_letter_queue,
    )


def _told(seconds: float) -> SoftTimeLimitExceeded:
    return SoftTimeLimitExceeded(f"it ran longer than its soft_time_limit of {seconds:g} s")


def _request(job: ClaimedJob, args: list[Any], kwargs: dict[str, Any], headers: dict[str, Any]) -> Request:
    eta = None
    if job.eta is not None:
        with suppress(ValueError, OverflowError, OSError):
            eta = datetime.fromtimestamp(job.eta, UTC)
    return Request(
        id=job.id,
        task=job.task,
        args=args,
        kwargs=kwargs,
        retries=job.retries,
        attempt=job.attempt,
        eta=eta,
        queue=job.queue,
        priority=job.priority,
        headers=headers,
        worker=job.worker,
        called_directly=False,
    )
