"""A PostgreSQL server of a test's own, which it may stop, kill and freeze."""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import signal
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from urllib.parse import urlsplit, urlunsplit

import psutil
import psycopg

from pgqueue.database.embedded import EmbeddedPostgres
from pgqueue.database.migrate import upgrade

MAJOR = int(os.environ.get("PGQUEUE_TEST_PG", "18"))
"""The version of these servers."""


class Server:
    """A PostgreSQL server that comes and goes, always at the same address.

    Args:
        home: A folder that the user Postgres runs as can enter.
        settings: Entries of postgresql.conf.
    """

    def __init__(self, home: Path, settings: Mapping[str, str] | None = None) -> None:
        bin_dir = None if MAJOR in (16, 18) else Path(f"/usr/lib/postgresql/{MAJOR}/bin")
        version = MAJOR if bin_dir is None else 18
        self._embedded = EmbeddedPostgres(home, version=version, settings=settings, bin_dir=bin_dir)
        self.home = home
        self.dsn = self._embedded.start()
        with self.connect() as connection:
            connection.execute("create database migrated")
        upgrade(self.dsn_of("migrated"))

    def connect(self) -> psycopg.Connection:
        return psycopg.connect(self.dsn, autocommit=True)

    def dsn_of(self, database: str) -> str:
        return urlunsplit(urlsplit(self.dsn)._replace(path=f"/{database}"))

    def new_database(self, template: str = "migrated") -> str:
        """URL of a copy of `template`."""
        name = f"copy_{secrets.token_hex(4)}"
        with self.connect() as connection:
            connection.execute(f"create database {name} template {template}".encode())
        return self.dsn_of(name)

    @property
    def postmaster(self) -> psutil.Process:
        pid_file = self.home / "cluster" / "postmaster.pid"
        return psutil.Process(int(pid_file.read_text().split()[0]))

    def backend(self, application: str, database_dsn: str) -> psutil.Process:
        """The server process of the session that calls itself `application`, once it is there."""
        database = urlsplit(database_dsn).path.removeprefix("/")
        query = "select pid from pg_stat_activity where application_name = %s and datname = %s"
        deadline = time.monotonic() + 30
        while time.monotonic() < deadline:
            with self.connect() as connection:
                row = connection.execute(query, [application, database]).fetchone()
            if row is not None:
                return psutil.Process(row[0])
            time.sleep(0.02)
        raise AssertionError(f"no session {application!r} in {database}")

    def stop(self, number: signal.Signals) -> None:
        """SIGINT: fast, sessions are told; SIGQUIT: immediate, as after a crash. Returns when it is down."""
        postmaster = self.postmaster
        postmaster.send_signal(number)
        psutil.wait_procs([postmaster], timeout=30)
        assert not postmaster.is_running()

    def kill(self) -> None:
        """SIGKILL to all its processes at once: as near to a power cut as it gets without one."""
        postmaster = self.postmaster
        family = [postmaster, *postmaster.children(recursive=True)]
        for process in family:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        psutil.wait_procs(family, timeout=30)

    def start(self) -> None:
        """Start it again; returns when it accepts connections."""
        server = self._embedded._server
        assert server is not None
        if server.is_running():
            return
        options = f"-c config_file={self.home / 'postgresql.conf'}"
        log = str(server.cluster / "server.log")
        done = server.run(
            "pg_ctl", "start", "-w", "-t", "60", "-D", str(server.cluster), "-l", log, "-o", options
        )
        assert done.returncode == 0, done.stdout

    def close(self) -> None:
        self._embedded.stop()


@contextlib.contextmanager
def own_server(settings: Mapping[str, str] | None = None) -> Iterator[Server]:
    """A server for the length of the block, in a temporary folder."""
    # Not tmp_path: for root it is closed to the user that Postgres runs as.
    home = Path(tempfile.mkdtemp(prefix="pgqueue-server-"))
    try:
        home.chmod(0o711)
        server = Server(home, settings)
        try:
            yield server
        finally:
            server.close()
    finally:
        shutil.rmtree(home, ignore_errors=True)
