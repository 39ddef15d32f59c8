"""A durable job queue for Python teams that already run Postgres.

Importing this loads no database driver, no command line and no worker. What it offers is loaded when it is
asked for: the command line needs little of it, and `--help` nothing.
"""

from importlib import import_module
from typing import TYPE_CHECKING

from pgqueue.errors import (
    AppNotLoaded,
    ConfigError,
    DatabaseError,
    DatabaseUnavailable,
    DuplicateJob,
    DuplicateTask,
    EnqueueError,
    EnqueueUncertain,
    JobCancelled,
    JobExpired,
    JobFailed,
    JobNotFound,
    NotInTransaction,
    PayloadError,
    PermissionDenied,
    PgQueueError,
    Reject,
    ResultError,
    ResultUnavailable,
    Retry,
    ScheduleError,
    SchemaMismatch,
    Signal,
    Snooze,
    SoftTimeLimitExceeded,
    TaskCancelled,
    TimeLimitExceeded,
    UniqueWaitTimeout,
    UnknownSchedule,
    UnknownTask,
    UnsupportedConnection,
    WorkerError,
    WrongDatabase,
)

if TYPE_CHECKING:
    from pgqueue.app import PgQueue
    from pgqueue.canvas import Canvas, Signature, chain, chord, group
    from pgqueue.context import Request, TaskContext
    from pgqueue.job import DeadFilter, Progress
    from pgqueue.options import JobOptions
    from pgqueue.result import AsyncResult, CanvasResult
    from pgqueue.task import Task

__version__ = "0.1.0"

_MODULES = {
    "pgqueue.app": ("PgQueue",),
    "pgqueue.canvas": ("Canvas", "Signature", "chain", "chord", "group"),
    "pgqueue.context": ("Request", "TaskContext"),
    "pgqueue.job": ("DeadFilter", "Progress"),
    "pgqueue.options": ("JobOptions",),
    "pgqueue.result": ("AsyncResult", "CanvasResult"),
    "pgqueue.task": ("Task",),
}
"""Where the names above come from, for those who do not check types."""

__all__ = [
    "AppNotLoaded",
    "AsyncResult",
    "Canvas",
    "CanvasResult",
    "ConfigError",
    "DatabaseError",
    "DatabaseUnavailable",
    "DeadFilter",
    "DuplicateJob",
    "DuplicateTask",
    "EnqueueError",
    "EnqueueUncertain",
    "JobCancelled",
    "JobExpired",
    "JobFailed",
    "JobNotFound",
    "JobOptions",
    "NotInTransaction",
    "PayloadError",
    "PermissionDenied",
    "PgQueue",
    "PgQueueError",
    "Progress",
    "Reject",
    "Request",
    "ResultError",
    "ResultUnavailable",
    "Retry",
    "ScheduleError",
    "SchemaMismatch",
    "Signal",
    "Signature",
    "Snooze",
    "SoftTimeLimitExceeded",
    "Task",
    "TaskCancelled",
    "TaskContext",
    "TimeLimitExceeded",
    "UniqueWaitTimeout",
    "UnknownSchedule",
    "UnknownTask",
    "UnsupportedConnection",
    "WorkerError",
    "WrongDatabase",
    "__version__",
    "chain",
    "chord",
    "group",
]


if not TYPE_CHECKING:  # which would let any name pass

    def __getattr__(name: str) -> object:
        for module, names in _MODULES.items():
            if name in names:
                found = globals()[name] = getattr(import_module(module), name)
                return found
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
