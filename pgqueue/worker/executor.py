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
import traceback
from contextlib import suppress
from datetime import UTC, datetime
from random import Random
from typing import TYPE_CHECKING, Any

import msgspec

from pgqueue.codec import clean_text, encode_result
from pgqueue.errors import PayloadError, Retry, UnknownTask
from pgqueue.retry import Again
from pgqueue.task import Request
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


class Executor:
    """Runs the jobs that come over `channel`, for the tasks of `app`."""

    def __init__(self, app: PgQueue, channel: socket.socket, board: Board) -> None:
        self._app = app
        self._channel = channel
        self._board = board
        self._random = Random()

    def serve(self) -> None:
        """Run jobs until the supervisor closes the channel."""
        frames = Frames()
        self._channel.sendall(frame(Ready(os.getpid())))
        while data := self._receive():
            for payload in frames.feed(data):
                for job in decode_jobs(payload):
                    self._channel.sendall(
                        frame(self.run(job) if self._board.start(job.number) else Skipped(job.number))
                    )

    def _receive(self) -> bytes:
        try:
            return self._channel.recv(1 << 18)
        except ConnectionResetError:
            return b""

    def run(self, job: Job) -> Succeeded | Failed:
        """Run one job to its end; never raises, whatever the body does."""
        started = clock()
        task: Task[Any, Any] | None = None
        try:
            task = self._app.find_task(job.task)
            args, kwargs = task.codec.decode(job.args, job.kwargs)
            value = task.run(_request(job, args, kwargs), args, kwargs)
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
        decision = task.policy.decide(
            error, retries=job.retries, max_retries=job.max_retries, random=self._random
        )
        shown = error
        if isinstance(error, Retry) and error.cause is not None:
            shown = error.cause
            if (
                shown.__traceback__ is None
            ):  # made for self.retry(exc=…): show where, and what was being handled
                shown = shown.with_traceback(error.__traceback__)
                shown.__context__ = shown.__context__ or error.__context__
        if not isinstance(decision, Again):
            return _dead(job, started, shown, decision.reason, dead_letter_queue)
        failed = _dead(job, started, shown, "not_retryable", dead_letter_queue)
        failed.reason = ""
        failed.delay = decision.delay
        failed.max_retries = error.max_retries if isinstance(error, Retry) else None
        return failed


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
    try:
        message = str(error)
    except BaseException as broken:
        message = f"({kind.__qualname__}.__str__ raised {type(broken).__qualname__})"
    try:
        text = "".join(traceback.format_exception(error))
    except BaseException as broken:
        text = f"(formatting the traceback raised {type(broken).__qualname__})"
    name = kind.__qualname__ if kind.__module__ == "builtins" else f"{kind.__module__}.{kind.__qualname__}"
    return clean_text(name, 512), clean_text(message, MESSAGE_LIMIT), clean_text(text, TRACEBACK_LIMIT)


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
        # The supervisor decides when this process ends. Handlers, not SIG_IGN: what is ignored stays ignored
        # in programs that a task starts.
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, lambda *_: None)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        board = Board(board_descriptor)
        os.close(board_descriptor)
        Executor(app, channel, board).serve()
        status = 0
    except (BrokenPipeError, ConnectionResetError):
        status = 0  # the supervisor is gone
    except BaseException:
        traceback.print_exc()
    finally:
        with suppress(BaseException):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(status)
