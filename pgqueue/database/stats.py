"""What the queues and workers are doing now, read from the tables: it works when workers are busy or gone."""

from __future__ import annotations

from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

from pgqueue.database.queues import Pause, list_pauses
from pgqueue.database.session import Session

COUNTED = 20_000
"""Rows of a kind that `survey_queues` counts, at about 1 µs each: a million waiting jobs cost no more."""


@dataclass(frozen=True, slots=True)
class QueueStats:
    """One queue.

    Attributes:
        oldest_ready: Since when the ready job that waits longest has been waiting; None when none waits.
        oldest_ready_seconds: How long that is, by the database's clock.
        workers: Live workers that serve it.
        at_least: Names of the counts that were not counted to their end.
        pause: None unless it is paused now.
    """

    queue: str
    ready: int
    scheduled: int
    running: int
    dead: int
    oldest_ready: datetime | None
    oldest_ready_seconds: float | None
    workers: int
    at_least: frozenset[str] = field(default_factory=frozenset)
    pause: Pause | None = None

    @property
    def served(self) -> bool:
        """False when jobs are ready and nobody serves the queue.

        A worker lists a queue it has just discovered with its next heartbeat, but runs its jobs at once: so a
        queue with running jobs counts as served.
        """
        return not self.ready or self.workers > 0 or self.running > 0


@dataclass(frozen=True, slots=True)
class ActiveJob:
    """A claimed job.

    Attributes:
        active: Known to have been running for more than a second; else it is reserved: claimed, perhaps not
            yet started.
        host: Of its worker; None when the worker is gone and the job about to be rescued.
        seconds: Since it was claimed, by the database's clock.
    """

    id: str
    queue: str
    task: str
    priority: int
    attempt: int
    retries: int
    active: bool
    worker_id: str | None
    host: str | None
    pid: int | None
    claimed_at: datetime | None
    seconds: float | None


@dataclass(frozen=True, slots=True)
class WorkerStats:
    """A worker's row.

    Attributes:
        queues: Those it serves; empty until it has found one, when it serves every queue there is.
        running: Jobs known to have been running for more than a second.
        beat_ago: Seconds since its last heartbeat, by the database's clock.
        stats: What that heartbeat said of it, in the worker's words; empty before the first.
    """

    id: str
    host: str
    pid: int
    queues: list[str]
    concurrency: int
    version: str
    started_at: datetime
    fenced: bool
    running: int
    beat_ago: float
    stats: dict[str, Any]


def list_queues(session: Session, *, exact: bool = False) -> list[QueueStats]:
    """Every queue that has jobs, dead letters, a worker or a pause, by name.

    Args:
        exact: Count every row, which takes a third of a second for a million.
    """
    with session.transaction(by_index=not exact):
        rows = session.run("list_queues") if exact else session.run("survey_queues", most=COUNTED)
    kinds = ("ready", "scheduled", "dead")
    pauses = {pause.queue: pause for pause in list_pauses(session)}
    found = [
        QueueStats(
            pause=pauses.pop(row["queue"], None),
            at_least=frozenset(kind for kind in kinds if row[f"{kind}_is_least"]),
            **{name: value for name, value in row.items() if not name.endswith("_is_least")},
        )
        for row in rows
    ]
    found += [QueueStats(queue, 0, 0, 0, 0, None, None, 0, pause=pause) for queue, pause in pauses.items()]
    return sorted(found, key=lambda stats: stats.queue)


def list_active_jobs(session: Session, *, limit: int | None = None) -> list[ActiveJob]:
    """Claimed jobs, those known to be running first, then by age."""
    with session.transaction():
        rows = session.run("list_active_jobs", limit=limit)
    return [ActiveJob(**{**row, "active": bool(row["active"])}) for row in rows]


def list_workers(session: Session) -> list[WorkerStats]:
    """Every worker that has a row, also fenced ones, the last that beat first."""
    with session.transaction():
        rows = session.run("list_workers")
    return [WorkerStats(**row) for row in rows]
