"""Dead letters: list them, show one, put them back into their queues, or delete them.

Requeueing moves a job: out of `dead_letters`, into `jobs`, with a row in `audit_log`, in one statement per
batch. So a crash leaves each job on one side, batches before it stay done, and two requeues at once move each
job once. A job that must not be live now, because another one has its unique key or its id, stays dead and is
reported.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime
from typing import Any
from uuid import UUID

import psycopg
from sqlalchemy import ColumnElement, Text, and_, cast, func, literal, or_, select

from pgqueue.database.session import Row, Session, time_of
from pgqueue.database.tables import metadata_for
from pgqueue.job import DeadFilter, check_id

BATCH = 500
"""Letters per transaction: it holds their locks, and a wake-up waits for its end."""


@dataclass(frozen=True, slots=True)
class DeadLetter:
    """One line of a list.

    Attributes:
        seconds: Since it died, by the database's clock.
    """

    id: str
    queue: str
    dead_letter_queue: str
    task: str
    reason: str
    attempt: int
    retries: int
    crashes: int
    error_class: str | None
    error_message: str | None
    died_at: datetime
    seconds: float


@dataclass(slots=True)
class Purged:
    """What became of a purge.

    Attributes:
        ids: Jobs that nothing is left of.
        missing: Ids that were no dead letters, or that somebody else had in hand.
    """

    ids: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Refusal:
    """A job that was not requeued, and why."""

    id: str
    why: str


@dataclass(slots=True)
class Requeued:
    """What became of a requeue.

    Attributes:
        ids: Jobs that are ready again.
        refused: Jobs that stay dead.
        missing: Ids that were no dead letters, or that somebody else had in hand.
    """

    ids: list[str] = field(default_factory=list)
    refused: list[Refusal] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)

    def add(self, other: Requeued) -> None:
        self.ids += other.ids
        self.refused += other.refused
        self.missing += other.missing


ANY = DeadFilter()


def list_dead_letters(
    session: Session, where: DeadFilter = ANY, *, limit: int | None = 50
) -> list[DeadLetter]:
    """Those that match, the last that died first."""
    table = _table(session)
    columns = [
        cast(table.c.id, Text).label("id"),
        *(
            table.c[name]
            for name in ("queue", "dead_letter_queue", "task", "reason", "attempt", "retries", "crashes")
        ),
        *(table.c[name] for name in ("error_class", "error_message", "died_at")),
        func.extract("epoch", func.clock_timestamp() - table.c.died_at).label("seconds"),
    ]
    found = select(*columns).where(_matches(session, where))
    rows = session.fetch(found.order_by(table.c.died_at.desc(), table.c.id.desc()).limit(limit))
    return [DeadLetter(**{**row, "seconds": float(row["seconds"])}) for row in rows]


def count_dead_letters(session: Session, where: DeadFilter = ANY) -> int:
    """How many match."""
    count = select(func.count().label("count")).select_from(_table(session))
    (row,) = session.fetch(count.where(_matches(session, where)))
    return int(row["count"])


def show_dead_letter(session: Session, job_id: str) -> dict[str, Any] | None:
    """The whole job, with its failed attempts as `failures`, oldest first; None if it is no dead letter."""
    with session.transaction():
        rows = session.run("find_dead_letter", id=check_id(job_id))
        if not rows:
            return None
        return {**rows[0], "failures": session.run("list_failures", id=check_id(job_id))}


def find_state(session: Session, job_id: str) -> str:
    """A job's state, or `unknown`."""
    with session.transaction():
        rows = session.run("find_job", id=check_id(job_id))
    return str(rows[0]["state"]) if rows else "unknown"


def requeue(
    session: Session, job_ids: Sequence[str], *, by: str | None = None, reason: str | None = None
) -> Requeued:
    """Put these dead letters back into their queues.

    Attempts stay; retries, crashes and rescues are counted anew; eta and expiry are gone; each job goes to
    the end of its lane.

    Args:
        job_ids: UUIDs.
        by: Who asks for it, noted in the audit log beside the database role.
        reason: Why, noted there too.
    """
    done = Requeued()
    ids = list(dict.fromkeys(check_id(job_id) for job_id in job_ids))
    for start in range(0, len(ids), BATCH):
        done.add(_requeue_batch(session, ids[start : start + BATCH], by, reason))
    return done


def requeue_where(
    session: Session,
    where: DeadFilter,
    *,
    limit: int | None = None,
    rate: float | None = None,
    by: str | None = None,
    reason: str | None = None,
    progress: Callable[[int], None] = lambda count: None,
) -> Requeued:
    """`requeue` for all that match now, by id; one that dies again meanwhile is left alone.

    Args:
        limit: So many at most.
        rate: So many a second at most.
        progress: Called with the number of letters each batch has dealt with.

    Raises:
        ValueError: The rate is not more than 0.
    """
    if rate is not None and not 0 < rate < float("inf"):
        raise ValueError(f"rate must be greater than 0 a second, got {rate:g}")
    done = Requeued()
    size = BATCH if rate is None else max(min(int(rate / 2), BATCH), 1)
    began, dealt_with = time.monotonic(), 0
    for ids in _pages(session, where, limit, size):
        if rate is not None:
            time.sleep(max(began + dealt_with / rate - time.monotonic(), 0.0))
        done.add(_requeue_batch(session, ids, by, reason))
        dealt_with += len(ids)
        progress(len(ids))
    # Gone between the look and the grip: somebody else requeued or deleted them, which is no news here.
    done.missing.clear()
    return done


def purge(
    session: Session, job_ids: Sequence[str], *, by: str | None = None, reason: str | None = None
) -> Purged:
    """Delete these dead letters; a note of each stays in the audit log.

    Args:
        job_ids: UUIDs.
        by: Who asks for it, noted in the audit log beside the database role.
        reason: Why, noted there too.
    """
    done = Purged()
    ids = list(dict.fromkeys(check_id(job_id) for job_id in job_ids))
    for start in range(0, len(ids), BATCH):
        batch = ids[start : start + BATCH]
        gone = _purge_batch(session, batch, by, reason)
        done.ids += gone
        done.missing += sorted(set(batch) - set(gone))
    return done


def purge_where(
    session: Session,
    where: DeadFilter,
    *,
    limit: int | None = None,
    by: str | None = None,
    reason: str | None = None,
    progress: Callable[[int], None] = lambda count: None,
) -> Purged:
    """`purge` for all that match now, by id.

    Args:
        limit: So many at most.
        progress: Called with the number of letters each batch has dealt with.
    """
    done = Purged()
    for ids in _pages(session, where, limit, BATCH):
        done.ids += _purge_batch(session, ids, by, reason)
        progress(len(ids))
    return done


def _purge_batch(session: Session, ids: list[str], by: str | None, reason: str | None) -> list[str]:
    with session.transaction_since("0007", "purging needs"):
        return [row["id"] for row in session.run("purge_dead_letters", ids=ids, by=by, reason=reason)]


def _requeue_batch(session: Session, ids: list[str], by: str | None, reason: str | None) -> Requeued:
    try:
        with session.transaction():
            rows = session.run("requeue_dead_letters", ids=ids, by=by, reason=reason)
            left = [row["id"] for row in rows if not row["moved"]]
            rivals = session.run("find_rivals", ids=left) if left else []
    except (psycopg.errors.LockNotAvailable, psycopg.errors.DeadlockDetected):
        # An open transaction has just enqueued a job with the unique key of one of these: find out which.
        if len(ids) == 1:
            return Requeued(refused=[Refusal(ids[0], "an open transaction holds its unique key; try again")])
        done = _requeue_batch(session, ids[: len(ids) // 2], by, reason)
        done.add(_requeue_batch(session, ids[len(ids) // 2 :], by, reason))
        return done
    moved = [row for row in rows if row["moved"]]
    session.wake(sorted({row["queue"] for row in moved}))
    return Requeued(
        ids=[row["id"] for row in moved],
        refused=[Refusal(row["id"], _why_not(row)) for row in rivals],
        missing=sorted(set(ids) - {row["id"] for row in rows}),
    )


def _why_not(row: Row) -> str:
    if row["reason"] == "member_failed":
        return "it waits for a job of its canvas that failed: requeue that one, and this comes back by itself"
    if row["id_is_live"]:
        return "a live job has the same id; wait until it has ended"
    if row["key_holder"]:
        return f"job {row['key_holder']} has its unique key {row['unique_key']!r}; wait until it has ended"
    return "the job that had its unique key has just ended; try again"


def _pages(session: Session, where: DeadFilter, limit: int | None, batch: int) -> Iterator[list[str]]:
    """Ids of what matches at the start, a batch at a time, by id: what was refused is not met again."""
    table = _table(session)
    (now,) = session.fetch(select(func.clock_timestamp().label("now")))
    until = min(where.until, now["now"]) if where.until is not None else now["now"]
    matches = _matches(session, replace(where, until=until))
    last: UUID | None = None
    left = limit
    while left is None or left > 0:
        size = batch if left is None else min(batch, left)
        page = select(table.c.id).where(matches).order_by(table.c.id).limit(size)
        rows = session.fetch(page if last is None else page.where(table.c.id > last))
        if not rows:
            return
        last = rows[-1]["id"]
        left = None if left is None else left - len(rows)
        yield [str(row["id"]) for row in rows]


def _table(session: Session) -> Any:
    return metadata_for(session.schema).tables[f"{session.schema}.dead_letters"]


def _matches(session: Session, where: DeadFilter) -> ColumnElement[bool]:
    c = _table(session).c
    conditions: list[ColumnElement[bool]] = []
    if where.queue is not None:
        conditions.append(or_(c.dead_letter_queue == where.queue, c.queue == where.queue))
    if where.task is not None:
        conditions.append(c.task == where.task)
    if where.reason is not None:
        conditions.append(c.reason == where.reason)
    if where.error_class is not None:
        last_part = func.right(c.error_class, len(where.error_class) + 1)
        conditions.append(or_(c.error_class == where.error_class, last_part == f".{where.error_class}"))
    if where.since is not None:
        conditions.append(c.died_at >= time_of(where.since))
    if where.until is not None:
        conditions.append(c.died_at <= where.until)
    return and_(literal(True), *conditions)
