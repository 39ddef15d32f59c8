"""An application's dead letters, for people and programs: list, show, requeue, purge."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any, Protocol

from pgqueue.errors import shown
from pgqueue.job import DeadFilter

if TYPE_CHECKING:
    from pgqueue.database.dead import DeadLetter, Purged, Requeued
    from pgqueue.database.session import Session


class Application(Protocol):
    """What they need to know of their application."""

    def open_session(self) -> AbstractContextManager[Session]: ...


class DeadLetters:
    """The dead letters in an application's database: `app.dead_letters`.

    Each call is a connection of its own.
    `which` is a list of job ids, or a `DeadFilter`; `DeadFilter()` is all of them.
    """

    def __init__(self, app: Application) -> None:
        self._app = app

    def count(self, where: DeadFilter | None = None) -> int:
        """How many there are, or match."""
        from pgqueue.database import dead

        with self._app.open_session() as session:
            return dead.count_dead_letters(session, _checked(where or DeadFilter()))

    def show(self, job_id: str) -> dict[str, Any] | None:
        """The whole job, its failed attempts as `failures`, oldest first; None if it is no dead letter."""
        from pgqueue.database import dead

        with self._app.open_session() as session:
            return dead.show_dead_letter(session, job_id)

    def requeue(
        self,
        which: Iterable[str] | DeadFilter,
        *,
        limit: int | None = None,
        rate: float | None = None,
        by: str | None = None,
        reason: str | None = None,
    ) -> Requeued:
        """Put them back into their queues, each with its id; `retries` and `crashes` are counted anew.

        Args:
            limit: So many at most of those that a filter matches.
            rate: So many a second at most, of those that a filter matches.
            by: Who asks for it, noted in the audit log.
            reason: Why, noted there too.
        """
        from pgqueue.database import dead

        with self._app.open_session() as session:
            if isinstance(which, DeadFilter):
                where = _checked(which)
                return dead.requeue_where(session, where, limit=limit, rate=rate, by=by, reason=reason)
            return dead.requeue(session, _ids(which, limit, rate), by=by, reason=reason)

    def purge(
        self,
        which: Iterable[str] | DeadFilter,
        *,
        limit: int | None = None,
        by: str | None = None,
        reason: str | None = None,
    ) -> Purged:
        """Delete them for good; a note of each stays in the audit log."""
        from pgqueue.database import dead

        with self._app.open_session() as session:
            if isinstance(which, DeadFilter):
                return dead.purge_where(session, _checked(which), limit=limit, by=by, reason=reason)
            return dead.purge(session, _ids(which, limit, None), by=by, reason=reason)

    def list(self, where: DeadFilter | None = None, *, limit: int | None = 50) -> list[DeadLetter]:
        """Those that match, the last that died first."""
        from pgqueue.database import dead

        with self._app.open_session() as session:
            return dead.list_dead_letters(session, _checked(where or DeadFilter()), limit=limit)


def _checked(where: object) -> DeadFilter:
    if not isinstance(where, DeadFilter):
        raise TypeError(f"dead letters are chosen by a DeadFilter, got {shown(where)}")
    return where


def _ids(which: object, limit: int | None, rate: float | None) -> list[str]:
    if isinstance(which, str) or not isinstance(which, Iterable):
        raise TypeError(f"give a list of job ids or a DeadFilter, got {shown(which)}")
    if limit is not None or rate is not None:
        raise ValueError("limit and rate go with a DeadFilter, not with ids")
    return [str(each) for each in which]
