"""What a running task can see of its job, and say about it."""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import Any, Final, NoReturn, Protocol

import msgspec

from pgqueue.codec import clean_text
from pgqueue.errors import Retry, shown
from pgqueue.job import CORRELATION_ID, TAGS, Progress
from pgqueue.options import check_max_retries, check_seconds, check_time


class Request(msgspec.Struct, frozen=True):
    """The job that a task runs for.

    Attributes:
        id: The job's id: the key to make the task idempotent with. Called directly: an id that no job has.
        task: The task's name.
        args: Decoded.
        kwargs: Decoded.
        retries: Failed runs that were retried before this one.
        attempt: How often the job was claimed, this time included; with `id` a fencing token.
        eta: When it was to run at the earliest, None for at once.
        queue: Where it waited.
        priority: 0 to 9.
        headers: JSON values that travelled with it.
        worker: Id of the worker that runs it, None when called directly.
        called_directly: The function was called like any function: there is no job.
    """

    id: str
    task: str
    args: Sequence[Any] = ()
    kwargs: Mapping[str, Any] = msgspec.field(default_factory=dict)
    retries: int = 0
    attempt: int = 1
    eta: datetime | None = None
    queue: str = ""
    priority: int = 0
    headers: Mapping[str, Any] = msgspec.field(default_factory=dict)
    worker: str | None = None
    called_directly: bool = False

    @property
    def correlation_id(self) -> str | None:
        """What the job belongs to; jobs that this run enqueues have it too."""
        found = self.headers.get(CORRELATION_ID)
        return found if isinstance(found, str) else None

    @property
    def tags(self) -> tuple[str, ...]:
        """The labels it was given."""
        found = self.headers.get(TAGS)
        return tuple(each for each in found if isinstance(each, str)) if isinstance(found, list) else ()

    @property
    def tick(self) -> datetime | None:
        """The tick of the schedule that it is run for, in UTC; None for any other job."""
        tick = self.headers.get("tick") if "schedule" in self.headers else None
        return datetime.fromisoformat(tick) if isinstance(tick, str) else None


class Transaction(Protocol):
    """What a transactional run happens in."""

    @property
    def connection(self) -> Any: ...
    @property
    def session(self) -> Any: ...


class Control(Protocol):
    """What a worker knows of the run.

    Attributes:
        transaction: None unless the task is transactional.
    """

    transaction: Transaction | None

    @property
    def is_cancelled(self) -> bool:
        """Somebody wants the job cancelled."""

    def report(self, progress: Progress) -> None:
        """The run has come so far."""


class TaskContext:
    """The first argument of a task declared with `bind=True`.

    Attributes:
        request: The job it runs for.
        task: The `Task` itself.
    """

    __slots__ = ("_control", "request", "task")

    def __init__(self, task: Any, request: Request, control: Control | None = None) -> None:
        self.task = task
        self.request = request
        self._control = control

    @property
    def app(self) -> Any:
        """The application the task belongs to."""
        return self.task.app

    @property
    def name(self) -> str:
        name: str = self.task.name
        return name

    def cancelled(self) -> bool:
        """Whether somebody wants this job cancelled; what ends from here on is not retried."""
        return self._control is not None and self._control.is_cancelled

    @property
    def connection(self) -> Any:
        """Of a transactional task: psycopg's `Connection`, an `AsyncConnection` if it is `async def`.

        What is written through it commits together with the job's end, or not at all. The transaction is
        open, and ends by itself.

        Raises:
            RuntimeError: The task is not transactional, or was called directly.
        """
        return self._transaction("connection").connection

    @property
    def session(self) -> Any:
        """Of a transactional task: a SQLAlchemy session in the same transaction, from
        `PgQueue(session_factory=…)`. Its `commit()` flushes; what it has not committed at the end is.

        Raises:
            RuntimeError: As for `connection`; or there is no factory, or none for this kind of task.
        """
        return self._transaction("session").session

    def _transaction(self, name: str) -> Transaction:
        if self._control is not None and self._control.transaction is not None:
            return self._control.transaction
        if self.task.transactional:
            raise RuntimeError(
                f"self.{name} is there when a worker runs the task; called directly it has no transaction"
            )
        raise RuntimeError(f"self.{name} needs @app.task(bind=True, transactional=True)")

    def progress(self, done: float, total: float | None = None, note: str | None = None) -> None:
        """Say how far this run is; `AsyncResult.progress` shows it at most a second later.

        Costs a few microseconds and no write, however often it is called. Called directly it does nothing.

        Args:
            done: 0 or more, in any unit.
            total: In the same unit; None if it is not known.
            note: A few words; of more than 200 bytes the middle is cut out.

        Raises:
            TypeError: What is to be a number is none, or the note is not text.
            ValueError: A number is negative or not finite.
        """
        progress = Progress(
            _amount("done", done), None if total is None else _amount("total", total), _note(note)
        )
        if self._control is not None:
            self._control.report(progress)

    def retry(
        self,
        *,
        countdown: float | None = None,
        eta: datetime | None = None,
        exc: BaseException | None = None,
        max_retries: int | None = None,
    ) -> NoReturn:
        """End this run and let the job run again later; does not return.

        Called directly there is no job to run again: the error at hand is raised instead.

        Args:
            countdown: Seconds from now; None for the task's own delay.
            eta: Or when, with a timezone.
            exc: Why; by default the exception being handled.
            max_retries: A limit for this job from now on.

        Raises:
            Retry: Always, in a job.
        """
        if countdown is not None and eta is not None:
            raise ValueError("countdown and eta exclude each other: give one of them")
        if exc is not None and not isinstance(exc, BaseException):
            raise TypeError(f"exc must be an exception, got {shown(exc)}")
        cause = exc if exc is not None else sys.exception()
        if self.request.called_directly and cause is not None:
            raise cause
        delay = None if countdown is None else check_seconds("countdown", countdown)
        if eta is not None:
            delay = (check_time("eta", eta) - datetime.now(UTC)).total_seconds()
        raise Retry(
            delay=None if delay is None else max(delay, 0.0),
            cause=cause,
            max_retries=check_max_retries(max_retries),
        ) from cause


MAX_NOTE: Final = 200
"""Bytes of a progress note."""


def _amount(name: str, value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name} must be a number, got {shown(value)}")
    try:
        amount = float(value)
    except OverflowError:
        amount = math.inf
    if not 0 <= amount < math.inf:
        raise ValueError(f"{name} must be a number from 0 on, got {shown(value)}")
    return amount


def _note(note: object) -> str | None:
    if note is None:
        return None
    if not isinstance(note, str):
        raise TypeError(f"note must be text, got {shown(note)}")
    return clean_text(note, MAX_NOTE)
