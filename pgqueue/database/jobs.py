"""What people do with jobs: find them, look at one, cancel it, have it run now."""

from __future__ import annotations

import json
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Literal

from sqlalchemy import Select, Text, and_, cast, column, or_, select, table
from sqlalchemy.dialects.postgresql import JSONB

from pgqueue.database import dead
from pgqueue.database.session import Session, time_of
from pgqueue.job import JobFilter, check_id

Answer = Literal["cancelled", "requested", "too_late"]


@dataclass(frozen=True, slots=True)
class FoundJob:
    """One line of a list.

    Attributes:
        started_at: Of a live or dead job, when it was claimed last.
        finished_at: Of a dead one, when it died.
        reason: Why it is dead.
        tags: Labels, a list of texts; or whatever SQL has put there.
    """

    id: str
    state: str
    queue: str
    task: str
    attempt: int
    enqueued_at: datetime
    enqueued_by: str
    started_at: datetime | None
    finished_at: datetime | None
    reason: str | None
    error_class: str | None
    correlation_id: str | None
    tags: Any


def list_jobs(session: Session, where: JobFilter, *, limit: int = 50) -> list[FoundJob]:
    """Those that match, the newest id first: UUIDv7 sort by the time they were made."""
    with session.transaction_since("0009", "finding jobs needs"):
        rows = session.select(_found(session, where).limit(limit))
    return [FoundJob(**row) for row in rows]


def _found(session: Session, where: JobFilter) -> Select[Any]:
    names = [name for name in FoundJob.__dataclass_fields__ if name not in ("id", "tags")]
    view = table("all_jobs", column("id"), column("tags", JSONB), *map(column, names), schema=session.schema)
    c = view.c
    terms = [
        c[name] == getattr(where, name)
        for name in ("state", "queue", "task", "correlation_id", "enqueued_by")
        if getattr(where, name) is not None
    ]
    if where.tags:
        terms.append(c.tags.op("@>")(cast(json.dumps(where.tags), JSONB)))
    if where.since is not None:
        since = time_of(where.since)
        # The second says nothing new, but that whole days of history need not be looked at.
        terms += [c.enqueued_at >= since, or_(c.finished_at >= since, c.finished_at.is_(None))]
    columns = [cast(c.id, Text).label("id"), c.tags, *(c[name] for name in names)]
    return select(*columns).where(and_(True, *terms)).order_by(c.id.desc())


def show_job(session: Session, job_id: str) -> dict[str, Any] | None:
    """Everything known of a job: its `state` and columns, its `failures` and what people did to it (`acts`),
    each oldest first; None if it is unknown.
    """
    job_id = check_id(job_id)
    with session.transaction():
        rows = session.run("show_job", id=job_id)
        if not rows:
            return None
        facts = {**rows[0]["job"], "state": rows[0]["state"]}
        return {
            **facts,
            "failures": session.run("list_failures", id=job_id),
            "acts": session.run("list_acts", id=job_id),
        }


def cancel_job(session: Session, job_id: str, *, by: str | None = None, reason: str | None = None) -> Answer:
    """Cancel a job: `cancelled` (it waited), `requested` (it runs, and is told), or `too_late`.

    Args:
        by: Who asks for it, noted in the audit log beside the database role.
        reason: Why, noted there too.
    """
    with session.transaction_since("0004", "cancelling needs"):
        (row,) = session.run("cancel_job", id=check_id(job_id), actor=by, reason=reason)
    answer: Answer = row["answer"]
    return answer


def retry_job(
    session: Session, job_id: str, *, by: str | None = None, reason: str | None = None
) -> str | None:
    """Have a job run now that is dead, or waits for its time or its retry; why it cannot, or None."""
    job_id = check_id(job_id)
    state = dead.find_state(session, job_id)
    if state == "dead":
        done = dead.requeue(session, [job_id], by=by, reason=reason)
        return done.refused[0].why if done.refused else None if done.ids else "somebody else has it just now"
    if state == "scheduled":
        with session.transaction():
            rows = session.run("run_now", id=job_id, by=by, reason=reason)
        if rows:
            session.wake([rows[0]["queue"]])
            return None
        state = dead.find_state(session, job_id)
    if state == "unknown":
        return "there is no such job: never committed, pruned, or in another database"
    if state == "blocked":
        return "it waits for other jobs of its canvas"
    if state in ("ready", "running"):
        return f"it is {state} already"
    return f"it has {state}; to do it once more, enqueue it anew"
