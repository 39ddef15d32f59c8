"""The PostgreSQL that everything is measured on, and what can be read off it from outside.

One embedded PostgreSQL 18 with fsync on serves a whole run; each measurement gets a database of its own,
which is dropped after it. CPU time is counted for whole process trees, children that have ended included,
and is right only when the server runs on this machine.
"""

from __future__ import annotations

import os
import platform
import secrets
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import Any
from urllib.parse import urlsplit, urlunsplit

import psutil
import psycopg

from pgqueue.database import embedded, migrate

HERE = Path(__file__).resolve().parent


class Server:
    """A PostgreSQL to make databases on: the embedded one, or the one that a DSN names.

    As a context manager it runs from enter to exit. A SIGTERM meanwhile ends this process in order: workers
    and servers that it has started end with it.
    """

    def __init__(self, dsn: str | None = None) -> None:
        self._embedded = None if dsn else embedded.EmbeddedPostgres(settings={"max_connections": "200"})
        self._dsn = dsn

    def __enter__(self) -> Server:
        self._before = signal.signal(signal.SIGTERM, _leave)
        if self._embedded is not None:
            self._dsn = self._embedded.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._embedded is not None:
            self._embedded.stop()
        signal.signal(signal.SIGTERM, self._before)

    @property
    def dsn(self) -> str:
        """URL of the server's maintenance database."""
        assert self._dsn is not None, "the server has not been started"
        return self._dsn

    @contextmanager
    def database(self, migrated: bool = False) -> Iterator[str]:
        """URL of a fresh database, with pgqueue's schema if asked for; dropped at the end."""
        with fresh_database(self.dsn) as dsn:
            if migrated:
                migrate.upgrade(dsn)
            yield dsn

    def facts(self) -> dict[str, Any]:
        """What the machine and the server are, so that a figure can be placed later."""
        with psycopg.connect(self.dsn) as connection:
            names = ("server_version", "fsync", "synchronous_commit", "full_page_writes", "shared_buffers")
            settings = {name: connection.execute(f"SHOW {name}").fetchone() for name in names}
        return {
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
            "cpus": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
            "cpu": _cpu_model(),
            "memory_gb": round(psutil.virtual_memory().total / 1e9),
            "system": f"{platform.system()} {platform.machine()}",
            "python": platform.python_version(),
            "psycopg": psycopg.__version__,
            **{name: row[0] if row else None for name, row in settings.items()},
        }


def _leave(number: int, frame: object) -> None:
    signal.signal(number, signal.SIG_IGN)  # once is enough, and ending takes a moment
    raise SystemExit(128 + number)


@contextmanager
def fresh_database(server_dsn: str) -> Iterator[str]:
    """URL of an empty database on that server; dropped at the end, whoever is still connected."""
    name = f"bench_{secrets.token_hex(4)}"
    with psycopg.connect(server_dsn, autocommit=True) as connection:
        connection.execute(f"CREATE DATABASE {name}")
    try:
        yield urlunsplit(urlsplit(server_dsn)._replace(path=f"/{name}"))
    finally:
        with psycopg.connect(server_dsn, autocommit=True) as connection:
            connection.execute(f"DROP DATABASE {name} WITH (FORCE)")


@contextmanager
def migrated_database(server_dsn: str) -> Iterator[str]:
    """The same with pgqueue's schema in it."""
    with fresh_database(server_dsn) as dsn:
        migrate.upgrade(dsn)
        yield dsn


@contextmanager
def pgqueue_worker(
    dsn: str, *flags: str, app: str = "noop:app", folder: Path = HERE
) -> Iterator[psutil.Process]:
    """A real pgqueue worker process, ready to run."""
    command = [sys.executable, "-m", "pgqueue.cli.main", "-A", app, "--dsn", dsn, "worker", *flags]
    with tempfile.NamedTemporaryFile("w+") as log:
        process = subprocess.Popen(command, cwd=folder, stdout=log, stderr=subprocess.STDOUT)
        try:
            deadline = time.monotonic() + 30
            while "worker_started" not in Path(log.name).read_text():
                if process.poll() is not None or time.monotonic() > deadline:
                    raise SystemExit(f"the worker did not start:\n{Path(log.name).read_text()}")
                time.sleep(0.01)
            yield psutil.Process(process.pid)
        finally:
            process.send_signal(signal.SIGTERM)
            if process.wait(60) != 0:
                print(Path(log.name).read_text(), file=sys.stderr)


@dataclass(frozen=True)
class Counters:
    """What has been used up so far; the difference of two is what lies between them."""

    server_cpu: float
    wal_bytes: int
    transactions: int

    def __sub__(self, other: Counters) -> Counters:
        return Counters(
            self.server_cpu - other.server_cpu,
            self.wal_bytes - other.wal_bytes,
            self.transactions - other.transactions,
        )


class Watch:
    """Looks at one database from outside: its own connection is to another one of the same server.

    Only `ask` goes to the database that is looked at; its transactions are not counted as the peer's.
    """

    def __init__(self, server_dsn: str, dsn: str) -> None:
        self._outside = psycopg.connect(server_dsn, autocommit=True)
        self._inside = psycopg.connect(dsn, autocommit=True, prepare_threshold=1)
        self._name = urlsplit(dsn).path.lstrip("/")
        self._asked = 0
        self._processes = _postmaster(self._outside)

    def __enter__(self) -> Watch:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._inside.close()
        self._outside.close()

    @property
    def connection(self) -> psycopg.Connection:
        """Into the database that is looked at; what runs on it counts as the peer's."""
        return self._inside

    def ask(self, query: str) -> int:
        """The number that a query returns."""
        self._asked += 1
        row = self._inside.execute(query.encode()).fetchone()
        assert row is not None
        return int(row[0])

    def counters(self) -> Counters:
        """Now. A backend reports its transactions a second late at worst while it works."""
        self._inside.execute("SELECT pg_stat_force_next_flush()")
        self._asked += 1
        row = self._outside.execute(
            "SELECT pg_current_wal_insert_lsn() - '0/0',"
            " (SELECT xact_commit + xact_rollback FROM pg_stat_database WHERE datname = %s)",
            [self._name],
        ).fetchone()
        assert row is not None
        return Counters(tree_cpu(self._processes), int(row[0]), int(row[1]) - self._asked)

    def settle(self) -> None:
        """Let earlier work go out of the way: dead rows cleaned up, dirty pages written."""
        self._inside.execute("VACUUM ANALYZE")
        self._outside.execute("CHECKPOINT")
        self._asked += 1


def _postmaster(connection: psycopg.Connection) -> list[psutil.Process]:
    try:
        parent = psutil.Process(connection.info.backend_pid).parent()
    except psutil.NoSuchProcess:
        return []
    return [] if parent is None else [parent]


def tree(roots: Iterable[psutil.Process]) -> list[psutil.Process]:
    """These processes and all below them that are alive."""
    found: dict[int, psutil.Process] = {}
    for root in roots:
        try:
            for process in (root, *root.children(recursive=True)):
                found[process.pid] = process
        except psutil.NoSuchProcess:
            continue
    return list(found.values())


def tree_cpu(roots: Sequence[psutil.Process]) -> float:
    """Seconds of CPU that these processes and all below them have used, those that have ended included."""
    total = 0.0
    for process in tree(roots):
        try:
            times = process.cpu_times()
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            continue
        # What children had used when they were waited for is in their parent's account.
        total += times.user + times.system + times.children_user + times.children_system
    return total


def tree_pss(roots: Sequence[psutil.Process]) -> float:
    """Bytes of memory of these processes and all below them, shared pages shared out among their users."""
    total = 0.0
    for process in tree(roots):
        try:
            total += process.memory_full_info().pss
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            continue
    return total


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), "")
