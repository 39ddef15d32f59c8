"""What is measured: functions over a peer that return figures by variant.

A figure is a number with its unit in its name: `jobs_per_s`, `worker_us` (CPU per job), `p99_ms`. A variant
says under which circumstances, such as `history on` or `single, 64 clients, with a worker`. What a peer does
not offer is a variant with the text `unsupported`.

drain      A worker that is up and idle; then so many no-op jobs appear, in one transaction where the peer's
           tables allow it. From before its COMMIT until nothing remains. Where they do not, the worker starts
           with a full queue and the clock with the first job that is done.
pools      The same for each pool of pgqueue.
enqueue    Closed loop: each client enqueues, waits for the answer, goes on.
wake-up    Open loop: jobs enqueued at a steady rate, from before the enqueue to the start of the body.
args       Jobs with one string: enqueued in bulk, then drained; the same jobs, put aside in between.
idle       What a worker with nothing to do costs, ten seconds after it had something.
memory     PSS of an idle worker's processes, and how much each process more adds.
startup    Milliseconds of `import pgqueue` and `pgqueue --help` beyond Python's own start.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import resource
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.peer import Bed, Peer, PeerError, Unsupported, Worker, bed
from benchmarks.server import Server

Figures = dict[str, Any]
"""Name of a figure → number."""
Variants = dict[str, Figures]

SIZES = {"1 KiB": 1_024, "100 KiB": 102_400}
RATES = (1, 50, 1_000)
WARM_UP = 200
POLL_SHARE = 20
"""Looking for the end may take this part of the time: a look that costs 5 ms comes every 100."""


@dataclass(frozen=True)
class Run:
    """One peer's turn at a measure.

    Attributes:
        scale: Part of the usual size: 0.1 for `--quick`.
    """

    server: Server
    peer: Peer
    command: Sequence[str]
    scale: float = 1.0
    cpus: int = os.cpu_count() or 1

    def bed(self) -> Any:
        """See `peer.bed`."""
        return bed(self.server, self.peer, self.command)

    @property
    def concurrency(self) -> int:
        """What its authors' best is here, or one for each CPU."""
        return self.peer.concurrency or self.cpus

    def seconds(self, full: float, least: float = 1.0) -> float:
        """So long, or shorter."""
        return max(least, full * self.scale)

    def jobs(self, full: int, least: int = 200) -> int:
        """So many, or fewer."""
        return max(least, int(full * self.scale))


@dataclass(frozen=True)
class Measure:
    """A function, and how it is to be run.

    Attributes:
        compared: Ours runs before and after each peer; else only once a round.
        of: Whose measure it is: everybody's, or ours alone.
        rounds: How often, where it has rounds of its own.
        nominal: Seconds of one turn, as a first guess.
    """

    name: str
    run: Callable[[Run], Variants]
    compared: bool = True
    of: str = "all"
    rounds: int | None = None
    nominal: float = 20


def drain(run: Run) -> Variants:
    """Jobs per second, CPU, WAL and transactions per job."""
    found: Variants = {}
    for history in run.peer.history:
        with run.bed() as place:
            found[f"history {history}"] = drain_once(run, place, history)
    return found


def pools(run: Run) -> Variants:
    """The same for each pool, history on."""
    found: Variants = {}
    for pool in run.peer.pools:
        with run.bed() as place:
            found[pool] = drain_once(run, place, None, pool)
    return found


def drain_once(run: Run, place: Bed, history: str | None, pool: str | None = None) -> Figures:
    """One drain on a fresh database."""
    jobs = run.jobs(run.peer.drain_jobs)
    if run.peer.appear is None:
        place.fill(jobs)
        return drain_filled(run, place, jobs, history, pool)
    return drain_at_once(run, place, jobs, lambda: place.appear(jobs), history, pool)


def drain_at_once(
    run: Run,
    place: Bed,
    jobs: int,
    appear: Callable[[], None],
    history: str | None,
    pool: str | None = None,
) -> Figures:
    """A drain by a worker that is up and idle when `appear` and a COMMIT bring the jobs."""
    with place.worker(run.concurrency, history, pool) as worker:
        warm_up(place)
        place.reset()
        place.watch.settle()
        with place.watch.connection.transaction():
            # With statistics of the full table, as autovacuum sees to in the long run.
            appear()
            before, cpu = place.counters(), worker.cpu()
            started = time.perf_counter()
        ended = _wait_closely(place)
        figures = _per_job(place, worker, jobs, before, cpu)
    figures |= {"jobs_per_s": jobs / (ended - started), "jobs": jobs}
    return figures | _transactions(place, before, jobs)


def drain_filled(run: Run, place: Bed, jobs: int, history: str | None, pool: str | None = None) -> Figures:
    """A drain by a worker that starts with a full queue: from the first job seen done to the last."""
    place.watch.settle()
    with place.worker(run.concurrency, history, pool, is_awaited=False) as worker:
        deadline = time.monotonic() + 60
        while (left := place.remaining()) >= jobs:
            if time.monotonic() > deadline:
                raise PeerError(f"{run.peer.name}: no job was done in 60 s")
            time.sleep(0.002)
        started, before, cpu = time.perf_counter(), place.counters(), worker.cpu()
        if left <= 0:
            raise PeerError(
                f"{run.peer.name}: {jobs} jobs were done before they could be watched; more are needed"
            )
        ended = _wait_closely(place)
        figures = _per_job(place, worker, left, before, cpu)
    return {
        "jobs_per_s": left / (ended - started),
        "jobs": left,
        **figures,
        **_transactions(place, before, left),
    }


def warm_up(place: Bed) -> None:
    """The worker has connected, prepared and run something."""
    place.fill(WARM_UP)
    place.wait(60)


def _wait_closely(place: Bed, patience: float = 180) -> float:
    """When nothing remained. The looks are rare where they are dear."""
    deadline = time.monotonic() + patience
    while True:
        looked = time.perf_counter()
        left = place.remaining()
        now = time.perf_counter()
        if left <= 0:
            return now
        if time.monotonic() > deadline:
            raise PeerError(f"{place.peer.name}: {left} jobs were left after {patience:.0f} s")
        time.sleep(min(0.5, max(0.005, POLL_SHARE * (now - looked))))


def _per_job(place: Bed, worker: Worker, jobs: int, before: Any, cpu: float) -> Figures:
    used = place.counters() - before
    figures = {"worker_us": (worker.cpu() - cpu) / jobs * 1e6, "server_us": used.server_cpu / jobs * 1e6}
    # A broker's jobs write nothing to the database, which has its own noise.
    return figures | ({"wal_bytes": used.wal_bytes / jobs} if place.peer.kind == "postgres" else {})


def _transactions(place: Bed, before: Any, jobs: int) -> Figures:
    if place.peer.kind != "postgres":
        return {}
    # The worker is gone: only then has the last of its connections told all of its transactions.
    return {"transactions": (place.counters() - before).transactions / jobs}


def enqueue(run: Run) -> Variants:
    """Enqueues per second by mode, clients, and whether a worker is there."""
    found: Variants = {}
    seconds = run.seconds(1.5)
    with run.bed() as place:
        for served in (False, True):
            for mode in ("single", "bulk", "transaction"):
                for clients in (1, 64):
                    name = f"{mode}, {clients} client{'s' if clients > 1 else ''}{', with a worker' * served}"
                    found[name] = _enqueue_once(run, place, mode, clients, seconds, served)
    return found


def _enqueue_once(run: Run, place: Bed, mode: str, clients: int, seconds: float, served: bool) -> Figures:
    arguments = ("enqueue", "--mode", mode, "--clients", clients, "--seconds", seconds)
    try:
        if not served:
            place.reset()
            place.watch.settle()
            before = place.counters()
            done = place.driver(*arguments)
            used = place.counters() - before
            less = done.get("without_confirms", {})
            jobs = done["jobs"] + less.get("jobs", 0)
            figures = {"without_confirms_per_s": less["jobs"] / less["seconds"]} if less else {}
            return figures | {
                "jobs_per_s": done["jobs"] / done["seconds"],
                "server_us": used.server_cpu / jobs * 1e6,
                "wal_bytes": used.wal_bytes / jobs,
            }
        place.reset()
        with place.worker(run.concurrency):
            warm_up(place)
            done = place.driver(*arguments)
            left = place.remaining()
        return {"jobs_per_s": done["jobs"] / done["seconds"], "left_behind": max(0, left) / done["jobs"]}
    except Unsupported as reason:
        return {"unsupported": str(reason)}


def wake_up(run: Run) -> Variants:
    """Percentiles of the time from the enqueue to the start of the body, at several rates."""
    found: Variants = {}
    with run.bed() as place, place.worker(run.concurrency):
        warm_up(place)
        try:
            for rate in RATES:
                found[f"{rate:,} jobs/s"] = _latencies(place, rate, run.seconds(20 if rate == 1 else 5, 3))
            # Half of what one client and the worker get through together.
            closed = place.driver("enqueue", "--mode", "single", "--clients", 1, "--seconds", run.seconds(3))
            started = time.monotonic()
            place.wait(60)
            half = closed["jobs"] / (closed["seconds"] + time.monotonic() - started) / 2
            found["50 % load"] = _latencies(place, half, run.seconds(5, 3)) | {"rate": half}
        except Unsupported as reason:
            found["50 % load"] = {"unsupported": str(reason)}
    return found


def _latencies(place: Bed, rate: float, seconds: float) -> Figures:
    # A worker's processes keep the file open: it is emptied, not replaced.
    with place.stamps.open("wb"):
        pass
    done = place.driver("produce", "--rate", rate, "--seconds", seconds)
    values = _read_stamps(place, done["jobs"])
    return {
        **{f"p{part}_ms": percentile(values, part / 100) for part in (50, 95, 99)},
        "samples": len(values),
        "behind_ms": done["behind_ms"],
    }


def percentile(ordered: Sequence[float], part: float) -> float:
    """The value that so large a part of the ordered ones lies below."""
    return ordered[min(len(ordered) - 1, int(part * len(ordered)))]


def _read_stamps(place: Bed, expected: int, patience: float = 30) -> list[float]:
    """Milliseconds in order, once all are there."""
    deadline = time.monotonic() + patience
    while (text := place.stamps.read_text()).count("\n") < expected:
        if time.monotonic() > deadline:
            raise PeerError(f"{place.peer.name}: {text.count(chr(10))} of {expected} stamps came")
        time.sleep(0.05)
    return sorted(int(line) / 1e6 for line in text.split())


def args(run: Run) -> Variants:
    """Jobs per second, in and out, by the size of their argument."""
    found: Variants = {}
    for name, size in SIZES.items():
        # 100 KiB are written, read, and written to disk again: a few hundred MB are enough.
        jobs = run.jobs(min(run.peer.drain_jobs, 20_000 if size < 10_000 else 2_000), 1_000)
        with run.bed() as place:
            before = place.counters()
            try:
                filled = place.fill(jobs, size)
                wal = (place.counters() - before).wal_bytes
                if run.peer.table is None:
                    drained = drain_filled(run, place, jobs, run.peer.history[0])
                else:
                    place.put_aside()
                    drained = drain_at_once(run, place, jobs, place.put_back, run.peer.history[0])
            except Unsupported as reason:
                found[name] = {"unsupported": str(reason)}
                continue
            found[name] = drained | {
                "enqueued_per_s": jobs / filled["seconds"],
                "enqueue_wal_bytes": wal / jobs,
            }
    return found


def idle(run: Run) -> Variants:
    """Transactions, WAL and CPU of a worker with nothing to do."""
    with run.bed() as place, place.worker(run.concurrency) as worker:
        warm_up(place)
        # Looks become rarer for ten seconds; what comes every five needs a while to be counted.
        time.sleep(run.seconds(10, 2))
        before, cpu, started = place.counters(), worker.cpu(), time.perf_counter()
        time.sleep(run.seconds(40, 3))
        used, seconds = place.counters() - before, time.perf_counter() - started
        return {
            "": {
                "transactions_per_s": used.transactions / seconds,
                "wal_bytes_per_s": used.wal_bytes / seconds,
                "worker_cpu_ms_per_s": (worker.cpu() - cpu) / seconds * 1e3,
                "server_cpu_ms_per_s": used.server_cpu / seconds * 1e3,
            }
        }


def memory(run: Run) -> Variants:
    """MB of an idle worker, and of each of the processes that it has more of."""
    base = run.concurrency
    more = 4
    pss = {}
    for size in (base, base + more):
        with run.bed() as place, place.worker(size) as worker:
            warm_up(place)
            time.sleep(1)
            pss[size] = worker.pss() / 1e6
    return {"": {"worker_mb": pss[base], "each_more_mb": (pss[base + more] - pss[base]) / more}}


def startup(run: Run) -> Variants:
    """Medians of fresh processes, Python's own start taken off; they take turns."""
    program = shutil.which("pgqueue", path=str(Path(sys.executable).parent)) or "pgqueue"
    commands: Mapping[str, list[str]] = {
        "python": [sys.executable, "-c", "pass"],
        "import pgqueue": [sys.executable, "-c", "import pgqueue"],
        "pgqueue --help": [program, "--help"],
    }
    times: dict[str, list[float]] = {name: [] for name in commands}
    cpu: dict[str, list[float]] = {name: [] for name in commands}
    for turn in range(run.jobs(21, 6)):
        for name, command in commands.items():
            started, used = time.perf_counter(), _children_cpu()
            subprocess.run(command, stdout=subprocess.DEVNULL, check=True)
            if turn:  # the first one reads from disk
                times[name].append((time.perf_counter() - started) * 1e3)
                cpu[name].append((_children_cpu() - used) * 1e3)
    return {
        name: {
            "beyond_ms": statistics.median(times[name]) - statistics.median(times["python"]),
            "beyond_cpu_ms": statistics.median(cpu[name]) - statistics.median(cpu["python"]),
            "python_ms": statistics.median(times["python"]),
        }
        for name in ("import pgqueue", "pgqueue --help")
    }


def _children_cpu() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


QUICK: dict[str, dict[str, Any]] = {
    "backlog": {"sizes": (1_000, 20_000), "jobs": 5_000, "rounds": 1},
    "scheduled": {"later": 20_000, "jobs": 5_000, "rounds": 1, "samples": 20},
    "held_snapshot": {"past": 10_000, "jobs": 5_000, "rounds": 1, "samples": 20},
    "lanes": {"queues": 20, "jobs": 5_000, "rounds": 1, "samples": 20},
}


def _own(name: str) -> Callable[[Run], Variants]:
    """A function of `benchmarks/own.py`, which has rounds and comparisons of its own."""

    def run_own(run: Run) -> Variants:
        own = importlib.import_module("benchmarks.own")
        return {"": _flat(getattr(own, name)(run.server.dsn, **(QUICK[name] if run.scale < 1 else {})))}

    return run_own


def _flat(found: Any, path: tuple[str, ...] = ()) -> Figures:
    """Nested figures as one level, `held / drain / rate`; the same figure of several rounds as a list."""
    if isinstance(found, Mapping):
        parts = [_flat(value, (*path, str(name))) for name, value in found.items()]
        return {name: value for part in parts for name, value in part.items()}
    if isinstance(found, list) and found and isinstance(found[0], Mapping):
        each = [_flat(value, path) for value in found]
        return {name: [one[name] for one in each if name in one] for name in each[0]}
    return {} if found is None else {" / ".join(path): found}


MEASURES = [
    Measure("drain", drain, nominal=12),
    Measure("pools", pools, compared=False, of="ours", nominal=50),
    Measure("enqueue", enqueue, nominal=60),
    Measure("wake-up", wake_up, nominal=50),
    Measure("args", args, nominal=30),
    Measure("idle", idle, compared=False, nominal=55),
    Measure("memory", memory, compared=False, nominal=10),
    Measure("startup", startup, compared=False, of="ours", nominal=15),
]
if importlib.util.find_spec("benchmarks.own") is not None:
    MEASURES += [
        Measure(name, _own(name.replace("-", "_")), compared=False, of="ours", rounds=1, nominal=300)
        for name in ("backlog", "scheduled", "held-snapshot", "lanes")
    ]
