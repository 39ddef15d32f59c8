"""An executor: a child process that runs one job after another.

It is forked by the fork server, owns one end of a socket pair and one board, and never talks to the queue's
tables: it decodes arguments, runs the body, decides by the task's policy what a failure means, and sends the
outcome before it starts the next job. End of file on the socket means that its supervisor is gone: it leaves.
"""

from __future__ import annotations

import os
import signal
import socket
import sys
import threading
import traceback
from contextlib import suppress
from datetime import UTC, datetime
from random import Random
from typing import TYPE_CHECKING, Any, NoReturn

import msgspec

from pgqueue.codec import clean_text, encode_result
from pgqueue.context import Request
from pgqueue.errors import PayloadError, Retry, UnknownTask
from pgqueue.failpoints import failpoint
from pgqueue.retry import Again
from pgqueue.shapes import class_name
from pgqueue.worker.signals import stay, stay_when_asked_to_stop
from pgqueue.worker.wire import (
    Board,
    Failed,
    Frames,
    Job,
    Ready,
    Skipped,
    Succeeded,
    clock,
    decode_jobs,
    frame,
)

if TYPE_CHECKING:
    from pgqueue.app import PgQueue
    from pgqueue.job import DeadReason
    from pgqueue.task import Task

TRACEBACK_LIMIT = 64 << 10
MESSAGE_LIMIT = 8 << 10
CHAIN_LIMIT = 1_000
COUNT_LIMIT = 1_000_000_000
"""Retries that the table can count."""


class Executor:
    """Runs the jobs that come over `channel`, for the tasks of `app`."""

    def __init__(self, app: PgQueue, channel: socket.socket, board: Board) -> None:
        self._app = app
        self._channel = channel
        self._board = board
        self._random = Random()
        self._recursion_limit = sys.getrecursionlimit()

    def serve(self) -> None:
        """Run jobs until the supervisor closes the channel."""
        frames = Frames()
        pid = os.getpid()
        descriptor = self._channel.fileno()
        channel = _identity(descriptor)
        self._channel.sendall(frame(Ready(pid)))
        while data := self._receive():
            for payload in frames.feed(data):
                for job in decode_jobs(payload):
                    failpoint("job_received")
                    message = self.run(job) if self._board.start(job.number) else Skipped(job.number)
                    if os.getpid() != pid:
                        _leave(message)
                    # A body that closed every descriptor may have opened others in their place.
                    if _identity(descriptor) != channel:
                        raise OSError(f"job {job.id} has closed the descriptor of its executor's channel")
                    self._channel.sendall(frame(message))

    def _receive(self) -> bytes:
        try:
            return self._channel.recv(1 << 18)
        except ConnectionResetError:
            return b""

    def run(self, job: Job) -> Succeeded | Failed:
        """Run one job to its end; never raises, whatever the body does."""
        started = clock()
        try:
            return self._run(job, started)
        except BaseException as error:
            # Looking at what the body raised, or returned, has raised in turn.
            task = self._app.tasks.get(job.task)
            return _shapeless(job, started, error, task.dead_letter_queue if task is not None else None)

    def _run(self, job: Job, started: float) -> Succeeded | Failed:
        task: Task[Any, Any] | None = None
        try:
            task = self._app.find_task(job.task)
            args, kwargs = task.codec.decode(job.args, job.kwargs)
            failpoint("body_before")
            try:
                value = task.run(_request(job, args, kwargs), args, kwargs)
            finally:
                if sys.getrecursionlimit() < self._recursion_limit:  # what comes now must not be cut short
                    sys.setrecursionlimit(self._recursion_limit)
            failpoint("body_after")
        except UnknownTask as error:
            if task is not None:  # the body looked for another one
                return self._failed(job, started, error, task)
            return _dead(job, started, error, "unknown_task", self._app.route(job.task).dead_letter_queue)
        except PayloadError as error:
            if task is None or error.__traceback__ is None or _raised_by_task(error, task):
                return self._failed(job, started, error, task)
            return _dead(job, started, error, "bad_payload", task.dead_letter_queue)
        except BaseException as error:
            return self._failed(job, started, error, task)
        finished = clock()
        if value is None:
            return Succeeded(job.number, started, finished)
        result, result_error = encode_result(value)
        return Succeeded(job.number, started, finished, result, result_error)

    def _failed(self, job: Job, started: float, error: BaseException, task: Task[Any, Any] | None) -> Failed:
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
        if not isinstance(decision, Again):
            return _dead(job, started, shown, decision.reason, dead_letter_queue)
        if job.retries >= COUNT_LIMIT:  # a row that cannot be counted up could not be acked
            return _dead(job, started, shown, "retries_exhausted", dead_letter_queue)
        failed = _dead(job, started, shown, "not_retryable", dead_letter_queue)
        failed.reason = ""
        failed.delay = decision.delay
        failed.max_retries = wish.max_retries if wish is not None else None
        return failed


def _identity(descriptor: int) -> tuple[int, int]:
    """What is behind a descriptor."""
    found = os.fstat(descriptor)
    return found.st_dev, found.st_ino


def _leave(message: Succeeded | Failed | Skipped) -> NoReturn:
    """End a process that a body forked and forgot to end: the outcome is told by the one that was asked."""
    status = 0
    if isinstance(message, Failed):
        asked = message.error_message
        status = int(asked) & 0xFF if message.error_class == "SystemExit" and asked.isdecimal() else 1
        if message.error_class != "SystemExit":
            with suppress(BaseException):
                print(message.traceback, file=sys.stderr)
    _flush()
    os._exit(status)


def _shapeless(job: Job, started: float, error: BaseException, dead_letter_queue: str | None) -> Failed:
    name = clean_text(class_name(type(error)), 512)
    return Failed(
        job.number,
        started,
        clock(),
        name,
        f"(looking at the error of the task raised {name})",
        "",
        reason="not_retryable",
        dead_letter_queue=dead_letter_queue,
    )


def _raised_by_task(error: BaseException, task: Task[Any, Any]) -> bool:
    """Whether the body ran: its own PayloadError (from enqueueing another job, say) is an ordinary
    failure.
    """
    code = getattr(task.function, "__code__", None)
    return any(step.f_code is code for step, _ in traceback.walk_tb(error.__traceback__))


def _dead(
    job: Job, started: float, error: BaseException, reason: DeadReason, dead_letter_queue: str | None
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


def describe(error: BaseException) -> tuple[str, str, str]:
    """Class, message and traceback of an exception, storable whatever its `__str__` does."""
    kind = type(error)
    name = class_name(kind)
    try:
        message = str.__str__(str(error))  # a str of its own class may do anything
    except BaseException as broken:
        message = f"({name}.__str__ raised {class_name(type(broken))})"
    try:
        text = (
            _steps(error) + f"{name}: {message}\n(more than {CHAIN_LIMIT} errors led to this one)\n"
            if _has_long_chain(error)
            else "".join(traceback.format_exception(error))
        )
    except BaseException as broken:
        text = _steps(error) + f"(formatting the error raised {class_name(type(broken))})"
    with suppress(BaseException):
        if kind.__module__ != "builtins":
            name = f"{kind.__module__}.{name}"
    return clean_text(name, 512), clean_text(message, MESSAGE_LIMIT), clean_text(text, TRACEBACK_LIMIT)


def _has_long_chain(error: BaseException) -> bool:
    """Whether so many errors led to this one that formatting them all would take minutes: each exception
    raised inside walks along the contexts of the one being handled.
    """
    link = error
    for _ in range(CHAIN_LIMIT):
        before = link.__cause__ or link.__context__
        if before is None or before is error:
            return False
        link = before
    return True


def _steps(error: BaseException) -> str:
    """Where it was raised, without what it says."""
    try:
        return "Traceback (most recent call last):\n" + "".join(traceback.format_tb(error.__traceback__))
    except BaseException:
        return ""


def _request(job: Job, args: list[Any], kwargs: dict[str, Any]) -> Request:
    eta = None
    if job.eta is not None:
        with suppress(ValueError, OverflowError, OSError):
            eta = datetime.fromtimestamp(job.eta, UTC)
    headers: dict[str, Any] = {}
    if job.headers != "{}":
        with suppress(msgspec.DecodeError, RecursionError):
            headers = msgspec.json.decode(job.headers, type=dict[str, Any])
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


def become_executor(app: PgQueue, channel: socket.socket, board_descriptor: int) -> None:
    """The life of a freshly forked child; never returns."""
    status = 1
    try:
        stay_when_asked_to_stop()
        os.register_at_fork(before=_hold, after_in_parent=_release, after_in_child=_let_go)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        board = Board(board_descriptor)
        Board.seal(board_descriptor)
        os.close(board_descriptor)
        Executor(app, channel, board).serve()
        status = 0
    except (BrokenPipeError, ConnectionResetError):
        status = 0  # the supervisor is gone
    except BaseException:
        traceback.print_exc()
    finally:
        _flush()
        os._exit(status)


_mask = threading.local()


def _hold() -> None:
    """Before a task forks: a SIGTERM for the child must not come while it still has our handler."""
    _mask.before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})


def _release() -> None:
    signal.pthread_sigmask(signal.SIG_SETMASK, _mask.before)


def _let_go() -> None:
    """In a process that a task has forked: end when asked to, or `multiprocessing` could not terminate it."""
    if signal.getsignal(signal.SIGTERM) is stay:
        with suppress(ValueError):
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
    _release()


def _flush() -> None:
    for stream in (sys.stdout, sys.stderr):
        with suppress(BaseException):
            stream.flush()
