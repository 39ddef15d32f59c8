"""How long an application's history and dead letters are kept: what differs by task or queue, and pruning."""

from __future__ import annotations

from contextlib import AbstractContextManager
from datetime import timedelta
from typing import TYPE_CHECKING, Protocol

from pgqueue.errors import shown
from pgqueue.job import check_queue, check_task_name

if TYPE_CHECKING:
    from pgqueue.config import Config
    from pgqueue.database.retention import General, Plan, Pruned, RetentionRule, Scope
    from pgqueue.database.session import Session


class Application(Protocol):
    """What they need to know of their application."""

    @property
    def config(self) -> Config: ...
    def open_session(self) -> AbstractContextManager[Session]: ...


class Retention:
    """How long things are kept in an application's database: `app.retention`.

    The general retentions are settings (`retention_finished` and so on). A task's own rule goes before its
    queue's, and that before the general one. Each call is a connection of its own.
    """

    def __init__(self, app: Application) -> None:
        self._app = app

    def list(self) -> list[RetentionRule]:
        """What is kept longer or shorter than the rest, by name."""
        from pgqueue.database.retention import list_retention

        with self._app.open_session() as session:
            return list_retention(session)

    def set(
        self,
        *,
        task: str | None = None,
        queue: str | None = None,
        finished: timedelta | float | None = None,
        failures: timedelta | float | None = None,
        dead_letters: timedelta | float | None = None,
        by: str | None = None,
        reason: str | None = None,
    ) -> None:
        """Keep what a task or a queue leaves behind longer or shorter than the rest.

        Args:
            task: Its name, or
            queue: the queue's.
            finished: A timedelta or days; history goes by whole days. None leaves it as it is.
            failures: The same for rows in `failures`.
            dead_letters: The same for dead letters.
            by: Who asks for it, noted in the audit log.
            reason: Why, noted there too.
        """
        from pgqueue.database.retention import check_days, set_retention

        scope, name = _which(task, queue)
        given = {"finished": finished, "failures": failures, "dead_letters": dead_letters}
        days = {what: check_days(what, keep) for what, keep in given.items() if keep is not None}
        if not days:
            raise ValueError("give finished, failures or dead_letters: how long they are kept")
        with self._app.open_session() as session:
            set_retention(session, scope, name, **days, by=by, reason=reason)

    def remove(
        self,
        *,
        task: str | None = None,
        queue: str | None = None,
        by: str | None = None,
        reason: str | None = None,
    ) -> bool:
        """Keep it as long as the rest again; False if it did not differ."""
        from pgqueue.database.retention import remove_retention

        scope, name = _which(task, queue)
        with self._app.open_session() as session:
            return remove_retention(session, scope, name, by=by, reason=reason)

    def plan(self) -> Plan:
        """What `prune` would remove now."""
        from pgqueue.database.retention import plan_pruning

        with self._app.open_session() as session:
            return plan_pruning(session, general_of(self._app.config))

    def prune(self, *, by: str | None = None, reason: str | None = None) -> Pruned:
        """Remove what is past its retention, as workers do each minute."""
        from pgqueue.database.retention import prune

        with self._app.open_session() as session:
            return prune(session, general_of(self._app.config), by=by, reason=reason)


def general_of(config: Config) -> General:
    """The retentions of what has no rule, as the application is set."""
    from pgqueue.database.retention import General

    return General(
        finished=config.retention_finished,
        failures=config.retention_failures,
        dead_letters=config.retention_dead_letters,
        audit=config.retention_audit,
    )


def _which(task: object, queue: object) -> tuple[Scope, str]:
    if (task is None) == (queue is None):
        raise ValueError(f"give a task or a queue, got task={shown(task)} and queue={shown(queue)}")
    return ("task", check_task_name(task)) if queue is None else ("queue", check_queue(queue))
