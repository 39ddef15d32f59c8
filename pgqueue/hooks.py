"""What an application wants to be told of, and what it wraps around its tasks.

A hook is told and cannot change the course of things: what it raises is logged, and the job goes on. The one
exception is `before_enqueue`, which belongs to the call that enqueues: it may add headers, and what it raises
is the caller's.

Hooks of tasks run in the executor, in the order in which they were registered, outside of the task's time
limit. A run that is cut off (its process dies or is killed at the hard limit) ends without one. Those of the
worker run in a process of their own that is forked for them: a supervisor never runs an application's code.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any, Final, Literal, TypeVar

import msgspec

from pgqueue.context import Request, TaskContext
from pgqueue.errors import ConfigError, nearest, shown
from pgqueue.tracebacks import describe

log = logging.getLogger("pgqueue.hooks")

HookName = Literal[
    "task_started",
    "task_succeeded",
    "task_retried",
    "task_failed",
    "worker_ready",
    "worker_stopping",
    "child_started",
    "before_enqueue",
]


class TaskStarted(msgspec.Struct, frozen=True):
    """A run begins."""

    request: Request


class TaskSucceeded(msgspec.Struct, frozen=True):
    """The body has returned.

    Attributes:
        result: What it returned, as it is.
        seconds: How long it took.
    """

    request: Request
    result: Any
    seconds: float


class TaskRetried(msgspec.Struct, frozen=True):
    """The run has failed, or asked for it with `self.retry()`, and the job will run again.

    Attributes:
        error: What was raised; of a `self.retry(exc=…)` that exception.
        delay: Seconds from now.
        seconds: How long it took.
    """

    request: Request
    error: BaseException
    delay: float
    seconds: float


class TaskFailed(msgspec.Struct, frozen=True):
    """The job is dead.

    Attributes:
        request: Without arguments, if those were what could not be read.
        error: What was raised.
        reason: As in `dead_letters`.
        seconds: How long it took.
    """

    request: Request
    error: BaseException
    reason: str
    seconds: float


class WorkerReady(msgspec.Struct, frozen=True):
    """The worker can take its first job."""

    worker: str


class WorkerStopping(msgspec.Struct, frozen=True):
    """The worker was asked to stop, and claims nothing more."""

    worker: str


class ChildStarted(msgspec.Struct, frozen=True):
    """An executor is about to take its first job; this runs in it."""

    pid: int
    pool: str


class BeforeEnqueue(msgspec.Struct, frozen=True):
    """A job is about to be enqueued, in the process that does.

    Attributes:
        args, kwargs: Not checked and not encoded yet.
        options: Of this call.
        headers: What travels with the job: add to it.
    """

    task: str
    args: Sequence[Any]
    kwargs: Mapping[str, Any]
    options: Mapping[str, Any]
    headers: dict[str, Any]


HOOKS: Final[Mapping[str, type]] = {
    "task_started": TaskStarted,
    "task_succeeded": TaskSucceeded,
    "task_retried": TaskRetried,
    "task_failed": TaskFailed,
    "worker_ready": WorkerReady,
    "worker_stopping": WorkerStopping,
    "child_started": ChildStarted,
    "before_enqueue": BeforeEnqueue,
}
"""By name: what a hook gets."""

Hook = TypeVar("Hook", bound=Callable[[Any], object])
Wrapper = TypeVar("Wrapper", bound=Callable[[TaskContext], Iterator[None]])


class Hooks:
    """What one application has registered."""

    def __init__(self) -> None:
        self._hooks: dict[str, list[Callable[[Any], object]]] = {}
        self._middleware: list[Callable[[TaskContext], AbstractContextManager[None]]] = []

    def __bool__(self) -> bool:
        return bool(self._hooks)

    @property
    def names(self) -> list[str]:
        """What somebody wants to be told of."""
        return sorted(self._hooks)

    def has(self, name: HookName) -> bool:
        """Whether anybody wants to be told."""
        return name in self._hooks

    def add(self, name: str, hook: object) -> None:
        """Register a hook; ConfigError if it is none, or the name is not one."""
        check_name(name)
        if not callable(hook) or inspect.iscoroutinefunction(hook):
            raise ConfigError(
                f"@app.hook({name!r}) decorates a plain function of one argument, got {shown(hook)}"
            )
        self._hooks.setdefault(name, []).append(hook)

    def add_middleware(self, function: object) -> None:
        """Register a generator function; ConfigError if it is none."""
        if not inspect.isgeneratorfunction(function):
            raise ConfigError(
                "@app.middleware decorates a generator function that takes a TaskContext and yields once, "
                f"got {shown(function)}"
            )
        self._middleware.append(contextmanager(function))

    @property
    def has_middleware(self) -> bool:
        return bool(self._middleware)

    @contextmanager
    def around(self, context: TaskContext) -> Generator[None, None, None]:
        """All middleware, the first registered outermost."""
        with ExitStack() as stack:
            for each in self._middleware:
                stack.enter_context(each(context))
            yield

    def tell(self, name: HookName, event: object) -> None:
        """Run the hooks of this name; what they raise is logged."""
        for hook in self._hooks.get(name, ()):
            try:
                hook(event)
            except BaseException as error:  # also of one that exits
                how = describe(error)[2].rstrip()
                log.error("hook_failed hook=%s function=%s error=%s", name, _name_of(hook), how)

    def headers_for(
        self, task: str, args: Sequence[Any], kwargs: Mapping[str, Any], options: Mapping[str, Any]
    ) -> Mapping[str, Any]:
        """The options of an enqueue, with the headers that hooks have added."""
        given = options.get("headers")
        if not (given is None or isinstance(given, Mapping)):
            return options  # refused further on
        event = BeforeEnqueue(task, args, kwargs, options, dict(given or {}))
        for hook in self._hooks["before_enqueue"]:
            hook(event)
        return {**options, "headers": event.headers or None} if event.headers or given else options


def check_name(name: str) -> None:
    """ConfigError if there is no such hook."""
    if name not in HOOKS:
        close = nearest(name, HOOKS)
        hint = f"did you mean {close}?" if close else f"known are {', '.join(sorted(HOOKS))}"
        raise ConfigError(f"unknown hook {shown(name)} ({hint})")


def _name_of(hook: object) -> str:
    return f"{getattr(hook, '__module__', '?')}.{getattr(hook, '__qualname__', '?')}"
