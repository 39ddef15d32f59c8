"""An application's recurring jobs: those in its code, and those that are added at run time.

Both are rows of the table `schedules`, and any worker enqueues their jobs. One from code comes as long as a
live worker has it in its code; one that was added comes until it is removed.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from pgqueue.errors import ConfigError, PgQueueError, ScheduleError, UnknownSchedule, nearest, shown
from pgqueue.job import JobRequest, check_task_name
from pgqueue.options import PERIODIC_OPTIONS, check_arguments
from pgqueue.request import build_request
from pgqueue.schedule import (
    CatchUp,
    Overlap,
    Schedule,
    check_policies,
    check_schedule_name,
    read_cadence,
    read_seconds,
)
from pgqueue.task import Task

if TYPE_CHECKING:
    from pgqueue.database.schedules import ScheduleStatus
    from pgqueue.database.session import Session

Decorated = TypeVar("Decorated", bound=Callable[..., Any])


class Application(Protocol):
    """What schedules need to know of their application."""

    def open_session(self) -> AbstractContextManager[Session]: ...
    @property
    def tasks(self) -> Mapping[str, Task[..., Any]]: ...
    def encode(
        self, name: str, args: Sequence[Any], kwargs: Mapping[str, Any], options: Mapping[str, Any]
    ) -> JobRequest: ...


@dataclass(frozen=True, slots=True)
class _Periodic:
    """What one `@app.periodic` says; the task it belongs to is known when it is registered."""

    name: str | None
    cron: str | None
    every: float | None
    timezone: str
    args: Sequence[Any]
    kwargs: Mapping[str, Any]
    catch_up: CatchUp
    overlap: Overlap
    jitter: float
    options: Mapping[str, Any]

    def schedule(self, task: str, request: JobRequest) -> Schedule:
        return Schedule(
            name=self.name or task,
            task=task,
            cron=self.cron,
            every=self.every,
            timezone=self.timezone,
            args=json.loads(request.args),
            kwargs=json.loads(request.kwargs),
            queue=request.queue,
            priority=request.priority,
            max_retries=request.max_retries,
            expires_in=request.expires_in,
            headers=json.loads(request.headers),
            catch_up=self.catch_up,
            overlap=self.overlap,
            jitter=self.jitter,
        )


class SchedulesInCode:
    """What `@app.periodic` says in an application's code."""

    def __init__(self) -> None:
        self._waiting: list[tuple[object, _Periodic]] = []
        self._in_code: dict[str, tuple[str, _Periodic]] = {}

    def periodic(self, options: dict[str, Any]) -> Callable[[Decorated], Decorated]:
        """The decorator `@app.periodic(**options)`; ConfigError if they are wrong."""
        periodic = _read(options, "@app.periodic")

        def decorate(function: Decorated) -> Decorated:
            if isinstance(function, Task):
                self._register(function, periodic)
            elif callable(function):
                self._waiting.append((function, periodic))
            else:
                raise ConfigError(f"@app.periodic decorates a task, got {shown(function)}")
            return function

        return decorate

    def adopt(self, task: Task[..., Any]) -> None:
        """A task has been registered: the schedules written under its decorator are its own."""
        for name in [name for name, (owner, _) in self._in_code.items() if owner == task.name]:
            del self._in_code[name]  # its module was reloaded
        mine = [each for function, each in self._waiting if function is task.function]
        self._waiting = [each for each in self._waiting if each[0] is not task.function]
        for periodic in reversed(mine):
            self._register(task, periodic)

    def _register(self, task: Task[..., Any], periodic: _Periodic) -> None:
        name = periodic.name or task.name
        known = self._in_code.get(name)
        if known is not None:
            whose = "two of its schedules are" if known[0] == task.name else f"one of {known[0]} is"
            raise ConfigError(
                f"@app.periodic of {task.name}: {whose} called {name!r}; give one another name="
            )
        try:
            check_arguments(task.name, periodic.args, periodic.kwargs)
            encoded = task.codec.encode(periodic.args, periodic.kwargs)
            build_request(task.name, *encoded, periodic.options, queue="default", priority=0, expires=None)
        except (PgQueueError, ValueError, TypeError) as error:
            raise ConfigError(f"@app.periodic of {task.name}: {error}") from error
        self._in_code[name] = (task.name, periodic)

    def definitions(self) -> list[tuple[str, _Periodic]]:
        """Tasks and what is said of them, by the schedules' names; ConfigError if one belongs to no task."""
        if self._waiting:
            names = ", ".join(getattr(each, "__qualname__", "?") for each, _ in self._waiting)
            raise ConfigError(f"@app.periodic needs a task: write @app.task above it ({names})")
        return [definition for _, definition in sorted(self._in_code.items())]


class Schedules:
    """The schedules of an application: `app.schedules`."""

    def __init__(self, app: Application, in_code: SchedulesInCode) -> None:
        self._app = app
        self._in_code = in_code

    def in_code(self) -> list[Schedule]:
        """Those in the application's code, by name; ConfigError if one belongs to no task."""
        return [
            periodic.schedule(task, self._app.encode(task, periodic.args, periodic.kwargs, periodic.options))
            for task, periodic in self._in_code.definitions()
        ]

    def add(
        self,
        name: str,
        task: str | Task[..., Any],
        *,
        cron: str | None = None,
        every: timedelta | float | None = None,
        timezone: str = "UTC",
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
        catch_up: CatchUp = "latest",
        overlap: Overlap = "allow",
        jitter: timedelta | float = 0.0,
        replace: bool = False,
        by: str | None = None,
        reason: str | None = None,
        **options: Any,
    ) -> ScheduleStatus:
        """Add a schedule at run time; it comes until it is removed.

        Args:
            task: The task, or the name of one that need not be registered here.
            replace: Change the one that has the name.
            by: Who asks for it, noted in the audit log.
            reason: Why, noted there too.
            options: See `PeriodicOptions`. The others are those of `@app.periodic`.

        Raises:
            ValueError, TypeError, PayloadError: An argument is wrong.
            ScheduleError: There is one of this name.
        """
        from pgqueue.database import schedules

        task_name = task.name if isinstance(task, Task) else check_task_name(task)
        given: dict[str, Any] = {
            "name": name,
            "cron": cron,
            "every": every,
            "timezone": timezone,
            "args": args,
        }
        given |= {"kwargs": kwargs, "catch_up": catch_up, "overlap": overlap, "jitter": jitter}
        try:
            periodic = _read({**given, **options}, f"schedule {shown(name)}")
        except ConfigError as error:
            raise ValueError(str(error)) from error
        request = self._app.encode(task_name, periodic.args, periodic.kwargs, periodic.options)
        with self._app.open_session() as session:
            answer = schedules.add_schedule(
                session,
                periodic.schedule(task_name, request),
                replace=replace,
                by=by,
                reason=reason,
            )
            if answer == "exists":
                raise ScheduleError(f"there is a schedule {name!r}; replace=True or --replace changes it")
            if answer == "in_code":
                raise ScheduleError(f"the schedule {name!r} is in an application's code; choose another name")
            found = schedules.find_schedule(session, name)
        if found is None:
            raise ScheduleError(f"somebody has removed the schedule {name!r} just now")
        return found

    def next(self, name: str, count: int = 5, *, after: datetime | None = None) -> list[datetime]:
        """Its next ticks, in UTC, whether or not it is paused.

        Args:
            after: From there on, with a timezone; by default from now on, by this machine's clock.
        """
        found = self.get(name)
        return next_ticks(found.cron, found.every, found.timezone, count, after)

    def list(self) -> list[ScheduleStatus]:
        """All schedules in the database, by name."""
        from pgqueue.database.schedules import list_schedules

        with self._app.open_session() as session:
            return list_schedules(session)

    def get(self, name: str) -> ScheduleStatus:
        """The schedule of this name; UnknownSchedule if there is none."""
        from pgqueue.database.schedules import find_schedule

        with self._app.open_session() as session:
            found = find_schedule(session, name)
        if found is None:
            raise _unknown(name)
        return found

    def pause(self, name: str, *, by: str | None = None, reason: str | None = None) -> None:
        """Let its ticks pass until it is resumed, also those that are held; one that is paused stays so."""
        self._act("pause", name, by, reason)

    def resume(self, name: str, *, by: str | None = None, reason: str | None = None) -> None:
        """Let its ticks count again, from now on."""
        self._act("resume", name, by, reason)

    def remove(self, name: str, *, by: str | None = None, reason: str | None = None) -> None:
        """Remove it; one that a live worker has in its code can only be paused."""
        self._act("remove", name, by, reason)

    def run_now(self, name: str, *, by: str | None = None, reason: str | None = None) -> str:
        """Enqueue its job now, beside its ticks, also when it is paused; the job's id."""
        from pgqueue.database.schedules import run_schedule

        with self._app.open_session() as session:
            job_id = run_schedule(session, name, by=by, reason=reason)
        if job_id is None:
            raise _unknown(name)
        return job_id

    def _act(self, act: Any, name: str, by: str | None, reason: str | None) -> None:
        from pgqueue.database.schedules import act_on_schedule

        with self._app.open_session() as session:
            answer = act_on_schedule(session, act, name, by=by, reason=reason)
        if answer == "unknown":
            raise _unknown(name)
        if answer == "in_code":
            raise ScheduleError(
                f"the schedule {name!r} is in the code of a running worker; take it out there, or pause it"
            )


def next_ticks(
    cron: str | None, every: float | None, timezone: str, count: int, after: datetime | None = None
) -> list[datetime]:
    """The next ticks of what these say; ValueError if it is wrong."""
    cadence, tick, ticks = read_cadence(cron, every, timezone), after or datetime.now(UTC), []
    for _ in range(count):
        tick = cadence.next_after(tick)
        ticks.append(tick)
    return ticks


def _unknown(name: str) -> UnknownSchedule:
    return UnknownSchedule(f"there is no schedule {shown(name)}")


def _read(options: dict[str, Any], what: str) -> _Periodic:
    """What `options` say of a schedule; ConfigError naming all that is wrong with them."""
    own = {"name", "cron", "every", "timezone", "args", "kwargs", "catch_up", "overlap", "jitter"}
    errors = []
    for name in sorted(options.keys() - own - PERIODIC_OPTIONS):
        close = nearest(name, own | PERIODIC_OPTIONS)
        hint = f"did you mean {close}?" if close else f"known are {', '.join(sorted(own | PERIODIC_OPTIONS))}"
        errors.append(f"unknown option {shown(name)} ({hint})")
    get = options.get
    timezone, jitter, every = get("timezone", "UTC"), get("jitter", 0.0), get("every")
    checks: list[Callable[[], object]] = [
        lambda: None if get("name") is None else check_schedule_name(get("name")),
        lambda: read_cadence(get("cron"), every, timezone),
        lambda: check_policies(get("catch_up", "latest"), get("overlap", "allow"), jitter),
        lambda: check_arguments("it", get("args", ()), get("kwargs") or {}),
    ]
    for check in checks:
        try:
            check()
        except (ValueError, TypeError) as error:
            errors.append(str(error))
    if isinstance(get("expires"), datetime):
        errors.append("expires must be a number of seconds, for each job anew")
    if errors:
        raise ConfigError(f"{what}: {'; '.join(errors)}")
    return _Periodic(
        name=get("name"),
        cron=get("cron"),
        every=None if every is None else read_seconds("every", every),
        timezone=timezone,
        args=tuple(get("args", ())),
        kwargs=dict(get("kwargs") or {}),
        catch_up=get("catch_up", "latest"),
        overlap=get("overlap", "allow"),
        jitter=read_seconds("jitter", jitter),
        options={n: v for n, v in options.items() if n in PERIODIC_OPTIONS and v is not None},
    )
