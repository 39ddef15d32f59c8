"""What people do with queues: pause and resume them, empty them, move their jobs.

A pause is one value that every claim reads: the next claim of every worker leaves the queue out, without
having been told, and so does that of a worker that starts later. Jobs that run end; jobs can still be
enqueued, and become ready.

Emptying and moving act on waiting jobs, in batches: a crash leaves each job on one side, batches before it
stay done. What is claimed meanwhile runs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Literal

import psycopg
from sqlalchemy import ColumnElement, and_, func, or_, select, tuple_

from pgqueue.database.session import Session
from pgqueue.database.tables import metadata_for
from pgqueue.job import check_queue

BATCH = 1000
"""Jobs per transaction: it holds their locks, and claims pass them over."""
WaitingState = Literal["ready", "scheduled", "blocked"]
WAITING: tuple[WaitingState, ...] = ("ready", "scheduled", "blocked")


@dataclass(frozen=True, slots=True)
class Pause:
    """A queue that no job is claimed from.

    Attributes:
        resume_at: When it ends by itself; None for when somebody resumes it.
        actor: The database role that paused it.
        by: Who that was, in their own words.
    """

    queue: str
    since: datetime
    resume_at: datetime | None
    actor: str
    by: str | None
    reason: str | None


@dataclass(frozen=True, slots=True)
class Waiting:
    """Which waiting jobs of a queue; None means any."""

    queue: str
    task: str | None = None
    state: WaitingState | None = None


def list_pauses(session: Session) -> list[Pause]:
    """The queues that are paused now, by name; none on a revision that knows no pauses."""
    try:
        with session.transaction():
            return [Pause(**row) for row in session.run("list_pauses")]
    except psycopg.errors.UndefinedTable:
        return []


def pause_queue(
    session: Session,
    queue: str,
    *,
    resume_at: datetime | None = None,
    resume_in: float | None = None,
    by: str | None = None,
    reason: str | None = None,
) -> None:
    """Claim no more jobs from this queue; one that is paused gets the new time and reason.

    Args:
        resume_at: When it ends by itself, with a timezone.
        resume_in: Or in how many seconds, by the database's clock.
        by: Who asks for it, noted in the audit log beside the database role.
        reason: Why, noted there too.
    """
    with session.transaction_since("0006", "pausing queues needs"):
        session.run(
            "pause_queue",
            queue=check_queue(queue),
            resume_at=resume_at,
            resume_in=resume_in,
            actor=by,
            reason=reason,
        )


def resume_queue(session: Session, queue: str, *, by: str | None = None, reason: str | None = None) -> bool:
    """Claim jobs from this queue again; False if it was not paused."""
    with session.transaction_since("0006", "pausing queues needs"):
        (row,) = session.run("resume_queue", queue=check_queue(queue), actor=by, reason=reason)
    return bool(row["answer"] == "resumed")


def count_waiting(session: Session, where: Waiting) -> int:
    """How many jobs match."""
    table = _jobs(session)
    states = [where.state] if where.state else WAITING
    count = select(func.count().label("count")).select_from(table)
    rows = session.fetch(count.where(_matches(session, where), table.c.state.in_(states)))
    return int(rows[0]["count"])


def purge_queue(
    session: Session,
    where: Waiting,
    *,
    limit: int | None = None,
    by: str | None = None,
    reason: str | None = None,
    progress: Callable[[int], None] = lambda count: None,
) -> int:
    """Cancel the waiting jobs that match; returns how many.

    They end as `cancelled` in the history, whatever their task's `history` says.

    Args:
        limit: So many at most, those that would run first.
        progress: Called with the number of jobs of each batch.
    """
    parameters = {"queue": where.queue, "by": by, "reason": reason}
    total = 0
    for ids in _pages(session, where, limit):
        with session.transaction():
            (row,) = session.run("cancel_waiting_jobs", ids=ids, **parameters)
        total += row["jobs"]
        progress(len(ids))
    return total


def move_jobs(
    session: Session,
    where: Waiting,
    to: str,
    *,
    limit: int | None = None,
    by: str | None = None,
    reason: str | None = None,
    progress: Callable[[int], None] = lambda count: None,
) -> int:
    """Move the waiting jobs that match to another queue, in their order; returns how many.

    Args:
        limit: So many at most, those that would run first.
        progress: Called with the number of jobs of each batch.

    Raises:
        ValueError: It is the queue they are in, or no name of one.
    """
    if check_queue(to) == where.queue:
        raise ValueError(f"jobs are moved to another queue, got {to!r} twice")
    parameters = {"queue": where.queue, "to": to, "by": by, "reason": reason}
    total = 0
    for ids in _pages(session, where, limit):
        with session.transaction():
            (row,) = session.run("move_waiting_jobs", ids=ids, **parameters)
        total += row["jobs"]
        progress(len(ids))
        if row["ready"]:
            session.wake([to])
    return total


def _pages(session: Session, where: Waiting, limit: int | None) -> Iterator[list[str]]:
    """Ids of what matches, a batch at a time, in the order in which they would run."""
    c = _jobs(session).c
    by_position = (c.priority.desc(), c.position)
    orders = {"ready": by_position, "scheduled": (c.eta, c.id), "blocked": by_position}
    left = limit
    for state in WAITING if where.state is None else (where.state,):
        last: tuple[Any, ...] | None = None
        while left is None or left > 0:
            size = BATCH if left is None else min(BATCH, left)
            keys = [c.eta, c.id] if state == "scheduled" else [c.priority, c.position]
            page = select(c.id, *(key.label(f"key_{n}") for n, key in enumerate(keys)))
            page = page.where(_matches(session, where), c.state == state).order_by(*orders[state]).limit(size)
            rows = session.fetch(page if last is None else page.where(_beyond(state, keys, last)))
            if not rows:
                break
            last = (rows[-1]["key_0"], rows[-1]["key_1"])
            left = None if left is None else left - len(rows)
            yield [str(row["id"]) for row in rows]


def _beyond(state: str, keys: list[Any], last: tuple[Any, ...]) -> ColumnElement[bool]:
    """What comes after this row: so what was passed over is not met again."""
    if state == "scheduled":
        return tuple_(*keys) > tuple_(*last)
    priority, position = keys
    return or_(priority < last[0], and_(priority == last[0], position > last[1]))


def _jobs(session: Session) -> Any:
    return metadata_for(session.schema).tables[f"{session.schema}.jobs"]


def _matches(session: Session, where: Waiting) -> ColumnElement[bool]:
    c = _jobs(session).c
    found = c.queue == where.queue
    return and_(found, c.task == where.task) if where.task is not None else and_(found)
