"""How long history and dead letters are kept, where tasks or queues differ, and pruning by hand.

The general retentions are settings of workers; what differs is in the table `retention`, so every worker
obeys it, whichever application it runs. A task's rule goes before its queue's, and that before the general
one.

History goes by the day. A day of which all is past its retention is dropped. One of which only some rows are
is walked over, a few blocks a step: before the general retention has passed, those rows are deleted; after
it, what stays is copied into a table that takes the day's place, so that a year of one task's history does
not need the disk of everybody's. A step is a transaction, and where it has come to is stored with it: a crash
costs nothing. Neither waits for a lock that somebody holds, and so nobody waits behind it.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from datetime import datetime, timedelta
from typing import Literal

import psycopg

from pgqueue.database.session import Session
from pgqueue.errors import shown

Scope = Literal["task", "queue"]
What = Literal["finished", "failures", "dead_letters"]

MOST_DAYS = 36_500.0
"""A century: what lies further back may fall off the database's calendar."""

_NEEDS = "0010", "retention by task or queue needs"


@dataclass(frozen=True, slots=True)
class RetentionRule:
    """What is kept longer or shorter than the rest.

    Attributes:
        scope: "task" or "queue".
        name: The task's or the queue's.
        what: "finished", "failures" or "dead_letters".
        days: How long it is kept.
        set_by: The database role that said so.
    """

    scope: Scope
    name: str
    what: What
    days: float
    set_at: datetime
    set_by: str


@dataclass(frozen=True, slots=True)
class General:
    """How many days that is kept which has no rule."""

    finished: float
    failures: float
    dead_letters: float
    audit: float


@dataclass(frozen=True, slots=True)
class DayPlan:
    """What is past its retention of one day of history.

    Attributes:
        table: "finished_jobs" or "failures".
        part: The name of the day's partition.
        goes: "whole", or "rows".
        rows: How many go; of a whole day the planner's estimate, None if it has none.
        bytes: The size of the day on disk; of one that goes in part not all of it comes free.
    """

    table: str
    part: str
    goes: Literal["whole", "rows"]
    rows: int | None
    bytes: int


@dataclass(frozen=True, slots=True)
class Plan:
    """What is past its retention now."""

    days: list[DayPlan]
    dead_letters: int
    acts: int

    @property
    def empty(self) -> bool:
        return not (self.days or self.dead_letters or self.acts)


@dataclass(slots=True)
class Pruned:
    """What became of a pruning.

    Attributes:
        days: Partitions that were dropped.
        rows: Of history and failures, out of days that stay or were written anew.
        dead_letters: Deleted.
        acts: Of the audit log, deleted.
        in_use: Partitions that are past their retention and that somebody reads: a later pruning drops them.
    """

    days: int = 0
    rows: int = 0
    dead_letters: int = 0
    acts: int = 0
    in_use: list[str] = field(default_factory=list)


def check_days(name: str, keep: object) -> float:
    """A retention in days, of a timedelta or a number of days; ValueError if it is out of range."""
    days = keep / timedelta(days=1) if isinstance(keep, timedelta) else keep
    if isinstance(days, bool) or not isinstance(days, (int, float)):
        raise TypeError(f"{name} must be a timedelta or a number of days, got {shown(keep)}")
    if not 0 <= days <= MOST_DAYS:
        raise ValueError(f"{name} must be from 0 to {MOST_DAYS:,.0f} days, got {shown(keep)}")
    return float(days)


def list_retention(session: Session) -> list[RetentionRule]:
    """What differs from the general retention, by name."""
    with session.transaction_since(*_NEEDS):
        return [RetentionRule(**row) for row in session.run("list_retention")]


def set_retention(
    session: Session,
    scope: Scope,
    name: str,
    *,
    finished: float | None = None,
    failures: float | None = None,
    dead_letters: float | None = None,
    by: str | None = None,
    reason: str | None = None,
) -> None:
    """Keep what a task or a queue leaves behind so many days; None leaves it as it is."""
    with session.transaction_since(*_NEEDS):
        session.run(
            "set_retention",
            scope=scope,
            name=name,
            finished=finished,
            failures=failures,
            dead_letters=dead_letters,
            actor=by,
            reason=reason,
        )


def remove_retention(
    session: Session, scope: Scope, name: str, *, by: str | None = None, reason: str | None = None
) -> bool:
    """Keep it as long as the rest again; False if it did not differ."""
    with session.transaction_since(*_NEEDS):
        (row,) = session.run("remove_retention", scope=scope, name=name, actor=by, reason=reason)
    return bool(row["removed"])


def plan_pruning(session: Session, general: General) -> Plan:
    """What is past its retention; changes nothing. Rows of whole days are not counted."""
    with session.transaction_since(*_NEEDS):
        found = session.run("survey_history", finished=general.finished, failures=general.failures)
        (other,) = session.run("count_past_retention", dead_letters=general.dead_letters, audit=general.audit)
    days = []
    for row in found:
        rows = row["rows"] if row["goes"] == "whole" else _count_rows(session, row["part"], row["condition"])
        if row["goes"] == "whole" or rows:
            days.append(DayPlan(row["parent"], row["part"], row["goes"], rows, row["bytes"]))
    return Plan(days, other["dead_letters"], other["acts"])


def _count_rows(session: Session, part: str, condition: str) -> int:
    """How many rows of a day meet the condition, which the database wrote, with its values quoted."""
    count = f"SELECT count(*) AS rows FROM {session.schema}.{part} WHERE {condition.replace('%', '%%')}"  # noqa: S608
    try:
        with session.transaction():
            (row,) = session.execute(count, {})
    except psycopg.errors.UndefinedTable:
        return 0  # a worker has just dropped it
    return int(row["rows"])


def prune(
    session: Session,
    general: General,
    *,
    by: str | None = None,
    reason: str | None = None,
    progress: Callable[[int], None] = lambda steps: None,
) -> Pruned:
    """Remove what is past its retention, as workers do each minute.

    Args:
        progress: Called with 1 after each step.
    """
    done = Pruned()
    list_retention(session)  # says so if the schema is older
    with session.transaction():
        (row,) = session.run(
            "drop_partitions", finished_days=general.finished, failures_days=general.failures
        )
    done.days = row["dropped"]
    progress(1)
    for what, days in (("finished", general.finished), ("failures", general.failures)):
        for removed in _steps(session, "prune_history", what=what, days=days):
            done.rows += sum(step["removed"] for step in removed)
            progress(1)
    for removed in _steps(session, "prune_dead_letters_by_rules", days=general.dead_letters):
        done.dead_letters += len(removed)
        progress(1)
    for removed in _steps(session, "prune_audit_log", days=general.audit):
        done.acts += len(removed)
        progress(1)
    with session.transaction():
        left = session.run("survey_history", finished=general.finished, failures=general.failures)
        session.run("note_act", action="prune", reason=reason, details=json.dumps(_details(done, by)))
    done.in_use = [row["part"] for row in left if row["goes"] == "whole"]
    return done


def _steps(session: Session, name: str, **parameters: object) -> Iterator[list[dict[str, int]]]:
    while True:
        with session.transaction(by_index=True):
            rows = session.run(name, **parameters)
        if not rows:
            return
        yield rows


def _details(done: Pruned, by: str | None) -> dict[str, object]:
    counts = {name: count for name, count in asdict(done).items() if name != "in_use"}
    return counts if by is None else {"by": by, **counts}
