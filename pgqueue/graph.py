"""The graph that a canvas becomes: jobs, and joins of jobs. Pure values, no I/O."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Final, Literal, Protocol

import msgspec

from pgqueue.job import JobRequest, new_id
from pgqueue.options import check_option_names

OnMemberFailure = Literal["fail", "skip"]

_NOT_IN_A_CANVAS: Final = ("job_id", "unique_key", "on_conflict", "unique_until")
_START: Final = ("countdown", "eta")
"""Options of a canvas that concern only the jobs that it starts with."""


class ErrorJob(msgspec.Struct, frozen=True):
    """A job to enqueue when a node of a canvas has failed.

    Attributes:
        takes_id: The id of the job at fault goes in front of its arguments.
        own: Only when the node's own job has failed, not one that it waited for.
    """

    request: JobRequest
    takes_id: bool = True
    own: bool = False


class CanvasNode(msgspec.Struct):
    """A job of a canvas, or a join, which ends when its members have ended.

    Attributes:
        id: The job's.
        nth: The order of nodes in the canvas, and so of the members of a join.
        request: The job; None for a join.
        after: Id of the node whose success releases the job.
        member_of: Id of the join that waits for it.
        takes_result: What `after` gives goes in front of the arguments.
        keeps_result: Somebody wants its result.
        skips_failed: Of a join: members that have failed are left out.
        dead_letter_queue: The label if it cannot run; None for its queue.
    """

    id: str
    nth: int
    request: JobRequest | None = None
    after: str | None = None
    member_of: str | None = None
    takes_result: bool = False
    keeps_result: bool = False
    skips_failed: bool = False
    dead_letter_queue: str | None = None
    on_error: list[ErrorJob] = msgspec.field(default_factory=list)


class CanvasRequest(msgspec.Struct, frozen=True):
    """A canvas about to be enqueued.

    Attributes:
        id: UUIDv7 made by this process.
        output: Id of the node whose end and result are those of the whole.
        nodes: What is waited for comes before what waits; a join comes before its members.
    """

    id: str
    output: str
    nodes: tuple[CanvasNode, ...]


class Call(Protocol):
    """A call of a task that has not been made: a `Signature`."""

    @property
    def task(self) -> str: ...
    @property
    def args(self) -> Sequence[Any]: ...
    @property
    def kwargs(self) -> Mapping[str, Any]: ...
    @property
    def options(self) -> Mapping[str, Any]: ...
    @property
    def immutable(self) -> bool: ...


class Encoder(Protocol):
    """Makes requests of calls: an application."""

    def member_request_for(
        self,
        name: str,
        args: Sequence[Any],
        kwargs: Mapping[str, Any],
        options: Mapping[str, Any],
        *,
        canvas_id: str | None,
        takes_result: bool,
    ) -> tuple[JobRequest, str | None]: ...


class Source:
    """What a part of a canvas waits for, and takes the result of: a node, or a value that is known."""

    __slots__ = ("constant", "node")

    def __init__(self, node: CanvasNode | None = None, constant: Sequence[Any] = ()) -> None:
        self.node = node
        self.constant = tuple(constant)


class Graph:
    """The nodes of a canvas, while it is put together.

    Args:
        args, kwargs: For the jobs that it starts with, before their own.
        options: For all jobs, unless they have their own.
    """

    def __init__(
        self, app: Encoder, args: Sequence[Any], kwargs: Mapping[str, Any], options: Mapping[str, Any]
    ) -> None:
        self.app = app
        self.id = new_id()
        self.nodes: list[CanvasNode] = []
        self._args = tuple(args)
        self._kwargs = kwargs
        self._options = {name: value for name, value in options.items() if name not in _START}
        self._start_options = options

    @contextmanager
    def without_options(self) -> Iterator[None]:
        """In the block, jobs have their own options only."""
        given, self._options = self._options, {}
        try:
            yield
        finally:
            self._options = given

    def job(self, call: Call, source: Source) -> CanvasNode:
        """The node of one call."""
        waits = source.node is not None
        args, kwargs = call.args, call.kwargs
        takes = waits and not call.immutable and not source.constant
        if not call.immutable:
            args = (*source.constant, *(() if waits or source.constant else self._args), *args)
            kwargs = kwargs if waits else {**kwargs, **self._kwargs}
        options = {**(self._options if waits else self._start_options), **call.options}
        request, dead_letter_queue = self.app.member_request_for(
            call.task, args, kwargs, _checked(options), canvas_id=self.id, takes_result=takes
        )
        node = CanvasNode(
            request.id,
            len(self.nodes),
            request=request,
            after=source.node.id if source.node is not None else None,
            takes_result=takes,
            dead_letter_queue=dead_letter_queue,
        )
        if takes and source.node is not None:
            source.node.keeps_result = True
        self.nodes.append(node)
        return node

    def join(self, on_member_failure: OnMemberFailure) -> CanvasNode:
        """A node that ends when its members have ended."""
        node = CanvasNode(new_id(), len(self.nodes), skips_failed=on_member_failure == "skip")
        self.nodes.append(node)
        return node

    def error_job(self, handler: Call, *, own: bool) -> ErrorJob:
        """What runs when a node has failed; `own`: not for what its job waited for."""
        takes = not handler.immutable
        options = {**self._options, **handler.options}
        request, _ = self.app.member_request_for(
            handler.task, handler.args, handler.kwargs, _checked(options), canvas_id=None, takes_result=takes
        )
        return ErrorJob(request, takes_id=takes, own=own)

    def request(self, output: CanvasNode) -> CanvasRequest:
        """The whole, with this node's end as its own."""
        output.keeps_result = True
        by_id = {node.id: node for node in self.nodes}
        for node in self.nodes:  # a join comes before its members
            if node.member_of is not None and by_id[node.member_of].keeps_result:
                node.keeps_result = True
        return CanvasRequest(self.id, output.id, tuple(self.nodes))


def _checked(options: Mapping[str, Any]) -> Mapping[str, Any]:
    if not options:
        return options
    if wrong := [name for name in _NOT_IN_A_CANVAS if options.get(name) is not None]:
        raise ValueError(
            f"{wrong[0]} has no meaning for a job of a canvas, which is always a new one; leave it out"
        )
    check_option_names("a canvas", options)
    return {name: value for name, value in options.items() if name not in _NOT_IN_A_CANVAS}
