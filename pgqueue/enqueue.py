"""From requests to rows in `jobs`: the single and the bulk way, and repeats.

On the caller's connection everything happens in the caller's open transaction, and an error is the caller's.
On a connection of our own the call commits; when it breaks, whether the COMMIT took place is unknown, so the
enqueue is repeated with the same ids, and the database is told that they may have been used: a job that was
enqueued, finished or buried meanwhile is not enqueued again. When that cannot be settled within seconds:
`EnqueueUncertain`.
"""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from datetime import UTC, datetime, timedelta
from functools import partial
from itertools import islice
from typing import TYPE_CHECKING, Any, Final, TypeVar

import msgspec

from pgqueue.database.connection import (
    AsyncCaller,
    Channel,
    ConnectionLost,
    Copy,
    NotReplicated,
    Pause,
    Plan,
    Refused,
    Statement,
    Steps,
    SyncCaller,
    adrive,
    check_install,
    drive,
    sqlstate_of,
)
from pgqueue.database.dsn import cut
from pgqueue.errors import (
    ConfigError,
    DatabaseError,
    DuplicateJob,
    EnqueueUncertain,
    SchemaMismatch,
    UniqueWaitTimeout,
    shown,
)
from pgqueue.failpoints import armed, failpoint
from pgqueue.graph import CanvasNode, CanvasRequest, ErrorJob
from pgqueue.job import JobRequest

if TYPE_CHECKING:
    from pgqueue.database.pool import Database

T = TypeVar("T")

CHUNK: Final = 1_000
"""Jobs per call of `enqueue_many`, whose JSON is built and parsed as one."""

COPY_CHUNK: Final = 20_000
"""Jobs per COPY: bounds the memory for their text, and each costs a round trip."""

REPEAT_FOR: Final = 3.0
UNIQUE_WAIT: Final = "1s"
REPLACE_ROUNDS: Final = 3
"""Tries to change the job that has the key, or to be the one that has it; in between it may start or end."""

LOCK_NOT_AVAILABLE: Final = "55P03"
UNDEFINED_FUNCTION: Final = "42883"
ASK_HOME_AGAIN: Final = 60.0
_PAUSES: Final = (0.05, 0.1, 0.2, 0.4, 0.8, 1.0)
"""Seconds between repeats after a connection broke; a database that only restarts is back by then."""


def insert_one(request: JobRequest, *, repeated: bool = False, flush: bool = False) -> Plan[str]:
    """Enqueue one job; its id, or that of the job that has its unique key.

    Args:
        repeated: It may be there already, or have ended.
        flush: If it is, see to it that COMMIT waits until that is safe, on disk and on synchronous standbys.

    Raises:
        DuplicateJob: Another job has the unique key, and the caller asked to be told.
        UniqueWaitTimeout: An open transaction holds the unique key.
    """
    parameters: dict[str, Any] = {
        "task": request.task,
        "args": request.args,
        "kwargs": request.kwargs,
        "queue": request.queue,
        "priority": request.priority,
        "id": request.id,
        "headers": request.headers,
    }
    statement = "enqueue_ready_job"
    if repeated or flush or not request.is_plain:
        statement = "enqueue_job"
        parameters |= {
            "eta": request.eta,
            "countdown": request.countdown,
            "expires_at": request.expires_at,
            "expires_in": request.expires_in,
            "max_retries": request.max_retries,
            "new_id": not (repeated or request.given_id),
            "flush": flush,
        }

    def plan(channel: Channel) -> Steps[str]:
        if request.unique_key is not None:
            return (yield from _insert_unique(request, {**parameters, "unique_key": request.unique_key}))
        rows = yield Statement(statement, parameters)
        job_id: str = rows[0][0]
        return job_id

    return plan


def _insert_unique(request: JobRequest, parameters: Mapping[str, Any]) -> Steps[str]:
    job_id = request.id
    for _ in range(REPLACE_ROUNDS):
        with _waiting_for_key(request.task, request.unique_key):
            rows = yield Statement("enqueue_unique_job", parameters)
        job_id = rows[0][0]
        if job_id == request.id or request.on_conflict == "return":
            break
        if request.on_conflict == "raise":
            raise DuplicateJob(
                f"job {job_id} of {request.task} has the unique_key {shown(request.unique_key)}, nothing was "
                "enqueued",
                job_id=job_id,
            )
        with (
            _waiting_for_key(request.task, request.unique_key),
            _told_of_revision("0003", 'on_conflict="replace" needs', "replace_job"),
        ):
            rows = yield Statement("replace_job", {**parameters, "id": job_id})
        if rows[0][0] != "gone":
            break
    return job_id


@contextlib.contextmanager
def _waiting_for_key(task: str, key: str | None) -> Iterator[None]:
    try:
        yield
    except Exception as error:
        state = sqlstate_of(error)
        if state == LOCK_NOT_AVAILABLE:
            raise UniqueWaitTimeout(
                f"another transaction, open for over a second, has enqueued {task} with the unique_key "
                f"{'given' if key is None else shown(key)}; try again when it has ended"
            ) from error
        raise


def insert_many(
    requests: Sequence[JobRequest], *, repeated: bool = False, flush: bool = False
) -> Plan[list[str]]:
    """Enqueue jobs; their ids in order. By COPY, if ids are fresh, and role and connection allow.

    `repeated` and `flush` are those of `insert_one`.
    """

    def plan(channel: Channel) -> Steps[list[str]]:
        if not requests:
            return []
        rows = yield Statement("read_clock", {"schema": channel.schema})
        now, may_copy = float(rows[0][0]), rows[0][1]
        new_ids = not repeated and not any(request.given_id for request in requests)
        keyed = next((request for request in requests if request.unique_key is not None), None)
        if new_ids and keyed is None and may_copy and channel.can_copy:
            return (yield from _copy_jobs(requests, now))
        ids: list[str] = []
        before = ""
        if keyed is not None:
            before = (yield Statement("set_lock_timeout", {"timeout": UNIQUE_WAIT}))[0][0]
        for chunk in _chunks(requests, CHUNK):
            parameters = {"jobs": _jobs_json(chunk, now), "new_ids": new_ids}
            with contextlib.nullcontext() if keyed is None else _waiting_for_key(keyed.task, None):
                ids += [row[0] for row in (yield Statement("enqueue_jobs", parameters))]
        if keyed is not None:
            yield Statement("set_lock_timeout", {"timeout": before})
        if flush and not new_ids:
            yield Statement("flush_log", {})
        return ids

    return plan


def insert_canvas(request: CanvasRequest) -> Plan[None]:
    """Enqueue a canvas, unless it is there already: its id is remembered for as long as it is."""

    def plan(channel: Channel) -> Steps[None]:
        jobs = sum(node.request is not None for node in request.nodes)
        start = {"id": request.id, "output": request.output, "jobs": jobs}
        with _told_of_revision("0011", "a canvas needs", "enqueue_canvas"):
            is_new = (yield Statement("enqueue_canvas", start))[0][0]
        if not is_new:
            yield Statement("flush_log", {})
            return
        rows = yield Statement("read_clock", {"schema": channel.schema})
        now = float(rows[0][0])
        for chunk in _chunks(request.nodes, CHUNK):
            nodes = f"[{','.join(_node_json(node, now) for node in chunk)}]"
            yield Statement("enqueue_canvas_nodes", {"id": request.id, "nodes": nodes})

    return plan


@contextlib.contextmanager
def _told_of_revision(revision: str, what: str, function: str) -> Iterator[None]:
    """SchemaMismatch where the schema does not have this function yet."""
    try:
        yield
    except Exception as error:
        if sqlstate_of(error) == UNDEFINED_FUNCTION and function in str(error):
            raise SchemaMismatch(
                f"{what} revision {revision} of the schema; run `pgqueue migrate`"
            ) from error
        raise


def in_transaction_of_caller(plan: Plan[T], home: str | None) -> Plan[T]:
    """The plan, after a look at whether it is the right database."""

    def checked(channel: Channel) -> Steps[T]:
        yield from check_install(channel, home)
        return (yield from (_before_commit(plan, channel) if armed else plan(channel)))

    return checked


def _before_commit(plan: Plan[T], channel: Channel) -> Steps[T]:
    result = yield from plan(channel)
    failpoint("enqueue_before_commit", lambda: cut(channel.physical))
    return result


_COPY_COLUMNS: Final = (
    "id", "state", "queue", "priority", "task", "args", "kwargs", "headers", "eta", "expires_at",
    "max_retries",
)  # fmt: skip


def _copy_jobs(requests: Sequence[JobRequest], now: float) -> Steps[list[str]]:
    ready: set[str] = set()
    scheduled: dict[str, datetime] = {}
    for chunk in _chunks(requests, COPY_CHUNK):
        lines = []
        for request in chunk:
            eta, expires_at = _times(request, now)
            waits = eta is not None and eta.timestamp() > now
            if waits and eta is not None:
                scheduled[request.queue] = min(eta, scheduled.get(request.queue, eta))
            else:
                ready.add(request.queue)
            lines.append(_copy_line(request, "scheduled" if waits else "ready", eta, expires_at))
        yield Copy("jobs", _COPY_COLUMNS, "".join(lines).encode())
    if ready:
        yield Statement("wake_workers", {"queues": sorted(ready), "eta": None})
    if scheduled:
        yield Statement("wake_workers", {"queues": sorted(scheduled), "eta": min(scheduled.values())})
    return [request.id for request in requests]


def _copy_line(request: JobRequest, state: str, eta: datetime | None, expires_at: datetime | None) -> str:
    r"""One row of COPY's text format.

    Names have no control characters and JSON escapes its own, so the backslash is all there is to double.
    """
    line = (
        f"{request.id}\t{state}\t{request.queue}\t{request.priority}"
        f"\t{request.task}\t{request.args}\t{request.kwargs}\t{request.headers}"
    )
    if "\\" in line:
        line = line.replace("\\", "\\\\")
    if eta is None and expires_at is None and request.max_retries is None:
        return line + _NULLS
    return (
        f"{line}\t{_null if eta is None else eta.isoformat()}"
        f"\t{_null if expires_at is None else expires_at.isoformat()}"
        f"\t{_null if request.max_retries is None else request.max_retries}\n"
    )


_null: Final = r"\N"
_NULLS: Final = f"\t{_null}\t{_null}\t{_null}\n"


def _jobs_json(requests: Sequence[JobRequest], now: float) -> str:
    """The argument of the SQL function `enqueue_many`. Payloads are JSON already, and go in as they are."""
    return f"[{','.join(_job_json(request, now) for request in requests)}]"


def _node_json(node: CanvasNode, now: float) -> str:
    """One element of the argument of the SQL function `enqueue_canvas_nodes`."""
    request = node.request
    fields: dict[str, Any] = {
        "id": node.id,
        "nth": node.nth,
        "after": node.after,
        "member_of": node.member_of,
        "takes_result": node.takes_result,
        "keeps_result": node.keeps_result,
        "skips_failed": node.skips_failed,
    }
    payloads = ""
    if node.on_error:
        payloads = f', "on_error": [{",".join(map(_error_json, node.on_error))}]'
    if request is not None:
        fields |= _common_fields(request)
        fields["dead_letter_queue"] = node.dead_letter_queue
        payloads += _payloads(request)
        if node.after is None:
            fields |= _fixed_times(request, now)
        else:  # what counts from now counts from its release
            fields |= _times_from_then(request)
    return f"{json.dumps(fields, ensure_ascii=False)[:-1]}{payloads}}}"


def _error_json(job: ErrorJob) -> str:
    fields = {"takes_result": job.takes_id, "own": job.own}
    fields |= _common_fields(job.request) | _times_from_then(job.request)
    return f"{json.dumps(fields, ensure_ascii=False)[:-1]}{_payloads(job.request)}}}"


def _times_from_then(request: JobRequest) -> dict[str, Any]:
    return {
        "eta": None if request.eta is None else request.eta.isoformat(),
        "countdown": request.countdown,
        "expires_at": None if request.expires_at is None else request.expires_at.isoformat(),
        "expires_in": request.expires_in,
    }


def _job_json(request: JobRequest, now: float) -> str:
    fields = {"id": request.id, "unique_key": request.unique_key}
    fields |= _common_fields(request) | _fixed_times(request, now)
    return f"{json.dumps(fields, ensure_ascii=False)[:-1]}{_payloads(request)}}}"


def _common_fields(request: JobRequest) -> dict[str, Any]:
    return {
        "queue": request.queue,
        "task": request.task,
        "priority": request.priority,
        "max_retries": request.max_retries,
    }


def _fixed_times(request: JobRequest, now: float) -> dict[str, str | None]:
    eta, expires_at = _times(request, now)
    return {
        "eta": None if eta is None else eta.isoformat(),
        "expires_at": None if expires_at is None else expires_at.isoformat(),
    }


def _payloads(request: JobRequest) -> str:
    return f', "args": {request.args}, "kwargs": {request.kwargs}, "headers": {request.headers}'


def _times(request: JobRequest, now: float) -> tuple[datetime | None, datetime | None]:
    """eta and expires_at, with the database's clock for what counts from now."""
    eta, expires_at = request.eta, request.expires_at
    if request.countdown is not None:
        eta = _later(now, request.countdown)
    if request.expires_in is not None:
        expires_at = _later(now, request.expires_in)
    return eta, expires_at


_EPOCH: Final = datetime(1970, 1, 1, tzinfo=UTC)


def _later(now: float, seconds: float) -> datetime:
    return _EPOCH + timedelta(seconds=now + seconds)


def _chunks(items: Sequence[T], size: int) -> Generator[Sequence[T], None, None]:
    remaining = iter(items)
    while chunk := list(islice(remaining, size)):
        yield chunk


class Attempt(msgspec.Struct, frozen=True):
    """Run a plan on a connection of our own."""

    plan: Plan[Any]
    atomic: bool


def until_settled(
    plan_for: Callable[[bool], Plan[T]], *, atomic: bool, job_id: str, history: bool = True
) -> Generator[Attempt | Pause, Any, T]:
    """Enqueue on a connection of our own, again after it broke, until the database has said yes or no.

    Args:
        plan_for: Makes the plan; its argument says that the ids may have been used by an attempt before.
        atomic: The first attempt needs a transaction. A repeat always has one: it must be READ COMMITTED.
        job_id: For `EnqueueUncertain`.
        history: The jobs will be remembered. Without, a repeat could run again what has succeeded meanwhile.
    """
    deadline = 0.0
    lost: ConnectionLost | None = None
    refused: Refused | None = None
    for pause in (0.0, *_PAUSES):
        if pause:
            yield Pause(pause)
        try:
            plan = plan_for(lost is not None)
            if armed:
                plan = partial(_before_commit, plan)
            result: T = yield Attempt(plan, atomic or lost is not None or armed)
            if armed:
                failpoint("enqueue_after_commit")
            return result
        except ConnectionLost as error:
            if not history:
                raise EnqueueUncertain(
                    f"the connection broke: job {job_id} may or may not be enqueued, and its task keeps no "
                    "history that could tell; repeat the call if running it twice does no harm",
                    job_id=job_id,
                ) from error
            lost = error
        except UniqueWaitTimeout:
            if lost is None:  # else it may be the attempt before that holds the key
                raise
        except NotReplicated as error:
            # Not repeated: the row is there, so a repeat would have nothing to wait for, or wait for ever.
            raise EnqueueUncertain(
                f"somebody cut the wait for synchronous replication short: job {job_id} is enqueued on this "
                "server, and would be lost in a failover; repeat the call with this job_id",
                job_id=job_id,
            ) from error
        except Refused as error:
            refused = error
        except DatabaseError:
            if lost is None:  # nothing took effect, so nothing is uncertain
                raise
        deadline = deadline or time.monotonic() + REPEAT_FOR
        if time.monotonic() > deadline:
            break
    if lost is None and refused is not None:
        raise refused
    raise EnqueueUncertain(
        f"the connection broke and the database did not come back within {REPEAT_FOR:g} s: job {job_id} may "
        "or may not be enqueued; repeat the call with this job_id",
        job_id=job_id,
    ) from lost


class Client:
    """Enqueues requests for one application, on a caller's connection or on one of our own.

    Args:
        schema: Where the queue's tables are.
        dsn: The queue's database; None when every enqueue comes with a connection.
    """

    def __init__(self, schema: str, dsn: str | None) -> None:
        self.schema = schema
        self._dsn = dsn
        self._database: Database | None = None
        self._home: str | None = None
        self._ask_home_again = 0.0

    @property
    def database(self) -> Database:
        """The queue's own database; ConfigError without a DSN."""
        if self._database is None:
            if self._dsn is None:
                raise ConfigError(
                    "no database: pass dsn=, or set PGQUEUE_DSN, or enqueue through .on(connection)"
                )
            from pgqueue.database.pool import Database

            self._database = Database(self._dsn, self.schema)
        return self._database

    def enqueue(self, request: JobRequest, caller: SyncCaller | None) -> str:
        """Enqueue one job; its id."""
        if caller is not None:
            return self._in_transaction(insert_one(request), caller)
        return drive(self._one(request), self._perform)

    async def aenqueue(self, request: JobRequest, caller: AsyncCaller | None) -> str:
        """Enqueue one job; its id."""
        if caller is not None:
            return await self._ain_transaction(insert_one(request), caller)
        return await adrive(self._one(request), self._aperform)

    def enqueue_many(self, requests: Sequence[JobRequest], caller: SyncCaller | None) -> list[str]:
        """Enqueue jobs, all or none; their ids in the same order."""
        if caller is not None:
            return self._in_transaction(insert_many(requests), caller)
        return drive(self._many(requests), self._perform)

    async def aenqueue_many(self, requests: Sequence[JobRequest], caller: AsyncCaller | None) -> list[str]:
        """Enqueue jobs, all or none; their ids in the same order."""
        if caller is not None:
            return await self._ain_transaction(insert_many(requests), caller)
        return await adrive(self._many(requests), self._aperform)

    def enqueue_canvas(self, request: CanvasRequest, caller: SyncCaller | None) -> None:
        """Enqueue a canvas, all or nothing."""
        if caller is not None:
            return self._in_transaction(insert_canvas(request), caller)
        return drive(self._whole(request), self._perform)

    async def aenqueue_canvas(self, request: CanvasRequest, caller: AsyncCaller | None) -> None:
        """Enqueue a canvas, all or nothing."""
        if caller is not None:
            return await self._ain_transaction(insert_canvas(request), caller)
        return await adrive(self._whole(request), self._aperform)

    def close(self) -> None:
        """Close the idle connections of this process."""
        if self._database is not None:
            self._database.close()

    async def aclose(self) -> None:
        """Close the idle connections, those of the running event loop too."""
        if self._database is not None:
            await self._database.aclose()

    def _one(self, request: JobRequest) -> Generator[Attempt | Pause, Any, str]:
        return until_settled(
            lambda repeated: insert_one(request, repeated=repeated, flush=repeated or request.given_id),
            atomic=request.given_id or request.on_conflict == "replace",
            job_id=request.id,
            history=request.history,
        )

    def _many(self, requests: Sequence[JobRequest]) -> Generator[Attempt | Pause, Any, list[str]]:
        first = requests[0].id if requests else ""
        return until_settled(
            lambda repeated: insert_many(requests, repeated=repeated, flush=True),
            atomic=True,
            job_id=first,
            history=all(request.history for request in requests),
        )

    def _whole(self, request: CanvasRequest) -> Generator[Attempt | Pause, Any, None]:
        return until_settled(lambda repeated: insert_canvas(request), atomic=True, job_id=request.id)

    def _perform(self, step: Attempt | Pause) -> Any:
        if isinstance(step, Pause):
            time.sleep(step.seconds)
            return None
        return self.database.run(step.plan, atomic=step.atomic)

    async def _aperform(self, step: Attempt | Pause) -> Any:
        if isinstance(step, Pause):
            import asyncio

            await asyncio.sleep(step.seconds)
            return None
        return await self.database.arun(step.plan, atomic=step.atomic)

    def _in_transaction(self, plan: Plan[T], caller: SyncCaller) -> T:
        if self._must_ask_home():
            with contextlib.suppress(DatabaseError):
                self._home = self.database.find_install()
        return caller.run(self.schema, in_transaction_of_caller(plan, self._home))

    async def _ain_transaction(self, plan: Plan[T], caller: AsyncCaller) -> T:
        if self._must_ask_home():
            with contextlib.suppress(DatabaseError):
                self._home = await self.database.afind_install()
        return await caller.run(self.schema, in_transaction_of_caller(plan, self._home))

    def _must_ask_home(self) -> bool:
        """Whether to find out which database the DSN means.

        An enqueue in the caller's transaction does not depend on the answer: when it cannot be had, nobody
        waits for it again for a minute.
        """
        if self._home is not None or self._dsn is None or time.monotonic() < self._ask_home_again:
            return False
        self._ask_home_again = time.monotonic() + ASK_HOME_AGAIN
        return True
