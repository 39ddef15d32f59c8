"""Options of tasks and of single enqueues: their names, their checks, and what Celery calls them."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from typing import Any, Final, TypedDict
from uuid import UUID

from pgqueue.errors import ConfigError, shown
from pgqueue.job import check_priority, check_queue, check_task_name
from pgqueue.retry import RETRY_OPTIONS, RetryPolicy

MAX_SECONDS: Final = 250_000_000_000
"""Nearly eight thousand years: a later time does not fit a datetime."""

LONG_AGO: Final = 1_000_000_000
"""Thirty years: what lies further back is as past, and may fall off the calendars of Python and Postgres."""


class TaskDefaults(TypedDict, total=False):
    """Options of a task that an application can set for all its tasks.

    Attributes:
        queue: Where its jobs go.
        priority: 0 to 9, larger runs first.
        expires: Seconds after the enqueue from which on a job is not run or retried any more.
        dead_letter_queue: The label of its dead letters; by default the job's queue.
        autoretry_for: Exceptions after which a job runs again.
        dont_autoretry_for: Exceptions taken out of `autoretry_for` again.
        retry_kwargs: `max_retries` and `countdown` for `autoretry_for`.
        max_retries: Runs after the first; -1 for ever.
        default_retry_delay: Seconds between runs, when nothing else says.
        retry_backoff: Seconds, doubled with every retry; True for 1.
        retry_backoff_max: Seconds a backoff does not exceed.
        retry_jitter: Whether to draw the delay from 0 to the backoff.
    """

    queue: str
    priority: int
    expires: float
    dead_letter_queue: str
    autoretry_for: type[BaseException] | Sequence[type[BaseException]]
    dont_autoretry_for: type[BaseException] | Sequence[type[BaseException]]
    retry_kwargs: Mapping[str, Any]
    max_retries: int
    default_retry_delay: float
    retry_backoff: bool | float
    retry_backoff_max: float
    retry_jitter: bool


class TaskOptions(TaskDefaults, total=False):
    """What `@app.task` takes beside `bind`; `name` is `<module>.<function>` by default."""

    name: str | None


TASK_DEFAULTS: Final = frozenset(TaskDefaults.__annotations__)
TASK_OPTIONS: Final = TASK_DEFAULTS | {"name", "bind"}

_CELERY_TASK_OPTIONS: Final = {
    "acks_late": "a job is acknowledged after it ran, always",
    "task_acks_late": "a job is acknowledged after it ran, always",
    "ignore_result": "results are kept as long as history is",
    "store_errors_even_if_ignored": "errors are always kept",
    "serializer": "arguments are always JSON",
    "compression": "Postgres compresses large arguments",
    "default_retry_max": "it is called retry_backoff_max here",
    "routing_key": "it is called queue here",
    "exchange": "it is called queue here",
    "base": "tasks have no classes here",
    "typing": "calls are always checked against the signature",
    "retry_max": "it is called max_retries here",
}


class JobOptions(TypedDict, total=False):
    """Options of one enqueue.

    Attributes:
        countdown: Seconds from now, by the database's clock. Excludes `eta`.
        eta: Earliest time to run, with a timezone.
        expires: Seconds from now, or a time with a timezone, after which the job is neither run nor retried.
        priority: 0 to 9, larger runs first.
        queue: Where to put it.
        max_retries: For this job instead of its task's; -1 for ever.
        job_id: A UUID of the caller's own. A job that has or had it is not enqueued again.
        headers: JSON values that travel with the job.
    """

    countdown: float | None
    eta: datetime | None
    expires: float | datetime | None
    priority: int | None
    queue: str | None
    max_retries: int | None
    job_id: str | UUID | None
    headers: Mapping[str, Any] | None


JOB_OPTIONS: Final = frozenset(JobOptions.__annotations__)

_CELERY_JOB_OPTIONS: Final = {
    "task_id": "it is called job_id here",
    "routing_key": "it is called queue here",
    "exchange": "it is called queue here",
    "retry": "a lost connection is repeated by itself",
    "retry_policy": "a lost connection is repeated by itself",
    "link": "enqueue the next job at the end of the task",
    "link_error": "a job that failed is a dead letter",
    "ignore_result": "results are kept as long as history is",
    "serializer": "arguments are always JSON",
    "compression": "Postgres compresses large arguments",
    "producer": "pass a connection",
    "delay": "it is called countdown here",
    "run_at": "it is called eta here",
}


def check_option_names(call: str, options: Mapping[str, object]) -> None:
    """TypeError naming ours, if an option is not of `JobOptions`."""
    if options.keys() <= JOB_OPTIONS:
        return
    unknown = [f"{shown(name)}{_meant(str(name))}" for name in options if name not in JOB_OPTIONS]
    raise TypeError(f"{call}() got an unknown option {', '.join(unknown)}")


def check_arguments(task: str, args: object, kwargs: object) -> None:
    """TypeError unless args is a list, a tuple or the like, and kwargs a mapping with text as keys."""
    if not isinstance(args, Sequence) or isinstance(args, (str, bytes, bytearray)):
        raise TypeError(f"{task}: args must be a list or tuple, got {shown(args)}")
    if not isinstance(kwargs, Mapping):
        raise TypeError(f"{task}: kwargs must be a mapping, got {shown(kwargs)}")
    for name in kwargs:
        if not isinstance(name, str):
            raise TypeError(f"{task}: names in kwargs must be text, got {shown(name)}")


def _meant(name: str) -> str:
    if name in _CELERY_JOB_OPTIONS:
        return f" ({_CELERY_JOB_OPTIONS[name]})"
    close = difflib.get_close_matches(name, JOB_OPTIONS, n=1)
    return f" (did you mean {close[0]}?)" if close else f" (known are {', '.join(sorted(JOB_OPTIONS))})"


def check_time(name: str, value: object) -> datetime:
    """The time in UTC; TypeError unless it is a datetime, ValueError unless it has a timezone."""
    if not isinstance(value, datetime):
        raise TypeError(f"{name} must be a datetime with a timezone, got {shown(value)}")
    if value.utcoffset() is None:
        raise ValueError(
            f"{name} must have a timezone, got {value!r}; for UTC use {name}.replace(tzinfo=timezone.utc)"
        )
    try:
        moment = value.astimezone(UTC)
    except OverflowError:
        moment = datetime.max.replace(tzinfo=UTC)
    if moment.year >= 9999:
        raise ValueError(f"{name} must be before the year 9999, got {value!r}")
    return moment


def check_seconds(name: str, value: object) -> float:
    """A finite number of seconds; a negative one is in the past."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        expected = "a number of seconds" if name == "countdown" else "a number of seconds or a datetime"
        raise TypeError(f"{name} must be {expected}, got {shown(value)}")
    if not abs(value) <= MAX_SECONDS:  # NaN is not, and a whole number too large for a float is compared too
        raise ValueError(
            f"{name} must be a finite number of seconds before the year 9999, got {shown(value)}"
        )
    return max(float(value), -LONG_AGO)


def check_max_retries(value: object) -> int | None:
    """None for the task's own, -1 for ever, else a number from 0."""
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"max_retries must be a whole number, got {shown(value)}")
    if value < -1 or value > 2**31 - 1:
        raise ValueError(f"max_retries must be from 0 to {2**31 - 1}, or -1 for ever, got {shown(value)}")
    return value


def check_task_options(options: Mapping[str, Any], known: frozenset[str], what: str) -> None:
    """ConfigError naming all that is wrong with a task's options."""
    if not isinstance(options, Mapping):
        raise ConfigError(f"{what} must be a dict of options, got {shown(options)}")
    errors = []
    for name in sorted(options.keys() - known, key=str):
        close = difflib.get_close_matches(str(name), known, n=1)
        hint = _CELERY_TASK_OPTIONS.get(name) or (
            f"did you mean {close[0]}?" if close else f"known are {', '.join(sorted(known))}"
        )
        errors.append(f"unknown option {shown(name)} ({hint})")
    for name, check in _CHECKS.items():
        try:
            if options.get(name) is not None:
                check(options[name])
        except (ValueError, TypeError) as error:
            errors.append(f"{'' if str(error).startswith(name) else f'{name}: '}{error}")
    try:
        RetryPolicy.from_options(retry_options(options))
    except ConfigError as error:
        errors.append(str(error))
    if errors:
        raise ConfigError(f"{what}: {'; '.join(errors)}")


def retry_options(options: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in options.items() if name in RETRY_OPTIONS}


def _check_bind(bind: object) -> None:
    if not isinstance(bind, bool):
        raise TypeError(f"bind must be True or False, got {shown(bind)}")


def _check_expires(expires: object) -> None:
    if check_seconds("expires", expires) <= 0:
        raise ValueError(f"expires must be greater than 0 seconds, got {shown(expires)}")


_CHECKS: Final[dict[str, Callable[[Any], object]]] = {
    "name": check_task_name,
    "bind": _check_bind,
    "queue": check_queue,
    "priority": check_priority,
    "expires": _check_expires,
    "dead_letter_queue": check_queue,
}
