"""What a job is: its states, its limits, its id, and the request that makes one. Pure values, no I/O."""

from __future__ import annotations

import os
import re
import time
import uuid
from contextvars import ContextVar
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any, Final, Literal

import msgspec

from pgqueue.errors import shown

LiveState = Literal["blocked", "scheduled", "ready", "running"]
EndState = Literal["succeeded", "cancelled", "expired", "dead"]
State = Literal[
    "blocked", "scheduled", "ready", "running", "succeeded", "cancelled", "expired", "dead", "unknown"
]

DeadReason = Literal[
    "not_retryable",
    "retries_exhausted",
    "crashed",
    "time_limit",
    "rejected",
    "unknown_task",
    "bad_payload",
    "member_failed",
]

LIVE_STATES: Final[tuple[LiveState, ...]] = ("blocked", "scheduled", "ready", "running")
FINISHED_STATES: Final = ("succeeded", "cancelled", "expired")
DEAD_REASONS: Final[tuple[DeadReason, ...]] = (
    "not_retryable",
    "retries_exhausted",
    "crashed",
    "time_limit",
    "rejected",
    "unknown_task",
    "bad_payload",
    "member_failed",
)

CORRELATION_ID: Final = "correlation_id"
TAGS: Final = "tags"
"""The keys of `headers` that jobs are found by, in SQL too."""

current_request: ContextVar[Any] = ContextVar("pgqueue.current_request", default=None)
"""The `Request` of the job that runs here, None outside a task."""

OWN_HEADER: Final = "pgqueue"
"""The key of `headers` under which a job's own options travel: time limits, how long its key is unique, its
canvas.
"""

CANVAS: Final = "canvas"
"""Under `OWN_HEADER`: the id of the canvas that the job belongs to."""

DEFAULT_QUEUE: Final = "default"
DEFAULT_PRIORITY: Final = 5
PRIORITIES: Final = range(10)
"""Larger runs first."""

_QUEUE_NAME = re.compile(r"[A-Za-z0-9_.:\-]{1,63}")
_TASK_NAME = re.compile(r"[^\x00-\x20\x7f]{1,255}")
_VARIANT = {digit: "89ab"[int(digit, 16) & 3] for digit in "0123456789abcdef"}


def new_id() -> str:
    """A UUIDv7 (RFC 9562): milliseconds since 1970, then 74 random bits, so ids sort by the time they were
    made.
    """
    return timed_id(time.time_ns() // 1_000_000, os.urandom(10))


def new_ids(count: int) -> list[str]:
    """So many of `new_id`, for a fifth of the price of each."""
    head = new_id()[:15]
    digits, variant = os.urandom(10 * count).hex(), _VARIANT
    return [
        f"{head}{digits[i : i + 3]}-{variant[digits[i + 3]]}{digits[i + 4 : i + 7]}-{digits[i + 7 : i + 19]}"
        for i in range(0, 20 * count, 20)
    ]


def timed_id(milliseconds: int, rest: bytes) -> str:
    """The UUIDv7 of a time since 1970 and ten bytes, of which six bits are not used."""
    since, digits = f"{milliseconds:012x}", rest.hex()
    return f"{since[:8]}-{since[8:]}-7{digits[1:4]}-{_VARIANT[digits[4]]}{digits[5:8]}-{digits[8:]}"


def check_id(job_id: object) -> str:
    """The id as text in its usual spelling; ValueError if it is not a UUID."""
    try:
        return str(job_id if isinstance(job_id, uuid.UUID) else uuid.UUID(str(job_id)))
    except Exception:  # also of a str() that fails
        raise ValueError(
            f"job_id must be a UUID, got {shown(job_id)}; a key of your own is unique_key"
        ) from None


def check_queue(queue: object) -> str:
    """The queue's name; ValueError if it is not 1 to 63 letters, digits or `_ . : -`."""
    if not isinstance(queue, str) or not _QUEUE_NAME.fullmatch(queue):
        raise ValueError(f"a queue name is 1 to 63 letters, digits or '_.:-', got {shown(queue)}")
    return queue


def check_task_name(name: object) -> str:
    """The task's name; ValueError if it is empty, over 255 characters, or has blanks or control
    characters.
    """
    if not isinstance(name, str) or not _TASK_NAME.fullmatch(name):
        raise ValueError(f"a task name is 1 to 255 characters without blanks, got {shown(name)}")
    return name


def check_priority(priority: object) -> int:
    """The priority; ValueError if it is not a whole number from 0 to 9."""
    if isinstance(priority, bool) or not isinstance(priority, int) or priority not in PRIORITIES:
        raise ValueError(
            f"priority must be a whole number from 0 to 9 (larger runs first), got {shown(priority)}"
        )
    return priority


_NOTHING_SAID: Final = (None,) * 6


class JobRequest(msgspec.Struct, frozen=True, gc=False):
    """One job about to be enqueued, checked and encoded.

    Attributes:
        id: UUIDv7 made by this process, or the caller's own `job_id`.
        given_id: The id came from the caller, so it may have been used before.
        args: JSON array, as text.
        kwargs: JSON object, as text.
        eta: Earliest time to run, aware; None for at once. Excludes `countdown`.
        countdown: Seconds, added to the database's clock.
        expires_at: Aware; None for never. Excludes `expires_in`.
        expires_in: Seconds, added to the database's clock.
        max_retries: None for the task's policy, -1 for ever.
        headers: JSON object, as text.
        unique_key: None for none.
        on_conflict: What to do if a live job of the task has the key: "return", "raise" or "replace".
        history: Whether the job will be remembered once it has succeeded.

    A Struct, because making one takes a tenth of the time that a frozen dataclass does. It holds no
    containers, so the garbage collector need not look at thousands of them.
    """

    id: str
    task: str
    args: str = "[]"
    kwargs: str = "{}"
    queue: str = DEFAULT_QUEUE
    priority: int = DEFAULT_PRIORITY
    eta: datetime | None = None
    countdown: float | None = None
    expires_at: datetime | None = None
    expires_in: float | None = None
    max_retries: int | None = None
    headers: str = "{}"
    unique_key: str | None = None
    on_conflict: str = "return"
    history: bool = True
    given_id: bool = False

    @property
    def is_plain(self) -> bool:
        """Nothing is said of its times, retries and uniqueness, and its id is fresh."""
        said = (self.eta, self.countdown, self.expires_at, self.expires_in, self.max_retries, self.unique_key)
        return said == _NOTHING_SAID and not self.given_id


class ClaimedJob(msgspec.Struct, array_like=True, gc=False):
    """A job as its claim answers it, as the supervisor holds it and as an executor gets it.

    Attributes:
        args, kwargs: JSON text, or None when it is too large to travel along.
        headers: JSON text.
        expired, cancelled: It is not to be run.
        number: What supervisor and executor call it; grows by one with each job sent to its slot.
    """

    id: str
    queue: str
    priority: int
    position: int
    task: str
    args: str | None
    kwargs: str | None
    headers: str
    attempt: int
    retries: int
    max_retries: int | None
    crashes: int
    eta: float | None
    expired: bool
    cancelled: bool
    worker: str = ""
    number: int = 0


@dataclass(frozen=True, slots=True)
class DeadFilter:
    """Which dead letters; None means any.

    Attributes:
        queue: The queue they came from, or the dead-letter queue they lie under.
        task: Its name.
        reason: Why they are dead.
        error_class: Dotted name of the last exception's class, or its last part.
        since: Died at this time (aware) or later, or this long ago at most.
        until: Died at this time (aware) or earlier.
    """

    queue: str | None = None
    task: str | None = None
    reason: DeadReason | None = None
    error_class: str | None = None
    since: datetime | timedelta | None = None
    until: datetime | None = None


@dataclass(frozen=True, slots=True)
class JobFilter:
    """Which jobs, live, finished or dead; None means any.

    Attributes:
        state: The one they are in.
        queue: The one they are in, or were.
        task: Its name.
        correlation_id: What they belong to.
        tags: Labels, all of which they have.
        enqueued_by: The database role that enqueued them.
        since: Enqueued at this time (aware) or later, or this long ago at most.
    """

    state: State | None = None
    queue: str | None = None
    task: str | None = None
    correlation_id: str | None = None
    tags: tuple[str, ...] = ()
    enqueued_by: str | None = None
    since: datetime | timedelta | None = None


@dataclass(frozen=True, slots=True)
class Progress:
    """How far a running job says it is.

    Attributes:
        done: In the task's own unit.
        total: The same; None if it does not know.
        note: A few words, 200 bytes at most.
    """

    done: float
    total: float | None = None
    note: str | None = None
