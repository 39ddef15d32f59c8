"""An application's queues, for people: what is in them, pauses, emptying, moving jobs."""

from __future__ import annotations

from contextlib import AbstractContextManager
from datetime import datetime, timedelta
from typing import TYPE_CHECKING, Literal, Protocol

from pgqueue.options import check_seconds, check_time

if TYPE_CHECKING:
    from pgqueue.database.session import Session
    from pgqueue.database.stats import QueueStats


class Application(Protocol):
    """What they need to know of their application."""

    def open_session(self) -> AbstractContextManager[Session]: ...


class Queues:
    """The queues in an application's database: `app.queues`. Each call is a connection of its own."""

    def __init__(self, app: Application) -> None:
        self._app = app

    def list(self, *, exact: bool = False) -> list[QueueStats]:
        """Every queue that has jobs, dead letters, a worker or a pause, by name.

        Args:
            exact: Count every job; else large counts stop early, and are named in `at_least`.
        """
        from pgqueue.database.stats import list_queues

        with self._app.open_session() as session:
            return list_queues(session, exact=exact)

    def pause(
        self,
        queue: str,
        *,
        resume_at: datetime | None = None,
        resume_in: timedelta | float | None = None,
        by: str | None = None,
        reason: str | None = None,
    ) -> None:
        """Let no worker claim jobs from this queue; those that run end, and jobs can still be enqueued.

        Args:
            resume_at: When the pause ends by itself, with a timezone; None for when somebody resumes it.
            resume_in: Or after how long.
            by: Who asks for it, noted in the audit log.
            reason: Why, noted there too.
        """
        from pgqueue.database.queues import pause_queue

        if resume_at is not None and resume_in is not None:
            raise ValueError("resume_at and resume_in exclude each other: give one of them")
        seconds = resume_in.total_seconds() if isinstance(resume_in, timedelta) else resume_in
        if seconds is not None and check_seconds("resume_in", seconds) <= 0:
            raise ValueError(f"resume_in must be greater than 0 seconds, got {seconds:g}")
        at = None if resume_at is None else check_time("resume_at", resume_at)
        with self._app.open_session() as session:
            pause_queue(session, queue, resume_at=at, resume_in=seconds, by=by, reason=reason)

    def resume(self, queue: str, *, by: str | None = None, reason: str | None = None) -> bool:
        """Let workers claim jobs from this queue again; False if it was not paused."""
        from pgqueue.database.queues import resume_queue

        with self._app.open_session() as session:
            return resume_queue(session, queue, by=by, reason=reason)

    def purge(
        self,
        queue: str,
        *,
        task: str | None = None,
        state: Literal["ready", "scheduled"] | None = None,
        limit: int | None = None,
        by: str | None = None,
        reason: str | None = None,
    ) -> int:
        """Cancel the jobs that wait in this queue; how many. What runs, or is claimed meanwhile, goes on."""
        from pgqueue.database.queues import Waiting, purge_queue

        with self._app.open_session() as session:
            return purge_queue(session, Waiting(queue, task, state), limit=limit, by=by, reason=reason)

    def move(
        self,
        queue: str,
        to: str,
        *,
        task: str | None = None,
        state: Literal["ready", "scheduled"] | None = None,
        limit: int | None = None,
        by: str | None = None,
        reason: str | None = None,
    ) -> int:
        """Move the jobs that wait in this queue to another one, in their order; how many."""
        from pgqueue.database.queues import Waiting, move_jobs

        with self._app.open_session() as session:
            return move_jobs(session, Waiting(queue, task, state), to, limit=limit, by=by, reason=reason)
