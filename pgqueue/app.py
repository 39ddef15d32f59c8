"""The application: its tasks, its settings, and the calls that enqueue by name or by the thousand."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Callable, Coroutine, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from datetime import timedelta
from fnmatch import fnmatchcase
from functools import cached_property
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Final, Literal, ParamSpec, TypeVar, Unpack, overload

from pgqueue.canvas import Signature, without_links
from pgqueue.codec import encode_plain
from pgqueue.config import Config
from pgqueue.database.connection import (
    AsyncConnection,
    SyncConnection,
    recognise_async,
    recognise_sync,
)
from pgqueue.dead_letters import DeadLetters
from pgqueue.discovery import task_modules
from pgqueue.enqueue import Client
from pgqueue.errors import AppNotLoaded, ConfigError, DuplicateTask, PgQueueError, UnknownTask, shown
from pgqueue.hooks import Hook, HookName, Hooks, Wrapper, check_name
from pgqueue.job import (
    JobRequest,
    check_id,
    check_priority,
    check_queue,
    check_task_name,
    current_request,
    new_ids,
)
from pgqueue.options import (
    TASK_DEFAULTS,
    TASK_OPTIONS,
    JobOptions,
    PeriodicOptions,
    TaskOptions,
    check_arguments,
    check_option_names,
    check_task_options,
    retry_options,
)
from pgqueue.queues import Queues
from pgqueue.request import build_request, of_this_run
from pgqueue.result import AsyncResult, CanvasResult
from pgqueue.retention import Retention
from pgqueue.retry import RetryPolicy
from pgqueue.task import (
    AsyncTask,
    BoundDecorator,
    PlainDecorator,
    Task,
)

if TYPE_CHECKING:
    from pgqueue.database.session import Session
    from pgqueue.eager import Eager
    from pgqueue.schedule import CatchUp, Overlap
    from pgqueue.schedules import Decorated, Schedules, SchedulesInCode

P = ParamSpec("P")
R = TypeVar("R")

_OWN_OPTIONS: Final = frozenset({"imports", "task_defaults", "task_routes", "session_factory"})


@dataclass(frozen=True, slots=True)
class TaskRoute:
    """Where `task_routes` sends a task; None leaves it to the task."""

    queue: str | None = None
    priority: int | None = None
    dead_letter_queue: str | None = None


_NO_ROUTE: Final = TaskRoute()


class PgQueue:
    """An application's tasks and its queue. Making one does no I/O.

    Args:
        name: For people; what installed distributions offer task modules under (see `import_tasks`); and the
            module part of names of tasks defined in an interactive session.
        dsn: The queue's database, a URL or `key=value` pairs; None for $PGQUEUE_DSN. A process that enqueues
            only through `.on(connection)` needs none.
        schema: The Postgres schema that holds the queue.
        imports: Modules that define tasks, imported by workers.
        task_defaults: Options for all tasks, see `TaskDefaults`.
        task_routes: `{task name or glob: {"queue": …, "priority": …, "dead_letter_queue": …}}`. An exact name
            beats a glob, the first glob that matches beats the others.
        session_factory: What makes `self.session` of transactional tasks: SQLAlchemy's `sessionmaker()`,
            `async_sessionmaker()` or anything that takes `bind` and `join_transaction_mode`.

    Raises:
        ConfigError: An option is wrong; the message lists all that are.
    """

    def __init__(
        self,
        name: str,
        dsn: str | None = None,
        schema: str | None = None,
        imports: Iterable[str] = (),
        task_defaults: Mapping[str, Any] = MappingProxyType({}),
        task_routes: Mapping[str, Mapping[str, Any]] = MappingProxyType({}),
        session_factory: Callable[..., Any] | None = None,
    ) -> None:
        if not _is_text(name):
            raise ConfigError(f"an application's name must be a text that is not empty, got {shown(name)}")
        self.name = name
        self._settings: dict[str, Any] = {}
        self._tasks: dict[str, Task[..., Any]] = {}
        self._imports: tuple[str, ...] = ()
        self._defaults: Mapping[str, Any] = {}
        self._routes: dict[str, TaskRoute] = {}
        self.session_factory: Callable[..., Any] | None = None
        self.hooks = Hooks()
        self._schedules_in_code: SchedulesInCode | None = None
        self._eager: Eager | None = None
        self.configure(
            dsn=dsn,
            schema=schema,
            imports=imports,
            task_defaults=task_defaults,
            task_routes=task_routes,
            session_factory=session_factory,
        )

    def __repr__(self) -> str:
        return f"<PgQueue {self.name}>"

    def configure(self, **options: Any) -> None:
        """Change settings, until the first use fixes them: those of the constructor, and those of `Config`.

        Raises:
            ConfigError: A setting is wrong, or the application is in use already.
        """
        if "config" in vars(self):
            raise ConfigError("configure() must come before the application's first use")
        if "imports" in options:
            self._imports = _checked_imports(options["imports"])
        if "task_defaults" in options:
            check_task_options(options["task_defaults"], TASK_DEFAULTS, "task_defaults")
            self._defaults = MappingProxyType(dict(options["task_defaults"]))
        if "task_routes" in options:
            self._routes = _checked_routes(options["task_routes"])
        if "session_factory" in options:
            self.session_factory = _checked_factory(options["session_factory"])
        given = {n: value for n, value in options.items() if n not in _OWN_OPTIONS and value is not None}
        settings = {**self._settings, **given}
        Config.load(os.environ, **settings)  # complain now, not at the first use
        self._settings = settings

    @cached_property
    def config(self) -> Config:
        """The settings, with `PGQUEUE_*` variables filled in; fixed from the first look on."""
        return self.read_config()

    def read_config(self, **changes: Any) -> Config:
        """The settings as they are now, with these changed; unlike `config` this fixes nothing."""
        return Config.load(os.environ, **{**self._settings, **changes})

    @property
    def dsn(self) -> str:
        """Where the queue's database is; ConfigError if nobody said."""
        return self.client.database.dsn

    @property
    def schema(self) -> str:
        return self.config.schema

    @property
    def imports(self) -> tuple[str, ...]:
        return self._imports

    @overload
    def task(self, function: Callable[P, Coroutine[Any, Any, R]], /) -> AsyncTask[P, R]: ...
    @overload
    def task(self, function: Callable[P, R], /) -> Task[P, R]: ...
    @overload
    def task(self, *, bind: Literal[False] = False, **options: Unpack[TaskOptions]) -> PlainDecorator: ...
    @overload
    def task(self, *, bind: Literal[True], **options: Unpack[TaskOptions]) -> BoundDecorator: ...
    def task(self, *function: Callable[..., Any], bind: bool = False, **options: Any) -> Any:
        """Register a function as a task: `@app.task`, or `@app.task(option=…)`; see `TaskOptions`.

        Raises:
            ConfigError: Options are wrong; the message lists all that are.
            DuplicateTask: Another function has the name.
        """
        if len(function) > 1:
            raise TypeError(f"@app.task decorates one function, got {len(function)}; name the options")
        given = {"bind": bind, **options}
        if not function:
            return lambda function: self._register(function, given)
        return self._register(function[0], given)

    @property
    def tasks(self) -> Mapping[str, Task[..., Any]]:
        """Registered tasks by name."""
        return MappingProxyType(self._tasks)

    def find_task(self, name: str) -> Task[..., Any]:
        """The task of this name; UnknownTask if no function is registered under it."""
        try:
            return self._tasks[name]
        except KeyError:
            raise UnknownTask(
                f"no task {shown(name)} is registered with {self.name!r}; is its module in imports= "
                f"({', '.join(self._imports) or 'which is empty'})?"
            ) from None

    def import_tasks(self) -> None:
        """Import the modules that define tasks, as workers do.

        They are those of `imports`, and those that installed distributions offer this application, as entry
        points of the group `pgqueue.tasks` with its name.

        Raises:
            AppNotLoaded: Modules do not exist or cannot be imported; the message has all of them, and why.
        """
        offered = [(module, f"offered by {by}") for module, by in task_modules(self.name)]
        failed: list[tuple[str, BaseException]] = []
        for module, whose in [*((module, "in imports=") for module in self._imports), *offered]:
            try:
                importlib.import_module(module)
            except (Exception, SystemExit) as error:
                failed.append((f"{shown(module)} ({whose})", error))
        if failed:
            causes = "; ".join(f"{where}: {_cause(error)}" for where, error in failed)
            many = "the task module " if len(failed) == 1 else f"{len(failed)} task modules: "
            traces = "".join(
                f"\n{_traceback(error)}" for _, error in failed if not isinstance(error, PgQueueError)
            )
            raise AppNotLoaded(f"cannot import {many}{causes}{traces}") from failed[0][1]

    def _register(self, function: object, options: dict[str, Any]) -> Task[..., Any]:
        if not callable(function) or isinstance(function, (type, Task)):
            raise ConfigError(f"@app.task decorates a function, got {shown(function)}")
        name = options.get("name")
        if name is None:
            name = f"{_module_name(function, self.name)}.{getattr(function, '__name__', '?')}"
        where = f"task {name}" if isinstance(name, str) and name.isprintable() else "task"
        check_task_options({**options, "name": name}, TASK_OPTIONS, where)
        known = self._tasks.get(name)
        if known is not None and not _is_same_function(known.function, function):
            raise DuplicateTask(
                f"two functions are the task {name!r}: {_place(known.function)} and {_place(function)}; "
                f"{_way_out(known.function, function)}"
            )
        kind = AsyncTask if _is_async(function) else Task
        own = {key: value for key, value in options.items() if key not in ("name", "bind")}
        task: Task[..., Any] = kind(self, function, name=name, bound=options["bind"], options=own)
        self._tasks[name] = task
        if self._schedules_in_code is not None:
            self._schedules_in_code.adopt(task)
        return task

    def periodic(
        self,
        *,
        cron: str | None = None,
        every: timedelta | float | None = None,
        timezone: str = "UTC",
        name: str | None = None,
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
        catch_up: CatchUp = "latest",
        overlap: Overlap = "allow",
        jitter: timedelta | float = 0.0,
        **options: Unpack[PeriodicOptions],
    ) -> Callable[[Decorated], Decorated]:
        """Enqueue a task's job again and again: `@app.periodic(cron="0 9 * * *")` under `@app.task`.

        The time of the tick is `self.request.tick` in the job, and `headers` of its row.

        Args:
            cron: Five fields (minute, hour, day of month, month, day of week), or a nickname like `@daily`.
            every: Instead of `cron`: a timedelta or seconds, counted from 1970-01-01T00:00Z.
            timezone: Whose wall clock `cron` goes by: an IANA name.
            name: Of the schedule; by default the task's.
            args: Positional arguments of each job.
            kwargs: Keyword arguments.
            catch_up: Of the ticks that no worker was there for: the "latest", "all" (the last thousand), or
                "none" is made up for.
            overlap: While a job of the schedule lives: "allow" another, "skip" the tick, or "queue" it.
            jitter: A timedelta or seconds: each job is put off by its own share of it.
            options: See `PeriodicOptions`.

        Raises:
            ConfigError: Something of it is wrong; the message lists all that is.
        """
        own: dict[str, Any] = {"cron": cron, "every": every, "timezone": timezone, "name": name, "args": args}
        own |= {"kwargs": kwargs, "catch_up": catch_up, "overlap": overlap, "jitter": jitter}
        return self._own_schedules().periodic({**own, **options})

    def _own_schedules(self) -> SchedulesInCode:
        if self._schedules_in_code is None:
            from pgqueue.schedules import SchedulesInCode  # and with it cron: for an application that has one

            self._schedules_in_code = SchedulesInCode()
        return self._schedules_in_code

    def send_task(
        self,
        name: str,
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
        *,
        connection: SyncConnection | None = None,
        **options: Unpack[JobOptions],
    ) -> AsyncResult[Any]:
        """Enqueue a job by its task's name, with plain JSON values if the task is not registered here too."""
        check_option_names("send_task", options)
        caller = None if connection is None else recognise_sync(connection, "send_task")
        if "link" in options or "link_error" in options:
            linked: AsyncResult[Any] = self.signature(name, args, kwargs)._enqueue((), {}, options, caller)
            return linked
        request = self.request_for(check_task_name(name), args, kwargs or {}, options)
        return self.result_of(self.client.enqueue(request, caller))

    async def asend_task(
        self,
        name: str,
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
        *,
        connection: AsyncConnection | None = None,
        **options: Unpack[JobOptions],
    ) -> AsyncResult[Any]:
        """`send_task`, awaited."""
        check_option_names("asend_task", options)
        caller = None if connection is None else recognise_async(connection, "asend_task")
        if "link" in options or "link_error" in options:
            signature = self.signature(name, args, kwargs)
            linked: AsyncResult[Any] = await signature._aenqueue((), {}, options, caller)
            return linked
        request = self.request_for(check_task_name(name), args, kwargs or {}, options)
        return self.result_of(await self.client.aenqueue(request, caller))

    def enqueue_many(
        self, signatures: Iterable[Signature[Any]], connection: SyncConnection | None = None
    ) -> list[str]:
        """Enqueue many jobs at once, all or none; their ids in the same order.

        Args:
            signatures: Calls made with `task.s(...)`, with `.set(...)` where they need options.
            connection: Enqueue in this connection's open transaction.
        """
        caller = None if connection is None else recognise_sync(connection, "enqueue_many")
        return self.client.enqueue_many(self._requests_for(signatures), caller)

    async def aenqueue_many(
        self, signatures: Iterable[Signature[Any]], connection: AsyncConnection | None = None
    ) -> list[str]:
        """`enqueue_many`, awaited."""
        caller = None if connection is None else recognise_async(connection, "aenqueue_many")
        return await self.client.aenqueue_many(self._requests_for(signatures), caller)

    def close(self) -> None:
        """Close this process's idle connections to the queue's database. A later call opens new ones."""
        if "_client" in vars(self):
            self._client.close()

    async def aclose(self) -> None:
        """`close`, for the running event loop's connections too."""
        if "_client" in vars(self):
            await self._client.aclose()

    def hook(self, name: HookName) -> Callable[[Hook], Hook]:
        """Have a function told of events: `@app.hook("task_failed")`; it gets one argument, see
        `pgqueue.hooks`.

        Raises:
            ConfigError: There is no such event, or it is no plain function.
        """
        check_name(name)

        def register(function: Hook) -> Hook:
            self.hooks.add(name, function)
            return function

        return register

    def middleware(self, function: Wrapper) -> Wrapper:
        """Run a generator function around each run of a task: `@app.middleware`.

        It gets the `TaskContext`, yields once, and then the body runs, `async def` tasks too. What it raises
        before counts as the body's failure; what the body raises comes out of its `yield`. The first
        registered is outermost.

        Raises:
            ConfigError: It is no generator function.
        """
        self.hooks.add_middleware(function)
        return function

    @contextmanager
    def eager(self, *, propagate: bool = False) -> Iterator[None]:
        """In the block jobs run at once, where they are enqueued, without a database: for tests.

        Their arguments and results go through JSON as ever. Retries, `Snooze` and a `countdown` do not wait.
        Enqueueing on a connection neither uses nor checks it.

        Args:
            propagate: An error that ends a job is raised by the call that enqueued it.
        """
        from pgqueue.eager import Eager

        before, self._eager = self._eager, Eager(self, propagate=propagate)
        try:
            yield
        finally:
            self._eager = before

    @contextmanager
    def standing_in(self, config: Config, client: Client) -> Iterator[None]:
        """In the block the application has these settings and enqueues with this client, whatever it was
        given and has opened: for tests.
        """
        own = {name: value for name, value in vars(self).items() if name in ("config", "_client")}
        self.__dict__.update(config=config, _client=client)
        try:
            yield
        finally:
            for name in ("config", "_client"):
                del self.__dict__[name]
            self.__dict__.update(own)

    # Made anew each time: what an application holds must not hold the application, whose connections are
    # closed as soon as nobody has it.

    @property
    def schedules(self) -> Schedules:
        """Recurring jobs, to see and to change at run time."""
        from pgqueue.schedules import Schedules

        return Schedules(self, self._own_schedules())

    @property
    def queues(self) -> Queues:
        """Queues, to see, pause, empty and move."""
        return Queues(self)

    @property
    def dead_letters(self) -> DeadLetters:
        """Dead letters, to see, requeue and purge."""
        return DeadLetters(self)

    @property
    def retention(self) -> Retention:
        """How long history and dead letters are kept, to see and to change by task or queue."""
        return Retention(self)

    def open_session(self) -> AbstractContextManager[Session]:
        """A connection to the queue's database for what people do, see `pgqueue.database.session`."""
        from pgqueue.database.session import open_session

        return open_session(self.dsn, schema=self.schema)

    @property
    def client(self) -> Client:
        """What enqueues, and reads results."""
        return self._eager or self._client

    @cached_property
    def _client(self) -> Client:
        return Client(self.config.schema, self.config.dsn)

    @property
    def defaults(self) -> Mapping[str, Any]:
        """`task_defaults`; tasks keep what they read, so it is fixed from now on."""
        _ = self.config
        return self._defaults

    @property
    def default_queue(self) -> str:
        return self.config.queue

    @property
    def default_priority(self) -> int:
        return self.config.priority

    @cached_property
    def default_policy(self) -> RetryPolicy:
        return RetryPolicy.from_options(retry_options(self.defaults))

    @property
    def default_limits(self) -> tuple[float | None, float | None]:
        """The soft and the hard time limit of tasks that name none."""
        return self.config.soft_time_limit, self.config.time_limit

    def route(self, task_name: str) -> TaskRoute:
        """Where `task_routes` sends the task."""
        if task_name in self._routes:
            return self._routes[task_name]
        matching = (route for glob, route in self._routes.items() if fnmatchcase(task_name, glob))
        return next(matching, _NO_ROUTE)

    def result_of(self, job_id: str) -> AsyncResult[Any]:
        """The result of a job whose id is known to be one."""
        eager = self._eager  # its results outlive the block
        return AsyncResult(job_id, lambda: (eager or self._client).database)

    def AsyncResult(self, job_id: object) -> AsyncResult[Any]:
        """The job with this id, whether or not there is one; ValueError if it is not a UUID."""
        return self.result_of(check_id(job_id))

    def signature(
        self,
        name: str,
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
        *,
        immutable: bool = False,
        **options: Unpack[JobOptions],
    ) -> Signature[Any]:
        """A call of the task of this name as a value, as `task.s` makes of one that is registered here.

        Args:
            immutable: It takes no result of what it waits for.
        """
        made: Signature[Any] = Signature(check_task_name(name), args, kwargs, app=self, immutable=immutable)
        return made.set(**options)

    def canvas_result_of(self, canvas_id: str) -> CanvasResult[Any]:
        """The result of a canvas whose id is known to be one."""
        eager = self._eager
        return CanvasResult(canvas_id, lambda: (eager or self._client).database)

    def CanvasResult(self, canvas_id: object) -> CanvasResult[Any]:
        """The canvas with this id, whether or not there is one; ValueError if it is not a UUID."""
        return self.canvas_result_of(check_id(canvas_id))

    def _requests_for(self, signatures: Iterable[Signature[Any]]) -> list[JobRequest]:
        if isinstance(signatures, Signature) or not isinstance(signatures, Iterable):
            raise TypeError(
                f"enqueue_many takes a list of calls made with task.s(...), got {shown(signatures)}"
            )
        calls = list(signatures)
        adds_nothing = current_request.get() is None and not self.hooks.has("before_enqueue")
        tasks = self._tasks if adds_nothing else {}
        requests = []
        for call, job_id in zip(calls, new_ids(len(calls)), strict=True):
            task = tasks.get(call.task) if type(call) is Signature else None
            if task is None or call.options or call.links or call.error_links:
                requests.append(self._request_of(call))
                continue
            if type(call.args) is not tuple or type(call.kwargs) is not dict or call.kwargs:
                check_arguments(call.task, call.args, call.kwargs)
            requests.append(task.plain_request(job_id, call.args, call.kwargs))
        return requests

    def _request_of(self, signature: object) -> JobRequest:
        """The request of one call among many, whatever it is."""
        if not isinstance(signature, Signature):
            raise TypeError(f"enqueue_many takes calls made with task.s(...), got {shown(signature)}")
        if signature.options:
            if not isinstance(signature.options, Mapping):
                raise TypeError(f"options of a Signature must be a mapping, got {shown(signature.options)}")
            check_option_names("enqueue_many", signature.options)
        if signature.task not in self._tasks:
            check_task_name(signature.task)
        without_links("enqueue_many", signature)
        request = self.request_for(signature.task, signature.args, signature.kwargs, signature.options)
        if request.on_conflict != "return":
            raise ValueError(
                f"enqueue_many takes on_conflict='return' only, got {request.on_conflict!r} for "
                f"{request.task}; enqueue such jobs one by one"
            )
        return request

    def request_for(
        self, name: str, args: Sequence[Any], kwargs: Mapping[str, Any], options: Mapping[str, Any]
    ) -> JobRequest:
        """Check and encode a call by name. Names of options are checked already."""
        task = self._tasks.get(name)
        if task is not None:
            return task.request_for(args, kwargs, options)
        return self.encode(name, args, kwargs, self._options_of(name, args, kwargs, options))

    def _options_of(
        self, name: str, args: Sequence[Any], kwargs: Mapping[str, Any], options: Mapping[str, Any]
    ) -> Mapping[str, Any]:
        """The options of a call that is made now, with what this run and hooks add; arguments are checked."""
        check_arguments(name, args, kwargs)
        options = of_this_run(options)
        if self.hooks.has("before_enqueue"):
            options = self.hooks.headers_for(name, args, kwargs, options)
        return options

    def member_request_for(
        self,
        name: str,
        args: Sequence[Any],
        kwargs: Mapping[str, Any],
        options: Mapping[str, Any],
        *,
        canvas_id: str | None,
        takes_result: bool,
    ) -> tuple[JobRequest, str | None]:
        """The request of a job of a canvas, and the label of its dead letter."""
        if name not in self._tasks:
            check_task_name(name)
        options = self._options_of(name, args, kwargs, options)
        request = self.encode(name, args, kwargs, options, canvas_id=canvas_id, takes_result=takes_result)
        task = self._tasks.get(name)
        label = self.route(name).dead_letter_queue if task is None else task.dead_letter_queue
        return request, label

    def encode(
        self,
        name: str,
        args: Sequence[Any],
        kwargs: Mapping[str, Any],
        options: Mapping[str, Any],
        *,
        canvas_id: str | None = None,
        takes_result: bool = False,
    ) -> JobRequest:
        """The request that a call of the task of this name would make, without asking hooks."""
        task = self._tasks.get(name)
        if task is not None:
            return task.encode(args, kwargs, options, canvas_id=canvas_id, takes_result=takes_result)
        route, defaults = self.route(name), self.defaults
        priority = route.priority if route.priority is not None else defaults.get("priority")
        return build_request(
            name,
            *encode_plain(args, kwargs),
            options,
            queue=route.queue or defaults.get("queue") or self.default_queue,
            priority=self.default_priority if priority is None else priority,
            expires=defaults.get("expires"),
            unique_until=defaults.get("unique_until"),
            history=defaults.get("history", True),
            canvas_id=canvas_id,
        )


def _is_text(value: object) -> bool:
    return isinstance(value, str) and bool(value)


def _checked_imports(imports: object) -> tuple[str, ...]:
    if isinstance(imports, str) or not isinstance(imports, Iterable):
        raise ConfigError(f"imports must be a list or tuple of module names, got {shown(imports)}")
    names = tuple(imports)
    if wrong := [name for name in names if not isinstance(name, str) or not name]:
        raise ConfigError(f"imports must be names of modules, got {', '.join(map(shown, wrong))}")
    return names


def _checked_factory(factory: Any) -> Callable[..., Any] | None:
    if factory is None or callable(factory):
        made: Callable[..., Any] | None = factory
        return made
    raise ConfigError(
        f"session_factory must be what makes sessions, like SQLAlchemy's sessionmaker(), got {shown(factory)}"
    )


def _checked_routes(routes: object) -> dict[str, TaskRoute]:
    checks: dict[str, Callable[[object], object]] = {
        "queue": check_queue,
        "priority": check_priority,
        "dead_letter_queue": check_queue,
    }
    if not isinstance(routes, Mapping):
        raise ConfigError(f"task_routes must be a dict of task names or globs, got {shown(routes)}")
    errors = []
    checked = {}
    for pattern, route in routes.items():
        if not isinstance(pattern, str):
            errors.append(f"a task name or glob must be text, got {shown(pattern)}")
            continue
        if not isinstance(route, Mapping):
            errors.append(f"{pattern!r} must be a dict, got {shown(route)}")
            continue
        errors += [
            f"{pattern!r} has an unknown {name!r} (known are {', '.join(checks)})"
            for name in route.keys() - checks.keys()
        ]
        values = {name: value for name, value in route.items() if name in checks and value is not None}
        for name, value in values.items():
            try:
                checks[name](value)
            except ValueError as error:
                errors.append(f"{pattern!r}: {error}")
        checked[pattern] = TaskRoute(**values)
    if errors:
        raise ConfigError(f"task_routes: {'; '.join(errors)}")
    return checked


def _is_async(function: object) -> bool:
    import inspect

    return inspect.iscoroutinefunction(function)


def _module_name(function: object, application: str) -> str:
    """The module a worker will import the function from; `__main__` is the script or module that runs."""
    module = str(getattr(function, "__module__", None) or application)
    if module != "__main__":
        return module
    main = sys.modules["__main__"]
    spec = getattr(main, "__spec__", None)
    if spec is not None:
        return str(spec.name)
    file = getattr(main, "__file__", None)
    return os.path.splitext(os.path.basename(file))[0] if file else application


def _is_same_function(old: Any, new: Any) -> bool:
    """Whether one is the other defined again: the module was reloaded, or a notebook's cell run again."""
    if (old.__module__, old.__qualname__) != (new.__module__, new.__qualname__):
        return False
    if _place(old) == _place(new):
        return True
    # Edited in between; but on the module's first import, or among somebody's locals, there are two.
    spec = getattr(sys.modules.get(new.__module__), "__spec__", None)
    return "<locals>" not in new.__qualname__ and not getattr(spec, "_initializing", False)


def _place(function: Any) -> str:
    code = getattr(function, "__code__", None)
    where = f" ({code.co_filename}:{code.co_firstlineno})" if code else ""
    return f"{function.__module__}.{getattr(function, '__qualname__', '?')}{where}"


def _way_out(old: Any, new: Any) -> str:
    """What to do about two functions with one name."""
    if old.__module__ != new.__module__ and hasattr(old, "__code__") and hasattr(new, "__code__"):
        first, second = (
            (os.path.realpath(each.__code__.co_filename), each.__code__.co_firstlineno) for each in (old, new)
        )
        if first == second:
            return (
                f"it is one file, imported as {old.__module__} and as {new.__module__}: import it under one "
                "name everywhere, also in -A and imports="
            )
    return "give one another name="


def _cause(error: BaseException) -> str:
    text = str(error) if isinstance(error, PgQueueError) else f"{type(error).__name__}: {error}"
    return " ".join(text.split())


def _traceback(error: BaseException) -> str:
    import traceback

    return "".join(traceback.format_exception(error)).rstrip()
