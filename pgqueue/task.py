"""Tasks: functions known by name, the calls that enqueue them, and what a running one can see of its job."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Coroutine, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import cached_property, update_wrapper
from types import MappingProxyType
from typing import (
    TYPE_CHECKING,
    Any,
    Concatenate,
    Final,
    Generic,
    NoReturn,
    ParamSpec,
    Protocol,
    TypedDict,
    TypeVar,
    Unpack,
    cast,
    overload,
)

from pgqueue.codec import ArgumentCodec
from pgqueue.database.connection import AsyncCaller, SyncCaller, recognise, recognise_async, recognise_sync
from pgqueue.enqueue import (
    Client,
    JobOptions,
    build_request,
    check_arguments,
    check_max_retries,
    check_option_names,
    check_seconds,
    check_time,
)
from pgqueue.errors import ConfigError, Retry, shown
from pgqueue.job import JobRequest, check_priority, check_queue, check_task_name, new_id
from pgqueue.result import AsyncResult, current_request
from pgqueue.retry import RETRY_OPTIONS, RetryPolicy

P = ParamSpec("P")
R = TypeVar("R")


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

_CELERY_OPTIONS: Final = {
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


class Route(Protocol):
    """Where `task_routes` sends a task; None leaves it to the task."""

    @property
    def queue(self) -> str | None: ...
    @property
    def priority(self) -> int | None: ...
    @property
    def dead_letter_queue(self) -> str | None: ...


class Application(Protocol):
    """What a task needs to know of its application."""

    @property
    def client(self) -> Client: ...
    @property
    def defaults(self) -> Mapping[str, Any]: ...
    @property
    def default_queue(self) -> str: ...
    @property
    def default_priority(self) -> int: ...
    @property
    def default_policy(self) -> RetryPolicy: ...
    def route(self, task_name: str) -> Route: ...
    def result_of(self, job_id: str) -> AsyncResult[Any]: ...


class _SyncConnection(Protocol):
    """Any accepted sync connection, to a type checker."""

    def commit(self) -> None: ...


class _AsyncConnection(Protocol):
    """SQLAlchemy's and psycopg's async connections, to a type checker."""

    def commit(self) -> Coroutine[Any, Any, None]: ...


class _AsyncpgConnection(Protocol):
    """asyncpg's, which commits through its transactions only."""

    def is_in_transaction(self) -> bool: ...


SyncConnection = _SyncConnection
AsyncConnection = _AsyncConnection | _AsyncpgConnection


@dataclass(frozen=True, slots=True)
class Request:
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
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    retries: int = 0
    attempt: int = 1
    eta: datetime | None = None
    queue: str = ""
    priority: int = 0
    headers: Mapping[str, Any] = field(default_factory=dict)
    worker: str | None = None
    called_directly: bool = False


class TaskContext:
    """The first argument of a task declared with `bind=True`.

    Attributes:
        request: The job it runs for.
        task: The task itself.
    """

    __slots__ = ("request", "task")

    def __init__(self, task: Task[..., Any], request: Request) -> None:
        self.task = task
        self.request = request

    @property
    def app(self) -> Any:
        """The application the task belongs to."""
        return self.task.app

    @property
    def name(self) -> str:
        return self.task.name

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


@dataclass(frozen=True, slots=True)
class Signature:
    """A call of a task that has not been made: a value to pass to `app.enqueue_many`.

    Attributes:
        task: The task's name.
        args: Positional arguments, not yet encoded.
        kwargs: Keyword arguments.
        options: As for `apply_async`.
    """

    task: str
    args: tuple[Any, ...] = ()
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    options: Mapping[str, Any] = field(default_factory=dict)

    def set(self, **options: Unpack[JobOptions]) -> Signature:
        """A copy with these options, beside those it has."""
        check_option_names("set", options)
        return Signature(self.task, self.args, self.kwargs, {**self.options, **options})


class Task(Generic[P, R]):
    """A registered function: call it to run it here and now, `delay` it to enqueue a job.

    Attributes:
        app: The application it is registered with.
        name: What the database and workers know it by.
        function: The function.
        bound: The function takes a `TaskContext` first.
        options: What the decorator was given.
        module: Where the function is defined.
    """

    def __init__(
        self,
        app: Application,
        function: Callable[..., Any],
        *,
        name: str,
        bound: bool,
        options: Mapping[str, Any],
    ) -> None:
        update_wrapper(self, function)
        self.app: Any = app
        self.function = function
        self.name = name
        self.bound = bound
        self.options = MappingProxyType(dict(options))
        self.module: str = function.__module__
        self.is_async = inspect.iscoroutinefunction(function)
        self.codec = ArgumentCodec(function, task=name, bound=bound)

    def __repr__(self) -> str:
        return f"<Task {self.name}>"

    # A call option beats the route, which beats the task's option, which beats the application's default.

    @cached_property
    def queue(self) -> str:
        """Where its jobs go, unless the call says otherwise."""
        return self._route.queue or self._options.get("queue") or self._app.default_queue

    @cached_property
    def priority(self) -> int:
        """Of its jobs, unless the call says otherwise."""
        given = (self._route.priority, self._options.get("priority"), self._app.default_priority)
        return next(priority for priority in given if priority is not None)

    @cached_property
    def expires(self) -> float | None:
        """Seconds after the enqueue, unless the call says otherwise."""
        expires: float | None = self._options.get("expires")
        return expires

    @cached_property
    def dead_letter_queue(self) -> str | None:
        """The label of its dead letters, None for their queue's name."""
        return self._route.dead_letter_queue or self._options.get("dead_letter_queue")

    @cached_property
    def policy(self) -> RetryPolicy:
        """Whether and when a failed job runs again."""
        return RetryPolicy.from_options(_retry_options(self.options), self._app.default_policy)

    @cached_property
    def _options(self) -> Mapping[str, Any]:
        return {**self._app.defaults, **self.options}

    @cached_property
    def _route(self) -> Route:
        return self._app.route(self.name)

    @property
    def _app(self) -> Application:
        return cast(Application, self.app)

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> R:
        """Run the function here and now, without a job."""
        if not self.bound:
            return cast(R, self.function(*args, **kwargs))
        request = Request(
            id=new_id(),
            task=self.name,
            args=args,
            kwargs=kwargs,
            queue=self.queue,
            priority=self.priority,
            called_directly=True,
        )
        return cast(R, self.function(TaskContext(self, request), *args, **kwargs))

    def run(self, request: Request, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        """Run the function for a job; what it returns, or whatever it raises."""
        token = current_request.set(request)
        try:
            context = (TaskContext(self, request),) if self.bound else ()
            result = self.function(*context, *args, **kwargs)
            if self.is_async:
                import asyncio

                return asyncio.run(result)
            return result
        finally:
            current_request.reset(token)

    def delay(self, *args: P.args, **kwargs: P.kwargs) -> AsyncResult[R]:
        """Enqueue a job with these arguments, on a connection of our own, which commits."""
        return self._enqueue(args, kwargs, {}, None)

    async def adelay(self, *args: P.args, **kwargs: P.kwargs) -> AsyncResult[R]:
        """`delay`, awaited."""
        return await self._aenqueue(args, kwargs, {}, None)

    def apply_async(
        self,
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
        *,
        connection: SyncConnection | None = None,
        **options: Unpack[JobOptions],
    ) -> AsyncResult[R]:
        """Enqueue a job with options.

        Args:
            args: Positional arguments.
            kwargs: Keyword arguments.
            connection: Enqueue in this connection's open transaction, as `.on(connection)` does.
            options: See `JobOptions`.

        Raises:
            PayloadError: An argument cannot be stored.
            NotInTransaction: The connection has no transaction that the caller ends.
            DatabaseUnavailable: Without `connection`: nothing was enqueued.
            EnqueueUncertain: Without `connection`: the connection broke, and the answer with it.
        """
        check_option_names("apply_async", options)
        caller = None if connection is None else recognise_sync(connection, "apply_async")
        return self._enqueue(args, kwargs or {}, options, caller)

    async def aapply_async(
        self,
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
        *,
        connection: AsyncConnection | None = None,
        **options: Unpack[JobOptions],
    ) -> AsyncResult[R]:
        """`apply_async`, awaited."""
        check_option_names("aapply_async", options)
        caller = None if connection is None else recognise_async(connection, "aapply_async")
        return await self._aenqueue(args, kwargs or {}, options, caller)

    @overload
    def on(self, connection: SyncConnection) -> SyncCalls[P, R]: ...
    @overload
    def on(self, connection: AsyncConnection) -> AsyncCalls[P, R]: ...
    def on(self, connection: object) -> SyncCalls[P, R] | AsyncCalls[P, R]:
        """The calls that enqueue in this connection's open transaction: jobs commit with the caller's data.

        Args:
            connection: psycopg's Connection or AsyncConnection; SQLAlchemy's Session or Connection on psycopg
                or psycopg2, AsyncSession or AsyncConnection on psycopg or asyncpg; asyncpg's; Django's.

        Raises:
            UnsupportedConnection: It is none of these.
        """
        caller = recognise(connection)
        if isinstance(caller, AsyncCaller):
            return AsyncCalls(self, caller)
        return SyncCalls(self, caller)

    def s(self, *args: Any, **kwargs: Any) -> Signature:
        """This call as a value, for `app.enqueue_many`."""
        return Signature(self.name, args, kwargs)

    def request_for(
        self, args: Sequence[Any], kwargs: Mapping[str, Any], options: Mapping[str, Any]
    ) -> JobRequest:
        """Check and encode a call. Names of options are checked already."""
        if type(args) is not tuple or kwargs:
            check_arguments(self.name, args, kwargs)
        encoded = self.codec.encode(args, kwargs)
        return build_request(
            self.name, *encoded, options, queue=self.queue, priority=self.priority, expires=self.expires
        )

    def _enqueue(
        self, args: Sequence[Any], kwargs: Mapping[str, Any], options: Any, caller: SyncCaller | None
    ) -> AsyncResult[R]:
        job_id = self._app.client.enqueue(self.request_for(args, kwargs, options), caller)
        return self._app.result_of(job_id)

    async def _aenqueue(
        self, args: Sequence[Any], kwargs: Mapping[str, Any], options: Any, caller: AsyncCaller | None
    ) -> AsyncResult[R]:
        job_id = await self._app.client.aenqueue(self.request_for(args, kwargs, options), caller)
        return self._app.result_of(job_id)


class AsyncTask(Task[P, R]):
    """A task whose function is `async def`: called directly it must be awaited."""

    if TYPE_CHECKING:

        def __call__(  # type: ignore[override]
            self, *args: P.args, **kwargs: P.kwargs
        ) -> Coroutine[Any, Any, R]: ...


class SyncCalls(Generic[P, R]):
    """What `.on(connection)` gives for a sync connection."""

    def __init__(self, task: Task[P, R], caller: SyncCaller) -> None:
        self._task = task
        self._caller = caller

    def delay(self, *args: P.args, **kwargs: P.kwargs) -> AsyncResult[R]:
        """Enqueue a job in the connection's open transaction."""
        return self._task._enqueue(args, kwargs, {}, self._caller)

    def apply_async(
        self, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None, **options: Unpack[JobOptions]
    ) -> AsyncResult[R]:
        """Enqueue a job with options in the connection's open transaction."""
        check_option_names("apply_async", options)
        return self._task._enqueue(args, kwargs or {}, options, self._caller)

    if not TYPE_CHECKING:

        def __getattr__(self, name: str) -> NoReturn:
            raise AttributeError(f".on() of a sync connection has delay and apply_async, not {name!r}")


class AsyncCalls(Generic[P, R]):
    """What `.on(connection)` gives for an async connection."""

    def __init__(self, task: Task[P, R], caller: AsyncCaller) -> None:
        self._task = task
        self._caller = caller

    async def adelay(self, *args: P.args, **kwargs: P.kwargs) -> AsyncResult[R]:
        """Enqueue a job in the connection's open transaction."""
        return await self._task._aenqueue(args, kwargs, {}, self._caller)

    async def aapply_async(
        self, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None, **options: Unpack[JobOptions]
    ) -> AsyncResult[R]:
        """Enqueue a job with options in the connection's open transaction."""
        check_option_names("aapply_async", options)
        return await self._task._aenqueue(args, kwargs or {}, options, self._caller)

    if not TYPE_CHECKING:

        def __getattr__(self, name: str) -> NoReturn:
            raise AttributeError(f".on() of an async connection has adelay and aapply_async, not {name!r}")


class PlainDecorator(Protocol):
    """`@app.task(...)` on a function without a context."""

    @overload
    def __call__(self, function: Callable[P, Coroutine[Any, Any, R]], /) -> AsyncTask[P, R]: ...
    @overload
    def __call__(self, function: Callable[P, R], /) -> Task[P, R]: ...


class BoundDecorator(Protocol):
    """`@app.task(bind=True, ...)`: the context is not an argument of the task's calls."""

    @overload
    def __call__(
        self, function: Callable[Concatenate[TaskContext, P], Coroutine[Any, Any, R]], /
    ) -> AsyncTask[P, R]: ...
    @overload
    def __call__(self, function: Callable[Concatenate[TaskContext, P], R], /) -> Task[P, R]: ...


def check_task_options(options: Mapping[str, Any], known: frozenset[str], what: str) -> None:
    """ConfigError naming all that is wrong with a task's options."""
    import difflib

    if not isinstance(options, Mapping):
        raise ConfigError(f"{what} must be a dict of options, got {shown(options)}")
    errors = []
    for name in sorted(options.keys() - known, key=str):
        close = difflib.get_close_matches(str(name), known, n=1)
        hint = _CELERY_OPTIONS.get(name) or (
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
        RetryPolicy.from_options(_retry_options(options))
    except ConfigError as error:
        errors.append(str(error))
    if errors:
        raise ConfigError(f"{what}: {'; '.join(errors)}")


def _retry_options(options: Mapping[str, Any]) -> dict[str, Any]:
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
