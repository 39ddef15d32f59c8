"""A real Postgres for every test that asks for one, and no leftovers behind any test.

Where it comes from, in this order: `PGQUEUE_TEST_DSN`; testcontainers, where a Docker engine answers;
else the embedded server. `PGQUEUE_TEST_PG` chooses its version: 16 and 18 come from the wheel (18 is
the default), another one from Debian's /usr/lib/postgresql. `PGQUEUE_TEST_ISOLATION` makes another
isolation level the default of the test databases.

Fixtures:
    database    the run's migrated database, as a `Database`
    dsn         its URL, as is
    db          its URL, with every table empty
    fresh_dsn   the URL of an empty database without the schema, this test's own
    server_dsn  the server's maintenance database, to create others
"""

from __future__ import annotations

import contextlib
import os
import secrets
import signal
import subprocess
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar
from urllib.parse import urlsplit, urlunsplit

import psutil
import psycopg
import pytest
from psycopg import sql

from pgqueue.database import embedded
from pgqueue.database.embedded import EmbeddedPostgres

Left = TypeVar("Left")
ISOLATION_LEVELS = ("read committed", "repeatable read", "serializable")
STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT)
LEFTOVER_LOOKS = 150  # 20 ms apart: how long something that is being closed may take to be gone
POSTGRES = pytest.StashKey["Postgres"]()


@dataclass(frozen=True)
class Database:
    """A migrated database that this run owns."""

    dsn: str
    name: str


class Postgres:
    """The server of this run, started when it is first needed."""

    def __init__(self) -> None:
        self.given_dsn = os.environ.get("PGQUEUE_TEST_DSN")
        self.major = os.environ.get("PGQUEUE_TEST_PG", "18")
        self.in_container = not self.given_dsn and docker_answers()
        self.own_databases: list[str] = []
        self.own_processes: set[int] = set()
        self._dsn: str | None = None
        self._watch: psycopg.Connection | None = None
        self._stack = contextlib.ExitStack()

    @property
    def dsn(self) -> str:
        if self._dsn is None:
            before = {process.pid for process in psutil.Process().children(recursive=True)}
            self._dsn = self._start()
            after = {process.pid for process in psutil.Process().children(recursive=True)}
            self.own_processes = after - before
        return self._dsn

    def __str__(self) -> str:
        if self.in_container:
            return f"{self.major} (testcontainers)"
        if self.given_dsn:
            with psycopg.connect(self.given_dsn) as connection:
                row = connection.execute("show server_version").fetchone()
                return f"{row[0] if row else '?'} (PGQUEUE_TEST_DSN)"
        said = subprocess.run([self._bin_dir() / "postgres", "--version"], capture_output=True, text=True)
        return f"{said.stdout.removeprefix('postgres (PostgreSQL)').strip()} (embedded)"

    def create_database(self) -> Database:
        name = f"pgqueue_test_{secrets.token_hex(6)}"
        isolation = os.environ.get("PGQUEUE_TEST_ISOLATION", "")
        with psycopg.connect(self.dsn, autocommit=True) as connection:
            connection.execute(sql.SQL("create database {}").format(sql.Identifier(name)))
            self.own_databases.append(name)
            if isolation:
                connection.execute(
                    sql.SQL("alter database {} set default_transaction_isolation to {}").format(
                        sql.Identifier(name), sql.Literal(isolation)
                    )
                )
        return Database(urlunsplit(urlsplit(self.dsn)._replace(path=f"/{name}")), name)

    def drop_database(self, database: Database) -> None:
        with psycopg.connect(self.dsn, autocommit=True) as connection:
            connection.execute(
                sql.SQL("drop database if exists {} with (force)").format(sql.Identifier(database.name))
            )
        self.own_databases.remove(database.name)

    def clients(self, names: list[str] | None = None) -> dict[int, str]:
        """Who is connected to the databases of this run: backend pid, and what it is."""
        names = self.own_databases if names is None else names
        if not names:
            return {}
        query = (
            "select pid, application_name, state, left(query, 100) from pg_stat_activity"
            " where datname = any(%s) and backend_type = 'client backend'"
        )
        try:
            rows = self._watching().execute(query, [names]).fetchall()
        except psycopg.OperationalError:  # a test restarted the server
            self._unwatch()
            rows = self._watching().execute(query, [names]).fetchall()
        return {int(row[0]): f"{row[1] or 'a client'}, {row[2]}: {row[3]}" for row in rows}

    def end_clients(self, pids: list[int]) -> None:
        self._watching().execute("select pg_terminate_backend(pid) from unnest(%s::int[]) pid", [pids])

    def stop(self) -> None:
        self._unwatch()
        self._stack.close()
        self._dsn = None

    def _watching(self) -> psycopg.Connection:
        if self._watch is None:
            self._watch = psycopg.connect(self.dsn, autocommit=True, application_name="pgqueue tests")
        return self._watch

    def _unwatch(self) -> None:
        if self._watch is not None:
            self._watch.close()
            self._watch = None

    def _start(self) -> str:
        if self.given_dsn:
            return self.given_dsn
        if self.in_container:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                from testcontainers.postgres import PostgresContainer

                container = self._stack.enter_context(
                    PostgresContainer(f"postgres:{self.major}", driver=None)
                )
            return str(container.get_connection_url())
        server = EmbeddedPostgres(bin_dir=self._bin_dir())
        return self._stack.enter_context(server).dsn

    def _bin_dir(self) -> Path:
        if self.major in ("16", "18"):
            return embedded.wheel_binaries(int(self.major))
        bin_dir = Path(f"/usr/lib/postgresql/{self.major}/bin")
        if not (bin_dir / "postgres").exists():
            raise pytest.UsageError(
                f"PGQUEUE_TEST_PG={self.major} needs {bin_dir}; apt-get install postgresql-{self.major}"
            )
        return bin_dir


def docker_answers() -> bool:
    """Whether a Docker engine is really there; a client or a socket file alone is not."""
    if not os.environ.get("DOCKER_HOST") and not Path("/var/run/docker.sock").exists():
        return False
    try:
        import docker

        client = docker.from_env(timeout=3)
        try:
            return bool(client.ping())
        finally:
            client.close()
    except Exception:  # any failure means: use something else
        return False


def pytest_configure(config: pytest.Config) -> None:
    isolation = os.environ.get("PGQUEUE_TEST_ISOLATION", "")
    if isolation and isolation not in ISOLATION_LEVELS:
        raise pytest.UsageError(
            f"PGQUEUE_TEST_ISOLATION must be one of {', '.join(ISOLATION_LEVELS)}, got {isolation!r}"
        )
    _hear_signals()
    config.stash[POSTGRES] = Postgres()


def _hear_signals() -> None:
    """What is ignored here would be ignored by every program that a test starts and stops by a signal: shells
    start background jobs so.
    """
    for number in STOP_SIGNALS:
        if signal.getsignal(number) is signal.SIG_IGN:
            signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)


def pytest_unconfigure(config: pytest.Config) -> None:
    if POSTGRES in config.stash:
        config.stash[POSTGRES].stop()


def pytest_report_header(config: pytest.Config) -> str:
    isolation = os.environ.get("PGQUEUE_TEST_ISOLATION", "")
    line = f"postgres: {config.stash[POSTGRES]}"
    return f"{line}, {isolation} by default" if isolation else line


@pytest.fixture(scope="session")
def postgres(pytestconfig: pytest.Config) -> Postgres:
    return pytestconfig.stash[POSTGRES]


@pytest.fixture(scope="session")
def server_dsn(postgres: Postgres) -> str:
    """URL of the server's maintenance database, as a role that may create databases."""
    return postgres.dsn


@pytest.fixture(scope="session")
def database(postgres: Postgres) -> Iterator[Database]:
    """The run's own migrated database."""
    from pgqueue.database.migrate import upgrade

    created = postgres.create_database()
    try:
        upgrade(created.dsn)
        yield created
    finally:
        postgres.drop_database(created)


@pytest.fixture(scope="session")
def dsn(database: Database) -> str:
    """URL of the run's migrated database; what earlier tests committed may still be there."""
    return database.dsn


@pytest.fixture
def db(dsn: str) -> str:
    """URL of the run's migrated database with every table empty."""
    empty(dsn)
    return dsn


@pytest.fixture
def fresh_dsn(postgres: Postgres) -> Iterator[str]:
    """URL of a database without the schema, dropped after the test."""
    created = postgres.create_database()
    left: dict[int, str] = {}
    try:
        yield created.dsn
        left = wait_for_none(lambda: postgres.clients([created.name]))
    finally:
        postgres.drop_database(created)
    fail_if_left([f"database session {pid}: {what}" for pid, what in left.items()])


def empty(dsn: str) -> None:
    """Empty the schema's tables, but for what says which schema it is."""
    with psycopg.connect(dsn, autocommit=True) as connection:
        # A session that an earlier test leaked fails this test in five seconds instead of hanging it.
        connection.execute("set lock_timeout = '5s'")
        # Only what has been written to: truncating all the partitions takes half a second.
        used = connection.execute(
            "select format('%I.%I', n.nspname, c.relname) from pg_class c"
            " join pg_namespace n on n.oid = c.relnamespace"
            " where n.nspname = 'pgqueue' and c.relkind = 'r' and pg_relation_size(c.oid) > 0"
            " and c.relname not in ('meta', 'alembic_version') order by 1"
        ).fetchall()
        connection.execute("update pgqueue.meta set paused = '{}' where paused <> '{}'")
        if used:
            names = ", ".join(str(row[0]) for row in used)
            connection.execute(f"truncate only {names} restart identity".encode())


@pytest.fixture(autouse=True)
def _same_signals() -> Iterator[None]:
    """What a command does to the signals of this process must not reach the programs of the next test."""
    before = {number: signal.getsignal(number) for number in STOP_SIGNALS}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture(autouse=True)
def _no_leftovers(postgres: Postgres) -> Iterator[None]:
    """Fail a test that leaves a child process or a database session behind."""
    children_before = {process.pid for process in children()}
    clients_before = set(postgres.clients())

    def new_children() -> dict[int, psutil.Process]:
        known = children_before | postgres.own_processes
        return {process.pid: process for process in children() if process.pid not in known}

    def new_clients() -> dict[int, str]:
        return {pid: what for pid, what in postgres.clients().items() if pid not in clients_before}

    yield
    processes, clients = wait_for_none(new_children), wait_for_none(new_clients)
    left = [f"process {pid}: {command(process)}" for pid, process in processes.items()]
    left += [f"database session {pid}: {what}" for pid, what in clients.items()]
    # What this test started must not spoil the next one.
    for process in processes.values():
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    if clients:
        postgres.end_clients(list(clients))
    fail_if_left(left)


def wait_for_none(look: Callable[[], dict[int, Left]]) -> dict[int, Left]:
    """What is still there after `LEFTOVER_LOOKS`. Seconds would not do: in those in which the whole machine
    stands still, nothing is closed either.
    """
    for _ in range(LEFTOVER_LOOKS):
        if not (left := look()):
            break
        time.sleep(0.02)
    return left


def fail_if_left(left: list[str]) -> None:
    if left:
        pytest.fail("the test left behind: " + "; ".join(left), pytrace=False)


def children() -> list[psutil.Process]:
    """Our descendants; multiprocessing's own helpers stay until the end by design."""
    helpers = ("multiprocessing.resource_tracker", "multiprocessing.forkserver")
    return [
        process
        for process in psutil.Process().children(recursive=True)
        if not any(helper in command(process) for helper in helpers)
    ]


def command(process: psutil.Process) -> str:
    try:
        if process.status() == psutil.STATUS_ZOMBIE:
            return f"{process.name()} (a zombie: nobody waited for it)"
        return " ".join(process.cmdline())[:200]
    except psutil.NoSuchProcess:
        return ""
