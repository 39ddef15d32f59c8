"""A worker's connection: calls that run in one round trip, on a connection that comes back.

A `Call` is one statement of `sql/` with its parameters. `Link.run` takes groups of calls; each group is one
READ COMMITTED transaction with local planner settings and timeouts, and all groups travel in one pipeline, in
order. They do not share a fate: a group that fails takes the later ones with it (they never started), never
the earlier ones (they are committed).

Lost connection: `DatabaseUnavailable`; a group whose COMMIT was sent may or may not have happened. Who calls
must be able to send every statement again.

The pipeline is libpq's, through `psycopg.pq`: psycopg's own waits in the event loop once per statement, and a
round has eight.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from functools import cache
from typing import Any, NamedTuple

import msgspec
import psycopg
from psycopg.adapt import Transformer
from psycopg.errors import error_from_result
from psycopg.pq import ConnStatus, ExecStatus
from psycopg.pq.abc import PGconn, PGresult
from psycopg.rows import tuple_row

from pgqueue.database.dsn import connect_options, cut, cut_short, is_pooled, one_line, unreachable
from pgqueue.database.patient import ANSWER_PATIENCE
from pgqueue.database.queries import query
from pgqueue.database.waiting import ready
from pgqueue.errors import DatabaseError, DatabaseUnavailable
from pgqueue.failpoints import armed, failpoint

log = logging.getLogger("pgqueue.worker")
to_json = msgspec.json.Encoder().encode

Row = tuple[Any, ...]

QUERY_CANCELED = "57014"
"""SQLSTATE of a statement that took longer than it may."""
LOCK_NOT_AVAILABLE = "55P03"
"""SQLSTATE of one that waited for a lock for longer than it may."""
PREPARE_AT = 5
"""A statement is prepared when it is used for the fifth time, as psycopg does it."""


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
        timeouts = {"statement_timeout": f"{statement_timeout:g}s", "lock_timeout": f"{lock_timeout:g}s"}
        self._settings = _Statement.of(Call("begin_work", timeouts), schema)
        self._patience = statement_timeout + ANSWER_PATIENCE
        self._watchdog: asyncio.TimerHandle | None = None
        self._silent = False
        self._connection: psycopg.AsyncConnection[Row] | None = None
        self._pipeline: _Pipeline
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
        self._pipeline = _Pipeline(connection.pgconn, prepares=not is_pooled(pid, connection))

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
            pipeline = self._pipeline
            answers: list[PGresult] = []
            # Not asyncio.timeout(): a pipeline that is left half way is of no use to anybody.
            self._watch(connection)
            try:
                for group in groups:
                    statements = [_Statement.of(call, self._schema) for call in group]
                    pipeline.add(_BEGIN, self._settings, *statements)
                    if armed:
                        answers += await _come_by(_BEFORE_COMMIT, group, connection, pipeline)
                    pipeline.add(_COMMIT)
                    if armed:
                        answers += await _come_by(_AFTER_COMMIT, group, connection, pipeline)
                answers += await pipeline.run()
                self._silent = False
                return _rows(connection, groups, answers)
            except psycopg.Error as error:
                answers += pipeline.forget()
                raise await self._failure(connection, error, groups, answers) from error
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
        groups: Sequence[Sequence[Call]],
        answers: list[PGresult],
    ) -> DatabaseError:
        if (
            connection.closed
            or error.sqlstate == "25006"  # read-only: the primary has become, or we are led to, a standby
            or (isinstance(error, psycopg.OperationalError) and not _is_refusal(error))
        ):
            await self.close()
            return DatabaseUnavailable(f"lost the database: {one_line(error)}")
        committed = sum(answer.command_status == b"COMMIT" for answer in answers)
        rows = _rows(connection, groups[:committed], answers)
        try:
            await connection.rollback()
        except psycopg.Error:
            await self.close()
        message = f"{error.sqlstate or 'error'}: {one_line(error)}"
        return GroupFailed(message, sqlstate=_sqlstate(error), group=committed, rows=rows)


class _Statement(NamedTuple):
    """A statement and its parameters as text, as they are sent."""

    text: bytes
    values: list[bytes | None]

    @classmethod
    def of(cls, call: Call, schema: str) -> _Statement:
        text, names = _rendered(call.name, schema)
        return cls(text, [as_text(call.parameters[name]) for name in names])


@cache
def _rendered(name: str, schema: str) -> tuple[bytes, tuple[str, ...]]:
    """The statement as it is sent, the same object each time: it is looked up by its text in every round."""
    rendered = query(name, schema, "numeric")
    return rendered.text.encode(), rendered.parameters


_BEGIN = _Statement(b"BEGIN ISOLATION LEVEL READ COMMITTED", [])
_COMMIT = _Statement(b"COMMIT", [])


class _Pipeline:
    """Sends statements together and collects their answers."""

    def __init__(self, pgconn: PGconn, *, prepares: bool) -> None:
        self._pgconn = pgconn
        self._prepares = prepares
        self._uses: dict[bytes, int] = {}
        self._names: dict[bytes, bytes] = {}
        self._fresh: list[bytes] = []
        self._prepared = 0
        self._waiting: list[_Statement] = []
        self._answers: list[PGresult] = []

    def add(self, *statements: _Statement) -> None:
        """Statements for the next `run`."""
        self._waiting += statements

    async def run(self) -> list[PGresult]:
        """Send what was added and wait until the server is done; returns an answer per statement.

        Raises:
            psycopg.Error: A statement was refused, and those behind it not looked at; or the connection
                broke. `forget` returns the answers before that.
        """
        pgconn, statements, self._waiting = self._pgconn, self._waiting, []
        pgconn.enter_pipeline_mode()
        preparing = [is_preparing for statement in statements for is_preparing in self._send(statement)]
        pgconn.pipeline_sync()
        while pgconn.flush():
            if await ready(pgconn.socket, to_write=True):
                pgconn.consume_input()
        await self._receive(iter(preparing))
        pgconn.exit_pipeline_mode()
        self._fresh = []
        answers, self._answers = self._answers, []
        return answers

    def forget(self) -> list[PGresult]:
        """After `run` has raised: returns the answers it had, and starts anew."""
        if self._pgconn.status == ConnStatus.OK:
            self._pgconn.exit_pipeline_mode()
        for text in self._fresh:
            del self._names[text]  # it may not have been prepared
        self._fresh = []
        self._waiting = []
        answers, self._answers = self._answers, []
        return answers

    def _send(self, statement: _Statement) -> Iterator[bool]:
        """Queue it; yields for each answer to come whether it is to a preparation."""
        text, values = statement
        name = self._names.get(text)
        if name is None and self._prepares:
            uses = self._uses[text] = self._uses.get(text, 0) + 1
            if uses >= PREPARE_AT:
                self._prepared += 1
                name = self._names[text] = b"pgqueue_%d" % self._prepared
                self._fresh.append(text)
                self._pgconn.send_prepare(name, text)
                yield True
        if name is None:
            self._pgconn.send_query_params(text, values)
        else:
            self._pgconn.send_query_prepared(name, values)
        yield False

    async def _receive(self, preparing: Iterator[bool]) -> None:
        """Take in answers until the one to the sync."""
        pgconn = self._pgconn
        error: psycopg.Error | None = None
        while True:
            between = True
            while not pgconn.is_busy():
                answer = pgconn.get_result()
                if answer is None:
                    if between:
                        break
                    between = True
                    continue
                between = False
                status = answer.status
                if status == ExecStatus.PIPELINE_SYNC:
                    if error is not None:
                        raise error
                    return
                if status in (ExecStatus.TUPLES_OK, ExecStatus.COMMAND_OK):
                    if not next(preparing):
                        self._answers.append(answer)
                elif error is None:
                    error = error_from_result(answer)
            if pgconn.status == ConnStatus.BAD:
                raise error or psycopg.OperationalError(pgconn.get_error_message())
            await ready(pgconn.socket)
            try:
                pgconn.consume_input()
            except psycopg.OperationalError as lost:
                raise error or lost from None


def as_text(value: object) -> bytes | None:
    """A parameter as Postgres reads it; its type is what the statement casts it to."""
    if value is None:
        return None
    if isinstance(value, str):
        return value.encode()
    if isinstance(value, bool):
        return b"true" if value else b"false"
    if isinstance(value, (int, float)):
        return repr(value).encode()
    if isinstance(value, (list, tuple)):
        if value and isinstance(value[0], float):
            return b"{" + to_json(value)[1:-1] + b"}"
        return ("{" + ",".join(map(_element, value)) + "}").encode()
    if isinstance(value, datetime):
        return value.isoformat().encode()
    raise TypeError(
        f"a parameter is text, a number, a truth value, a time or a list of them, got {value!r:.100}"
    )


def _element(value: object) -> str:
    if isinstance(value, str):
        return '"' + value.replace("\\", "\\\\").replace('"', '\\"') + '"'
    text = as_text(value)
    return "NULL" if text is None else text.decode()


def _rows(
    connection: psycopg.AsyncConnection[Row], groups: Sequence[Sequence[Call]], answers: Iterable[PGresult]
) -> list[list[list[Row]]]:
    """The rows of each call; every group has a BEGIN and its settings in front, and a COMMIT behind."""
    remaining = iter(answers)
    found: list[list[list[Row]]] = []
    for group in groups:
        next(remaining), next(remaining)
        found.append([_loaded(connection, next(remaining)) for _ in group])
        next(remaining)
    return found


def _loaded(connection: psycopg.AsyncConnection[Row], answer: PGresult) -> list[Row]:
    if not answer.nfields:
        return []
    transformer = Transformer(connection)
    transformer.set_pgresult(answer)
    return transformer.load_rows(0, answer.ntuples, tuple)


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
    pipeline: _Pipeline,
) -> list[PGresult]:
    """Pass the failpoints of these calls, once the server has done what was sent so far."""
    answers: list[PGresult] = []
    for place in {places[call.name] for call in group if call.name in places}:
        answers += await pipeline.run()
        failpoint(place, lambda: cut(connection))
    return answers


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
