"""Which jobs are enqueued, whether one is as a test expects it, and what to say if none is."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence, Set
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any, Final, TypedDict

from pgqueue.app import PgQueue
from pgqueue.codec import decode_headers
from pgqueue.errors import PayloadError, shown
from pgqueue.job import CORRELATION_ID, TAGS
from pgqueue.options import check_time
from pgqueue.task import Task

TOLERANCE: Final = 5.0
"""Seconds by which an eta may differ: a test takes its time."""

_MOST_SHOWN: Final = 20
_WIDTH: Final = 60


@dataclass(frozen=True, slots=True)
class EnqueuedJob:
    """A job that has not ended.

    Attributes:
        args, kwargs: As the task gets them; JSON values if no such task is registered.
        headers: Without those that are pgqueue's own.
    """

    id: str
    state: str
    task: str
    queue: str
    priority: int
    args: list[Any]
    kwargs: dict[str, Any]
    eta: datetime | None
    expires_at: datetime | None
    attempt: int
    retries: int
    unique_key: str | None
    headers: dict[str, Any]

    @property
    def tags(self) -> tuple[str, ...]:
        """The labels it was given."""
        found = self.headers.get(TAGS)
        return tuple(found) if isinstance(found, list) else ()

    @property
    def correlation_id(self) -> str | None:
        """What it belongs to."""
        return self.headers.get(CORRELATION_ID)

    @property
    def call(self) -> str:
        """Its arguments as one would write them."""
        said = [repr(value) for value in self.args]
        said += [f"{name}={value!r}" for name, value in self.kwargs.items()]
        return ", ".join(said)


class JobMatch(TypedDict, total=False):
    """What a job is to be like; what is not given does not matter.

    Attributes:
        args: Its first arguments, whether they were passed by position or by name.
        kwargs: Some of its arguments by name, whether they were passed by name or by position.
        queue: Where it waits.
        priority: 0 to 9.
        eta: When it is due, or how long from now; None for at once.
        tolerance: Seconds by which the eta may differ, 5 unless you say otherwise.
        headers: Some of its headers.
        tags: Some of its tags.
        correlation_id: What it belongs to.
        unique_key: Its own.
        state: `ready`, `scheduled` or `running`.
    """

    args: Sequence[Any]
    kwargs: Mapping[str, Any]
    queue: str
    priority: int
    eta: datetime | timedelta | None
    tolerance: float
    headers: Mapping[str, Any]
    tags: Sequence[str] | Set[str]
    correlation_id: str | None
    unique_key: str | None
    state: str


def read_jobs(app: PgQueue, rows: Iterable[Mapping[str, Any]]) -> list[EnqueuedJob]:
    """What rows of `list_live_jobs` say."""
    return [_read(app, row) for row in rows]


def _read(app: PgQueue, row: Mapping[str, Any]) -> EnqueuedJob:
    args, kwargs = json.loads(row["args"]), json.loads(row["kwargs"])
    task = app.tasks.get(row["task"])
    if task is not None:
        with suppress(PayloadError):  # it will be a dead letter; what is there is shown
            args, kwargs = task.codec.decode(row["args"], row["kwargs"])
    headers, _ = decode_headers(row["headers"])
    rest = {name: value for name, value in row.items() if name not in ("args", "kwargs", "headers")}
    return EnqueuedJob(**rest, args=args, kwargs=kwargs, headers=headers)


def check_match(app: PgQueue, task: str | None, match: Mapping[str, Any]) -> None:
    """TypeError or ValueError if no job could ever be like this, because it is not a match at all.

    Also when there are no jobs: `assert_not_enqueued` must not be content with a misspelt name.
    """
    if unknown := sorted(match.keys() - JobMatch.__annotations__.keys()):
        raise TypeError(
            f"unknown {unknown[0]!r}: a job is matched by {', '.join(JobMatch.__annotations__)}; "
            "arguments of the task go into args= and kwargs="
        )
    kinds: dict[str, tuple[Any, str]] = {
        "args": (list | tuple, "a list or tuple"),
        "kwargs": (Mapping, "a mapping"),
        "headers": (Mapping, "a mapping"),
        "tags": (list | tuple | set | frozenset, "a list, tuple or set"),
        "eta": (datetime | timedelta | None, "a datetime, a timedelta or None"),
        "tolerance": (int | float, "a number of seconds"),
    }
    for name, (kind, words) in kinds.items():
        if name in match and not isinstance(match[name], kind):
            raise TypeError(f"{name} must be {words}, got {shown(match[name])}")
    if isinstance(match.get("eta"), datetime):
        check_time("eta", match["eta"])
    if task is not None and task in app.tasks:
        try:
            app.tasks[task].codec.named(match.get("args", ()), match.get("kwargs", {}))
        except TypeError as error:
            raise TypeError(f"no job of {task} can be like this: {error}") from None


def differences(app: PgQueue, job: EnqueuedJob, match: Mapping[str, Any], now: datetime) -> list[str]:
    """In what the job is not as expected."""
    checks: dict[str, Callable[[], bool]] = {
        "eta": lambda: _is_due(job.eta, match["eta"], match.get("tolerance", TOLERANCE), now),
        "headers": lambda: _includes(job.headers, match["headers"]),
        "tags": lambda: set(match["tags"]) <= set(job.tags),
    }
    for name in ("queue", "priority", "correlation_id", "unique_key", "state"):
        checks[name] = lambda name=name: getattr(job, name) == match[name]  # type: ignore[misc]
    wrong = [name for name, is_right in checks.items() if name in match and not is_right()]
    if match.keys() & {"args", "kwargs"} and not _has_arguments(app, job, match):
        wrong.insert(0, "arguments")
    return wrong


def _has_arguments(app: PgQueue, job: EnqueuedJob, match: Mapping[str, Any]) -> bool:
    args, kwargs = list(match.get("args", ())), dict(match.get("kwargs", {}))
    task = app.tasks.get(job.task)
    if task is not None:
        try:
            wanted, there = task.codec.named(args, kwargs), task.codec.named(job.args, job.kwargs)
        except TypeError:
            return False
        return _includes(there, wanted)
    return job.args[: len(args)] == args and _includes(job.kwargs, kwargs)


def _includes(there: Mapping[str, Any], wanted: Mapping[str, Any]) -> bool:
    return all(name in there and there[name] == value for name, value in wanted.items())


def _is_due(
    eta: datetime | None, wanted: datetime | timedelta | None, tolerance: float, now: datetime
) -> bool:
    if eta is None or wanted is None:
        return eta is wanted is None
    due = now + wanted if isinstance(wanted, timedelta) else wanted
    return abs((eta - due).total_seconds()) <= tolerance


def described(task: str | None, match: Mapping[str, Any]) -> str:
    """What was looked for, in words."""
    what = "job" if task is None else f"job of {task}"
    said = ", ".join(f"{name}={value!r}" for name, value in match.items())
    return f"{what} with {said}" if said else what


def table(jobs: Sequence[tuple[EnqueuedJob, Sequence[str]]], now: datetime) -> str:
    """Jobs as lines of a table, each with what is wrong with it."""
    rows: list[list[str]] = [["task", "arguments", "queue", "priority", "state", "differs in"]]
    for job, wrong in jobs[:_MOST_SHOWN]:
        state = _state(job, now)
        rows.append([job.task, _cut(job.call), job.queue, str(job.priority), state, ", ".join(wrong)])
    if not any(row[-1] for row in rows[1:]):
        rows = [row[:-1] for row in rows]
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = [
        "  " + "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    ]
    more = len(jobs) - _MOST_SHOWN
    return "\n".join(lines + [f"  and {more} more"] * (more > 0))


def _state(job: EnqueuedJob, now: datetime) -> str:
    if job.state != "scheduled" or job.eta is None:
        return job.state
    seconds = (job.eta - now).total_seconds()
    return f"scheduled, due in {seconds:.0f} s"


def _cut(text: str) -> str:
    return text if len(text) <= _WIDTH else f"{text[: _WIDTH - 1]}…"


def name_of(task: Task[..., Any] | str | None) -> str | None:
    """A task's name, given it or the task."""
    if task is None or isinstance(task, str):
        return task
    if isinstance(task, Task):
        return task.name
    raise TypeError(f"a task is one of @app.task, or its name, got {shown(task)}")
