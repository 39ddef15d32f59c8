"""Tasks: functions known by name, and the calls that enqueue them."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Coroutine, Mapping, Sequence
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
    TypeVar,
    Unpack,
    cast,
    overload,
)

from pgqueue.canvas import Signature
from pgqueue.codec import ArgumentCodec
from pgqueue.context import Control, Request, TaskContext
from pgqueue.database.connection import (
    AsyncCaller,
    AsyncConnection,
    SyncCaller,
    SyncConnection,
    recognise,
    recognise_async,
    recognise_sync,
)
from pgqueue.enqueue import Client
from pgqueue.hooks import Hooks
from pgqueue.job import JobRequest, new_id
from pgqueue.options import JobOptions, check_arguments, check_option_names, retry_options
from pgqueue.request import build_request, of_this_run
from pgqueue.result import AsyncResult
from pgqueue.retry import RetryPolicy

P = ParamSpec("P")
R = TypeVar("R")

TRANSACTION_LIMIT: Final = 30.0
"""Seconds that a transactional run may take by default."""


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
    @property
    def hooks(self) -> Hooks: ...
    @property
    def default_limits(self) -> tuple[float | None, float | None]: ...
    def route(self, task_name: str) -> Route: ...
    def result_of(self, job_id: str) -> AsyncResult[Any]: ...


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
    def ignore_result(self) -> bool:
        """What it returns is not stored."""
        return bool(self._options.get("ignore_result"))

    @cached_property
    def soft_time_limit(self) -> float | None:
        """Seconds after which a run is told to end; None or 0 for never."""
        limit: float | None = self._options.get("soft_time_limit")
        return self._app.default_limits[0] if limit is None else limit

    @cached_property
    def time_limit(self) -> float | None:
        """Seconds after which a run is killed; None or 0 for never.

        A transactional one is, unless somebody says otherwise: what it has written locks out others, and an
        open transaction keeps the whole database from cleaning up.
        """
        limit: float | None = self._options.get("time_limit")
        if limit is None:
            limit = self._app.default_limits[1]
        if limit is None and self.transactional:
            return max(TRANSACTION_LIMIT, 2 * (self.soft_time_limit or 0.0))
        return limit

    @property
    def pool(self) -> str | None:
        """What it runs in, None for the worker's own pool."""
        pool: str | None = self._options.get("pool")
        return pool

    @cached_property
    def exclusive(self) -> bool:
        """Its runs never overlap."""
        return bool(self._options.get("exclusive"))

    @cached_property
    def transactional(self) -> bool:
        """Its runs are one transaction with their job's end."""
        return self.bound and bool(self._options.get("transactional"))

    @property
    def history(self) -> bool:
        """Its jobs are remembered once they have succeeded."""
        return self.transactional or bool(self._options.get("history", True))

    @property
    def max_crashes(self) -> int | None:
        """Deaths of its process after which a job is a dead letter; None for the worker's setting."""
        most: int | None = self._options.get("max_crashes")
        return 1 if self.runs_once else most

    @property
    def runs_once(self) -> bool:
        """A run that may have begun is never repeated by itself."""
        return self._options.get("on_crash") == "dead_letter"

    @cached_property
    def policy(self) -> RetryPolicy:
        """Whether and when a failed job runs again."""
        return RetryPolicy.from_options(retry_options(self.options), self._app.default_policy)

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

    def run(self, request: Request, control: Control) -> Any:
        """Run the function for a job; what it returns, a coroutine if it is `async def`, or whatever it
        raises.
        """
        hooks = self._app.hooks
        if not (self.bound or hooks.has_middleware):
            return self.function(*request.args, **request.kwargs)
        context = TaskContext(self, request, control)
        given = (context, *request.args) if self.bound else request.args
        if not hooks.has_middleware:
            return self.function(*given, **request.kwargs)
        if self.is_async:
            return self._run_coroutine(context, given)
        with hooks.around(context):
            return self.function(*given, **request.kwargs)

    async def _run_coroutine(self, context: TaskContext, given: Sequence[Any]) -> Any:
        with self._app.hooks.around(context):
            return await self.function(*given, **context.request.kwargs)

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

    def s(self, *args: Any, **kwargs: Any) -> Signature[R]:
        """This call as a value, for `chain`, `group`, `chord` and `app.enqueue_many`; the result of what it
        waits for goes in front of these arguments.
        """
        return Signature(self.name, args, kwargs, app=self.app)

    def si(self, *args: P.args, **kwargs: P.kwargs) -> Signature[R]:
        """This call as a value that takes no result of what it waits for."""
        return Signature(self.name, args, kwargs, app=self.app, immutable=True)

    def request_for(
        self, args: Sequence[Any], kwargs: Mapping[str, Any], options: Mapping[str, Any]
    ) -> JobRequest:
        """Check and encode a call. Names of options are checked already."""
        if type(args) is not tuple or kwargs:
            check_arguments(self.name, args, kwargs)
        options = of_this_run(options)
        if self._app.hooks.has("before_enqueue"):
            options = self._app.hooks.headers_for(self.name, args, kwargs, options)
        return self.encode(args, kwargs, options)

    def encode(
        self,
        args: Sequence[Any],
        kwargs: Mapping[str, Any],
        options: Mapping[str, Any],
        *,
        canvas_id: str | None = None,
        takes_result: bool = False,
    ) -> JobRequest:
        """`request_for`, without asking hooks: this call is not made now.

        Args:
            canvas_id: Of the canvas that the job belongs to.
            takes_result: One more argument goes in front of these, when it is known.
        """
        if not (options or canvas_id or takes_result):
            return self.plain_request(new_id(), args, kwargs)
        encoded = (
            self.codec.encode_behind(1, args, kwargs) if takes_result else self.codec.encode(args, kwargs)
        )
        return build_request(
            self.name,
            *encoded,
            options,
            queue=self.queue,
            priority=self.priority,
            expires=self.expires,
            unique_until=self._options.get("unique_until"),
            limits=(self.soft_time_limit, self.time_limit),
            history=self.history,
            canvas_id=canvas_id,
        )

    def plain_request(self, job_id: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> JobRequest:
        """`encode`, for a call without options: few are made with any, and this takes a third of the time."""
        written_args, written_kwargs = self.codec.encode(args, kwargs)
        queue, priority, expires, history = self._usual
        return JobRequest(
            job_id,
            self.name,
            written_args,
            written_kwargs,
            queue,
            priority,
            expires_in=expires,
            history=history,
        )

    @cached_property
    def _usual(self) -> tuple[str, int, float | None, bool]:
        return self.queue, self.priority, self.expires, self.history

    def _enqueue(
        self, args: Sequence[Any], kwargs: Mapping[str, Any], options: Any, caller: SyncCaller | None
    ) -> AsyncResult[R]:
        if "link" in options or "link_error" in options:
            linked: AsyncResult[R] = self._signature(args, kwargs)._enqueue((), {}, options, caller)
            return linked
        job_id = self._app.client.enqueue(self.request_for(args, kwargs, options), caller)
        return self._app.result_of(job_id)

    async def _aenqueue(
        self, args: Sequence[Any], kwargs: Mapping[str, Any], options: Any, caller: AsyncCaller | None
    ) -> AsyncResult[R]:
        if "link" in options or "link_error" in options:
            linked: AsyncResult[R] = await self._signature(args, kwargs)._aenqueue((), {}, options, caller)
            return linked
        job_id = await self._app.client.aenqueue(self.request_for(args, kwargs, options), caller)
        return self._app.result_of(job_id)

    def _signature(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Signature[Any]:
        check_arguments(self.name, args, kwargs)
        return Signature(self.name, tuple(args), kwargs, app=self.app)


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
