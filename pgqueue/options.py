"""Options of tasks and of single enqueues: their names, their checks, and what Celery calls them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from typing import Any, Final, Literal, TypedDict, get_args
from uuid import UUID

from pgqueue.errors import ConfigError, nearest, shown
from pgqueue.job import check_priority, check_queue, check_task_name
from pgqueue.retry import RETRY_OPTIONS, RetryPolicy

MAX_SECONDS: Final = 250_000_000_000
"""Nearly eight thousand years: a later time does not fit a datetime."""

MAX_UNIQUE_KEY: Final = 512
MAX_LABEL: Final = 255
"""Characters of a correlation id or of a tag."""
MAX_TAGS: Final = 32
MAX_CRASHES: Final = 1_000_000_000

LONG_AGO: Final = 1_000_000_000
"""Thirty years: what lies further back is as past, and may fall off the calendars of Python and Postgres."""


Pool = Literal["prefork", "threads", "asyncio"]
OnConflict = Literal["return", "raise", "replace"]
UniqueUntil = Literal["end", "start"]


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
        max_retries: Runs after the first; None for ever.
        default_retry_delay: Seconds between runs, when nothing else says.
        retry_backoff: Seconds, doubled with every retry; True for 1.
        retry_backoff_max: Seconds a backoff does not exceed.
        retry_jitter: Whether to draw the delay from 0 to the backoff.
        max_crashes: Deaths of its process after which a job is a dead letter.
        on_crash: "retry", or "dead_letter" for what must not run twice: after one death, or when a worker
            went silent with the job in its hands, nobody runs it again.
        exclusive: Its runs never overlap: a run whose worker can no longer prove that it is alive is killed
            before others may take the job.
        transactional: The body runs in a transaction, on `self.connection` or `self.session`, that commits
            together with the job's end: its effects there happen exactly once. Needs `bind=True`.
        soft_time_limit: Seconds after which `SoftTimeLimitExceeded` is raised in the task.
        time_limit: Seconds after which the task is killed.
        pool: What it runs in: "prefork", "threads" or "asyncio", whatever the worker's own pool is.
        ignore_result: Store no result.
        history: Whether a job that has succeeded is kept in `finished_jobs`.
        unique_until: "end", or "start": from then on another job may have the `unique_key`.
    """

    queue: str
    priority: int
    expires: float
    dead_letter_queue: str
    autoretry_for: type[BaseException] | Sequence[type[BaseException]]
    dont_autoretry_for: type[BaseException] | Sequence[type[BaseException]]
    retry_kwargs: Mapping[str, Any]
    max_retries: int | None
    default_retry_delay: float
    retry_backoff: bool | float
    retry_backoff_max: float
    retry_jitter: bool
    max_crashes: int
    on_crash: Literal["retry", "dead_letter"]
    exclusive: bool
    transactional: bool
    soft_time_limit: float | None
    time_limit: float | None
    pool: Pool
    ignore_result: bool
    history: bool
    unique_until: UniqueUntil


class TaskOptions(TaskDefaults, total=False):
    """What `@app.task` takes beside `bind`; `name` is `<module>.<function>` by default."""

    name: str | None


TASK_DEFAULTS: Final = frozenset(TaskDefaults.__annotations__)
TASK_OPTIONS: Final = TASK_DEFAULTS | {"name", "bind"}

_CELERY_TASK_OPTIONS: Final = {
    "acks_late": "a job is acknowledged after it ran, always",
    "task_acks_late": "a job is acknowledged after it ran, always",
    "store_errors_even_if_ignored": "errors are always kept",
    "serializer": "arguments are always JSON",
    "compression": "Postgres compresses large arguments",
    "acks_on_failure": "a job that failed is retried or kept as a dead letter",
    "acks_on_failure_or_timeout": "a job that failed is retried or kept as a dead letter",
    "acks_on_timeout": "a job that failed is retried or kept as a dead letter",
    "reject_on_worker_lost": "it is called on_crash here",
    "retry_on_worker_lost": "deaths of a process are counted apart, see max_crashes",
    "pydantic": "annotated pydantic models are validated and rebuilt, always",
    "send_events": "there are no events: the tables say what happens",
    "delivery_mode": "a job is a row, and as durable as your data",
    "default_retry_max": "it is called retry_backoff_max here",
    "routing_key": "it is called queue here",
    "exchange": "it is called queue here",
    "base": "tasks have no classes here",
    "typing": "calls are always checked against the signature",
    "retry_max": "it is called max_retries here",
    "rate_limit": "limit a queue's rate by the concurrency of the workers that serve it",
    "track_started": "a running job's state is running, always",
    "trail": "a job knows who enqueued it",
    "throws": "a failed run is a row in failures, not a line in the log",
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
        soft_time_limit: Seconds, instead of its task's; 0 for none.
        time_limit: Seconds, instead of its task's; 0 for none.
        job_id: A UUID of the caller's own. A job that has or had it is not enqueued again.
        unique_key: While a job of this task with this key lives, no other one is enqueued.
        on_conflict: If there is one: "return" it, "raise" DuplicateJob, or "replace" what it shall do while
            it waits.
        unique_until: "end", or "start", when another may have the key as soon as this one is claimed.
        correlation_id: What the job belongs to, such as "order 42": jobs are found by it. A job enqueued in a
            run has that run's, unless it is given one, or None.
        tags: Labels to find jobs by.
        headers: JSON values that travel with the job.
        link: A Signature or canvas, or several, to run when the job has succeeded, with its result in front.
        link_error: A Signature, or several, to run when it has failed, with its id in front.
    """

    countdown: float | None
    eta: datetime | None
    expires: float | datetime | None
    priority: int | None
    queue: str | None
    max_retries: int | None
    soft_time_limit: float | None
    time_limit: float | None
    job_id: str | UUID | None
    unique_key: str | None
    on_conflict: OnConflict
    unique_until: UniqueUntil | None
    correlation_id: str | None
    tags: Sequence[str] | None
    headers: Mapping[str, Any] | None
    link: Any
    link_error: Any


class PeriodicOptions(TypedDict, total=False):
    """Options of the jobs of a schedule: those of `JobOptions` that mean the same for each of them.

    Attributes:
        expires: Seconds after the enqueue from which on the job is neither run nor retried.
    """

    queue: str | None
    priority: int | None
    expires: float | None
    max_retries: int | None
    soft_time_limit: float | None
    time_limit: float | None
    tags: Sequence[str] | None
    headers: Mapping[str, Any] | None


PERIODIC_OPTIONS: Final = frozenset(PeriodicOptions.__annotations__)

JOB_OPTIONS: Final = frozenset(JobOptions.__annotations__)

_CELERY_JOB_OPTIONS: Final = {
    "task_id": "it is called job_id here",
    "routing_key": "it is called queue here",
    "exchange": "it is called queue here",
    "retry": "a lost connection is repeated by itself",
    "retry_policy": "a lost connection is repeated by itself",
    "ignore_result": "it is an option of the task",
    "serializer": "arguments are always JSON",
    "compression": "Postgres compresses large arguments",
    "producer": "pass a connection instead",
    "delay": "it is called countdown here",
    "run_at": "it is called eta here",
    "expiration": "it is called expires here",
    "parent_id": "a job belongs to what enqueued it by its correlation_id",
    "root_id": "a job belongs to what enqueued it by its correlation_id",
    "shadow": "a job is found by its tags",
    "stamped_headers": "a job is found by its tags; other values go into headers",
    "publisher": "pass a connection instead",
}


def check_option_names(call: str, options: Mapping[str, object]) -> None:
    """TypeError naming ours, if an option is not of `JobOptions`."""
    if options.keys() <= JOB_OPTIONS:
        return
    unknown = [f"{shown(name)}{_meant(str(name))}" for name in options if name not in JOB_OPTIONS]
    raise TypeError(f"{call}() got an unknown option {', '.join(unknown)}")


def check_arguments(task: str, args: object, kwargs: object) -> None:
    """TypeError unless args is a list, a tuple or the like, and kwargs a mapping with text as keys."""
    # tuple and dict are named because asking an ABC is slow
    if not isinstance(args, (tuple, Sequence)) or isinstance(args, (str, bytes, bytearray)):
        raise TypeError(f"{task}: args must be a list or tuple, got {shown(args)}")
    if not isinstance(kwargs, (dict, Mapping)):
        raise TypeError(f"{task}: kwargs must be a mapping, got {shown(kwargs)}")
    for name in kwargs:
        if not isinstance(name, str):
            raise TypeError(f"{task}: names in kwargs must be text, got {shown(name)}")


def _meant(name: str) -> str:
    if name in _CELERY_JOB_OPTIONS:
        return f" ({_CELERY_JOB_OPTIONS[name]})"
    close = nearest(name, JOB_OPTIONS)
    return f" (did you mean {close}?)" if close else f" (known are {', '.join(sorted(JOB_OPTIONS))})"


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
        expected = "a number of seconds or a datetime" if name == "expires" else "a number of seconds"
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
        close = nearest(name, known)
        hint = _CELERY_TASK_OPTIONS.get(name) or (
            f"did you mean {close}?" if close else f"known are {', '.join(sorted(known))}"
        )
        errors.append(f"unknown option {shown(name)} ({hint})")
    for name, check in _CHECKS.items():
        try:
            if options.get(name) is not None:
                check(options[name])
        except (ValueError, TypeError) as error:
            errors.append(f"{'' if str(error).startswith(name) else f'{name}: '}{error}")
    if not errors:
        errors += _contradictions(options)
    try:
        RetryPolicy.from_options(retry_options(options))
    except ConfigError as error:
        errors.append(str(error))
    if errors:
        raise ConfigError(f"{what}: {'; '.join(errors)}")


def retry_options(options: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in options.items() if name in RETRY_OPTIONS}


def check_limit(name: str, value: object) -> float | None:
    """Seconds of a time limit, 0 for none; None for the task's."""
    if value is None:
        return None
    seconds = check_seconds(name, value)
    if seconds < 0:
        raise ValueError(f"{name} must be greater than 0 seconds, or 0 for none, got {shown(value)}")
    return seconds


def check_limits(soft: float | None, hard: float | None) -> None:
    """ValueError if the hard limit would come first."""
    if soft and hard and soft >= hard:
        raise ValueError(
            f"soft_time_limit must be less than time_limit ({hard:g} s), or the task is killed before it is "
            f"told; got {soft:g}"
        )


def check_unique_key(key: object) -> str | None:
    """Up to 512 characters that Postgres can store."""
    if key is None:
        return None
    if not isinstance(key, str):
        raise TypeError(f"unique_key must be text, got {shown(key)}")
    if not _is_word(key, MAX_UNIQUE_KEY):
        raise ValueError(
            f"unique_key must be 1 to {MAX_UNIQUE_KEY} characters in UTF-8 without NUL, got {shown(key)}"
        )
    return key


def check_correlation_id(value: object) -> str | None:
    """Up to 255 characters that Postgres can store."""
    if value is None:
        return None
    if not isinstance(value, str):
        raise TypeError(f"correlation_id must be text, got {shown(value)}")
    if not _is_word(value, MAX_LABEL):
        raise ValueError(
            f"correlation_id must be 1 to {MAX_LABEL} characters in UTF-8 without NUL, got {shown(value)}"
        )
    return value


def check_tags(value: object) -> list[str]:
    """Each once, in the order they were given."""
    if value is None:
        return []
    if isinstance(value, (str, bytes)) or not isinstance(value, Sequence):
        raise TypeError(f"tags must be a list or tuple of texts, got {shown(value)}")
    if strange := [each for each in value if not isinstance(each, str)]:
        raise TypeError(f"tags must be texts, got {shown(strange[0])}")
    if wrong := [each for each in value if not _is_word(each, MAX_LABEL)]:
        raise ValueError(
            f"each of tags must be 1 to {MAX_LABEL} characters in UTF-8 without NUL, got {shown(wrong[0])}"
        )
    tags = list(dict.fromkeys(value))
    if len(tags) > MAX_TAGS:
        raise ValueError(f"tags are {MAX_TAGS} at most, got {len(tags)}")
    return tags


def _is_word(text: str, most: int) -> bool:
    return 1 <= len(text) <= most and "\0" not in text and not any("\ud800" <= c <= "\udfff" for c in text)


def check_choice(name: str, value: object, choices: Sequence[str]) -> None:
    """ValueError unless it is one of the choices."""
    if not isinstance(value, str) or value not in choices:
        raise ValueError(f"{name} must be {' or '.join(map(repr, choices))}, got {shown(value)}")


def _flag(name: str) -> Callable[[object], None]:
    def check(value: object) -> None:
        if not isinstance(value, bool):
            raise TypeError(f"{name} must be True or False, got {shown(value)}")

    return check


def _choice(name: str, choices: Sequence[str]) -> Callable[[object], None]:
    return lambda value: check_choice(name, value, choices)


def _check_max_crashes(value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= MAX_CRASHES:
        raise ValueError(f"max_crashes must be a whole number from 1 to {MAX_CRASHES}, got {shown(value)}")


def _contradictions(options: Mapping[str, Any]) -> list[str]:
    """What does not go together, each value by itself being right."""
    errors = []
    try:
        check_limits(options.get("soft_time_limit"), options.get("time_limit"))
    except ValueError as error:
        errors.append(str(error))
    if options.get("transactional") and options.get("history") is False:
        errors.append("transactional needs history: it is what tells that a job has ended")
    if options.get("transactional") and options.get("bind") is False:
        errors.append("transactional needs bind=True: the transaction is on self.connection")
    if options.get("on_crash") == "dead_letter" and options.get("max_crashes", 1) != 1:
        errors.append("on_crash='dead_letter' means max_crashes=1; leave one of them out")
    return errors


def _check_expires(expires: object) -> None:
    if check_seconds("expires", expires) <= 0:
        raise ValueError(f"expires must be greater than 0 seconds, got {shown(expires)}")


_CHECKS: Final[dict[str, Callable[[Any], object]]] = {
    "name": check_task_name,
    "bind": _flag("bind"),
    "queue": check_queue,
    "priority": check_priority,
    "expires": _check_expires,
    "dead_letter_queue": check_queue,
    "max_crashes": _check_max_crashes,
    "on_crash": _choice("on_crash", ("retry", "dead_letter")),
    "exclusive": _flag("exclusive"),
    "transactional": _flag("transactional"),
    "soft_time_limit": lambda value: check_limit("soft_time_limit", value),
    "time_limit": lambda value: check_limit("time_limit", value),
    "pool": _choice("pool", get_args(Pool)),
    "ignore_result": _flag("ignore_result"),
    "history": _flag("history"),
    "unique_until": _choice("unique_until", get_args(UniqueUntil)),
}
