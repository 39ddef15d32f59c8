"""Each database call of one fixed scenario is broken once, before and after it takes effect.

After the fault nobody helps: the program has fifteen seconds to end every job exactly once. Calls are counted
per kind of connection, so that what others happen to say meanwhile does not shift the count.
"""

from __future__ import annotations

import random
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import psycopg
import pytest

from pgqueue import PgQueue, Signature
from pgqueue.errors import EnqueueUncertain, PgQueueError
from pgqueue.job import new_id
from tests.acceptance.workers import Jobs, Worker, Workers, eventually
from tests.faults.nth_call_proxy import SQLSTATES, Fault, How, NthCallProxy, proxied

T = TypeVar("T")

RECOVERY = 15.0
"""Seconds a run may take, its fault included."""
SEED = 20
PRODUCER_KINDS = ("client", "caller")
WORKER_KINDS = ("claim", "maintenance", "listen")
MOST_CALLS = 400
"""A scenario that makes more calls than this over one kind of connection does not come to rest."""


@dataclass
class Tally:
    """What the producers of one run were told."""

    acknowledged: dict[str, str] = field(default_factory=dict)
    refusals: list[str] = field(default_factory=list)

    def add(self, what: str, *ids: str) -> None:
        for job in ids:
            assert job not in self.acknowledged, f"{job} was given to two calls"
            self.acknowledged[job] = what


@dataclass
class Place:
    """A worker behind the proxy, and a direct view of its database."""

    proxy: NthCallProxy
    jobs: Jobs
    workers: Workers

    def start_worker(self, *, ready: bool = True) -> Worker:
        return self.workers.start("-c", "1", "--heartbeat", "1", "--lease", "3", ready=ready)

    def empty(self) -> None:
        for table in ("jobs", "finished_jobs", "dead_letters", "failures"):
            self.jobs.sql(f"delete from pgqueue.{table}")
        self.jobs.sql("delete from orders")

    def connections(self) -> Counter[str]:
        rows = self.jobs.sql(
            "select application_name as name from pg_stat_activity where datname = current_database()"
            " and backend_type = 'client backend' and pid <> pg_backend_pid()"
        )
        return Counter(str(row["name"]) for row in rows)


@pytest.fixture
def place(db: str, tmp_path: Path) -> Iterator[Place]:
    with closing(Jobs(db)) as jobs:
        jobs.sql("create table orders (id integer primary key, job_id uuid)")
        try:
            with proxied(db) as proxy, Workers(proxy.dsn, tmp_path) as workers:
                yield Place(proxy, jobs, workers)
        finally:
            jobs.sql("drop table orders")


def insist(call: Callable[[str | None], T], tally: Tally, job_id: str | None = None) -> T:
    """What a careful producer does: repeat what was refused, with the same id when that is uncertain."""
    deadline = time.monotonic() + RECOVERY
    while True:
        try:
            return call(job_id)
        except EnqueueUncertain as error:
            job_id = error.job_id
            problem: Exception = error
        except (psycopg.Error, PgQueueError) as error:
            problem = error
        tally.refusals.append(f"{type(problem).__name__}: {problem}")
        if time.monotonic() > deadline:
            raise problem


def produce(place: Place) -> Tally:
    """The producers' part of the scenario, through the proxy."""
    tally = Tally()
    app = PgQueue("client", dsn=place.proxy.dsn)

    def send(task: str, *args: object, **options: Any) -> Callable[[str | None], str]:
        def call(job_id: str | None) -> str:
            given = {"job_id": job_id} if job_id else {}
            return app.send_task(f"tests_app.{task}", args, **options, **given).id

        return call

    try:
        tally.add("plain", insist(send("mark", "plain"), tally))
        tally.add("later", insist(send("mark", "later", countdown=0.1), tally))
        calls = [Signature("tests_app.mark", (f"many {n}",), {}, {}) for n in range(5)]
        tally.add("many", *insist(lambda _: app.enqueue_many(calls), tally))
        place_order(place, app, tally)
        own = new_id()
        tally.add("own id", insist(send("mark", "own id"), tally, own))
        assert own in tally.acknowledged
        tally.add("large", insist(send("mark", "x" * 20_000), tally))
        tally.add("retried", insist(send("fails_until", 2), tally))
        tally.add("dead", insist(send("fails_but_not_as_child"), tally))
        tally.add("crashed", insist(send("die", "kill", 1), tally))
    finally:
        app.close()
    return tally


def place_order(place: Place, app: PgQueue, tally: Tally) -> None:
    """An order and its job in one transaction of the caller's, who looks what became of a lost COMMIT."""

    def order(_: str | None) -> str:
        dsn = place.proxy.dsn
        with psycopg.connect(dsn, application_name="caller", connect_timeout=5) as connection:
            connection.execute("insert into orders (id) values (1)")
            job = app.send_task("tests_app.mark", ("order",), connection=connection).id
            connection.execute("update orders set job_id = %s where id = 1", [job])
        return job

    def look_and_order(_: str | None) -> str:
        placed = place.jobs.sql("select job_id::text as job from orders")
        return str(placed[0]["job"]) if placed else order(None)

    tally.add("order", insist(look_and_order, tally))


def drain(place: Place, deadline: float) -> None:
    """Until no job is live; what waits for its process to have died waits no longer than it takes."""
    while live := place.jobs.sql("select id::text as id, state, crashes from pgqueue.jobs"):
        for row in live:
            if row["state"] == "scheduled" and row["crashes"]:
                place.jobs.make_due(row["id"])
        if time.monotonic() > deadline:
            everything = place.jobs.sql("select * from pgqueue.jobs")
            raise AssertionError(f"jobs did not end within {RECOVERY:g} s: {everything}")
        time.sleep(0.01)


SUCCEEDED = ("succeeded", 0, 0, 0)
ENDS = {
    "retried": ("succeeded", 1, 0, 1),
    "dead": ("dead", 0, 0, 1),
    "crashed": ("succeeded", 0, 1, 1),
}
"""What a job ends as: state, retries, crashes, rows of `failures`."""


def expected_end(what: str, attempts: list[int]) -> tuple[str, int, int, int]:
    # Their bodies fail in attempt 1, which is given back unstarted when no executor is free for long.
    fails_once = what in ("retried", "crashed") and attempts[0] > 1
    return SUCCEEDED if fails_once else ENDS.get(what, SUCCEEDED)


def check(place: Place, tally: Tally, seen: int) -> None:
    """The promise, job by job."""
    acknowledged = tally.acknowledged
    rows = place.jobs.sql("select id::text as id, state, attempt, retries, crashes from pgqueue.all_jobs")
    assert Counter(row["id"] for row in rows) == Counter(list(acknowledged)), "not each acknowledged job once"
    failures = place.jobs.sql("select job_id::text as id, attempt from pgqueue.failures")
    assert len({(row["id"], row["attempt"]) for row in failures}) == len(failures), failures
    failed = Counter(row["id"] for row in failures)
    rescues = {
        row["id"]: row["rescues"]
        for row in place.jobs.sql(
            "select id::text as id, rescues from pgqueue.finished_jobs union all"
            " select id::text, rescues from pgqueue.dead_letters"
        )
    }
    runs: dict[str, list[int]] = defaultdict(list)
    for entry in place.workers.ledger.entries("start")[seen:]:
        runs[entry["job"]].append(entry["attempt"])
    assert set(runs) == set(acknowledged), "not exactly the acknowledged jobs have run"
    for row in rows:
        job, what = row["id"], acknowledged[row["id"]]
        attempts = runs[job]
        ended = row["state"], row["retries"], row["crashes"], failed[job]
        assert ended == expected_end(what, attempts), what
        # A worker that lives runs nothing twice, whatever becomes of its connections.
        assert attempts == sorted(set(attempts)), f"{what}: an attempt ran twice, or out of order: {attempts}"
        assert attempts[-1] == row["attempt"], f"{what}: its last attempt did not run: {attempts}, {row}"
        assert rescues[job] == 0
        assert len(attempts) == 1 + row["retries"] + row["crashes"], f"{what}: {attempts}, {row}"
    order = place.jobs.sql("select job_id::text as job from orders")
    assert [acknowledged[row["job"]] for row in order] == ["order"]


@dataclass
class Run:
    """One run of the scenario.

    Attributes:
        hit: The call that was broken, or None.
        calls: How often each call came by.
    """

    fault: Fault | None
    hit: str | None
    calls: Counter[str]
    seconds: float
    refusals: list[str]

    def __str__(self) -> str:
        said = f", told {self.refusals}" if self.refusals else ""
        return f"{self.fault}: {self.hit}, {self.seconds:.2f} s{said}"


def run(place: Place, fault: Fault | None) -> Run:
    """The scenario with one fault, whose name is noted on what is raised when the promise is broken."""
    place.empty()
    seen = place.workers.ledger.count()
    start = time.monotonic()
    place.proxy.arm(fault)
    try:
        tally = produce(place)
        drain(place, start + RECOVERY)
        seconds = time.monotonic() - start
        calls, hit = place.proxy.calls, place.proxy.hit
        check(place, tally, seen)
        wanted = Counter({f"pgqueue {kind}": 1 for kind in WORKER_KINDS})
        eventually(lambda: place.connections() == wanted, "three connections, and no other", RECOVERY)
    except BaseException as error:
        error.add_note(f"the fault was {fault}, it hit {place.proxy.hit}")
        raise
    return Run(fault, hit, calls, seconds, tally.refusals)


def walk(place: Place, kind: str) -> list[Run]:
    """Break the first call, the second, the third …, until there is none to break."""
    runs = []
    others: tuple[How, ...] = ("late", *SQLSTATES)
    for nth in range(1, MOST_CALLS):
        for how in ("cut before", "cut after", others[nth % len(others)]):
            if how == "cut after" and runs[-1].hit in OPENINGS:
                continue
            result = run(place, Fault(kind, nth, how))
            print(result)
            if result.hit is None:
                return runs
            runs.append(result)
    raise AssertionError(f"after {MOST_CALLS} calls of {kind} there are still more")


OPENINGS = {f"{kind}: {call}" for kind in WORKER_KINDS for call in ("BEGIN ISOLATION", "begin_work")}
"""To lose the connection after these is to lose it before what follows."""


COMMITS = (
    Fault("client", 1, "cut after", after=("enqueue_ready_job",)),
    Fault("client", 1, "cut after", after=("wake_workers",)),
    Fault("caller", 1, "cut before", after=("update orders",)),
    Fault("caller", 1, "cut after", after=("update orders",)),
    Fault("claim", 1, "cut before", after=("claim_jobs",)),
    *(Fault("claim", 1, "cut after", after=("claim_jobs",) * looks) for looks in range(1, 8)),
    Fault("claim", 1, "cut before", after=("ack_finished",)),
    Fault("claim", 1, "cut after", after=("ack_finished",)),
    Fault("claim", 1, "cut after", after=("ack_retried",)),
    Fault("claim", 1, "cut after", after=("ack_dead",)),
    Fault("maintenance", 1, "cut after", after=("promote_jobs",)),
)
"""Where a lost answer matters most. Not every look finds a job: of several, some do."""


def sample(place: Place, size: int) -> list[Fault]:
    """Faults spread over the calls of a run without one, each kind of connection by its share of them.

    The last fifth is left out: there the worker only looks whether there is more, as often as there is time.
    """
    calls: Counter[str] = Counter()
    for call, count in run(place, None).calls.items():
        calls[call.partition(":")[0]] += count
    random_ = random.Random(SEED)
    print(f"seed {SEED}, calls {dict(calls)}")
    step = calls.total() / size
    faults = []
    for kind, count in sorted(calls.items()):
        points = range(max(1, round(count / step)))
        faults += [
            Fault(
                kind,
                1 + int((n + random_.random()) * 0.8 * count / len(points)),
                random_.choice(("cut before", "cut after", "late", *SQLSTATES)),
            )
            for n in points
        ]
    return faults


def test_some_calls_break(place: Place) -> None:
    place.start_worker()
    runs = [run(place, fault) for fault in (*COMMITS, *sample(place, 24))]
    for each in runs:
        print(each)
    missed = [str(each.fault) for each in runs[: len(COMMITS)] if each.hit is None]
    assert missed == [], "the scenario has no such call"
    assert sum(each.hit is not None for each in runs) > len(runs) * 0.8, "most faults struck nothing"


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("kind", [*PRODUCER_KINDS, *WORKER_KINDS])
def test_every_call_may_break(place: Place, kind: str) -> None:
    place.start_worker()
    run(place, None)
    assert walk(place, kind)


def live(place: Place, starting: Fault | None = None, stopping: Fault | None = None) -> str | None:
    """The life of a worker: it starts, runs what is there, stops and leaves nothing; what was hit."""
    place.empty()
    ids = place.jobs.add_many("mark", [(n,) for n in range(3)])
    place.proxy.arm(starting)
    worker = place.start_worker(ready=False)
    try:
        ends = place.jobs.ends(ids, RECOVERY)
        assert ends == {"succeeded": 3}
        hit = place.proxy.hit
        if stopping is not None:
            place.proxy.arm(stopping)
        assert worker.stop(within=RECOVERY) == 0
        hit = hit or place.proxy.hit
        left = place.jobs.sql("select id from pgqueue.workers")
        assert left == [], "it did not sign off"
        eventually(lambda: not place.connections(), "no connection is left")
    except BaseException as error:
        if worker.process.poll() is None:
            worker.kill()
        error.add_note(
            f"the faults were {starting}, {stopping}; hit: {place.proxy.hit}\n{worker.log[-2000:]}"
        )
        raise
    return hit


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    ("phase", "kind", "most"),
    [("starting", "maintenance", 15), ("starting", "claim", 6), ("starting", "listen", 2)]
    + [("stopping", kind, 8) for kind in ("maintenance", "claim")],
)
def test_every_call_of_a_start_and_a_stop_may_break(place: Place, phase: str, kind: str, most: int) -> None:
    """The first calls of a worker, up to its registration, and its last ones, in one way or two each."""
    hits: list[str] = []
    others: tuple[How, ...] = ("late", *SQLSTATES)
    for nth in range(1, most + 1):
        first: How = "cut before" if nth % 2 else "cut after"
        for how in (first, others[nth % len(others)]):
            fault = Fault(kind, nth, how)
            hit = live(place, **{phase: fault})
            print(f"{phase}: {fault}: {hit}")
            if hit is None:
                break
            hits.append(hit)
    assert phase == "stopping" or hits
