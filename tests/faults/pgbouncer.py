"""A PgBouncer of a test's own, in front of the server of a DSN."""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Literal
from urllib.parse import unquote, urlsplit, urlunsplit

import psycopg
import pytest

from tests.acceptance.workers import eventually

Mode = Literal["transaction", "session"]


def binary() -> str:
    """Where PgBouncer is; skips the test where it is not installed."""
    found = shutil.which("pgbouncer") or shutil.which("pgbouncer", path="/usr/sbin:/usr/local/sbin")
    if found is None:
        pytest.skip("needs PgBouncer: apt-get install pgbouncer")
    return found


class PgBouncer:
    """One that runs, and can be started again at the same address.

    Args:
        dsn: The server and the database behind it.
        mode: When a server's connection goes back to the pool.
        pool_size: Connections to the server.
    """

    def __init__(self, dsn: str, folder: Path, mode: Mode, pool_size: int) -> None:
        url = urlsplit(dsn)
        user, password = unquote(url.username or ""), unquote(url.password or "")
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        netloc = f"{url.username}:{url.password}@127.0.0.1:{port}"
        self.dsn = urlunsplit(url._replace(netloc=netloc))
        self._process: subprocess.Popen[bytes] | None = None
        users = folder / "users.txt"
        users.write_text(f'"{user}" "{password}"\n')
        users.chmod(0o644)
        self.log = folder / "pgbouncer.log"
        self._ini = folder / "pgbouncer.ini"
        self._ini.write_text(
            "[databases]\n"
            f"* = host={url.hostname} port={url.port}\n"
            "[pgbouncer]\n"
            f"listen_addr = 127.0.0.1\nlisten_port = {port}\nunix_socket_dir =\n"
            f"auth_type = plain\nauth_file = {users}\n"
            f"pool_mode = {mode}\ndefault_pool_size = {pool_size}\nmax_client_conn = 200\n"
            "server_login_retry = 0.2\n"
            f"logfile = {self.log}\nsyslog = 0\n" + ("user = nobody\n" if os.geteuid() == 0 else "")
        )

    def start(self) -> None:
        """Returns when it accepts connections."""
        self._process = subprocess.Popen(
            [binary(), "-q", str(self._ini)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )

        def answers() -> bool:
            with contextlib.suppress(psycopg.OperationalError):
                psycopg.connect(self.dsn).close()
                return True
            return False

        eventually(answers, "PgBouncer accepts connections")

    def stop(self) -> None:
        """End it at once, and all connections through it."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None


@contextlib.contextmanager
def pgbouncer(dsn: str, mode: Mode = "transaction", pool_size: int = 4) -> Iterator[PgBouncer]:
    """A running PgBouncer for the length of the block."""
    binary()
    folder = Path(tempfile.mkdtemp(prefix="pgqueue-pgbouncer-"))
    folder.chmod(0o777)  # started by root it runs as somebody else, who writes the log
    bouncer = PgBouncer(dsn, folder, mode, pool_size)
    try:
        bouncer.start()
        yield bouncer
    finally:
        bouncer.stop()
        shutil.rmtree(folder, ignore_errors=True)
