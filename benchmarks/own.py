"""What a queue's past and its surroundings cost it: pgqueue next to the bare loop, on one server, in one run.

    python -m benchmarks.own                                     # all of it, in an embedded PostgreSQL 18
    python -m benchmarks.own held-snapshot --jobs 50000 --rounds 1
    python -m benchmarks.own backlog --sizes 10000 100000 --json own.json

The databases that are compared stand side by side and take turns, because the speed of one machine drifts by
a third within an hour: compare figures of the same round. A worker's speed is read from the history, by the
database's clock.

The bare loop is one connection with the worker's planner settings that claims 500 with SKIP LOCKED and
deletes them: no execution, no history, no fencing. `cursor`: it asks beyond the last position it took, as
lanes do. `head`: it asks for the first ready jobs, as most queues do.

Measures:

backlog        jobs/s of so many, while at least 10,000, a million, ten million others wait in the same lane.
scheduled      jobs/s of ready ones with none and with a million scheduled for later in the same table; a look
               for due jobs that finds none, or finds 500; how late a due job starts.
held-snapshot  with every dead row gone, and with a snapshot held since before 500,000 jobs went through:
               drain, jobs that become due at once, jobs of a lost worker, and how fast a lone job starts, by
               a worker that ran half of those jobs; the first two by one that was started just now; what a
               look from the beginning of each index takes.
lanes          jobs/s from one lane, and of the same number spread over 2,000; how fast a lone job starts.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import psycopg

from benchmarks.server import Server, migrated_database, pgqueue_worker, tree_cpu
from pgqueue.database.queries import query
from pgqueue.database.session import Session, open_session

EXECUTORS = 2
BATCH = 500
RESCUED = 10_000
"""Jobs of a lost worker that are taken back at once: as the worker does it."""
SAMPLES = 100
PATIENCE = 300.0
"""Seconds for anything at all."""

READY = """
INSERT INTO pgqueue.jobs (id, task, queue, priority)
SELECT {uuid}, 'noop', %(queue)s || CASE WHEN %(queues)s > 1 THEN '_' || n %% %(queues)s ELSE '' END,
       CASE WHEN %(queues)s > 1 THEN n / %(queues)s %% 10 ELSE 5 END
FROM generate_series(1, %(jobs)s) AS n
"""
SCHEDULED = """
INSERT INTO pgqueue.jobs (id, task, state, eta)
SELECT {uuid}, 'noop', 'scheduled', %(first)s::timestamptz + n * %(within)s::interval / %(jobs)s
FROM generate_series(1, %(jobs)s) AS n
"""
LOST = """
INSERT INTO pgqueue.jobs (id, task, state, attempt, worker_id, claimed_at)
SELECT {uuid}, 'noop', 'running', 1, %(worker)s, now() - interval '1 minute'
FROM generate_series(1, %(jobs)s) AS n
"""

CLAIM = """
UPDATE pgqueue.jobs SET state = 'running', attempt = attempt + 1, worker_id = 'bare', claimed_at = now()
WHERE id = ANY (ARRAY(
    SELECT id FROM pgqueue.jobs
    WHERE state = 'ready' AND queue = 'default' AND priority = 5 AND position > %s
    ORDER BY position LIMIT %s FOR UPDATE SKIP LOCKED))
RETURNING id, position
"""
PROMOTE = """
UPDATE pgqueue.jobs SET state = 'ready', position = nextval('pgqueue.jobs_position_seq')
WHERE id = ANY (ARRAY(
    SELECT id FROM pgqueue.jobs WHERE state = 'scheduled' AND eta >= %s AND eta <= now()
    ORDER BY eta LIMIT %s FOR UPDATE SKIP LOCKED))
RETURNING id, eta
"""
RESCUE = """
UPDATE pgqueue.jobs SET state = 'ready', position = nextval('pgqueue.jobs_position_seq'), worker_id = NULL
WHERE id = ANY (ARRAY(
    SELECT id FROM pgqueue.jobs WHERE state = 'running' AND worker_id = %s LIMIT %s FOR UPDATE SKIP LOCKED))
RETURNING id
"""
BEGINNING = "-infinity"


def say(text: str) -> None:
    """Progress."""
    print(f"{time.strftime('%H:%M:%S')} {text}", file=sys.stderr, flush=True)


@dataclass
class Bed:
    """A database that measures are taken in.

    Attributes:
        bare: The bare loop's own connection.
        uuid: What makes an id; the server's own function is the faster one.
    """

    dsn: str
    connection: psycopg.Connection[Any]
    bare: psycopg.Connection[Any]
    session: Session
    uuid: str

    def ask(self, text: str, **parameters: object) -> Any:
        """The first column of the first row."""
        row = self.connection.execute(text, parameters).fetchone()
        assert row is not None
        return row[0]

    def insert(self, text: str, jobs: int, **parameters: object) -> None:
        """So many jobs, of which nobody is told."""
        given = {"jobs": jobs, "queues": 1, "queue": "default", **parameters}
        self.connection.execute(text.format(uuid=self.uuid).encode(), given)

    def fill(self, text: str, jobs: int, **parameters: object) -> None:
        """So many jobs, visible all at once, of which sleeping workers are told."""
        with self.connection.transaction():
            self.insert(text, jobs, **parameters)
            self.connection.execute(
                "SELECT pgqueue.wake_workers(array(SELECT queue FROM pgqueue.wake), now())"
            )

    def forget(self) -> None:
        """Empty the history, of which the next figures are made."""
        self.connection.execute("TRUNCATE pgqueue.finished_jobs")

    def vacuum(self) -> None:
        """Clear away what can be, and let the disk rest."""
        self.connection.execute("VACUUM pgqueue.jobs")
        self.connection.execute("CHECKPOINT")

    def finished(self) -> int:
        """Jobs in the history."""
        return int(self.ask("SELECT count(*) FROM pgqueue.finished_jobs"))

    def wait(self, jobs: int, pause: float = 0.1) -> None:
        """Until so many jobs have finished."""
        deadline = time.monotonic() + PATIENCE
        while (finished := self.finished()) < jobs:
            if time.monotonic() > deadline:
                raise SystemExit(f"own: {finished} of {jobs} jobs finished in {PATIENCE:.0f} s")
            time.sleep(pause)

    def rate(self, jobs: int) -> float:
        """Jobs per second of the first so many in the history."""
        seconds = self.ask(
            "SELECT extract(epoch FROM (SELECT finished_at FROM pgqueue.finished_jobs"
            " ORDER BY finished_at OFFSET %(jobs)s - 1 LIMIT 1) - min(started_at))::float8"
            " FROM pgqueue.finished_jobs",
            jobs=jobs,
        )
        return jobs / float(seconds)


@contextmanager
def bed(server_dsn: str) -> Iterator[Bed]:
    """A database of its own, on which the worker's planner settings hold for the bare loop too."""
    with ExitStack() as stack:
        dsn = stack.enter_context(migrated_database(server_dsn))
        connection = stack.enter_context(psycopg.connect(dsn, autocommit=True))
        bare = stack.enter_context(psycopg.connect(dsn, autocommit=True))
        for setting in ("enable_seqscan", "enable_bitmapscan", "enable_sort", "jit"):
            bare.execute(f"SET {setting} = off")
        session = stack.enter_context(open_session(dsn))
        uuid = "uuidv7()" if connection.info.server_version >= 180000 else "pgqueue.uuid7()"
        yield Bed(dsn, connection, bare, session, uuid)


@contextmanager
def worker(bed: Bed, warm: Sequence[str] = ("default",)) -> Iterator[psutil.Process]:
    """A real worker that has run a hundred jobs in each of the `warm` queues, and is idle."""
    with pgqueue_worker(bed.dsn, "-c", str(EXECUTORS)) as process:
        bed.forget()
        for queue in warm:
            bed.fill(READY, 100, queue=queue)
        bed.wait(100 * len(warm), 0.02)
        time.sleep(0.2)  # it has looked once more, and sleeps
        bed.forget()
        yield process


class Cpu:
    """User and system seconds that a worker and the server have used since this was made."""

    def __init__(self, bed: Bed, process: psutil.Process) -> None:
        postmaster = psutil.Process(bed.connection.info.backend_pid).parent()
        assert postmaster is not None
        self._roots = [[process], [postmaster]]
        self._before = [tree_cpu(roots) for roots in self._roots]

    def per_job(self, jobs: int) -> dict[str, float]:
        """Microseconds per job."""
        used = [tree_cpu(roots) - before for roots, before in zip(self._roots, self._before, strict=True)]
        return {"worker_us": used[0] / jobs * 1e6, "server_us": used[1] / jobs * 1e6}


def drain(
    bed: Bed, process: psutil.Process, jobs: int, fill: str = READY, **parameters: object
) -> dict[str, float]:
    """An idle worker and so many jobs, all there at once."""
    bed.forget()
    bed.vacuum()
    with bed.connection.transaction():
        # In order, so that it counts the work on the jobs only: the worker sees none of them yet.
        bed.fill(fill, jobs, **parameters)
        cpu = Cpu(bed, process)
    bed.wait(jobs)
    return {"rate": bed.rate(jobs), **cpu.per_job(jobs)}


def drain_part(bed: Bed, jobs: int) -> dict[str, float]:
    """A worker, and more jobs than it is given the time for: the first so many. Takes them all back in."""
    reason = "benchmark"
    bed.ask("SELECT pgqueue.pause_queue('default', %(reason)s, %(reason)s, NULL)", reason=reason)
    bed.vacuum()
    with worker(bed, warm=["warm"]) as process:
        cpu = Cpu(bed, process)
        bed.ask("SELECT pgqueue.resume_queue('default', %(reason)s, %(reason)s)", reason=reason)
        bed.wait(jobs)
        used = cpu.per_job(bed.finished())
        bed.ask("SELECT pgqueue.pause_queue('default', %(reason)s, %(reason)s, NULL)", reason=reason)
    return {"rate": bed.rate(jobs), **used}


def bare_drain(bed: Bed, jobs: int, *, cursor: bool) -> dict[str, float]:
    """Jobs per second of the bare loop, out of those that are there."""
    bed.vacuum()
    started, taken, last = time.perf_counter(), 0, 0
    while taken < jobs:
        rows = bed.bare.execute(CLAIM, [last, BATCH]).fetchall()
        assert rows, f"{taken} of {jobs} jobs were there"
        bed.bare.execute("DELETE FROM pgqueue.jobs WHERE id = ANY (%s)", [[row[0] for row in rows]])
        taken += len(rows)
        last = max(row[1] for row in rows) if cursor else 0
    return {"rate": taken / (time.perf_counter() - started)}


def last_position(bed: Bed) -> int:
    """Where the sequence is: beyond all jobs there are."""
    return int(bed.ask("SELECT last_value FROM pgqueue.jobs_position_seq"))


def backlog(
    server: str,
    *,
    sizes: Sequence[int] = (10_000, 1_000_000, 10_000_000),
    jobs: int = 50_000,
    rounds: int = 3,
) -> dict[str, Any]:
    """Speed while so many others wait, at each size; the ratio is the last size's to the first's."""
    runs: dict[int, dict[str, list[Any]]] = {size: {"pgqueue": [], "bare": []} for size in sizes}
    filled: dict[int, float] = {}
    with ExitStack() as stack:
        beds = {size: stack.enter_context(bed(server)) for size in sizes}
        for n in range(rounds):
            for size, there in beds.items():
                started = time.perf_counter()
                top_up(there, size + 3 * jobs)
                if n == 0:
                    there.connection.execute("VACUUM ANALYZE pgqueue.jobs")
                    filled[size] = time.perf_counter() - started
                    say(f"backlog: {size:,} jobs made in {filled[size]:.1f} s")
                runs[size]["pgqueue"].append(drain_part(there, jobs))
                runs[size]["bare"].append(bare_drain(there, jobs, cursor=True))
                say(
                    f"backlog: {size:,} waiting: {runs[size]['pgqueue'][-1]['rate']:,.0f} jobs/s,"
                    f" bare loop {runs[size]['bare'][-1]['rate']:,.0f}"
                )
    return {
        "jobs": jobs,
        "fill_seconds": filled,
        "sizes": runs,
        "ratio": _kept(runs[sizes[-1]], runs[sizes[0]]),
    }


def top_up(bed: Bed, jobs: int) -> None:
    """As many ready jobs in the lane as this, in steps that a server of any size can hold in its memory."""
    head = (
        "SELECT min(position) FROM (SELECT position FROM pgqueue.jobs WHERE state = 'ready'"
        " AND queue = 'default' AND priority = 5 ORDER BY position LIMIT 1) AS first"
    )
    first = bed.ask(head)
    # Positions are taken in order, and nobody else takes any: no need to count ten million rows.
    waiting = 0 if first is None else last_position(bed) - first + 1
    while waiting < jobs:
        some = min(1_000_000, jobs - waiting)
        bed.fill(READY, some)
        waiting += some


def scheduled(
    server: str,
    *,
    later: int = 1_000_000,
    jobs: int = 50_000,
    rounds: int = 3,
    samples: int = SAMPLES,
) -> dict[str, Any]:
    """Ready and due jobs beside none and beside so many that are due in a month; ratios are beside / none."""
    runs: dict[str, dict[str, list[Any]]] = {"none": {}, "beside": {}}
    with ExitStack() as stack:
        beds = {name: stack.enter_context(bed(server)) for name in runs}
        started = time.perf_counter()
        for _ in range(0, later, 1_000_000):
            first = beds["beside"].ask("SELECT now() + interval '30 days'")
            beds["beside"].fill(SCHEDULED, min(later, 1_000_000), first=first, within="10 days")
        for there in beds.values():
            there.connection.execute("VACUUM ANALYZE pgqueue.jobs")
        say(f"scheduled: {later:,} jobs made in {time.perf_counter() - started:.1f} s")
        for _ in range(rounds):
            for name, there in beds.items():
                with worker(there) as process:
                    _note(runs[name], "drain", drain(there, process, jobs))
                    _note(runs[name], "late_ms", late(there, samples))
                there.fill(READY, jobs)
                _note(runs[name], "bare", bare_drain(there, jobs, cursor=True))
                _note(runs[name], "look_ms", promotion_passes(there, due=0))
                _note(runs[name], "promote_ms", promotion_passes(there, due=BATCH))
                _tell("scheduled", name, runs[name])
    return {"jobs": jobs, "later": later, "runs": runs, "ratio": _kept(runs["beside"], runs["none"])}


def late(bed: Bed, samples: int) -> list[float]:
    """Milliseconds from the eta of lone jobs to their start, sorted."""
    bed.forget()
    for n in range(samples):
        bed.connection.execute(
            "SELECT pgqueue.enqueue('noop', eta => clock_timestamp() + %s * interval '1 millisecond')",
            [150 + 7 * (n % 11)],
        )
        time.sleep(0.05)
    bed.wait(samples)
    return _milliseconds(bed, "started_at - eta")


def wake_up(bed: Bed, samples: int, queue: str = "default") -> list[float]:
    """Milliseconds from the enqueue of lone jobs to their start, sorted."""
    bed.forget()
    time.sleep(1.5)  # the rush of what was before is over
    for n in range(samples):
        bed.connection.execute("SELECT pgqueue.enqueue('noop', queue => %s)", [queue])
        time.sleep(0.05 + 0.001 * (n % 7))
    bed.wait(samples)
    return _milliseconds(bed, "started_at - enqueued_at")


def _milliseconds(bed: Bed, what: str) -> list[float]:
    rows = bed.connection.execute(
        f"SELECT extract(epoch FROM {what})::float8 * 1000 FROM pgqueue.finished_jobs ORDER BY 1"
    ).fetchall()
    return [row[0] for row in rows]


def bare_wake_up(bed: Bed, samples: int, *, cursor: bool) -> list[float]:
    """Milliseconds from the insert of lone jobs to the bare loop having claimed and deleted them, sorted."""
    times = []
    last = last_position(bed) if cursor else 0
    bed.bare.execute("LISTEN bare")
    for _ in range(samples):
        with bed.connection.transaction():
            bed.insert(READY, 1)
            bed.connection.execute("NOTIFY bare")
        assert list(bed.bare.notifies(timeout=10, stop_after=1))
        ((job, position),) = bed.bare.execute(CLAIM, [last, BATCH]).fetchall()
        gone = "DELETE FROM pgqueue.jobs WHERE id = %s RETURNING clock_timestamp() - enqueued_at"
        row = bed.bare.execute(gone, [job]).fetchone()
        assert row is not None
        times.append(row[0].total_seconds() * 1000)
        last = position if cursor else 0
    bed.bare.execute("UNLISTEN *")
    return sorted(times)


def promotion_passes(bed: Bed, *, due: int, passes: int = 10) -> list[float]:
    """Milliseconds of the worker's look for due jobs and for the next eta, from the beginning of the index;
    `due` jobs are made ready by each. No worker may be up.
    """
    times = []
    for _ in range(passes):
        if due:
            bed.insert(SCHEDULED, due, first=bed.ask("SELECT now()"), within="1 ms")
            time.sleep(0.01)
        with bed.session.transaction(by_index=True):
            started = time.perf_counter()
            (row,) = bed.session.run(
                "promote_jobs", after=float("-inf"), upto=None, mark=False, now=None, batch=BATCH
            )
        times.append((time.perf_counter() - started) * 1000)
        assert row["promoted"] == due
        bed.connection.execute("DELETE FROM pgqueue.jobs WHERE state = 'ready'")
    return sorted(times)


def sweep_passes(bed: Bed, passes: int = 10) -> dict[str, list[float]]:
    """Milliseconds of what the worker does every few seconds from the beginning of an index, with nothing to
    find: a claim from every lane, a look for due jobs, and for jobs of a lost worker. By an idle worker's
    name, which must be up.
    """
    name = bed.ask("SELECT max(id) FROM pgqueue.workers WHERE NOT fenced")
    claim = {"worker": name, "queues": ["default"] * 10, "priorities": list(range(9, -1, -1))}
    claim |= {"after": [-(2**63)] * 10, "upto": [2**63 - 1] * 10, "most": [BATCH] * 10, "batch": BATCH}
    claim |= {"bare": False, "tasks": None, "but": False}
    rescue = {"batch": RESCUED, "max_crashes": 3, "max_rescues": 10, "once": []}
    rescue |= {"dead_letter_queues": "{}", "task_max_crashes": "{}"}
    acts: dict[str, dict[str, Any]] = {
        "claim_jobs": claim,
        "promote_jobs": {"after": float("-inf"), "upto": None, "mark": False, "now": None, "batch": BATCH},
        "rescue_jobs": rescue,
        "find_cancelled": {"worker": name, "ids": []},
        "list_claimed": {"worker": name},
    }
    times: dict[str, list[float]] = {act: [] for act in acts}
    for act, parameters in acts.items():
        for _ in range(passes):
            with bed.session.transaction(by_index=True):
                started = time.perf_counter()
                bed.session.execute(query(act).text, parameters)
                times[act].append((time.perf_counter() - started) * 1000)
    return {act: sorted(each) for act, each in times.items()}


def held_snapshot(
    server: str,
    *,
    past: int = 500_000,
    jobs: int = 100_000,
    rounds: int = 3,
    samples: int = SAMPLES,
) -> dict[str, Any]:
    """What `past` jobs cost that went through while a snapshot was held; ratios are held / clean.

    They were scheduled, due at once, ready, run and done, by two workers: one that is gone, and lost the jobs
    that are rescued later, and one that goes on. From the head the loops take fewer jobs: it takes long.
    """
    runs: dict[str, dict[str, list[Any]]] = {"clean": {}, "held": {}}
    lost: dict[str, str] = {}
    with ExitStack() as stack:
        beds = {name: stack.enter_context(bed(server)) for name in runs}
        holder = stack.enter_context(psycopg.connect(beds["held"].dsn))
        holder.isolation_level = psycopg.IsolationLevel.REPEATABLE_READ
        holder.execute("SELECT 1")
        for name, there in beds.items():
            with worker(there):
                _note(runs[name], "past", {"rate": pass_through(there, past // 2)})
                lost[name] = there.ask("SELECT worker_id FROM pgqueue.finished_jobs LIMIT 1")
        with ExitStack() as up:
            workers = {name: up.enter_context(worker(there)) for name, there in beds.items()}
            for name, there in beds.items():
                _note(runs[name], "past", {"rate": pass_through(there, past - past // 2)})
                there.vacuum()
                there.connection.execute("ANALYZE pgqueue.jobs")
                _note(runs[name], "dead_rows", dead_rows(there))
                _tell("held-snapshot", name, runs[name])
            assert runs["held"]["dead_rows"][0] >= past, "the snapshot holds nothing"
            for _ in range(rounds):
                for name, there in beds.items():
                    _note(runs[name], "drain", drain(there, workers[name], jobs))
                    _note(runs[name], "promote", promote(there, jobs))
                    _note(runs[name], "rescue", rescue(there, jobs // 5, lost[name]))
                    _note(runs[name], "wake_up_ms", wake_up(there, samples))
                    _note(runs[name], "sweep_ms", sweep_passes(there))
                    _tell("held-snapshot", name, runs[name])
        for _ in range(rounds):
            for name, there in beds.items():
                # One that was started just now has no cursors yet.
                with worker(there) as process:
                    _note(runs[name], "fresh_drain", drain(there, process, jobs))
                with worker(there):
                    _note(runs[name], "fresh_promote", promote(there, jobs))
                for how in ("cursor", "head"):
                    cursor = how == "cursor"
                    some = jobs if cursor else max(jobs // 10, BATCH)
                    there.fill(READY, some)
                    _note(runs[name], f"bare_drain_{how}", bare_drain(there, some, cursor=cursor))
                    _note(runs[name], f"bare_promote_{how}", bare_promote(there, some, cursor=cursor))
                    _note(runs[name], f"bare_wake_up_{how}_ms", bare_wake_up(there, samples, cursor=cursor))
                _note(runs[name], "bare_rescue", bare_rescue(there, max(jobs // 50, BATCH), lost[name]))
                _tell("held-snapshot", name, runs[name])
    return {"jobs": jobs, "past": past, "runs": runs, "ratio": _kept(runs["held"], runs["clean"])}


def pass_through(bed: Bed, jobs: int) -> float:
    """Jobs per second that are scheduled in the past, ready, run and done."""
    bed.forget()
    started = time.perf_counter()
    for done in range(0, jobs, 50_000):
        first = bed.ask("SELECT now()")
        bed.fill(SCHEDULED, min(50_000, jobs - done), first=first, within="1 ms")
    bed.wait(jobs, 0.5)
    return jobs / (time.perf_counter() - started)


def dead_rows(bed: Bed) -> int:
    """As the last VACUUM has counted them."""
    return int(bed.ask("SELECT n_dead_tup FROM pg_stat_user_tables WHERE relid = 'pgqueue.jobs'::regclass"))


def promote(bed: Bed, jobs: int) -> dict[str, float]:
    """Jobs per second that become due at once: from their eta to the last one's end."""
    bed.forget()
    bed.vacuum()
    first = bed.ask("SELECT now() + interval '2 seconds'")
    bed.fill(SCHEDULED, jobs, first=first, within="100 ms")
    bed.wait(jobs)
    last = "SELECT extract(epoch FROM max(finished_at) - %(first)s)::float8 FROM pgqueue.finished_jobs"
    return {"rate": jobs / float(bed.ask(last, first=first))}


def rescue(bed: Bed, jobs: int, lost: str) -> dict[str, float]:
    """Jobs per second that a lost worker held: from the first one's start to the last one's end."""
    bed.forget()
    bed.vacuum()
    bed.fill(LOST, jobs, worker=lost)
    bed.wait(jobs)
    return {"rate": bed.rate(jobs)}


def bare_promote(bed: Bed, jobs: int, *, cursor: bool) -> dict[str, float]:
    """Jobs per second that a loop makes ready, all of them due."""
    bed.vacuum()
    first = bed.ask("SELECT now() - interval '10 milliseconds'")
    bed.fill(SCHEDULED, jobs, first=first, within="1 ms")
    started, taken = time.perf_counter(), 0
    after: object = BEGINNING
    while taken < jobs:
        rows = bed.bare.execute(PROMOTE, [after, BATCH]).fetchall()
        assert rows, f"{taken} of {jobs} jobs were due"
        taken += len(rows)
        after = max(row[1] for row in rows) if cursor else after
    seconds = time.perf_counter() - started
    bed.bare.execute("DELETE FROM pgqueue.jobs")
    return {"rate": taken / seconds}


def bare_rescue(bed: Bed, jobs: int, lost: str) -> dict[str, float]:
    """Jobs per second that a loop takes back from a lost worker."""
    bed.vacuum()
    bed.fill(LOST, jobs, worker=lost)
    started, taken = time.perf_counter(), 0
    while taken < jobs:
        taken += len(bed.bare.execute(RESCUE, [lost, RESCUED]).fetchall())
    seconds = time.perf_counter() - started
    bed.bare.execute("DELETE FROM pgqueue.jobs")
    return {"rate": taken / seconds}


def lanes(
    server: str, *, queues: int = 200, jobs: int = 50_000, rounds: int = 3, samples: int = SAMPLES
) -> dict[str, Any]:
    """So many jobs in one lane, and in all ten lanes of each of so many queues; ratios are spread / one."""
    runs: dict[str, dict[str, list[Any]]] = {"one": {}, "spread": {}}
    names = {"one": ["default"], "spread": [f"default_{n}" for n in range(queues)]}
    with ExitStack() as stack:
        beds = {name: stack.enter_context(bed(server)) for name in runs}
        workers = {name: stack.enter_context(worker(each, names[name])) for name, each in beds.items()}
        for _ in range(rounds):
            for name, there in beds.items():
                spread = queues if name == "spread" else 1
                _note(runs[name], "drain", drain(there, workers[name], jobs, queues=spread))
                _note(runs[name], "wake_up_ms", wake_up(there, samples, names[name][-1]))
                _tell("lanes", name, runs[name])
    ratio = _kept(runs["spread"], runs["one"])
    return {"jobs": jobs, "lanes": queues * 10, "runs": runs, "ratio": ratio}


def _note(runs: dict[str, list[Any]], what: str, figure: Any) -> None:
    runs.setdefault(what, []).append(figure)


def _tell(measure: str, name: str, runs: dict[str, list[Any]]) -> None:
    """The last figure of each kind."""
    lines = [f"{measure}: {name}"]
    for what, figures in runs.items():
        last = figures[-1]
        if isinstance(last, list):
            lines.append(
                f"{what:22} p50 {statistics.median(last):.2f}, p99 {last[int(len(last) * 0.99)]:.2f}"
            )
        elif isinstance(last, dict):
            each = {
                key: statistics.median(value) if isinstance(value, list) else value
                for key, value in last.items()
            }
            lines.append(
                f"{what:22} "
                + ", ".join(f"{key} {value:,.{2 if value < 1000 else 0}f}" for key, value in each.items())
            )
        else:
            lines.append(f"{what:22} {last:,}")
    say("\n    ".join(lines))


def _kept(these: dict[str, list[Any]], those: dict[str, list[Any]]) -> dict[str, list[float]]:
    """Round by round, how much of the speed is left in `these`: of rates, and of median times in reverse."""
    kept = {}
    for what, runs in these.items():
        pairs = list(zip(runs, those[what], strict=True))
        if what.endswith("_ms") and isinstance(runs[0], list):
            kept[what] = [statistics.median(that) / statistics.median(this) for this, that in pairs]
        elif isinstance(runs[0], dict) and "rate" in runs[0]:
            kept[what] = [this["rate"] / that["rate"] for this, that in pairs]
    return kept


MEASURES: dict[str, Callable[..., dict[str, Any]]] = {
    "backlog": backlog,
    "scheduled": scheduled,
    "held-snapshot": held_snapshot,
    "lanes": lanes,
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("measures", nargs="*", choices=[*MEASURES, []], help="default: all")
    parser.add_argument("--dsn", help="a server to make databases on (default: an embedded PostgreSQL)")
    parser.add_argument("--jobs", type=int, help="in each run")
    parser.add_argument("--rounds", type=int)
    parser.add_argument("--sizes", type=int, nargs="+", help="backlog: jobs that wait")
    parser.add_argument("--later", type=int, help="scheduled: jobs that are due in a month")
    parser.add_argument("--past", type=int, help="held-snapshot: jobs that went through before")
    parser.add_argument("--queues", type=int, help="lanes: queues of ten lanes each")
    parser.add_argument("--samples", type=int, help="lone jobs in each run, where there are some")
    parser.add_argument("--json", type=Path, help="write all figures there")
    arguments = parser.parse_args()
    takes = {
        "backlog": ("sizes",),
        "scheduled": ("later", "samples"),
        "held-snapshot": ("past", "samples"),
        "lanes": ("queues", "samples"),
    }
    figures = {}
    with ExitStack() as stack:
        server = stack.enter_context(Server(arguments.dsn)).dsn
        for name in arguments.measures or MEASURES:
            given = {key: getattr(arguments, key) for key in ("jobs", "rounds", *takes[name])}
            given = {key: value for key, value in given.items() if value is not None}
            figures[name] = MEASURES[name](server, **given)
            if arguments.json:
                arguments.json.write_text(json.dumps(figures, indent=2) + "\n")
            else:
                print(json.dumps({name: figures[name]["ratio"]}))


if __name__ == "__main__":
    main()
