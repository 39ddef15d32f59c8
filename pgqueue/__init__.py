"""A durable job queue for Python teams that already run Postgres.

Importing this loads no database driver, no command line and no worker.
"""

from pgqueue.app import PgQueue
from pgqueue.context import Request, TaskContext
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
from pgqueue.job import DeadFilter, Progress
from pgqueue.options import JobOptions
from pgqueue.result import AsyncResult
from pgqueue.task import Signature, Task

__version__ = "0.1.0"

__all__ = [
    "AppNotLoaded",
    "AsyncResult",
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
]
