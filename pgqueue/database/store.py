"""What a worker says to the database: connections that come back, and calls that run in one round trip.

A `Call` is one statement of `sql/` with its parameters. `Link.run` takes groups of calls; each group is one
READ COMMITTED transaction with local planner settings and timeouts, and all groups travel in one pipeline, in
order. They do not share a fate: a group that fails takes the later ones with it (they never started), never
the earlier ones (they are committed).

Lost connection: `DatabaseUnavailable`; a group whose COMMIT was sent may or may not have happened. Every
statement here is safe to send again: acks are fenced, so a repeat finds nothing; a claim whose answer was
lost leaves jobs running under the worker's name, which `list_claimed` finds. Clock skew cannot matter: only
the database's clock is compared or stored.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from operator import attrgetter
from typing import Any, Literal

import msgspec
import psycopg
from psycopg.rows import tuple_row

from pgqueue.database.dsn import connect_options, cut, cut_short, is_pooled, one_line, unreachable
from pgqueue.database.patient import ANSWER_PATIENCE
from pgqueue.database.queries import query
from pgqueue.errors import DatabaseError, DatabaseUnavailable
from pgqueue.failpoints import armed, failpoint
from pgqueue.job import ClaimedJob, DeadReason

log = logging.getLogger("pgqueue.worker")

Row = tuple[Any, ...]

CLAIM_LIMIT = 500
"""Jobs per claim and per ack statement: with values printed up to 8 kB, a claim's answer stays under 8
MiB."""


@dataclass(frozen=True, slots=True)
class Call:
    """One statement of `sql/` and its parameters."""

    name: str
    parameters: Mapping[str, Any] = field(default_factory=dict)


class GroupFailed(DatabaseError):
    """A group of calls failed; the groups before it are committed, those after it did not start.

    Attributes:
        sqlstate: What it was refused with.
        group: Index of the group that failed.
        rows: The answers of the groups before it.
        blames_the_row: It will be refused again: a value (22), a constraint (23), a limit (54), or a trigger
            of somebody's own (P0). Everything else passes: conflicts, locks, timeouts, a full disk, rights
            that are missing.
    """

    def __init__(
        self, message: str, *, sqlstate: str | None, group: int, rows: list[list[list[Row]]]
    ) -> None:
        super().__init__(message)
        self.sqlstate = sqlstate
        self.group = group
        self.rows = rows
        self.blames_the_row = sqlstate is not None and sqlstate[:2] in ("22", "23", "54", "P0")


QUERY_CANCELED = "57014"
"""SQLSTATE of a statement that took longer than it may."""


class Link:
    """One connection of a worker: opened on first use, opened again after it broke.

    Args:
        statement_timeout: Seconds.
        lock_timeout: Seconds.
    """

    def __init__(
        self, dsn: str, *, schema: str, name: str, statement_timeout: float = 10, lock_timeout: float = 2
    ) -> None:
        self._dsn = dsn
        self._schema = schema
        self._name = name
        self._timeouts = {
            "statement_timeout": f"{statement_timeout:g}s",
            "lock_timeout": f"{lock_timeout:g}s",
        }
        self._patience = statement_timeout + ANSWER_PATIENCE
        self._watchdog: asyncio.TimerHandle | None = None
        self._silent = False
        self._connection: psycopg.AsyncConnection[Row] | None = None
        self._lock = asyncio.Lock()
        self.opened = 0
        """How often it was opened; a change tells the owner that session state is gone."""

    async def connect(self) -> psycopg.AsyncConnection[Row]:
        """The open connection; DatabaseUnavailable if there is none to be had."""
        connection = self._connection
        if connection is not None and not connection.closed:
            return connection
        try:
            connection = await psycopg.AsyncConnection.connect(
                self._dsn,
                autocommit=True,
                row_factory=tuple_row,
                **connect_options(self._dsn, application_name=f"pgqueue {self._name}"),
            )
        except psycopg.OperationalError as error:
            raise unreachable(error) from error
        await self._settle(connection)
        self._connection = connection
        self.opened += 1
        return connection

    async def _settle(self, connection: psycopg.AsyncConnection[Row]) -> None:
        """Find out whether it goes through a pooler, where nothing can be prepared."""
        connection.add_notice_handler(self._on_notice)
        self._watch(connection)
        try:
            cursor = await connection.execute("SELECT pg_backend_pid()", prepare=False)
            ((pid,),) = await cursor.fetchall()
        except psycopg.Error as error:
            await connection.close()
            raise unreachable(error) from error
        except asyncio.CancelledError:
            connection.pgconn.finish()
            raise
        finally:
            self._stop_watching()
        if is_pooled(pid, connection):
            connection.prepare_threshold = None

    def _on_notice(self, diagnostic: psycopg.errors.Diagnostic) -> None:
        if cut_short(diagnostic):
            log.warning("commit_not_replicated connection=%s", self._name)

    async def close(self) -> None:
        """Close the connection; a later call opens another."""
        connection, self._connection = self._connection, None
        if connection is not None:
            await connection.close()

    async def call(self, name: str, /, **parameters: Any) -> list[Row]:
        """Run one statement in a transaction of its own; returns its rows."""
        return (await self.run([Call(name, parameters)]))[0][0]

    async def run(self, *groups: Sequence[Call]) -> list[list[list[Row]]]:
        """Run each group as one transaction, all in one round trip; returns the rows per group and call.

        Raises:
            GroupFailed: The server refused a statement.
            DatabaseUnavailable: The connection broke, or could not be made.
        """
        async with self._lock:
            connection = await self.connect()
            begin = query("begin_work", self._schema).text
            cursors: list[list[psycopg.AsyncCursor[Row]]] = []
            commits: list[psycopg.AsyncCursor[Row]] = []
            # Not asyncio.timeout(): cancelled, psycopg waits for the server, which is what does not answer.
            self._watch(connection)
            try:
                async with connection.pipeline() as pipeline:
                    for group in groups:
                        await connection.execute("BEGIN ISOLATION LEVEL READ COMMITTED")
                        await connection.execute(begin, self._timeouts)
                        cursors.append(
                            [
                                await connection.execute(query(call.name, self._schema).text, call.parameters)
                                for call in group
                            ]
                        )
                        if armed:
                            await _come_by(_BEFORE_COMMIT, group, connection, pipeline)
                        commits.append(await connection.execute("COMMIT"))
                        if armed:
                            await _come_by(_AFTER_COMMIT, group, connection, pipeline)
                self._silent = False
                return [
                    [await cursor.fetchall() if cursor.description else [] for cursor in group]
                    for group in cursors
                ]
            except psycopg.Error as error:
                raise await self._failure(connection, error, cursors, commits) from error
            except asyncio.CancelledError:
                # The pipeline may be half sent: only a new connection is in a known state.
                await self.close()
                raise
            finally:
                self._stop_watching()

    def _watch(self, connection: psycopg.AsyncConnection[Row]) -> None:
        loop = asyncio.get_running_loop()
        due = loop.time() + self._patience
        self._watchdog = loop.call_at(due, self._give_up, connection, due)

    def _stop_watching(self) -> None:
        if self._watchdog is not None:
            self._watchdog.cancel()

    def _give_up(self, connection: psycopg.AsyncConnection[Row], due: float) -> None:
        if asyncio.get_running_loop().time() - due > ANSWER_PATIENCE / 2:
            self._watch(connection)  # it was we who were frozen: the answer may lie there unread
            return
        if not self._silent:  # once for an outage
            log.warning("database_silent connection=%s seconds=%g", self._name, self._patience)
            self._silent = True
        cut(connection)

    async def _failure(
        self,
        connection: psycopg.AsyncConnection[Row],
        error: psycopg.Error,
        cursors: list[list[psycopg.AsyncCursor[Row]]],
        commits: list[psycopg.AsyncCursor[Row]],
    ) -> DatabaseError:
        if (
            connection.closed
            or error.sqlstate == "25006"  # read-only: the primary has become, or we are led to, a standby
            or (isinstance(error, psycopg.OperationalError) and not _is_refusal(error))
        ):
            await self.close()
            return DatabaseUnavailable(f"lost the database: {one_line(error)}")
        committed = 0
        while committed < len(commits) and commits[committed].statusmessage == "COMMIT":
            committed += 1
        rows = [
            [await cursor.fetchall() if cursor.description else [] for cursor in group]
            for group in cursors[:committed]
        ]
        try:
            await connection.rollback()
        except psycopg.Error:
            await self.close()
        message = f"{error.sqlstate or 'error'}: {one_line(error)}"
        return GroupFailed(message, sqlstate=_sqlstate(error), group=committed, rows=rows)


_BEFORE_COMMIT = {
    "claim_jobs": "claim_before_commit",
    "rescue_jobs": "rescue_mid_batch",
    "promote_jobs": "promote_mid_batch",
    "fire_schedule": "tick_before_commit",
    "settle_canvases": "settle_before_commit",
}
_ACKS = ("ack_finished", "ack_forgotten", "ack_retried", "ack_snoozed", "ack_dead", "release_jobs")
_AFTER_COMMIT = {
    "claim_jobs": "claim_after_commit",
    "fire_schedule": "tick_after_commit",
    "settle_canvases": "settle_after_commit",
    **dict.fromkeys(_ACKS, "ack_sent"),
}


async def _come_by(
    places: Mapping[str, str],
    group: Sequence[Call],
    connection: psycopg.AsyncConnection[Row],
    pipeline: psycopg.AsyncPipeline,
) -> None:
    """Pass the failpoints of these calls, once the server has done what was sent so far."""
    for place in {places[call.name] for call in group if call.name in places}:
        await pipeline.sync()
        failpoint(place, lambda: cut(connection))


def _sqlstate(error: psycopg.Error) -> str | None:
    """The error's code; a row that met the making of its partition counts as a conflict: repeated, it fits.

    That refusal shares its code with CHECK constraints, but names none (ExecPartitionCheckEmitError in
    execMain.c).
    """
    if error.sqlstate == "23514" and error.diag.constraint_name is None:
        return "40001"
    return error.sqlstate


def _is_refusal(error: psycopg.OperationalError) -> bool:
    """Errors psycopg files under Operational although the connection is fine: timeouts, deadlocks, limits,
    disk full.
    """
    return error.sqlstate is not None and error.sqlstate[:2] != "08" and error.sqlstate[:4] != "57P0"


@dataclass(frozen=True, slots=True)
class Claim:
    """A claim's answer: the jobs in no particular order, and the horizon of the snapshot that found them."""

    jobs: list[ClaimedJob]
    xmin: int
    xmax: int


_CLAIM_DECODER = msgspec.json.Decoder(list[ClaimedJob])
_JOB_DECODER = msgspec.json.Decoder(ClaimedJob)


def decode_claim(rows: list[Row], worker: str) -> Claim:
    """Read the answer of `claim_jobs`; msgspec.DecodeError when the document is not readable."""
    document, xmin, xmax = rows[0]
    jobs = _CLAIM_DECODER.decode(document)
    for job in jobs:
        job.worker = worker
    return Claim(jobs, xmin, xmax)


def decode_claimed(rows: list[Row], worker: str) -> tuple[list[ClaimedJob], list[Outcome]]:
    """Read the answer of `list_claimed` row by row: the jobs, and the burial of each row that is not
    readable.
    """
    jobs: list[ClaimedJob] = []
    unreadable: list[Outcome] = []
    for job_id, attempt, document in rows:
        try:
            job = _JOB_DECODER.decode(document)
        except (msgspec.DecodeError, RecursionError) as error:
            why = f"the row cannot be read: {error}"
            unreadable.append(
                Outcome(job_id, attempt, worker, "bury", reason="bad_payload", error_message=why)
            )
        else:
            job.worker = worker
            jobs.append(job)
    return jobs, unreadable


Verb = Literal["finish", "retry", "snooze", "bury", "release"]


class Outcome(msgspec.Struct):
    """What became of one attempt, waiting to be acked.

    Attributes:
        verb: `finish` → finished_jobs, `retry` and `snooze` → scheduled, `bury` → dead_letters, `release` →
            ready.
        state: For `finish`.
        kind: For `retry` and `bury`: what the failures row says.
        started, finished: Seconds on the caller's monotonic clock, for `finish`.
        uncertain: It was sent before and the answer was lost; finding nothing is no news then.
        queue: For `release`: who sleeps on it is to be told.
        history: For `finish`: False → nowhere.
        canvas: The job belongs to a canvas: what waits for it is to be told of its end.
    """

    id: str
    attempt: int
    worker: str
    verb: Verb
    state: Literal["succeeded", "expired", "cancelled"] = "succeeded"
    kind: Literal["failed", "crashed"] = "failed"
    result: str | None = None
    result_error: str | None = None
    started: float = 0.0
    finished: float = 0.0
    delay: float = 0.0
    max_retries: int | None = None
    reason: DeadReason = "not_retryable"
    dead_letter_queue: str | None = None
    error_class: str | None = None
    error_message: str | None = None
    traceback: str | None = None
    uncertain: bool = False
    queue: str = ""
    history: bool = True
    canvas: bool = False

    @property
    def settles(self) -> bool:
        """Whether something may be waiting for this."""
        return self.canvas and self.verb in ("finish", "bury")


_ID = attrgetter("id")


def ack_calls(outcomes: Iterable[Outcome], now: float) -> list[tuple[Call, list[Outcome]]]:
    """The statements that record these outcomes, each with the outcomes it carries.

    One statement per verb, worker and attempt number (nearly always one in all): joining ids with attempts
    would cost four times as much in the server. `now` is on the clock of `Outcome.started`.
    """
    groups: dict[tuple[object, ...], list[Outcome]] = {}
    for outcome in sorted(outcomes, key=_ID):  # the statements find an id's place among them by halving
        how = outcome.state if outcome.verb == "finish" else outcome.kind
        key = (outcome.verb, outcome.worker, outcome.attempt, how, outcome.history)
        groups.setdefault(key, []).append(outcome)
    return [(_ack_call(group, now), group) for group in groups.values()]


def _ack_call(group: list[Outcome], now: float) -> Call:
    first = group[0]
    # Array literals: the driver sends text of unknown type, the cast in the statement makes it a uuid[]
    # parameter.
    parameters: dict[str, Any] = {
        "ids": "{" + ",".join([outcome.id for outcome in group]) + "}",
        "attempt": first.attempt,
        "worker": first.worker,
    }
    if first.verb == "finish" and first.state == "succeeded" and not first.history:
        return Call("ack_forgotten", parameters)
    if first.verb == "finish":
        parameters |= {
            "state": first.state,
            "started_ago": "{" + ",".join([f"{now - o.started:.6f}" for o in group]) + "}",
            "finished_ago": "{" + ",".join([f"{now - o.finished:.6f}" for o in group]) + "}",
            "results": _column(o.result for o in group),
            "result_errors": _column(o.result_error for o in group),
        }
        return Call("ack_finished", parameters)
    if first.verb == "release":
        return Call("release_jobs", parameters)
    delays = "{" + ",".join([f"{o.delay:.6f}" for o in group]) + "}"
    if first.verb == "snooze":
        return Call("ack_snoozed", parameters | {"delays": delays})
    parameters |= {
        "kind": first.kind,
        "error_classes": _column(o.error_class for o in group),
        "error_messages": _column(o.error_message for o in group),
        "tracebacks": _column(o.traceback for o in group),
    }
    if first.verb == "retry":
        parameters |= {"delays": delays, "max_retries": _column(o.max_retries for o in group)}
        return Call("ack_retried", parameters)
    parameters |= {
        "reasons": [o.reason for o in group],
        "dead_letter_queues": _column(o.dead_letter_queue for o in group),
    }
    return Call("ack_dead", parameters)


def _column(values: Iterable[Any]) -> list[Any] | None:
    """The values as an array parameter; None when there is not one among them, which costs nothing to
    send.
    """
    column = list(values)
    return column if any(value is not None for value in column) else None
