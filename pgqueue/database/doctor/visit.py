"""One examination: the connection it goes through, and what several checks look at."""

from __future__ import annotations

import shlex
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from pgqueue.database.doctor.report import Finding
from pgqueue.database.migrate import VERSION_TABLE, head_revision, require_revision
from pgqueue.database.session import Row, Session
from pgqueue.database.stats import WorkerStats, list_workers, worker_state
from pgqueue.errors import SchemaMismatch

ALIVE = ("ready", "starting", "draining", "no executors", "stuck")
"""States of workers that are heard of."""

Seen = tuple[str, list[Finding]]
"""What a check returns: a fact in a few words, and findings."""


@dataclass
class Visit:
    """What the checks share.

    Attributes:
        listen: Whether workers are to listen for notifications.
        listen_dsn: Where, if that is not the `dsn`.
        old: Seconds after which a transaction is called old; twelve times that is an error.
        release: The version of this release.
    """

    session: Session
    dsn: str
    listen: bool = True
    listen_dsn: str | None = None
    old: float = 300.0
    release: str = ""
    _found: dict[str, Any] = field(default_factory=dict)

    def once(self, name: str, look: Callable[[], Any]) -> Any:
        """What `look` finds, looked for once until `forget`."""
        if name not in self._found:
            self._found[name] = look()
        return self._found[name]

    def forget(self) -> None:
        """Something was changed: look again."""
        self._found.clear()

    def read(self, name: str, /, *, by_index: bool = False, **parameters: object) -> list[Row]:
        """Run one statement of `sql/` in a transaction of its own; its rows."""
        with self.session.transaction(by_index=by_index):
            return self.session.run(name, **parameters)

    @property
    def schema(self) -> str:
        return self.session.schema

    @property
    def server(self) -> Row:
        """What the server is."""
        server: Row = self.once("server", lambda: self.read("describe_server")[0])
        return server

    @property
    def grants(self) -> Row | None:
        """What this role may do in the schema; None if there is no such schema."""
        rows = self.once("grants", lambda: self.read("survey_grants"))
        return rows[0] if rows else None

    @property
    def reads_schema(self) -> bool:
        """Whether this role may look what revision the schema is at."""
        grants = self.grants
        if grants is None:
            return True  # and there is none
        tables = (VERSION_TABLE, "meta")
        return bool(grants["usage"]) and all(
            "SELECT" in grants["relations"].get(name, ["SELECT"]) for name in tables
        )

    @cached_property
    def revision(self) -> str | None:
        """The revision of the schema; None for none."""
        return self._revision[0]

    @cached_property
    def _revision(self) -> tuple[str | None, str | None]:
        return self.session.read_revision() if self.grants is not None else (None, None)

    @cached_property
    def mismatch(self) -> SchemaMismatch | None:
        """Why this release may not work on the schema; None if it may."""
        try:
            require_revision(*self._revision, schema=self.schema)
        except SchemaMismatch as error:
            return error
        return None

    @property
    def outdated(self) -> bool:
        """At an older revision than this release's, or at a newer one."""
        return self.revision != head_revision()

    @property
    def workers(self) -> list[tuple[WorkerStats, str]]:
        """The workers, each with its state."""
        found: list[tuple[WorkerStats, str]] = self.once(
            "workers", lambda: [(each, worker_state(each)) for each in list_workers(self.session)]
        )
        return found

    @property
    def live(self) -> list[WorkerStats]:
        """Those that are heard of."""
        return [worker for worker, state in self.workers if state in ALIVE]

    @property
    def snapshots(self) -> list[Row]:
        """Who keeps dead rows from being removed, the longest first."""
        rows: list[Row] = self.once("snapshots", lambda: self.read("list_snapshots"))
        return rows

    def command(self, *words: str) -> str:
        """A command of ours, on the same schema."""
        schema = [] if self.schema == "pgqueue" else ["--schema", self.schema]
        return shlex.join(["pgqueue", *schema, *words])

    @property
    def worker_command(self) -> str:
        """The command that starts a worker."""
        return self.command("-A", "module:attribute", "worker")
