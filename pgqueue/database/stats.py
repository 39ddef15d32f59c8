"""What the queues and workers are doing now, read from the tables: it works when workers are busy or gone."""

from __future__ import annotations

from dataclasses import dataclass, field
from datetime import datetime
from typing import TYPE_CHECKING, Any

from pgqueue.database.session import Session

if TYPE_CHECKING:
    from pgqueue.database.queues import Pause

SILENT_AFTER = 30.0
"""Seconds without a heartbeat after which a worker is called silent; what becomes of it others decide."""
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
class ScheduledJob:
    """A job that waits for its time.

    Attributes:
        retries: More than 0: it is a retry that it waits for.
        seconds: Until then, by the database's clock; negative for one that is due.
    """

    id: str
    queue: str
    task: str
    priority: int
    attempt: int
    retries: int
    eta: datetime
    seconds: float


@dataclass(frozen=True, slots=True)
class WorkerFacts:
    """What a worker said of itself when it started.

    Attributes:
        tasks: Names of those it knows; none of a release that did not say.
        schedules: Names of those in its code.
        conf: Its settings, without passwords.
    """

    id: str
    host: str
    pid: int
    tasks: list[str]
    schedules: list[str]
    conf: dict[str, Any]


@dataclass(frozen=True, slots=True)
class WorkerStats:
    """A worker's row.

    Attributes:
        queues: Those it serves; empty until it has found one, when it serves every queue there is.
        running: Jobs known to have been running for more than a second.
        beat_ago: Seconds since its last heartbeat, by the database's clock.
        seconds: Since it started.
        stats: What that heartbeat said of it, in the worker's words; empty before the first.
    """

    id: str
    host: str
    pid: int
    queues: list[str]
    pool: str
    concurrency: int
    version: str
    started_at: datetime
    fenced: bool
    running: int
    beat_ago: float
    seconds: float
    stats: dict[str, Any]


def list_queues(session: Session, *, exact: bool = False) -> list[QueueStats]:
    """Every queue that has jobs, dead letters, a worker or a pause, by name.

    Args:
        exact: Count every row, which takes a third of a second for a million.
    """
    with session.transaction(by_index=not exact):
        rows = session.run("list_queues") if exact else session.run("survey_queues", most=COUNTED)
    kinds = ("ready", "scheduled", "dead")
    from pgqueue.database.queues import list_pauses  # and with it SQLAlchemy: not for `ping`, a probe

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


def list_active_jobs(session: Session, *, active: bool = True, limit: int | None = None) -> list[ActiveJob]:
    """Claimed jobs that are known to be running, or those that are not, the oldest claim first."""
    with session.transaction(by_index=True):
        rows = session.run("list_active_jobs", active=active, limit=limit)
    return [ActiveJob(**{**row, "active": bool(row["active"])}) for row in rows]


def list_scheduled_jobs(session: Session, *, limit: int | None = None) -> list[ScheduledJob]:
    """Jobs that wait for their time or for their retry, the next first."""
    with session.transaction(by_index=True):
        return [ScheduledJob(**row) for row in session.run("list_scheduled_jobs", limit=limit)]


def list_worker_facts(session: Session) -> list[WorkerFacts]:
    """What the workers that are not fenced say of themselves, by id."""
    with session.transaction_since("0008", "this needs"):
        return [WorkerFacts(**row) for row in session.run("list_worker_facts")]


def list_workers(session: Session) -> list[WorkerStats]:
    """Every worker that has a row, also fenced ones, the last that beat first."""
    with session.transaction():
        rows = session.run("list_workers")
    return [WorkerStats(**row) for row in rows]


def worker_state(worker: WorkerStats, max_age: float = SILENT_AFTER) -> str:
    """One word, or two, for how a worker is. One of an older release says less, and is believed more.

    Args:
        max_age: Seconds that its last heartbeat, and a claim that is due, may be old.
    """
    said = worker.stats
    if worker.fenced:
        return "fenced"
    if worker.beat_ago > max_age:
        return "silent"
    if (number_or_none(said.get("claim_due_for")) or 0.0) > max_age:
        return "stuck"
    if not said:
        return "starting"
    if said.get("draining"):
        return "draining"
    return "no executors" if said.get("executors") == 0 else "ready"


def number_or_none(value: object) -> float | None:
    """What a worker has written may be anything."""
    return value if isinstance(value, (int, float)) and not isinstance(value, bool) else None
