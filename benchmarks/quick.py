"""Whether a change has made the queue dearer: ratios that hold on any machine, in half a minute.

    python benchmarks/quick.py              # exit status 1 when a bound is broken; `make test` runs it
    python benchmarks/quick.py --rounds 10  # how far the figures spread here

Each round runs the bare loop, and then a worker's drain, with as many no-op jobs on the same server. No bound
is a time: a slow machine is as good as a fast one, and a busy one hardly worse. Which indexes the hot
statements use, on bloated tables and with old statistics, is held by tests/integration/test_plans.py.
"""

from __future__ import annotations

import argparse
import re
import statistics
import sys
import tempfile
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import psutil

from pgqueue.benchmark import Worker, queue_for_benchmark
from pgqueue.database import benchmark as stage
from pgqueue.database.embedded import EmbeddedPostgres
from pgqueue.noop import TASK

JOBS = 20_000
EXECUTORS = 2

SETTINGS = {
    # A checkpoint or a vacuum in one of two runs would make a difference that is not theirs.
    "checkpoint_timeout": "1h",
    "max_wal_size": "8GB",
    "autovacuum": "off",
    # Without parameters, which are a megabyte a drain. Our own sessions turn it off.
    "log_statement": "all",
    "log_parameter_max_length": "0",
    "log_line_prefix": "",
}

_STATEMENT = re.compile(rb"^LOG:  (?:statement|execute [^:]+): (\w+)", re.MULTILINE)


@dataclass(frozen=True)
class Round:
    """What one round came to; BOUNDS says what each of them is."""

    speed: float
    cpu: float
    wal: float
    statements: float
    transactions: float


@dataclass(frozen=True)
class Bound:
    """What the median of the rounds must be.

    Attributes:
        what: The measure, in words.
    """

    what: str
    least: float = 0.0
    most: float = float("inf")

    def __str__(self) -> str:
        return f"at least {self.least:g}" if self.least else f"at most {self.most:g}"


# Above each: what the medians of three to five rounds were, single rounds in parentheses, on 2 CPUs that
# others kept busy (a load of 6 to 9); and what it was with something broken on purpose.
BOUNDS = {
    # 0.34 to 0.43 (0.08 to 0.92). In chunks of one job: 0.19.
    "speed": Bound("jobs/s, worker / bare loop", least=0.2),
    # 2.0 to 2.5 (1.8 to 2.6). In chunks of one job: 3.6.
    "cpu": Bound("CPU per job, worker and server / bare loop and server", most=3.2),
    # 1.36 to 1.38. With 60 bytes more in each claimed row: 1.55.
    "wal": Bound("bytes of the server's log per job, worker / bare loop", most=1.45),
    # 4.05 to 4.07: BEGIN, the settings, one for the work, COMMIT; the few looks for due jobs set timeouts of
    # their own. With a pointless one in each: 5.00.
    "statements": Bound("statements of the worker per transaction", most=4.3),
    # 7.1 to 9.0 (5.9 to 10.5): claims and acks of 500 jobs, not all of them full. With claims of 50: 45.
    "transactions": Bound("transactions of the worker per 1,000 jobs", most=15),
}


class Scene:
    """A server with two queues: one for the bare loop, one with a worker."""

    def __init__(self, stack: ExitStack) -> None:
        home = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="pgqueue-quick-")))
        home.chmod(0o711)  # for the user that Postgres runs as when we are root
        dsn = stack.enter_context(EmbeddedPostgres(home, settings=SETTINGS)).dsn
        self._log = home / "cluster" / "server.log"
        self._postmaster = psutil.Process(int((home / "cluster" / "postmaster.pid").read_text().split()[0]))
        self._bare, _ = stack.enter_context(queue_for_benchmark(dsn))
        self._queue, keeper = stack.enter_context(queue_for_benchmark(dsn))
        for session in (self._bare, self._queue):
            session.connection.execute("SET log_statement = 'none'")
        self._worker = stack.enter_context(Worker(self._queue, dsn, ["-c", str(EXECUTORS)], keeper=keeper))

    def round(self) -> Round:
        """The bare loop, then the worker."""
        ourselves = [psutil.Process()]
        before = self._used(ourselves)
        stage.truncate(self._bare)
        self._bare.run("fill_queue", jobs=JOBS, task=TASK)
        self._bare.connection.execute(f"ANALYZE {self._bare.schema}.jobs".encode())
        looped = stage.bare_loop(self._bare, lambda _: None)
        bare_cpu, bare_wal = self._used(ourselves, since=before)

        supervisor = psutil.Process(self._worker.process.pid)
        family = [supervisor, *supervisor.children(recursive=True)]
        logged, before = self._log.stat().st_size, self._used(family)
        drained = self._worker.drain(JOBS, lambda _: None)
        cpu, wal = self._used(family, since=before)
        statements = _STATEMENT.findall(self._log.read_bytes(), logged)
        commits = statements.count(b"COMMIT")

        return Round(
            speed=drained.rate / looped.rate,
            cpu=cpu / bare_cpu,
            wal=wal / bare_wal,
            statements=len(statements) / commits,
            transactions=1000 * commits / JOBS,
        )

    def _used(
        self, clients: list[psutil.Process], *, since: tuple[float, int] = (0.0, 0)
    ) -> tuple[float, int]:
        """Seconds of CPU of these processes and the server's, and bytes of the server's log."""
        times = [each.cpu_times() for each in [*clients, *self._postmaster.children()]]
        (row,) = self._bare.execute("SELECT pg_current_wal_insert_lsn() - '0/0' AS wal", {})
        return sum(each.user + each.system for each in times) - since[0], int(row["wal"]) - since[1]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    with ExitStack() as stack:
        scene = Scene(stack)
        rounds = [scene.round() for _ in range(arguments.rounds)]
    broken = False
    for name, bound in BOUNDS.items():
        values = [getattr(each, name) for each in rounds]
        middle = statistics.median(values)
        holds = bound.least <= middle <= bound.most
        broken |= not holds
        spread = f"{middle:6.2f} ({min(values):.2f}-{max(values):.2f})"
        print(f"{'ok' if holds else 'BROKEN':6}  {spread:22}  {bound!s:14}  {bound.what}")
    if broken:
        sys.exit(
            "quick: the queue has become dearer; what each bound was measured at is in benchmarks/quick.py"
        )


if __name__ == "__main__":
    main()
