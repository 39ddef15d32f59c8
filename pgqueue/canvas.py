"""Jobs that wait for other jobs: `chain`, `group` and `chord` of `Signature`s, shaped like Celery's.

A canvas becomes a graph of jobs and joins, enqueued as a whole. A job that waits for another, or for a join,
is `blocked` until that has succeeded; a join waits for all its members, and gives the list of their results.
What happens when they end is in `migrations/versions/0011_canvas.py`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final, Generic, Protocol, TypeVar, Unpack, overload

from pgqueue.database.connection import (
    AsyncCaller,
    AsyncConnection,
    SyncConnection,
    recognise,
    recognise_async,
    recognise_sync,
)
from pgqueue.errors import shown
from pgqueue.graph import CanvasNode, CanvasRequest, Encoder, Graph, OnMemberFailure, Source
from pgqueue.job import JobRequest
from pgqueue.options import JobOptions, check_arguments, check_option_names

if TYPE_CHECKING:
    from pgqueue.database.connection import SyncCaller
    from pgqueue.enqueue import Client
    from pgqueue.result import AsyncResult, CanvasResult

R = TypeVar("R")
T = TypeVar("T")

MOST_NESTED: Final = 32
"""Levels: the database puts nested results together by recursion."""

_LINKS: Final = ("link", "link_error")


class Application(Encoder, Protocol):
    """What a canvas needs to know of its application."""

    @property
    def client(self) -> Client: ...
    def canvas_result_of(self, canvas_id: str) -> CanvasResult[Any]: ...
    def result_of(self, job_id: str) -> AsyncResult[Any]: ...
    def find_task(self, name: str) -> Any: ...
    def request_for(
        self, name: str, args: Sequence[Any], kwargs: Mapping[str, Any], options: Mapping[str, Any]
    ) -> JobRequest: ...


class Canvas(Generic[R]):
    """What can be enqueued as a whole: a `Signature`, or a `chain`, `group` or `chord` of such."""

    links: tuple[Canvas[Any], ...] = ()
    error_links: tuple[Canvas[Any], ...] = ()

    def parts(self) -> Iterable[Canvas[Any]]:
        """What it is made of."""
        return ()

    def build(self, graph: Graph, source: Source, depth: int) -> CanvasNode:
        """Add its nodes to the graph; the one whose end is its own."""
        if depth > MOST_NESTED:
            raise ValueError(f"a canvas is nested at most {MOST_NESTED} levels deep")
        output = self.build_parts(graph, source, depth)
        self.build_links(graph, output, self.links, self.error_links, depth)
        return output

    def build_links(
        self,
        graph: Graph,
        output: CanvasNode,
        links: Iterable[Canvas[Any]],
        handlers: Iterable[Canvas[Any]],
        depth: int,
    ) -> None:
        """What runs when it has ended; options of the whole are not meant for that."""
        with graph.without_options():
            for link in links:
                link.build(graph, Source(output), depth + 1)
            for handler in handlers:
                output.on_error.append(graph.error_job(_handler(handler), own=isinstance(self, Signature)))

    def build_parts(self, graph: Graph, source: Source, depth: int) -> CanvasNode:
        raise NotImplementedError

    def link(self, other: Canvas[Any]) -> Canvas[R]:
        """Run this too when it has succeeded, with its result in front of the arguments; returns itself."""
        self.links += (_part("link", other),)
        return self

    def link_error(self, handler: Signature[Any]) -> Canvas[R]:
        """Run this when it has failed, with the id of the job at fault in front of the arguments; returns
        itself.
        """
        self.error_links += (_part("link_error", handler),)
        return self

    on_error = link_error

    def __or__(self, other: Canvas[Any]) -> Canvas[Any]:
        return chain(*_steps(self), *_steps(_part("|", other)))

    def delay(self, *args: Any, **kwargs: Any) -> CanvasResult[R]:
        """Enqueue it on a connection of our own, which commits; the arguments go in front of those of the
        jobs that it starts with.
        """
        return self._enqueue(args, kwargs, {}, None)

    async def adelay(self, *args: Any, **kwargs: Any) -> CanvasResult[R]:
        """`delay`, awaited."""
        return await self._aenqueue(args, kwargs, {}, None)

    def apply_async(
        self,
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
        *,
        connection: SyncConnection | None = None,
        **options: Unpack[JobOptions],
    ) -> CanvasResult[R]:
        """Enqueue it with options, which hold for all its jobs that have none of their own.

        Args:
            args: In front of those of the jobs that it starts with.
            kwargs: Beside theirs.
            connection: Enqueue in this connection's open transaction, as `.on(connection)` does.
            options: See `JobOptions`. `countdown` and `eta` are for the jobs that it starts with;
                `job_id` and `unique_key` have no meaning here.

        Raises:
            As `Task.apply_async`, and ValueError if a group is empty.
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
    ) -> CanvasResult[R]:
        """`apply_async`, awaited."""
        check_option_names("aapply_async", options)
        caller = None if connection is None else recognise_async(connection, "aapply_async")
        return await self._aenqueue(args, kwargs or {}, options, caller)

    @overload
    def on(self, connection: SyncConnection) -> SyncCanvasCalls[CanvasResult[R]]: ...
    @overload
    def on(self, connection: AsyncConnection) -> AsyncCanvasCalls[CanvasResult[R]]: ...
    def on(self, connection: object) -> SyncCanvasCalls[CanvasResult[R]] | AsyncCanvasCalls[CanvasResult[R]]:
        """The calls that enqueue it in this connection's open transaction, see `Task.on`."""
        caller = recognise(connection)
        return (
            AsyncCanvasCalls(self, caller)
            if isinstance(caller, AsyncCaller)
            else SyncCanvasCalls(self, caller)
        )

    def request(
        self, args: Sequence[Any], kwargs: Mapping[str, Any], options: Mapping[str, Any]
    ) -> tuple[Application, CanvasRequest]:
        """The whole as nodes, checked and encoded, and whose it is."""
        check_arguments("a canvas", args, kwargs)
        wanted = {name: value for name, value in options.items() if name not in _LINKS}
        app = _app_of(self)
        graph = Graph(app, args, kwargs, wanted)
        output = self.build(graph, Source(), 1)
        links = _listed("link", options.get("link"))
        self.build_links(graph, output, links, _listed("link_error", options.get("link_error")), 1)
        return app, graph.request(output)

    def _enqueue(
        self, args: Sequence[Any], kwargs: Mapping[str, Any], options: Any, caller: SyncCaller | None
    ) -> CanvasResult[R]:
        app, request = self.request(args, kwargs, options)
        app.client.enqueue_canvas(request, caller)
        return app.canvas_result_of(request.id)

    async def _aenqueue(
        self, args: Sequence[Any], kwargs: Mapping[str, Any], options: Any, caller: AsyncCaller | None
    ) -> CanvasResult[R]:
        app, request = self.request(args, kwargs, options)
        await app.client.aenqueue_canvas(request, caller)
        return app.canvas_result_of(request.id)


class Signature(Canvas[R]):
    """A call of a task that has not been made: a value for `chain`, `group`, `chord` and `app.enqueue_many`.

    Attributes:
        task: The task's name.
        args: Positional arguments, not yet encoded; behind the result of what it waits for, if anything.
        kwargs: Keyword arguments.
        options: As for `apply_async`.
        app: Whose it is; None in one made by hand, which can only be enqueued beside others.
        immutable: It takes no result.
    """

    def __init__(
        self,
        task: str,
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
        options: Mapping[str, Any] | None = None,
        *,
        app: Any = None,
        immutable: bool = False,
    ) -> None:
        self.task = task
        self.args = args if type(args) is tuple else _arguments(task, args, kwargs)
        if kwargs is None:
            kwargs = {}
        self.kwargs = dict(kwargs) if type(kwargs) is dict else kwargs  # the caller's may change
        self.options = options or {}
        self.app = app
        self.immutable = immutable

    def __repr__(self) -> str:
        given = [*map(repr, self.args), *(f"{name}={value!r}" for name, value in self.kwargs.items())]
        return f"{self.task}({', '.join(given)})"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Signature) and self._facts() == other._facts()

    __hash__ = None  # type: ignore[assignment]  # it can be changed

    def _facts(self) -> tuple[object, ...]:
        return self.task, self.args, self.kwargs, self.options, self.immutable, self.links, self.error_links

    def set(self, **options: Unpack[JobOptions]) -> Signature[R]:
        """Give it these options, beside those it has; returns itself, as Celery's does."""
        check_option_names("set", options)
        given = dict(options)
        self.links += _listed("link", given.pop("link", None))
        self.error_links += _listed("link_error", given.pop("link_error", None))
        self.options = {**self.options, **given}
        return self

    def clone(self, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None) -> Signature[R]:
        """Another one, with these arguments in front of its own."""
        copy: Signature[R] = Signature(
            self.task,
            (*args, *self.args),
            {**self.kwargs, **(kwargs or {})},
            dict(self.options),
            app=self.app,
            immutable=self.immutable,
        )
        copy.links, copy.error_links = self.links, self.error_links
        return copy

    def __deepcopy__(self, memo: object) -> Signature[R]:
        return self.clone()

    def __call__(self, *args: Any, **kwargs: Any) -> R:
        """Run the function here and now, without a job."""
        result: R = _app_of(self).find_task(self.task)(*args, *self.args, **{**self.kwargs, **kwargs})
        return result

    def build_parts(self, graph: Graph, source: Source, depth: int) -> CanvasNode:
        return graph.job(self, source)

    if TYPE_CHECKING:
        # One job is no canvas: these give the job's own result.
        @overload  # type: ignore[override]
        def on(self, connection: SyncConnection) -> SyncCanvasCalls[AsyncResult[R]]: ...
        @overload
        def on(self, connection: AsyncConnection) -> AsyncCanvasCalls[AsyncResult[R]]: ...
        def on(self, connection: Any) -> Any: ...
        def delay(self, *args: Any, **kwargs: Any) -> AsyncResult[R]: ...  # type: ignore[override]
        async def adelay(self, *args: Any, **kwargs: Any) -> AsyncResult[R]: ...  # type: ignore[override]
        def apply_async(  # type: ignore[override]
            self,
            args: Sequence[Any] = (),
            kwargs: Mapping[str, Any] | None = None,
            *,
            connection: SyncConnection | None = None,
            **options: Unpack[JobOptions],
        ) -> AsyncResult[R]: ...
        async def aapply_async(  # type: ignore[override]
            self,
            args: Sequence[Any] = (),
            kwargs: Mapping[str, Any] | None = None,
            *,
            connection: AsyncConnection | None = None,
            **options: Unpack[JobOptions],
        ) -> AsyncResult[R]: ...

    def _enqueue(
        self, args: Sequence[Any], kwargs: Mapping[str, Any], options: Any, caller: SyncCaller | None
    ) -> Any:
        call = self._with(args, kwargs, options)
        if not (call.links or call.error_links):
            app = _app_of(call)
            request = app.request_for(call.task, call.args, call.kwargs, call.options)
            return app.result_of(app.client.enqueue(request, caller))
        app, canvas = call.request((), {}, {})
        app.client.enqueue_canvas(canvas, caller)
        return app.result_of(canvas.output)

    async def _aenqueue(
        self, args: Sequence[Any], kwargs: Mapping[str, Any], options: Any, caller: AsyncCaller | None
    ) -> Any:
        call = self._with(args, kwargs, options)
        if not (call.links or call.error_links):
            app = _app_of(call)
            request = app.request_for(call.task, call.args, call.kwargs, call.options)
            return app.result_of(await app.client.aenqueue(request, caller))
        app, canvas = call.request((), {}, {})
        await app.client.aenqueue_canvas(canvas, caller)
        return app.result_of(canvas.output)

    def _with(self, args: Sequence[Any], kwargs: Mapping[str, Any], options: Any) -> Signature[R]:
        """The call that is made: what is linked to it does not get its options."""
        check_arguments(self.task, args, kwargs)
        return (self.clone() if self.immutable else self.clone(args, kwargs)).set(**options)


class chain(Canvas[Any]):
    """One after the other; each gets the result of the one before in front of its arguments.

    Args:
        steps: Signatures, or canvases in turn; or one iterable of them.
    """

    def __init__(self, *steps: Canvas[Any] | Iterable[Canvas[Any]]) -> None:
        self.steps = [step for part in _parts("chain", steps) for step in _steps(part)]
        if not self.steps:
            raise ValueError("a chain needs at least one step")

    def __repr__(self) -> str:
        return f"<chain of {len(self.steps)}>"

    def __call__(self, *args: Any, **kwargs: Any) -> CanvasResult[Any]:
        """As `delay`."""
        return self.delay(*args, **kwargs)

    def parts(self) -> Iterable[Canvas[Any]]:
        return self.steps

    def build_parts(self, graph: Graph, source: Source, depth: int) -> CanvasNode:
        for step in self.steps:
            output = step.build(graph, source, depth + 1)
            source = Source(output)
        return output


class group(Canvas[list[Any]]):
    """All at once; its result is the list of theirs, in order.

    Args:
        members: Signatures, or canvases in turn; or one iterable of them.
        on_member_failure: "fail": the group fails when one has, once all have ended. "skip": those that have
            are left out of the list.
    """

    def __init__(
        self, *members: Canvas[Any] | Iterable[Canvas[Any]], on_member_failure: OnMemberFailure = "fail"
    ) -> None:
        self.members = _parts("group", members)
        self.on_member_failure = _checked_failure(on_member_failure)

    def __repr__(self) -> str:
        return f"<group of {len(self.members)}>"

    def __call__(self, *args: Any, **kwargs: Any) -> CanvasResult[list[Any]]:
        """As `delay`."""
        return self.delay(*args, **kwargs)

    def __or__(self, other: Canvas[Any]) -> Canvas[Any]:
        return chord(self, _part("|", other))

    def parts(self) -> Iterable[Canvas[Any]]:
        if not self.members:
            raise ValueError("a group needs at least one member")
        return self.members

    def build_parts(self, graph: Graph, source: Source, depth: int) -> CanvasNode:
        join = graph.join(self.on_member_failure)
        for member in self.members:
            member.build(graph, source, depth + 1).member_of = join.id
        return join


class chord(Canvas[Any]):
    """A group, and a body that gets the list of its results.

    Args:
        header: The group, or its members. Without any, the body gets an empty list.
        body: A Signature, or a canvas; it may also be given by calling the chord, which enqueues it.
        on_member_failure: "fail": the body becomes a dead letter when a member has failed. "skip": the list
            is of those that have succeeded.
    """

    def __init__(
        self,
        header: Canvas[Any] | Iterable[Canvas[Any]],
        body: Canvas[Any] | None = None,
        *,
        on_member_failure: OnMemberFailure | None = None,
    ) -> None:
        self.header = header if isinstance(header, group) else group(*_parts("chord", (header,)))
        if on_member_failure is not None:
            linked = self.header
            self.header = group(*linked.members, on_member_failure=on_member_failure)
            self.header.links, self.header.error_links = linked.links, linked.error_links
        self.body = None if body is None else _part("chord", body)

    def __repr__(self) -> str:
        return f"<chord of {len(self.header.members)}>"

    def __call__(self, body: Canvas[Any] | None = None, **options: Unpack[JobOptions]) -> CanvasResult[Any]:
        """Enqueue it, with this body."""
        whole = chord(self.header, self.body if body is None else body)
        whole.links, whole.error_links = self.links, self.error_links
        return whole.apply_async(**options)

    def parts(self) -> Iterable[Canvas[Any]]:
        return [*self.header.members, *([] if self.body is None else [self.body])]

    def build_parts(self, graph: Graph, source: Source, depth: int) -> CanvasNode:
        if self.body is None:
            raise TypeError("a chord needs a body: chord(header, body), or chord(header)(body)")
        if not self.header.members:
            return self.body.build(graph, Source(source.node, constant=([],)), depth + 1)
        return self.body.build(graph, Source(self.header.build(graph, source, depth + 1)), depth + 1)


class SyncCanvasCalls(Generic[T]):
    """What `.on(connection)` of a canvas gives for a sync connection."""

    def __init__(self, canvas: Canvas[Any], caller: SyncCaller) -> None:
        self._canvas: Any = canvas
        self._caller = caller

    def delay(self, *args: Any, **kwargs: Any) -> T:
        """Enqueue it in the connection's open transaction."""
        result: T = self._canvas._enqueue(args, kwargs, {}, self._caller)
        return result

    def apply_async(
        self, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None, **options: Unpack[JobOptions]
    ) -> T:
        """Enqueue it with options in the connection's open transaction."""
        check_option_names("apply_async", options)
        result: T = self._canvas._enqueue(args, kwargs or {}, options, self._caller)
        return result


class AsyncCanvasCalls(Generic[T]):
    """What `.on(connection)` of a canvas gives for an async connection."""

    def __init__(self, canvas: Canvas[Any], caller: AsyncCaller) -> None:
        self._canvas: Any = canvas
        self._caller = caller

    async def adelay(self, *args: Any, **kwargs: Any) -> T:
        """Enqueue it in the connection's open transaction."""
        result: T = await self._canvas._aenqueue(args, kwargs, {}, self._caller)
        return result

    async def aapply_async(
        self, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None, **options: Unpack[JobOptions]
    ) -> T:
        """Enqueue it with options in the connection's open transaction."""
        check_option_names("aapply_async", options)
        result: T = await self._canvas._aenqueue(args, kwargs or {}, options, self._caller)
        return result


def without_links(call: str, request: Signature[Any]) -> Signature[Any]:
    """The Signature; ValueError if jobs are linked to it, for a call that enqueues single jobs."""
    if request.links or request.error_links or any(request.options.get(name) for name in _LINKS):
        raise ValueError(f"{call} takes no links: enqueue {request.task} as a canvas of its own")
    return request


def _arguments(task: str, args: object, kwargs: object) -> tuple[Any, ...]:
    check_arguments(task, args, kwargs or {})
    return tuple(args)  # type: ignore[arg-type]


def _checked_failure(value: OnMemberFailure) -> OnMemberFailure:
    if value not in ("fail", "skip"):
        raise ValueError(f"on_member_failure must be 'fail' or 'skip', got {shown(value)}")
    return value


def _part(where: str, part: object) -> Canvas[Any]:
    if not isinstance(part, Canvas):
        raise TypeError(
            f"{where} takes calls made with task.s(...), chains, groups and chords, got {shown(part)}"
        )
    return part


def _handler(handler: Canvas[Any]) -> Signature[Any]:
    if not isinstance(handler, Signature) or handler.links or handler.error_links:
        raise TypeError(f"link_error takes a call of one task, made with task.s(...), got {shown(handler)}")
    return handler


def _parts(where: str, parts: Sequence[object]) -> list[Canvas[Any]]:
    """The parts that were given, one by one or as one iterable."""
    given: Iterable[object] = parts
    if len(parts) == 1 and not isinstance(parts[0], Canvas):
        if isinstance(parts[0], (str, bytes)) or not isinstance(parts[0], Iterable):
            _part(where, parts[0])
        else:
            given = parts[0]
    return [_part(where, part) for part in given]


def _steps(part: Canvas[Any]) -> list[Canvas[Any]]:
    """The steps of a chain that can be taken apart, else the part itself."""
    if isinstance(part, chain) and not part.links and not part.error_links:
        return part.steps
    return [part]


def _listed(where: str, given: object) -> tuple[Canvas[Any], ...]:
    return () if given is None else tuple(_parts(where, (given,)))


def _app_of(canvas: Canvas[Any]) -> Application:
    """The application of its signatures."""
    found: Application | None = None
    waiting = [canvas]
    seen: set[int] = set()
    while waiting:
        part = waiting.pop()
        if id(part) in seen:
            continue
        seen.add(id(part))
        if isinstance(part, Signature) and part.app is not None:
            if found is not None and part.app is not found:
                raise ValueError(
                    f"a canvas is of one application, got tasks of {found!r} and of {part.app!r}"
                )
            found = part.app
        waiting += part.parts()
        waiting += part.links
        waiting += part.error_links
    if found is None:
        raise ValueError(
            "nothing in it says whose application it is: make calls with task.s(...) or app.signature(...)"
        )
    return found
