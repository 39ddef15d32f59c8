"""One system under test: a folder of `benchmarks/peers/` with `peer.toml`, a driver and pinned versions.

`requirements.txt`: a virtual environment of its own; none: the Python that runs the harness. `runtime =
"node"`: see `benchmarks/node.py`. Environments live in `${XDG_CACHE_HOME:-~/.cache}/pgqueue-bench/<name>/`;
they are made when they are missing or a pinned file has changed. `kind`: where its jobs are; Redis and
RabbitMQ are started by `benchmarks/brokers.py`.

The driver is a program that reads BENCH_URL from its environment; its last line of output is one JSON object:

setup                               make the schema (idempotent)
fill --jobs N [--size BYTES]        enqueue no-op jobs in bulk, 1,000 at a time → {"jobs", "seconds"}
enqueue --mode single|bulk|transaction --clients C --seconds S → {"jobs", "seconds"}
produce --rate R --seconds S        enqueue `stamp` jobs at a steady rate → {"jobs", "seconds", "behind_ms"}
worker --concurrency N [--history on|off] [--pool NAME]     print `ready`, serve until SIGTERM

What it cannot do it answers with {"unsupported": "why"}. The job `stamp(ns)` appends the nanoseconds since
then as a line to $BENCH_STAMPS; where no SQL tells how many jobs are left, finished no-ops are counted in
$BENCH_COUNTER, a file of 8-byte numbers, one for each process of the worker.
"""

from __future__ import annotations

import array
import hashlib
import importlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import tomllib
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

from benchmarks.server import Counters, Server, Watch, tree_cpu, tree_pss

HERE = Path(__file__).resolve().parent
PEERS = HERE / "peers"
LIB = HERE / "lib"
OURS = "pgqueue"
COUNTER_SLOTS = 1_024
READY_SECONDS = 60
STOP_SECONDS = 60


class PeerError(Exception):
    """The peer cannot be installed or did not do what it was asked; the text ends with its own last words."""


class Unsupported(Exception):
    """The peer does not offer this; the text says why."""


def cache() -> Path:
    """Where the peers' environments are."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "pgqueue-bench"


def find_peers() -> dict[str, Peer]:
    """All peers by name: ours first, then the bare one, then by name."""
    found = [Peer.read(path.parent) for path in sorted(PEERS.glob("*/peer.toml"))]
    found.sort(key=lambda peer: (peer.name != OURS, not peer.is_reference, peer.name))
    return {peer.name: peer for peer in found}


@dataclass(frozen=True)
class Peer:
    """What `peer.toml` says.

    Attributes:
        history: Whether what has succeeded is remembered: `on`, `off`, or both where there is a choice,
            which is then told to the worker.
        appear: SQL that makes so many no-op jobs appear at once, for a worker that is up and idle; None:
            there is none, and the worker starts with a full queue.
        table: Where the jobs are, if they are in one table that can be emptied into another and back.
        renumber: SQL that makes the rows of `bench_aside` the youngest, where a worker goes by that.
        wake: SQL that tells a worker that rows were put there, if the table itself does not.
        ready: The worker serves when this has been printed.
    """

    name: str
    title: str
    folder: Path
    kind: str
    drain_jobs: int
    history: tuple[str, ...] = ("off",)
    remaining: str | None = None
    reset: str | None = None
    appear: str | None = None
    table: str | None = None
    renumber: str | None = None
    wake: str | None = None
    ready: str = "ready"
    runtime: str = "python"
    pools: tuple[str, ...] = ()
    concurrency: int | None = None
    settings: str = ""
    gives_up: str = ""
    is_reference: bool = False
    env: dict[str, str] = field(default_factory=dict, hash=False)

    @classmethod
    def read(cls, folder: Path) -> Peer:
        """From its folder; ValueError if `peer.toml` has what nobody knows."""
        facts = tomllib.loads((folder / "peer.toml").read_text())
        history = facts.pop("history", "off")
        facts["history"] = (history,) if isinstance(history, str) else tuple(history)
        facts["pools"] = tuple(facts.get("pools", ()))
        facts["is_reference"] = facts.pop("reference", False)
        try:
            return cls(folder=folder, **facts)
        except TypeError as error:
            raise ValueError(f"{folder / 'peer.toml'}: {error}") from None

    @property
    def is_ours(self) -> bool:
        """It is pgqueue."""
        return self.name == OURS

    def history_flag(self, history: str | None) -> list[str]:
        """Only a peer with a choice is asked to make one."""
        if history is None or len(self.history) < 2:
            return []
        return ["--history", history]

    def prepare(self) -> list[str]:
        """The command that runs the driver; its environment is made if need be, PeerError if it cannot."""
        if self.runtime == "node":
            node = importlib.import_module("benchmarks.node")
            try:
                return list(node.prepare(self.folder, cache() / self.name))
            except node.NodeError as error:
                raise PeerError(str(error)) from None
        requirements = self.folder / "requirements.txt"
        driver = str(self.folder / "driver.py")
        if not requirements.exists():
            return [sys.executable, driver]
        return [str(environment(self.name, requirements)), driver]


def environment(name: str, requirements: Path) -> Path:
    """The Python of a virtual environment with these packages, made if it is not there or not up to date."""
    home = cache() / name
    python, stamp = home / "venv" / "bin" / "python", home / "requirements.stamp"
    pinned = hashlib.sha256(requirements.read_bytes() + sys.version.encode()).hexdigest()
    if stamp.exists() and stamp.read_text() == pinned and python.exists():
        return python
    print(f"bench: installing {name} into {home}", file=sys.stderr, flush=True)
    shutil.rmtree(home, ignore_errors=True)
    home.mkdir(parents=True)
    pip = [
        str(python),
        "-m",
        "pip",
        "install",
        "--quiet",
        "--disable-pip-version-check",
        "-r",
        str(requirements),
    ]
    for command in ([sys.executable, "-m", "venv", str(home / "venv")], pip):
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise PeerError(f"cannot install {name}: {' / '.join(done.stderr.strip().splitlines()[-3:])}")
    stamp.write_text(pinned)
    return python


class Bed:
    """A peer on a place of its own, ready to be measured: a fresh database, and its broker if it has one.

    Use `bed()`.
    """

    def __init__(
        self, peer: Peer, command: Sequence[str], url: str, watch: Watch, folder: Path, broker: Any
    ) -> None:
        self.peer = peer
        self.watch = watch
        self._command = list(command)
        self._folder = folder
        self._broker = broker
        self._counted = 0
        self._filled = 0
        self.stamps = folder / "stamps"
        self._counter = folder / "counter"
        self._counter.write_bytes(bytes(8 * COUNTER_SLOTS))
        self._environment = {
            **os.environ,
            **peer.env,
            "BENCH_URL": url,
            "BENCH_STAMPS": str(self.stamps),
            "PYTHONPATH": str(LIB),
        }
        if peer.remaining is None:
            self._environment["BENCH_COUNTER"] = str(self._counter)

    def driver(self, *arguments: object, patience: float = 300) -> dict[str, Any]:
        """Run a subcommand and return what it found; Unsupported, PeerError."""
        command = [*self._command, *map(str, arguments)]
        try:
            done = subprocess.run(
                command,
                env=self._environment,
                cwd=self._folder,
                capture_output=True,
                text=True,
                timeout=patience,
            )
        except subprocess.TimeoutExpired:
            raise PeerError(f"{self.peer.name}: {arguments[0]} was not done in {patience:.0f} s") from None
        lines = done.stdout.strip().splitlines()
        if done.returncode or not lines:
            raise PeerError(f"{self.peer.name}: {arguments[0]} failed:\n{_tail(done.stdout + done.stderr)}")
        found = json.loads(lines[-1])
        if "unsupported" in found:
            raise Unsupported(str(found["unsupported"]))
        if arguments[0] in ("fill", "enqueue"):
            # A driver may do it a second time, in a way that promises less, and say so.
            self._filled += int(found["jobs"]) + int(found.get("without_confirms", {}).get("jobs", 0))
        return dict(found)

    def fill(self, jobs: int, size: int = 0) -> dict[str, Any]:
        """Enqueue no-op jobs as the driver does it best."""
        return self.driver("fill", "--jobs", jobs, *(("--size", size) if size else ()))

    def appear(self, jobs: int) -> None:
        """So many no-op jobs, when the caller's transaction commits; `peer.appear` has to be there."""
        assert self.peer.appear is not None
        # Without parameters several statements go in one message; ANALYZE sees what was inserted just before.
        self.watch.connection.execute(f"{self.peer.appear.format(jobs=jobs)}; ANALYZE".encode())

    def put_aside(self) -> None:
        """Take the jobs that wait out of the way of a worker; `peer.table` has to be there."""
        table = self.peer.table
        aside = f"CREATE TABLE bench_aside AS SELECT * FROM {table}; TRUNCATE {table} CASCADE"
        self.watch.connection.execute(aside.encode())

    def put_back(self) -> None:
        """They are there again when the caller's transaction commits."""
        back = f"INSERT INTO {self.peer.table} OVERRIDING SYSTEM VALUE SELECT * FROM bench_aside; ANALYZE"
        self.watch.connection.execute(f"{self.peer.renumber or ''}; {back}; {self.peer.wake or ''}".encode())

    def remaining(self) -> int:
        """How many jobs are not done yet."""
        if self.peer.remaining is not None:
            return self.watch.ask(self.peer.remaining)
        return self._filled - (sum(array.array("Q", self._counter.read_bytes())) - self._counted)

    def wait(self, patience: float = 120, pause: float = 0.02) -> None:
        """Until nothing remains."""
        deadline = time.monotonic() + patience
        while (left := self.remaining()) > 0:
            if time.monotonic() > deadline:
                raise PeerError(f"{self.peer.name}: {left} jobs were not done in {patience:.0f} s")
            time.sleep(pause)

    def reset(self) -> None:
        """No jobs and no history, while nothing runs."""
        if self.peer.reset is not None:
            self.watch.connection.execute(self.peer.reset.encode())
        if self._broker is not None:
            self._broker.reset()
        self._counted = sum(array.array("Q", self._counter.read_bytes()))
        self._filled = 0

    @contextmanager
    def worker(
        self,
        concurrency: int,
        history: str | None = None,
        pool: str | None = None,
        *,
        is_awaited: bool = True,
    ) -> Iterator[Worker]:
        """A worker, which serves by then unless it is not awaited; stopped at the end."""
        arguments = ["--concurrency", str(concurrency), *self.peer.history_flag(history)]
        if pool is not None:
            arguments += ["--pool", pool]
        log = self._folder / "worker.log"
        with log.open("wb") as output:
            process = subprocess.Popen(
                [*self._command, "worker", *arguments],
                env=self._environment,
                cwd=self._folder,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        try:
            deadline = time.monotonic() + READY_SECONDS
            while is_awaited and self.peer.ready not in log.read_text(errors="replace"):
                if process.poll() is not None or time.monotonic() > deadline:
                    raise PeerError(f"{self.peer.name}: the worker did not start:\n{_tail(log.read_text())}")
                time.sleep(0.01)
            yield Worker(process.pid)
        finally:
            _stop(process)

    def counters(self) -> Counters:
        """What the server, and the broker with it, have used so far."""
        found = self.watch.counters()
        if self._broker is None:
            return found
        return Counters(
            found.server_cpu + tree_cpu(self._broker.processes()), found.wal_bytes, found.transactions
        )


class Worker:
    """The processes of a worker."""

    def __init__(self, pid: int) -> None:
        self._root = psutil.Process(pid)

    def cpu(self) -> float:
        """Seconds of CPU so far."""
        return tree_cpu([self._root])

    def pss(self) -> float:
        """Bytes of memory now."""
        return tree_pss([self._root])


@contextmanager
def bed(server: Server, peer: Peer, command: Sequence[str]) -> Iterator[Bed]:
    """The peer set up on a fresh database, and broker if it has one."""
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="pgqueue-bench-")))
        dsn = stack.enter_context(server.database())
        watch = stack.enter_context(Watch(server.dsn, dsn))
        broker = None
        if peer.kind != "postgres":
            brokers = importlib.import_module("benchmarks.brokers")
            try:
                broker = stack.enter_context(brokers.start(peer.kind))
            except brokers.BrokerError as error:
                raise PeerError(str(error)) from None
        made = Bed(peer, command, dsn if broker is None else broker.url, watch, folder, broker)
        made.driver("setup")
        yield made


def _stop(process: subprocess.Popen[bytes]) -> None:
    process.send_signal(signal.SIGTERM)
    try:
        process.wait(STOP_SECONDS)
    except subprocess.TimeoutExpired:
        print("bench: a worker did not stop, it is killed", file=sys.stderr)
    # What it left behind in its session goes too.
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _tail(text: str) -> str:
    return "\n".join(text.strip().splitlines()[-12:])
