"""What people did: the audit log, for people. Acts write into it themselves, each in its own transaction."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any

from sqlalchemy import Text, and_, cast, or_, select, true
from sqlalchemy.dialects.postgresql import UUID

from pgqueue.database.session import Session, time_of
from pgqueue.database.tables import metadata_for


@dataclass(frozen=True, slots=True)
class ActFilter:
    """Which acts; None means any.

    Attributes:
        action: `cancel`, `requeue`, `pause_queue` and so on.
        job_id: Of the job.
        queue: Of the queue, or of the job's.
        schedule: Of the schedule.
        who: The database role, or the name that they gave.
        since: At this time (aware) or later, or this long ago at most.
    """

    action: str | None = None
    job_id: str | None = None
    queue: str | None = None
    schedule: str | None = None
    who: str | None = None
    since: datetime | timedelta | None = None


@dataclass(frozen=True, slots=True)
class Act:
    """What somebody did.

    Attributes:
        actor: The database role of the session.
        by: Who that was, in their own words; `user@host` on the command line.
        reason: Why, in their words.
        before: What was, as far as the act changed it.
        after: What is since.
        details: What else there is to say.
    """

    at: datetime
    action: str
    actor: str
    by: str | None
    job_id: str | None
    queue: str | None
    schedule: str | None
    reason: str | None
    before: Any
    after: Any
    details: dict[str, Any]


_OWN = ("by", "schedule", "before", "after")
"""What of `details` is a field of an act, as in the view `audit_trail`."""


def list_acts(session: Session, where: ActFilter, *, limit: int = 50) -> list[Act]:
    """Those that match, the latest first."""
    log = metadata_for(session.schema).tables[f"{session.schema}.audit_log"]
    c = log.c
    by, schedule = c.details["by"].astext, c.details["schedule"].astext
    terms = [
        column == wanted
        for column, wanted in (
            (c.action, where.action),
            (c.queue, where.queue),
            (schedule, where.schedule),
        )
        if wanted is not None
    ]
    if where.job_id is not None:
        terms.append(c.job_id == cast(where.job_id, UUID))
    if where.who is not None:
        terms.append(or_(c.actor == where.who, by == where.who))
    if where.since is not None:
        terms.append(c.at >= time_of(where.since))
    columns = [c.at, c.action, c.actor, cast(c.job_id, Text).label("job_id"), c.queue, c.reason, c.details]
    found = select(*columns).where(and_(true(), *terms)).order_by(c.at.desc(), c.id.desc()).limit(limit)
    return [_act(row) for row in session.fetch(found)]


def _act(row: dict[str, Any]) -> Act:
    details = row.pop("details")
    own = {name: details.pop(name, None) for name in _OWN}
    return Act(**row, **own, details=details)
