"""Redis and RabbitMQ for the peers that need them: Debian's packages, on their own ports and data.

    with start("redis") as broker:
        broker.url

They listen on 127.0.0.1 only, ask for a random password, keep what they are told on disk, and end with the
process that started them. Started by root they run as the user of their package. A program that is missing is
installed when root runs this on Debian.

Redis: `appendonly yes`, `appendfsync everysec` (its default), no snapshots beside it. A power failure loses
up to a second of writes; the death of the process loses none.
RabbitMQ: its defaults; Celery declares durable queues and sends persistent messages.
"""

from __future__ import annotations

import contextlib
import os
import pwd
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil

START_SECONDS = 60
STOP_SECONDS = 30
QUEUE = "bench"
PACKAGES = {"redis": "redis-server", "rabbitmq": "rabbitmq-server"}
# The package's command in /usr/sbin is a wrapper that insists on the system's own data directory.
RABBITMQ_BIN = Path("/usr/lib/rabbitmq/bin")


class BrokerError(Exception):
    """The broker cannot be installed or does not start; the text says why."""


@dataclass(frozen=True)
class Broker:
    """A broker that runs."""

    url: str
    _process: psutil.Process
    _reset: Callable[[], None]

    def processes(self) -> list[psutil.Process]:
        """Its processes, those of its children not among them."""
        return [self._process]

    def reset(self) -> None:
        """Drop all jobs, while nothing uses it."""
        self._reset()


@contextmanager
def start(kind: str) -> Iterator[Broker]:
    """A broker with no data, gone at the end; BrokerError."""
    run = {"redis": _redis, "rabbitmq": _rabbitmq}[kind]
    _install(kind)
    with ExitStack() as stack:
        home = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix=f"pgqueue-bench-{kind}-")))
        user = _user(kind)
        if user is not None:
            os.chown(home, user.pw_uid, user.pw_gid)
        yield run(stack, home, user)


def _redis(stack: ExitStack, home: Path, user: pwd.struct_passwd | None) -> Broker:
    (port,), password = _free_ports(1), secrets.token_hex(16)
    settings = {
        "bind": "127.0.0.1",
        "port": port,
        "dir": home,
        "requirepass": password,
        "appendonly": "yes",
        "appendfsync": "everysec",
        "save": '""',
        "daemonize": "no",
        "logfile": home / "redis.log",
    }
    # Not on the command line, where everybody could read the password.
    configuration = _write(home / "redis.conf", "".join(f"{k} {v}\n" for k, v in settings.items()), user)

    def ask(*words: str) -> bytes:
        with socket.create_connection(("127.0.0.1", port), timeout=10) as connection:
            connection.sendall(f"AUTH {password}\r\n{' '.join(words)}\r\n".encode())
            replies = connection.makefile("rb")
            replies.readline()
            return replies.readline().strip()

    process = stack.enter_context(_running(["redis-server", str(configuration)], home, user))
    _wait(process, lambda: ask("PING") == b"+PONG", home)

    def reset() -> None:
        if (reply := ask("FLUSHALL")) != b"+OK":
            raise BrokerError(f"redis did not empty itself: {reply.decode()}")

    return Broker(f"redis://:{password}@127.0.0.1:{port}/0", psutil.Process(process.pid), reset)


def _rabbitmq(stack: ExitStack, home: Path, user: pwd.struct_passwd | None) -> Broker:
    (port, between_nodes, mapper), password = _free_ports(3), secrets.token_hex(16)
    name = f"bench{port}@localhost"
    configuration = f"""
listeners.tcp.1 = 127.0.0.1:{port}
loopback_users.bench = true
default_user = bench
default_pass = {password}
log.file.level = warning
"""
    environment = {
        "HOME": str(home),  # the cookie that lets `rabbitmqctl` in is here
        "ERL_EPMD_PORT": str(mapper),
        "ERL_EPMD_ADDRESS": "127.0.0.1",
        "RABBITMQ_NODENAME": name,
        "RABBITMQ_DIST_PORT": str(between_nodes),
        "RABBITMQ_SERVER_ADDITIONAL_ERL_ARGS": "-kernel inet_dist_use_interface {127,0,0,1}",
        "RABBITMQ_CONFIG_FILE": str(_write(home / "rabbitmq.conf", configuration, user)),
        "RABBITMQ_CONF_ENV_FILE": str(_write(home / "env.conf", "", user)),
        "RABBITMQ_ENABLED_PLUGINS_FILE": str(_write(home / "enabled_plugins", "[].\n", user)),
        "RABBITMQ_MNESIA_BASE": str(home / "mnesia"),
        "RABBITMQ_LOG_BASE": str(home / "log"),
        "RABBITMQ_PID_FILE": str(home / "pid"),
        "RUNNING_UNDER_SYSTEMD": "true",  # the script then becomes the server instead of watching it
    }
    # Erlang would start its port mapper as a daemon that outlives the server.
    stack.enter_context(_running(["epmd", "-port", str(mapper)], home, user, environment))
    server = stack.enter_context(
        _running([str(RABBITMQ_BIN / "rabbitmq-server")], home, user, environment, output="startup.log")
    )
    _wait(server, lambda: _speaks_amqp(port), home)

    def reset() -> None:
        # There is no queue before the first job.
        control = [str(RABBITMQ_BIN / "rabbitmqctl"), "--quiet", "--node", name]
        found = _run([*control, "list_queues", "name"], home, user, environment)
        if QUEUE in found.split():
            _run([*control, "purge_queue", QUEUE], home, user, environment)

    return Broker(f"amqp://bench:{password}@127.0.0.1:{port}//", psutil.Process(server.pid), reset)


def _speaks_amqp(port: int) -> bool:
    with socket.create_connection(("127.0.0.1", port), timeout=10) as connection:
        connection.sendall(b"AMQP\x00\x00\x09\x01")
        return connection.recv(1) == b"\x01"  # a method frame: connection.start


def _install(kind: str) -> None:
    """Debian's package, if its program is not there."""
    package = PACKAGES[kind]
    if shutil.which(package, path=f"{RABBITMQ_BIN}{os.pathsep}{os.environ.get('PATH', os.defpath)}"):
        return
    if os.geteuid() != 0 or shutil.which("apt-get") is None:
        raise BrokerError(f"{package} is missing; run apt-get install {package} as root")
    print(f"bench: apt-get install {package}", file=sys.stderr, flush=True)
    # RUNLEVEL keeps the package from starting a service of its own.
    environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive", "RUNLEVEL": "1"}
    install = ["apt-get", "install", "-y", "-q", "--no-install-recommends", package]
    done: subprocess.CompletedProcess[str] | None = None
    for command in (install, ["apt-get", "update", "-q"], install):
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        if command is install and done.returncode == 0:
            return
    assert done is not None
    raise BrokerError(f"cannot install {package}: {' / '.join(done.stderr.strip().splitlines()[-3:])}")


def _user(kind: str) -> pwd.struct_passwd | None:
    """Whom the broker runs as; None: as we do."""
    return pwd.getpwnam(kind) if os.geteuid() == 0 else None


def _as_user(command: Sequence[str], user: pwd.struct_passwd | None) -> list[str]:
    """The command line that gives up root, and that is told to end when its parent ends."""
    switch = ["setpriv", "--pdeathsig", "TERM"]
    if user is not None:
        switch += ["--reuid", str(user.pw_uid), "--regid", str(user.pw_gid), "--init-groups"]
    return [*switch, *command]


def _environment(more: Mapping[str, str]) -> dict[str, str]:
    # RABBITMQ_* and ERL_* of this shell are meant for somebody else's node.
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("RABBITMQ_", "ERL_"))}
    return {**kept, "LC_ALL": "C.UTF-8", **more}


@contextmanager
def _running(
    command: Sequence[str],
    home: Path,
    user: pwd.struct_passwd | None,
    environment: Mapping[str, str] | None = None,
    output: str = "output.log",
) -> Iterator[subprocess.Popen[bytes]]:
    with (home / output).open("ab") as log:
        process = subprocess.Popen(
            _as_user(command, user),
            cwd=home,
            env=_environment(environment or {}),
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # Ctrl-C is for the harness
        )
    try:
        yield process
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
        # Helpers of Erlang's, which it leaves behind when it is killed.
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _run(
    command: Sequence[str], home: Path, user: pwd.struct_passwd | None, environment: Mapping[str, str]
) -> str:
    done = subprocess.run(
        _as_user(command, user), cwd=home, env=_environment(environment), capture_output=True, text=True
    )
    if done.returncode:
        raise BrokerError(f"{Path(command[0]).name} failed: {done.stderr.strip() or done.stdout.strip()}")
    return done.stdout


def _wait(process: subprocess.Popen[bytes], serves: Callable[[], bool], home: Path) -> None:
    deadline = time.monotonic() + START_SECONDS
    while True:
        with contextlib.suppress(OSError):
            if serves():
                return
        if process.poll() is not None or time.monotonic() > deadline:
            logs = [path.read_text(errors="replace") for path in sorted(home.glob("*.log"))]
            last = "\n".join("\n".join(logs).strip().splitlines()[-12:])
            raise BrokerError(f"the broker does not start:\n{last}")
        time.sleep(0.05)


def _write(path: Path, text: str, user: pwd.struct_passwd | None) -> Path:
    path.touch(mode=0o600)
    path.write_text(text)
    if user is not None:
        os.chown(path, user.pw_uid, user.pw_gid)
    return path


def _free_ports(count: int) -> list[int]:
    """Different ports that nobody listens on."""
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]
