"""Every exception pgqueue raises, as one tree.

::

    PgQueueError
    ├── ConfigError (ValueError)            an option, a task definition or an environment variable is wrong
    │   └── DuplicateTask                   two functions claim one task name
    ├── PayloadError (ValueError)           arguments, headers or a result that cannot be stored or read back
    ├── UnknownTask (LookupError)           no function is registered under that name
    ├── EnqueueError                        a job was not enqueued
    │   ├── NotInTransaction                the caller's connection has no transaction that the caller ends
    │   ├── UnsupportedConnection (TypeError)  a connection of a kind, or bound in a way, we cannot use
    │   ├── WrongDatabase                   the caller's connection is on a database without this queue
    │   ├── DuplicateJob                    a live job has the unique key, and `on_conflict="raise"`
    │   ├── UniqueWaitTimeout               an open transaction holds the unique key
    │   └── EnqueueUncertain                the COMMIT answer was lost and a repeat cannot settle it
    ├── ScheduleError                       a schedule is not what the act needs: its name taken, or in code
    │   └── UnknownSchedule (LookupError)   no schedule has this name
    ├── ResultError                         `AsyncResult.get` has no value to return
    │   ├── JobFailed                       the job is a dead letter
    │   ├── JobCancelled
    │   ├── JobExpired
    │   ├── JobNotFound                     no such job for five seconds
    │   └── ResultUnavailable               it succeeded, but its result was not stored
    ├── DatabaseError                       the queue's own database work failed
    │   ├── DatabaseUnavailable             it cannot be reached, or refused us
    │   ├── PermissionDenied                the role lacks a right on the queue
    │   └── SchemaMismatch                  the schema is missing or at another revision
    ├── WorkerError                         a worker could not start or go on
    │   └── AppNotLoaded                    importing its application failed
    └── TimeLimitExceeded                   never raised: `autoretry_for` names it to retry after that limit
    Signal (BaseException)                  steers the job that a task runs for
    ├── Retry                               raised by the task: run again later, as a retry
    ├── Snooze                              raised by the task: run again later, and nothing was wrong
    ├── Reject                              raised by the task: never run again
    ├── SoftTimeLimitExceeded               raised in the task: it has run for its soft limit
    └── TaskCancelled                       raised in the task: somebody has cancelled the job

`Signal` derives from `BaseException` so that `except Exception` in a task does not swallow it.
Bad arguments of ours are plain `ValueError` or `TypeError`. Messages say the rule, the value and the way out.
"""

from __future__ import annotations

import reprlib
from collections.abc import Iterable

_REPR = reprlib.Repr()
_REPR.maxstring = _REPR.maxother = _REPR.maxlong = 120


def shown(value: object) -> str:
    """A wrong value for a message: its repr on one line, shortened, also when the repr fails."""
    try:
        text = _REPR.repr(value)
    except Exception:
        text = f"{type(value).__name__} (its repr fails)"
    return text if text.isprintable() else repr(text)[1:-1]


def nearest(name: object, known: Iterable[str], *, cutoff: float = 0.6) -> str | None:
    """The known name that a wrong one is most like, to suggest it; None when none is like it.

    Args:
        cutoff: How alike they must be, from 0 to 1.
    """
    import difflib  # wanted by nobody who makes no mistake

    return next(iter(difflib.get_close_matches(str(name), known, n=1, cutoff=cutoff)), None)


class PgQueueError(Exception):
    """Base class of pgqueue's exceptions."""


class ConfigError(PgQueueError, ValueError):
    """An option, a task definition or an environment variable is wrong."""


class DuplicateTask(ConfigError):
    """Two functions claim one task name."""


class PayloadError(PgQueueError, ValueError):
    """Arguments, headers or a result that cannot be stored, or not be read back."""


class UnknownTask(PgQueueError, LookupError):
    """No function is registered under the job's task name."""


class EnqueueError(PgQueueError):
    """A job was not enqueued."""


class NotInTransaction(EnqueueError):
    """The caller's connection has no open transaction that the caller will end."""


class UnsupportedConnection(EnqueueError, TypeError):
    """A connection of a kind we do not know, or bound in a way we cannot use."""


class WrongDatabase(EnqueueError):
    """The caller's connection is on a database that does not hold this queue."""


class DuplicateJob(EnqueueError):
    """A live job of this task has the unique key; nothing was enqueued, the caller's transaction goes on.

    Attributes:
        job_id: The job that has the key.
    """

    def __init__(self, message: str, *, job_id: str) -> None:
        super().__init__(message)
        self.job_id = job_id


class UniqueWaitTimeout(EnqueueError):
    """Another transaction, still open after a second, has enqueued a job with this unique key."""


class EnqueueUncertain(EnqueueError):
    """The connection broke before the database's answer came, and repeating did not settle it.

    Or the COMMIT's wait for a synchronous standby was cut short.

    Attributes:
        job_id: Repeat the call with `job_id=` this to enqueue it at most once.
    """

    def __init__(self, message: str, *, job_id: str) -> None:
        super().__init__(message)
        self.job_id = job_id


class ScheduleError(PgQueueError):
    """A schedule was not changed: its name is taken, or it is in the code of a worker."""


class UnknownSchedule(ScheduleError, LookupError):
    """No schedule has this name."""


class ResultError(PgQueueError):
    """`AsyncResult.get` has no value to return.

    Attributes:
        job_id: The job asked about.
    """

    def __init__(self, message: str, *, job_id: str) -> None:
        super().__init__(message)
        self.job_id = job_id


class JobFailed(ResultError):
    """The job is a dead letter.

    Attributes:
        reason: Why it is dead, one of the words of `dead_letters.reason`.
        error_class: Dotted name of the last exception's class, or None.
        error_message: Its message, or None.
        remote_traceback: Its traceback as text, or None.
    """

    def __init__(
        self,
        message: str,
        *,
        job_id: str,
        reason: str,
        error_class: str | None = None,
        error_message: str | None = None,
        remote_traceback: str | None = None,
    ) -> None:
        super().__init__(message, job_id=job_id)
        self.reason = reason
        self.error_class = error_class
        self.error_message = error_message
        self.remote_traceback = remote_traceback


class JobCancelled(ResultError):
    """The job was cancelled before it ran, or while it ran."""


class JobExpired(ResultError):
    """The job's `expires` passed before it could run."""


class JobNotFound(ResultError):
    """No job has this id: never committed, already pruned, or another database's."""


class ResultUnavailable(ResultError):
    """The job succeeded but its result was not stored; the message says why."""


class DatabaseError(PgQueueError):
    """The queue's own database work failed."""


class DatabaseUnavailable(DatabaseError):
    """The database cannot be reached, or refused us."""


class PermissionDenied(DatabaseError):
    """The role lacks a right on the queue; the message says on what."""


class SchemaMismatch(DatabaseError):
    """The schema is missing, or at a revision this pgqueue does not work with."""


class WorkerError(PgQueueError):
    """A worker could not start, or cannot go on."""


class AppNotLoaded(WorkerError):
    """A worker's application cannot be imported; the message has the traceback."""


class TimeLimitExceeded(PgQueueError):
    """A job ran into its hard time limit; its process was killed, so nothing is ever raised.

    For `autoretry_for`: a job of a task that names it is retried then, others are dead letters.
    """


class Signal(BaseException):
    """Steers the job that a task runs for."""


class Retry(Signal):
    """Run this job again later; made by `self.retry(...)`.

    Attributes:
        delay: Seconds from now, or None for the task's policy.
        cause: The exception that led here, or None.
        max_retries: A limit for this job from now on, or None to keep the one it has.
    """

    def __init__(
        self,
        *,
        delay: float | None = None,
        cause: BaseException | None = None,
        max_retries: int | None = None,
    ) -> None:
        super().__init__(f"retry in {delay} s" if delay is not None else "retry")
        self.delay = delay
        self.cause = cause
        self.max_retries = max_retries


class Snooze(Signal):
    """Run this job again later, by the task's own wish: no retry is burned, and no failure kept.

    Attributes:
        seconds: From now.
    """

    def __init__(self, seconds: float) -> None:
        number: object = seconds
        if isinstance(number, bool) or not isinstance(number, (int, float)) or not 0 <= number < 1e10:
            raise ValueError(f"Snooze takes seconds, at least 0, got {shown(seconds)}")
        super().__init__(f"snooze for {seconds:g} s")
        self.seconds = float(seconds)


class Reject(Signal):
    """Never run this job again: it becomes a dead letter, `rejected`.

    Attributes:
        reason: Why, for people.
    """

    def __init__(self, reason: str = "") -> None:
        super().__init__(reason)
        self.reason = reason


class SoftTimeLimitExceeded(Signal):
    """The job has run for its `soft_time_limit`: clean up and end; `autoretry_for` may name it."""


class TaskCancelled(Signal):
    """Somebody has cancelled the job: clean up and end. Whatever the task does, it is not retried."""
