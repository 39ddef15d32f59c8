"""What became of a job: `AsyncResult`, shaped like Celery's, read from the tables; nothing is pushed.

Reads run on connections of our own, never on the caller's: an uncommitted job is `unknown`.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Generator
from contextlib import suppress
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar, Final, Generic, Literal, TypeVar

import msgspec

from pgqueue.codec import clean_text, decode_result
from pgqueue.database.connection import (
    Channel,
    ConnectionLost,
    Pause,
    Statement,
    Steps,
    adrive,
    drive,
)
from pgqueue.errors import (
    JobCancelled,
    JobExpired,
    JobFailed,
    JobNotFound,
    PermissionDenied,
    ResultError,
    ResultUnavailable,
    shown,
)
from pgqueue.job import FINISHED_STATES, Progress, State, current_request

if TYPE_CHECKING:
    from pgqueue.database.pool import Database

R_co = TypeVar("R_co", covariant=True)

FIRST_POLL: Final = 0.005
LAST_POLL: Final = 0.5
MAX_REASON: Final = 1_000
UNKNOWN_FOR: Final = 5.0
"""Seconds an id may be unknown to `get`: the transaction that enqueues it may still be open."""


class Outcome(msgspec.Struct, frozen=True):
    """One look at a job, or a canvas; `fault`: of that, the id of the job that has failed."""

    state: State
    result: str | None = None
    result_error: str | None = None
    reason: str | None = None
    error_class: str | None = None
    error_message: str | None = None
    traceback: str | None = None
    fault: str | None = None

    @property
    def ended(self) -> bool:
        return self.state in FINISHED_STATES or self.state == "dead"


class _Look(msgspec.Struct, frozen=True):
    """Read the job's outcome."""


_LOOK: Final = _Look()


class AsyncResult(Generic[R_co]):
    """A job that was enqueued, and its result once it has one.

    Args:
        job_id: Its id, in the spelling the database uses.
        database: Where to look; called on first use.
    """

    def __init__(self, job_id: str, database: Callable[[], Database]) -> None:
        self._id = job_id
        self._database = database
        self._succeeded: Outcome | None = None

    _what: ClassVar[str] = "job"

    @property
    def id(self) -> str:
        return self._id

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self._id}>"

    def __eq__(self, other: object) -> bool:
        return type(other) is type(self) and other._id == self._id

    def __hash__(self) -> int:
        return hash(self._id)

    @property
    def state(self) -> State:
        """A job's state, or `unknown`: not committed, pruned, or never there."""
        return self._glance().state

    def ready(self) -> bool:
        """Whether it has ended, one way or another."""
        return self._glance().ended

    def successful(self) -> bool:
        return self._glance().state == "succeeded"

    def failed(self) -> bool:
        """Whether it is a dead letter."""
        return self._glance().state == "dead"

    @property
    def result(self) -> Any:
        """What it returned; the exception `get` would raise if it ended otherwise; None before."""
        outcome = self._look()
        if not outcome.ended:
            return None
        try:
            return self._value(outcome)
        except ResultError as error:
            return error

    @property
    def traceback(self) -> str | None:
        """Of a dead letter's last run, as text."""
        return self._look().traceback

    def get(self, timeout: float | None = None) -> R_co:
        """Wait for the job's end; what it returned, as JSON values.

        Args:
            timeout: Seconds; None waits for ever, 0 or less looks once.

        Raises:
            JobFailed: It is a dead letter.
            JobCancelled: It was cancelled.
            JobExpired: It expired.
            JobNotFound: Nobody knew it for five seconds.
            ResultUnavailable: It succeeded, and its result was not stored.
            TimeoutError: It has not ended in time.
            RuntimeError: Called inside a task: jobs that wait for jobs stop a queue when all slots wait.
            TypeError: `timeout` is not a number.
            ValueError: `timeout` is NaN.
        """
        return drive(self._until_ended(timeout), self._perform)

    async def aget(self, timeout: float | None = None) -> R_co:
        """`get`, awaited."""
        return await adrive(self._until_ended(timeout), self._aperform)

    @property
    def progress(self) -> Progress | None:
        """How far the running job says it is (`self.progress` in the task), at most a second ago; None while
        it does not run, or has said nothing.
        """
        return self._database().run(self._find_progress)

    async def aprogress(self) -> Progress | None:
        """`progress`, awaited."""
        return await self._database().arun(self._find_progress)

    def cancel(self, reason: str | None = None) -> Literal["cancelled", "requested", "too_late"]:
        """Cancel the job, for the `reason` that the audit log keeps.

        Returns:
            `cancelled`: it waited, and will not run. `requested`: it runs, and is told to end; if its body
            ends first, it has succeeded. `too_late`: it has ended, or there is no such job.
        """
        return self._database().run(partial(self._cancel, reason=_read_reason(reason)))

    async def acancel(self, reason: str | None = None) -> Literal["cancelled", "requested", "too_late"]:
        """`cancel`, awaited."""
        return await self._database().arun(partial(self._cancel, reason=_read_reason(reason)))

    def _cancel(
        self, channel: Channel, *, reason: str | None
    ) -> Steps[Literal["cancelled", "requested", "too_late"]]:
        rows = yield Statement("cancel_job", {"id": self._id, "reason": reason, "actor": None})
        answer: Literal["cancelled", "requested", "too_late"] = rows[0][0]
        return answer

    def _until_ended(self, timeout: float | None) -> Generator[_Look | Pause, Any, R_co]:
        if current_request.get() is not None:
            raise RuntimeError(
                f"a task must not wait for another {self._what} ({self._id}): when all slots wait, none is "
                "left for it"
            )
        timeout = _read_timeout(timeout)
        start = time.monotonic()
        known_until = start
        pause = FIRST_POLL
        while True:
            outcome: Outcome = yield _LOOK
            if outcome.ended:
                value: R_co = self._value(outcome)
                return value
            now = time.monotonic()
            if outcome.state != "unknown":
                known_until = now
            elif now - known_until >= UNKNOWN_FOR:
                raise JobNotFound(
                    f"no {self._what} {self._id}: not committed, pruned, or in another database",
                    job_id=self._id,
                )
            if timeout is not None and now - start >= timeout:
                raise TimeoutError(f"{self._what} {self._id} is {outcome.state} after {timeout:g} s")
            left = pause if timeout is None else start + timeout - now
            yield Pause(min(pause, left))
            pause = min(pause * 1.5, LAST_POLL)

    def _glance(self) -> Outcome:
        """A look that need not bring the result."""
        return self._look()

    def _look(self) -> Outcome:
        return self._remember(self._ask(self._find))

    def _ask(self, find: Callable[[Channel], Steps[Outcome]]) -> Outcome:
        """What `find` finds, unless the end is known."""
        if self._succeeded is not None:
            return self._succeeded
        return drive(_twice(), lambda _: self._database().run(find))

    async def _alook(self) -> Outcome:
        if self._succeeded is not None:
            return self._succeeded
        return self._remember(await adrive(_twice(), lambda _: self._database().arun(self._find)))

    def _remember(self, outcome: Outcome) -> Outcome:
        if outcome.state == "succeeded":  # final, unlike a death: a dead letter can be requeued
            self._succeeded = outcome
        return outcome

    def _perform(self, step: _Look | Pause) -> Outcome | None:
        if not isinstance(step, Pause):
            return self._look()
        time.sleep(step.seconds)
        return None

    async def _aperform(self, step: _Look | Pause) -> Outcome | None:
        if not isinstance(step, Pause):
            return await self._alook()
        import asyncio

        await asyncio.sleep(step.seconds)
        return None

    def _find(self, channel: Channel) -> Steps[Outcome]:
        rows = yield Statement("find_job", {"id": self._id})
        return Outcome(*rows[0]) if rows else Outcome("unknown")

    def _find_progress(self, channel: Channel) -> Steps[Progress | None]:
        rows = yield Statement("find_progress", {"id": self._id})
        if not rows or rows[0][0] is None:
            return None
        done, total, note = json.loads(rows[0][0])
        return Progress(done, total, note)

    def _value(self, outcome: Outcome) -> Any:
        """The result of a job that has ended, or the error that stands for it."""
        if outcome.state == "succeeded":
            if outcome.result is not None:
                return decode_result(outcome.result)
            if outcome.result_error is not None:
                raise ResultUnavailable(
                    f"{self._what} {self._id} succeeded, its result was not stored: {outcome.result_error}",
                    job_id=self._id,
                )
            return None
        if outcome.state == "cancelled":
            raise JobCancelled(f"{self._what} {self._id} was cancelled", job_id=self._id)
        if outcome.state == "expired":
            raise JobExpired(f"{self._what} {self._id} expired before it could run", job_id=self._id)
        because = ": ".join(part for part in (outcome.error_class, outcome.error_message) if part)
        reason = outcome.reason or "unknown"
        raise JobFailed(
            f"{self._what} {self._id} failed ({reason}){': ' if because else ''}{because}",
            job_id=outcome.fault or self._id,
            reason=reason,
            error_class=outcome.error_class,
            error_message=outcome.error_message,
            remote_traceback=outcome.traceback,
        )


class CanvasResult(AsyncResult[R_co]):
    """A chain, group or chord that was enqueued, and its result once it has one.

    Its state is that of what it ends with, once that has ended; before, `running` if any of its jobs has
    begun, else `ready` or `scheduled`. It fails when it cannot succeed any more and all that it waits for has
    ended. One that has failed goes on when the dead letter at fault, the `job_id` of `JobFailed`, is requeued
    and succeeds.
    """

    _what = "canvas"

    @property
    def progress(self) -> Progress | None:
        """How many of its jobs have ended, and how many it has; None if nobody knows it."""
        return self._database().run(self._find_progress)

    @property
    def children(self) -> list[AsyncResult[Any]]:
        """Its jobs, in order."""
        return self._database().run(self._list_jobs)

    async def achildren(self) -> list[AsyncResult[Any]]:
        """`children`, awaited."""
        return await self._database().arun(self._list_jobs)

    def cancel(self, reason: str | None = None) -> Literal["cancelled", "requested", "too_late"]:
        """Cancel what is left of it, for the `reason` that the audit log keeps.

        Returns:
            `cancelled`: all that was left waited, and will not run. `requested`: some of it runs, and is told
            to end. `too_late`: nothing was left, or there is no such canvas.
        """
        answer = super().cancel(reason)
        with suppress(PermissionDenied):
            self._database().run(self._settle)
        return answer

    async def acancel(self, reason: str | None = None) -> Literal["cancelled", "requested", "too_late"]:
        """`cancel`, awaited."""
        answer = await super().acancel(reason)
        with suppress(PermissionDenied):
            await self._database().arun(self._settle)
        return answer

    def _glance(self) -> Outcome:
        return self._ask(partial(self._find, value=False))

    def _find(self, channel: Channel, *, value: bool = True) -> Steps[Outcome]:
        rows = yield Statement("find_canvas", {"id": self._id, "value": value})
        return Outcome(*rows[0]) if rows else Outcome("unknown")

    def _find_progress(self, channel: Channel) -> Steps[Progress | None]:
        rows = yield Statement("find_canvas_progress", {"id": self._id})
        return Progress(*rows[0]) if rows else None

    def _list_jobs(self, channel: Channel) -> Steps[list[AsyncResult[Any]]]:
        rows = yield Statement("list_canvas_jobs", {"id": self._id})
        return [AsyncResult(row[0], self._database) for row in rows]

    def _cancel(
        self, channel: Channel, *, reason: str | None
    ) -> Steps[Literal["cancelled", "requested", "too_late"]]:
        rows = yield Statement("cancel_canvas", {"id": self._id, "reason": reason, "actor": None})
        answer: Literal["cancelled", "requested", "too_late"] = rows[0][0]
        return answer

    def _settle(self, channel: Channel) -> Steps[None]:
        """After the cancel is committed: see revision 0011. Workers do the rest, seconds later."""
        rows = yield Statement("list_canvas_jobs", {"id": self._id})
        yield Statement("settle_canvases", {"ids": "{" + ",".join(row[0] for row in rows) + "}"})


def _read_reason(reason: object) -> str | None:
    if reason is not None and not isinstance(reason, str):
        raise TypeError(f"reason must be text, got {shown(reason)}")
    return reason if reason is None else clean_text(reason, MAX_REASON)


def _read_timeout(timeout: object) -> float | None:
    """Seconds; None, for ever, is also what thirty years are."""
    if timeout is None:
        return None
    if isinstance(timeout, bool) or not isinstance(timeout, (int, float)):
        raise TypeError(f"timeout must be a number of seconds or None, got {shown(timeout)}")
    if timeout != timeout:
        raise ValueError(f"timeout must be a number of seconds or None, got {shown(timeout)}")
    return None if timeout > 1e9 else max(float(timeout), 0.0)


def _twice() -> Generator[_Look, Outcome, Outcome]:
    """Look, and once more when a kept connection turns out to be broken."""
    try:
        return (yield _LOOK)
    except ConnectionLost:
        return (yield _LOOK)
