"""What people do with schedules: list them, add, pause, resume and remove one, have its job run now."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from datetime import datetime
from typing import Any, Literal

from pgqueue.database.session import Row, Session
from pgqueue.schedule import Schedule, read_cadence

Added = Literal["added", "replaced", "unchanged", "exists", "in_code"]
State = Literal["active", "paused", "not in code", "broken"]


@dataclass(frozen=True, slots=True)
class ScheduleStatus:
    """A schedule and what has become of it.

    Attributes:
        source: "code", or "database" for one that was added at run time.
        every: Seconds.
        expires_in: Seconds.
        jitter: Seconds.
        last_tick: The last one that was decided about, or since when it counts.
        next_tick: The next one; None if it is paused, in no live worker's code, or makes no sense.
        held: Ticks that wait for the end of the job before them.
        fired: Jobs that were enqueued for ticks.
        missed: Ticks that nobody was there for and that were not made up for.
        skipped: Ticks left out because a job was live.
        workers: Live workers that have it in their code.
        live_jobs: Ids of jobs of it that have not ended; where they may overlap, only of the last one.
        last_job: Id of the last one.
        seconds: Until the next tick, by the database's clock.
    """

    name: str
    source: Literal["code", "database"]
    state: State
    task: str
    cron: str | None
    every: float | None
    timezone: str
    args: list[Any]
    kwargs: dict[str, Any]
    queue: str
    priority: int
    max_retries: int | None
    expires_in: float | None
    headers: dict[str, Any]
    catch_up: str
    overlap: str
    jitter: float
    last_tick: datetime
    next_tick: datetime | None
    held: list[datetime]
    fired: int
    missed: int
    skipped: int
    workers: int
    live_jobs: list[str]
    last_job: str | None
    created_at: datetime
    created_by: str
    changed_at: datetime
    seconds: float | None


def list_schedules(session: Session) -> list[ScheduleStatus]:
    """All of them, by name."""
    with session.transaction_since("0005", "schedules need"):
        return [_status(row) for row in session.run("list_schedules", name=None)]


def find_schedule(session: Session, name: str) -> ScheduleStatus | None:
    """The one of this name."""
    with session.transaction_since("0005", "schedules need"):
        rows = session.run("list_schedules", name=name)
    return _status(rows[0]) if rows else None


def add_schedule(
    session: Session,
    schedule: Schedule,
    *,
    replace: bool = False,
    by: str | None = None,
    reason: str | None = None,
) -> Added:
    """Write a schedule down; from now on its ticks count.

    Returns:
        `added`, `replaced` or `unchanged`; or, with nothing done, `exists` (and `replace` was not asked for)
        or `in_code`.

    Args:
        by: Who asks for it, noted in the audit log beside the database role.
        reason: Why, noted there too.
    """
    document = asdict(schedule)
    with session.transaction_since("0005", "schedules need"):
        rows = session.run("list_schedules", name=schedule.name)
        before = {name: rows[0][name] for name in document} if rows else None
        (row,) = session.run(
            "put_schedules", schedules=json.dumps([document]), source="database", replace=replace
        )
        if not row["written"]:
            known: Added = "in_code" if row["source_before"] == "code" else "exists"
            return "unchanged" if before == document and known == "exists" else known
        details = {"before": before, "after": document}
        session.run(
            "note_schedule_act",
            action="add_schedule" if before is None else "replace_schedule",
            name=schedule.name,
            reason=reason,
            actor=by,
            details=json.dumps(details if before is not None else {"after": document}),
        )
    return "added" if before is None else "replaced"


def act_on_schedule(
    session: Session,
    act: Literal["pause", "resume", "remove"],
    name: str,
    *,
    by: str | None = None,
    reason: str | None = None,
) -> str:
    """What became of it: `paused`, `resumed` or `removed`; `already`, `in_code` or `unknown`."""
    with session.transaction_since("0005", "schedules need"):
        (row,) = session.run(f"{act}_schedule", name=name, actor=by, reason=reason)
    return str(row["answer"])


def run_schedule(
    session: Session, name: str, *, by: str | None = None, reason: str | None = None
) -> str | None:
    """Enqueue its job now, beside its ticks; the job's id, None if there is no such schedule."""
    with session.transaction_since("0005", "schedules need"):
        (row,) = session.run("run_schedule", name=name, actor=by, reason=reason)
    job_id: str | None = row["id"]
    return job_id


def _status(row: Row) -> ScheduleStatus:
    now = row.pop("now")
    state: State = "paused" if row["paused"] else "active"
    if not row["paused"] and row["source"] == "code" and not row["workers"]:
        state = "not in code"
    next_tick: datetime | None = row.pop("next_tick")
    if state == "active" and next_tick is None:
        try:
            cadence = read_cadence(row["cron"], row["every"], row["timezone"])
            next_tick = cadence.next_after(max(row["last_tick"], now))
        except (ValueError, OverflowError):
            state = "broken"
    if state != "active":
        next_tick = None
    row.pop("paused")
    seconds = None if next_tick is None else (next_tick - now).total_seconds()
    return ScheduleStatus(**row, state=state, next_tick=next_tick, seconds=seconds)
