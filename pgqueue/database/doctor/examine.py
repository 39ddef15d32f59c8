"""The examination: all checks, one after the other, and what --fix does about their findings.

Checks only read, in read-only transactions of their own with short timeouts. One that fails is a finding of
its own and stops no other. What is fixed is done one finding at a time, each with a row in `audit_log`.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import Any, Final, Literal

import psycopg

from pgqueue.database.doctor import canvases, schema, server, storage, work
from pgqueue.database.doctor.report import Check, Finding, identifier
from pgqueue.database.doctor.visit import Seen, Visit
from pgqueue.database.dsn import one_line
from pgqueue.database.session import Session, connect
from pgqueue.errors import DatabaseError, DatabaseUnavailable, PgQueueError, SchemaMismatch

Needs = Literal["server", "schema", "tables", "release"]

STATEMENT_TIMEOUT: Final = "5s"
LOCK_TIMEOUT: Final = "500ms"


@dataclass(frozen=True)
class Look:
    """A check.

    Attributes:
        about: What it looks at, in a few words.
        needs: The server; also a right on the schema; also tables this release works on; also that they
            are of its own revision.
    """

    look: Callable[[Visit], Seen]
    about: str
    needs: Needs = "tables"


CHECKS: Final[dict[str, Look]] = {
    "connection": Look(
        server.check_connection, "the server's version, and whether it takes writes", "server"
    ),
    "pooler": Look(server.check_pooler, "a pooler in the way of LISTEN", "server"),
    "clock": Look(server.check_clock, "this machine's clock against the database's", "server"),
    "settings": Look(server.check_settings, "fsync, full_page_writes, synchronous_commit", "server"),
    "max-connections": Look(server.check_connections, "how many connections are left", "server"),
    "notify-queue": Look(
        server.check_notify_queue, "a notification queue that fills, a held lock of NOTIFY", "server"
    ),
    "snapshots": Look(
        server.check_snapshots, "who keeps dead rows from being removed, and since when", "server"
    ),
    "privileges": Look(
        schema.check_privileges, "whether this role may enqueue, look, operate, work", "server"
    ),
    "revision": Look(schema.check_revision, "the revision of the schema against this release's", "schema"),
    "drift": Look(
        schema.check_drift, "tables, columns, constraints, indexes against the release's", "release"
    ),
    "functions": Look(schema.check_functions, "functions and views against the migrations'", "release"),
    "autovacuum": Look(storage.check_autovacuum, "autovacuum, and the hot tables' settings for it"),
    "dead-rows": Look(storage.check_dead_rows, "dead rows that are not removed"),
    "partitions": Look(
        storage.check_partitions, "history's partitions for the coming days, rows beside them"
    ),
    "workers": Look(work.check_workers, "silent and stuck workers, running jobs without one"),
    "queues": Look(work.check_queues, "queues that nobody serves, and paused ones"),
    "tasks": Look(work.check_tasks, "waiting jobs whose task no worker knows"),
    "schedules": Look(work.check_schedules, "schedules that do not fire"),
    "canvases": Look(canvases.check_canvases, "canvases that can never end"),
    "dead-letters": Look(work.check_dead_letters, "jobs that have died in the last hour"),
}
"""All of them, in the order in which they are made."""


@contextlib.contextmanager
def open_visit(dsn: str, *, schema: str = "pgqueue", **options: Any) -> Iterator[Visit]:
    """An examination of this queue; it is closed at the end of the block.

    Args:
        options: Attributes of the `Visit`.

    Raises:
        ConfigError: The DSN cannot be read.
        DatabaseUnavailable: The database cannot be reached.
    """
    with closing(connect(dsn)) as connection:
        connection.read_only = True
        session = Session(connection, schema, STATEMENT_TIMEOUT, LOCK_TIMEOUT)
        yield Visit(session, dsn, **options)


def examine(
    visit: Visit, names: Sequence[str] = tuple(CHECKS), progress: Callable[[int], None] = lambda count: None
) -> list[Check]:
    """Make these checks.

    Args:
        progress: Called with 1 after each.
    """
    found = []
    for name in names:
        found.append(make_check(visit, name))
        progress(1)
    return found


def make_check(visit: Visit, name: str) -> Check:
    """Make one check; what keeps it from being made is its finding."""
    check = CHECKS[name]
    try:
        if why := _why_not(visit, check.needs):
            return Check(name, skipped=why)
        fact, findings = check.look(visit)
        return Check(name, fact, findings)
    except SchemaMismatch as error:
        return Check(name, skipped=str(error))
    except (psycopg.Error, DatabaseError) as error:
        return Check(name, findings=[_failed(visit, error)])


def why_not(visit: Visit, names: Sequence[str]) -> PgQueueError | None:
    """Why not all of these checks could be made: the connection broke, or the schema is none to work on."""
    if visit.session.connection.closed:
        return DatabaseUnavailable("the connection to the database broke; try again")
    if all(CHECKS[name].needs == "server" for name in names):
        return None
    try:
        return visit.mismatch if visit.reads_schema else None
    except psycopg.Error:
        return None  # it is a finding of the checks


def unreachable(error: DatabaseUnavailable, dsn: str, names: Sequence[str]) -> list[Check]:
    """The checks of a database that cannot be reached: all but one are skipped."""
    first = Check("connection", findings=[server.explain_unreachable(error, dsn)])
    rest = [Check(name, skipped="the database cannot be reached") for name in names if name != "connection"]
    return [first, *rest]


def _why_not(visit: Visit, needs: Needs) -> str | None:
    """Why this cannot be looked at."""
    if visit.session.connection.closed:
        return "the connection to the database broke"
    if needs == "server":
        return None
    if not visit.reads_schema:
        return "this role may not look, see privileges"
    if needs != "schema" and visit.mismatch is not None:
        return "there is no schema this release works on, see revision"
    if needs == "release" and visit.outdated:
        return "compared only at the revision of this release, see revision"
    return None


def _failed(visit: Visit, error: Exception) -> Finding:
    text = one_line(error)
    if visit.session.connection.closed:
        return Finding(
            "error", f"the connection broke: {text}", "the rest was not looked at", visit.command("doctor")
        )
    if isinstance(error, psycopg.errors.InsufficientPrivilege):
        role = identifier(visit.server["role"])
        return Finding(
            "warning",
            f"this could not be looked at: {text}",
            f"role {visit.server['role']} may not read what it takes",
            f"GRANT SELECT ON ALL TABLES IN SCHEMA {visit.schema} TO {role}; "
            f"GRANT EXECUTE ON ALL FUNCTIONS IN SCHEMA {visit.schema} TO {role}",
            facts={"role": visit.server["role"]},
        )
    slow = isinstance(error, psycopg.errors.QueryCanceled | psycopg.errors.LockNotAvailable)
    means = (
        f"the database took over {STATEMENT_TIMEOUT}, or another session has locked a table"
        if slow
        else "the database refused the question, so what this check is about is not known"
    )
    return Finding(
        "error",
        f"this could not be looked at: {text}",
        means,
        "SELECT pid, usename, state, wait_event, query FROM pg_stat_activity WHERE state <> 'idle'",
    )


def fix(visit: Visit, check: Check, *, by: str) -> None:
    """Do what mends the findings of a check and is safe, and look again.

    Each finding says what became of it. What others have mended meanwhile counts as fixed.

    Args:
        by: Who asks for it, noted in the audit log beside the database role.
    """
    connection = visit.session.connection
    acted = False
    for finding in check.findings:
        if not finding.fixable or connection.closed:
            continue
        connection.read_only = False
        try:
            if acted and _left(visit, check.name, finding) is None:
                finding.fixed = True  # by what was done about another one
                continue
            _mend(visit, check.name, finding, by)
            acted = True
        except (psycopg.Error, DatabaseError) as error:
            finding.fixed, finding.refused = False, one_line(error)
        finally:
            visit.forget()
            if not connection.closed:
                connection.read_only = True


def _mend(visit: Visit, name: str, finding: Finding, by: str) -> None:
    session = visit.session
    if finding.act is not None:
        undone = finding.act()
        with session.transaction():
            _look_again(visit, name, finding, by)
        if finding.fixed and undone is not None:
            finding.fixed, finding.refused = False, f"done, but {undone}"
        return
    if finding.atomic:
        with session.transaction():
            session.connection.execute(finding.mend.encode())
            _look_again(visit, name, finding, by)
        return
    notices: list[str] = []

    def hear(diagnostic: psycopg.errors.Diagnostic) -> None:
        notices.append(diagnostic.message_primary or "")

    # A VACUUM that may not, or does not get the table at once, only says so.
    session.connection.add_notice_handler(hear)
    try:
        session.connection.execute(finding.mend.encode())
    finally:
        session.connection.remove_notice_handler(hear)
    if notices:
        finding.refused = notices[0]
        return
    with session.transaction():
        _look_again(visit, name, finding, by)


def _left(visit: Visit, name: str, finding: Finding) -> Finding | None:
    """The finding as it is now; None when it is gone."""
    visit.forget()
    _, findings = CHECKS[name].look(visit)
    return next((each for each in findings if each.subject == finding.subject), None)


def _look_again(visit: Visit, name: str, finding: Finding, by: str) -> None:
    """Whether it is mended; written to the audit log with what was and what is."""
    left = _left(visit, name, finding)
    details = {
        "by": by,
        "check": name,
        "statement": finding.mend,
        "before": {"found": finding.what, "facts": finding.facts},
        "after": {"found": left.what, "facts": left.facts} if left is not None else {"found": None},
    }
    visit.session.run("note_act", action="doctor_fix", reason=None, details=json.dumps(details, default=str))
    finding.fixed = left is None
    if left is not None:
        finding.refused = f"done, and still: {left.what}"
