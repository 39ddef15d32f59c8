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
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import msgspec
import psycopg
from psycopg.rows import tuple_row

from pgqueue.database.dsn import connect_options, one_line, unreachable
from pgqueue.database.queries import query
from pgqueue.errors import DatabaseError, DatabaseUnavailable
from pgqueue.job import DeadReason

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
        group: Index of the group that failed.
        rows: The answers of the groups before it.
        is_passing: The database is in trouble or busy, the statement is not to blame: conflicts (40), out of
            disk or connections (53), locks (55), timeouts and shutdowns (57), I/O errors (58), read-only
            (25).
    """

    def __init__(
        self, message: str, *, sqlstate: str | None, group: int, rows: list[list[list[Row]]]
    ) -> None:
        super().__init__(message)
        self.group = group
        self.rows = rows
        self.is_passing = sqlstate is None or sqlstate[:2] in ("25", "40", "53", "55", "57", "58")


class Link:
    """One connection of a worker: opened on first use, opened again after it broke."""

    def __init__(
        self, dsn: str, *, schema: str, name: str, statement_timeout: str = "10s", lock_timeout: str = "2s"
    ) -> None:
        self._dsn = dsn
        self._schema = schema
        self._name = name
        self._timeouts = {"statement_timeout": statement_timeout, "lock_timeout": lock_timeout}
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
        self._connection = connection
        self.opened += 1
        return connection

    async def close(self) -> None:
        """Close the connection; a later call opens another."""
        connection, self._connection = self._connection, None
        if connection is not None:
            await connection.close()

    async def call(self, name: str, **parameters: Any) -> list[Row]:
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
            try:
                async with connection.pipeline():
                    for group in groups:
                        await connection.execute("BEGIN ISOLATION LEVEL READ COMMITTED")
                        await connection.execute(begin, self._timeouts)
                        cursors.append(
                            [
                                await connection.execute(query(call.name, self._schema).text, call.parameters)
                                for call in group
                            ]
                        )
                        commits.append(await connection.execute("COMMIT"))
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

    async def _failure(
        self,
        connection: psycopg.AsyncConnection[Row],
        error: psycopg.Error,
        cursors: list[list[psycopg.AsyncCursor[Row]]],
        commits: list[psycopg.AsyncCursor[Row]],
    ) -> DatabaseError:
        if connection.closed or (isinstance(error, psycopg.OperationalError) and not _is_refusal(error)):
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


def _sqlstate(error: psycopg.Error) -> str | None:
    """The error's code; a row that met the making of its partition counts as a conflict: repeated, it fits.

    That refusal shares its code with CHECK constraints, but names none (ExecPartitionCheckEmitError in
    execMain.c).
    """
    if error.sqlstate == "23514" and error.diag.constraint_name is None:
        return "40001"
    return error.sqlstate


def _is_refusal(error: psycopg.OperationalError) -> bool:
    """Errors psycopg files under Operational although the connection is fine: timeouts, deadlocks, disk
    full.
    """
    return (
        error.sqlstate is not None
        and error.sqlstate[:2] in ("40", "53", "55", "57")
        and error.sqlstate[:4] != "57P0"
    )


class ClaimedJob(msgspec.Struct, array_like=True):
    """One row of a claim's answer. `args`, `kwargs`: JSON text, or None when it is too large to travel
    along.
    """

    id: str
    queue: str
    priority: int
    position: int
    task: str
    args: str | None
    kwargs: str | None
    headers: str
    attempt: int
    retries: int
    max_retries: int | None
    crashes: int
    eta: float | None
    expired: bool
    worker: str = ""


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


Verb = Literal["finish", "retry", "bury", "release"]


class Outcome(msgspec.Struct):
    """What became of one attempt, waiting to be acked.

    Attributes:
        verb: `finish` → finished_jobs, `retry` → scheduled, `bury` → dead_letters, `release` → ready.
        state: For `finish`.
        kind: For `retry` and `bury`: what the failures row says.
        started, finished: Seconds on the caller's monotonic clock, for `finish`.
        uncertain: It was sent before and the answer was lost; finding nothing is no news then.
    """

    id: str
    attempt: int
    worker: str
    verb: Verb
    state: Literal["succeeded", "expired"] = "succeeded"
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


def ack_calls(outcomes: Iterable[Outcome], now: float) -> list[tuple[Call, list[Outcome]]]:
    """The statements that record these outcomes, each with the outcomes it carries.

    One statement per verb, worker and attempt number (nearly always one in all): joining ids with attempts
    would cost four times as much in the server. `now` is on the clock of `Outcome.started`.
    """
    groups: dict[tuple[str, ...], list[Outcome]] = {}
    for outcome in outcomes:
        how = outcome.state if outcome.verb == "finish" else outcome.kind
        key = (outcome.verb, outcome.worker, str(outcome.attempt), how)
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
    parameters |= {
        "kind": first.kind,
        "error_classes": _column(o.error_class for o in group),
        "error_messages": _column(o.error_message for o in group),
        "tracebacks": _column(o.traceback for o in group),
    }
    if first.verb == "retry":
        parameters |= {
            "delays": "{" + ",".join([f"{o.delay:.6f}" for o in group]) + "}",
            "max_retries": _column(o.max_retries for o in group),
        }
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
