"""The plans of a worker's statements, in the situations in which a planner is known to leave the index.

Every statement is planned with the worker's own settings, once as they ask for it, the same for all
parameters, and once for its parameters: a transactional task acks in a session with settings of its own. The
last tests count buffers: what a plan touches when old index entries cannot be cleaned up.
"""

from __future__ import annotations

import contextlib
import json
import re
import uuid
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import psycopg
import pytest
from psycopg import sql

import pgqueue.database
from pgqueue.database.migrate import upgrade
from pgqueue.database.queries import query

ME, OTHER = "host:1:aaaa", "host:2:bbbb"
TIMEOUTS = {"statement_timeout": "60s", "lock_timeout": "2s"}
IDS = [str(uuid.UUID(int=number)) for number in range(1, 501)]
ID_LIST = "{" + ",".join(IDS) + "}"
LANES = [(f"q{number}", priority) for number in range(20) for priority in range(9, -1, -1)]
END = 2**63 - 1

Plan = dict[str, Any]


@dataclass(frozen=True)
class Hot:
    """A statement that runs all the time: what it is given here, and how it may reach `jobs`."""

    parameters: dict[str, Any]
    # For each index it may use, the columns that must bound the scan.
    indexes: Mapping[str, tuple[str, ...]]


FENCE = {"attempt": 1, "worker": ME}
COLUMNS = {
    "jobs_pkey": ("id",),
    "jobs_ready": ("queue", "priority", "position"),
    "jobs_scheduled": ("eta",),
    "jobs_running": ("worker_id",),
}
BY_ID = {"jobs_pkey": ("id",)}
HOT = {
    "claim_jobs": Hot(
        {
            "queues": [queue for queue, _ in LANES],
            "priorities": [priority for _, priority in LANES],
            "after": [0 for _ in LANES],
            "upto": [END for _ in LANES],
            "most": [100 for _ in LANES],
            "bare": False,
            "tasks": None,
            "but": False,
            "batch": 100,
            "worker": ME,
        },
        {"jobs_ready": ("queue =", "priority =", "position >", "position <="), **BY_ID},
    ),
    "ack_finished": Hot(
        {
            **FENCE,
            "ids": ID_LIST,
            "state": "succeeded",
            "started_ago": [0.1] * len(IDS),
            "finished_ago": [0.0] * len(IDS),
            "results": ["1"] * len(IDS),
            "result_errors": None,
        },
        BY_ID,
    ),
    "ack_retried": Hot(
        {
            **FENCE,
            "ids": ID_LIST,
            "kind": "failed",
            "delays": [1.0] * len(IDS),
            "max_retries": None,
            "error_classes": ["E"] * len(IDS),
            "error_messages": None,
            "tracebacks": None,
        },
        BY_ID,
    ),
    "ack_dead": Hot(
        {
            **FENCE,
            "ids": ID_LIST,
            "kind": "failed",
            "reasons": ["rejected"] * len(IDS),
            "dead_letter_queues": None,
            "error_classes": ["E"] * len(IDS),
            "error_messages": None,
            "tracebacks": None,
        },
        BY_ID,
    ),
    "ack_forgotten": Hot({**FENCE, "ids": ID_LIST}, BY_ID),
    "ack_snoozed": Hot({**FENCE, "ids": ID_LIST, "delays": [1.0] * len(IDS)}, BY_ID),
    "release_jobs": Hot({**FENCE, "ids": ID_LIST}, BY_ID),
    "load_payloads": Hot({"ids": IDS[:8], "attempts": [1] * 8, "workers": [ME] * 8}, BY_ID),
    "promote_jobs": Hot(
        {"after": 1.0, "upto": None, "mark": False, "now": None, "batch": 500},
        {"jobs_scheduled": ("eta >", "eta <"), **BY_ID},
    ),
    "find_queues": Hot({"known": [f"q{number}" for number in range(20)]}, {"jobs_ready": ("queue >",)}),
    "rescue_jobs": Hot(
        {
            "batch": 100,
            "max_crashes": 3,
            "max_rescues": 10,
            "dead_letter_queues": "{}",
            "task_max_crashes": "{}",
            "once": [],
        },
        {"jobs_running": ("worker_id",), **BY_ID},
    ),
    "list_claimed": Hot({"worker": ME}, {"jobs_running": ("worker_id =",)}),
    "find_cancelled": Hot({"ids": ID_LIST, "worker": ME}, BY_ID),
    "delete_worker": Hot({"worker": ME}, {"jobs_running": ("worker_id =",)}),
    "delete_fenced_workers": Hot({}, {"jobs_running": ("worker_id =",)}),
    "find_job": Hot({"id": IDS[0]}, BY_ID),
    "find_due_schedules": Hot({"now": None}, BY_ID),
    "fire_schedule": Hot(
        {
            **{"name": "s", "version": 0, "ids": ID_LIST, "held": []},
            **{"ticks": [1.0] * len(IDS), "etas": [1.0] * len(IDS)},
            **{"last_tick": 1.0, "next_tick": 2.0, "missed": 0, "skipped": 0},
        },
        BY_ID,
    ),
    "beat_heart": Hot({"worker": ME, "running": "{}", "stats": "{}"}, {}),
}

# Rows, in SQL. An id is made of its number, so that IDS are among them.
READY = """
insert into pgqueue.jobs (id, queue, task, priority)
select lpad(to_hex(n), 32, '0')::uuid, {queue}, 't', {priority} from generate_series(1, {count}) n
"""
RUNNING = """
insert into pgqueue.jobs (id, state, queue, task, attempt, worker_id, claimed_at)
select lpad(to_hex(n), 32, '0')::uuid, 'running', 'q1', 't', 1, '{worker}', now()
from generate_series(1, {count}) n
"""
SCHEDULED = """
insert into pgqueue.jobs (id, state, queue, task, eta)
select lpad(to_hex(n), 32, '0')::uuid, 'scheduled', 'q1', 't',
       now() + (n * 7919 % {count} - {count} / 2) * interval '1 ms'  -- each once, in no order
from generate_series(1, {count}) n
"""
ONE_LANE = READY.format(queue="'q1'", priority=5, count="{count}")
MANY_LANES = READY.format(queue="'q' || n % 2000", priority="(n / 2000) % 10", count=40_000)
CLAIM_ALL = f"update pgqueue.jobs set state = 'running', attempt = attempt + 1, worker_id = '{ME}'"
DELETE_ALL = "delete from pgqueue.jobs"
ANALYZE = "analyze pgqueue.jobs"

SHAPES = {
    "never analyzed, empty": [],
    # Emptied while a snapshot was held: every row and every index entry is still there, dead.
    "bloated, statistics of a full table": [ONE_LANE.format(count=60_000), ANALYZE, CLAIM_ALL, DELETE_ALL],
    "bloated, statistics of running jobs": [ONE_LANE.format(count=60_000), CLAIM_ALL, ANALYZE, DELETE_ALL],
    "bloated, statistics of an empty table": [ONE_LANE.format(count=60_000), CLAIM_ALL, DELETE_ALL, ANALYZE],
    "one lane of 500,000, statistics of an empty table": [ANALYZE, ONE_LANE.format(count=500_000)],
    "20,000 lanes": [MANY_LANES, ANALYZE],
    "20,000 lanes, statistics of an empty table": [ANALYZE, MANY_LANES],
    "all running here": [RUNNING.format(worker=ME, count=50_000), ANALYZE],
    "all running here, statistics of a waiting lane": [ONE_LANE.format(count=50_000), ANALYZE, CLAIM_ALL],
    "all running elsewhere": [RUNNING.format(worker=OTHER, count=50_000), ANALYZE],
    "all scheduled": [SCHEDULED.format(count=50_000), ANALYZE],
    "all scheduled, statistics of an empty table": [ANALYZE, SCHEDULED.format(count=50_000)],
}


@pytest.fixture(scope="module")
def stage(postgres: Any) -> Iterator[str]:
    """URL of a database of this module's own, with autovacuum off for `jobs`: statistics stay as they are
    made.
    """
    created = postgres.create_database()
    try:
        upgrade(created.dsn)
        with psycopg.connect(created.dsn, autocommit=True) as connection:
            connection.execute("alter table pgqueue.jobs set (autovacuum_enabled = off)")
        yield created.dsn
    finally:
        postgres.drop_database(created)


@pytest.fixture(scope="module", params=list(SHAPES))
def shape(request: pytest.FixtureRequest, stage: str) -> Iterator[psycopg.Connection]:
    """A connection to a database in this shape, and a snapshot from before it was made held by another."""
    with clean(stage), psycopg.connect(stage, autocommit=True) as connection:
        for statement in SHAPES[request.param]:
            connection.execute(statement.encode())
        yield connection


@contextlib.contextmanager
def clean(dsn: str) -> Iterator[None]:
    """Empty tables, two workers, and a snapshot held from then on."""
    with psycopg.connect(dsn, autocommit=True) as connection:
        connection.execute("set lock_timeout = '5s'")
        connection.execute(
            "truncate pgqueue.jobs, pgqueue.workers, pgqueue.dead_letters,"
            " pgqueue.finished_jobs, pgqueue.failures"
        )
        for worker in (ME, OTHER):
            register(connection, worker)
    with psycopg.connect(dsn) as holder:
        holder.isolation_level = psycopg.IsolationLevel.REPEATABLE_READ
        holder.execute("select")  # a snapshot, and no lock on any table
        yield


def register(connection: psycopg.Connection, worker: str) -> None:
    parameters = dict(worker=worker, host="h", pid=1, queues=[], pool="prefork", concurrency=1, version="1")
    connection.execute(query("register_worker").text, parameters)


@pytest.mark.parametrize("name", list(HOT))
@pytest.mark.parametrize("mode", ["custom", "generic"])
def test_a_hot_statement_reaches_jobs_by_index_alone(shape: psycopg.Connection, name: str, mode: str) -> None:
    hot = HOT[name]
    plan = explain_custom(shape, name) if mode == "custom" else explain_generic(shape, name)
    problems = complaints(plan, hot.indexes)
    assert not problems, "\n".join([*problems, json.dumps(plan, indent=1)])


def test_an_ack_of_one_job_is_planned_once(bloating: psycopg.Connection) -> None:
    """Left to itself the server plans it anew each time: for one id it looks cheaper than for several."""
    one = {"ids": "{" + IDS[0] + "}", "started_ago": [0.1], "finished_ago": [0.0], "results": ["1"]}
    with bloating.transaction(force_rollback=True):
        bloating.execute(query("begin_work").text, TIMEOUTS)
        for _ in range(20):
            bloating.execute(query("ack_finished").text, HOT["ack_finished"].parameters | one, prepare=True)
        plans = bloating.execute(
            "select generic_plans, custom_plans from pg_prepared_statements where statement like 'WITH gone%'"
        ).fetchall()
    assert plans == [(20, 0)]


def test_every_statement_of_a_worker_that_reads_jobs_is_checked_here() -> None:
    package = Path(pgqueue.database.__file__).parent
    sources = [*package.parent.glob("worker/*.py"), package / "store.py"]
    words = {
        word for path in sources for word in re.findall(r'"([a-z_]+)"', path.read_text(encoding="utf-8"))
    }
    names = {path.stem for path in package.glob("sql/*.sql")} & words
    assert {"claim_jobs", "ack_dead"} < names
    assert {name for name in names if re.search(r"pgqueue\.jobs\b", query(name).text)} <= set(HOT)


def explain_custom(connection: psycopg.Connection, name: str) -> Plan:
    """The plan for these very parameters."""
    with connection.transaction(force_rollback=True):
        connection.execute(query("begin_work").text, TIMEOUTS)
        row = connection.execute(f"explain (format json) {query(name).text}", HOT[name].parameters).fetchone()
    assert row is not None
    plan: Plan = row[0][0]["Plan"]
    return plan


def explain_generic(connection: psycopg.Connection, name: str) -> Plan:
    """The plan of a prepared statement that is planned without looking at its parameters."""
    statement = query(name, style="numeric")
    values = sql.SQL(", ").join(
        sql.Literal(HOT[name].parameters[parameter]) for parameter in statement.parameters
    )
    call = (
        sql.SQL("explain (format json) execute hot ({})")
        if statement.parameters
        else sql.SQL("explain (format json) execute hot")
    )
    with connection.transaction(force_rollback=True):
        connection.execute(query("begin_work").text, TIMEOUTS)
        connection.execute(f"prepare hot as {statement.text.replace('%%', '%')}".encode())
        try:
            row = connection.execute(call.format(values)).fetchone()
        finally:
            connection.execute("deallocate hot")
    assert row is not None
    plan: Plan = row[0][0]["Plan"]
    return plan


def nodes(plan: Plan) -> Iterator[Plan]:
    """The plan's nodes, from the top."""
    yield plan
    for child in plan.get("Plans", ()):
        yield from nodes(child)


def complaints(plan: Plan, indexes: Mapping[str, tuple[str, ...]]) -> list[str]:
    """What is wrong with the way a plan reaches `jobs`."""
    found: list[str] = []
    for node in nodes(plan):
        kind = node["Node Type"]
        if "Sort" in kind and any(reads_jobs(below) for below in nodes(node)):
            found.append(f"{kind} by {node.get('Sort Key')} over jobs")
        if not reads_jobs(node):
            continue
        if kind not in ("Index Scan", "Index Only Scan"):
            found.append(f"{kind} on jobs")
            continue
        index, condition = node["Index Name"], node.get("Index Cond", "").replace('"', "")
        if index not in indexes:
            found.append(f"{kind} using {index}, bound by {condition or 'nothing'}")
            continue
        found += [
            f"{index} is not bound by {what}: {condition}" for what in indexes[index] if what not in condition
        ]
        # What could bound the scan but is only looked at row by row lets it run on to the end of the index.
        rest = node.get("Filter", "")
        found += [
            f"{index} filters by {column}: {rest}"
            for column in COLUMNS[index]
            if re.search(rf"\b{column}\b", rest)
        ]
    used = {node["Index Name"] for node in nodes(plan) if reads_jobs(node) and "Index Name" in node}
    found += [f"{index} is not used" for index in indexes if index not in used]
    return found


def reads_jobs(node: Plan) -> bool:
    if "Scan" not in node["Node Type"]:
        return False
    return bool(node.get("Relation Name") == "jobs" or str(node.get("Index Name", "")).startswith("jobs_"))


@pytest.fixture
def bloating(stage: str) -> Iterator[psycopg.Connection]:
    """A connection to an empty database in which a snapshot is held, so that no dead index entry goes
    away.
    """
    with clean(stage), psycopg.connect(stage, autocommit=True) as connection:
        connection.execute(ANALYZE)
        yield connection


def test_a_claim_beyond_its_cursor_does_not_walk_over_what_is_gone(bloating: psycopg.Connection) -> None:
    bloating.execute(ONE_LANE.format(count=20_000).encode())
    cursor = 0
    while jobs := json.loads(do(bloating, "claim_jobs", **one_lane(cursor))[0][0]):
        cursor = max(cursor, *(position for _, _, _, position, *_ in jobs))
        ids = "{" + ",".join(job[0] for job in jobs) + "}"
        times = [0.0] * len(jobs)
        acked = {"ids": ids, "started_ago": times, "finished_ago": times, "results": None}
        parameters = {**HOT["ack_finished"].parameters, **acked}
        assert do(bloating, "ack_finished", **parameters) == [(len(jobs), None)]
    bloating.execute(ONE_LANE.format(count=100).encode())

    beyond = analyzed(bloating, "claim_jobs", **one_lane(cursor))
    from_head = analyzed(bloating, "claim_jobs", **one_lane(0))

    assert rows(beyond, "jobs_ready") == rows(from_head, "jobs_ready") == 100
    assert buffers(from_head, "jobs_ready") > 20 * buffers(beyond, "jobs_ready")


def test_promotion_beyond_its_cursor_reads_neither_what_is_gone_nor_what_is_not_due(
    bloating: psycopg.Connection,
) -> None:
    bloating.execute(SCHEDULED.format(count=40_000).encode())
    now = bloating.execute("select now()").fetchone()
    assert now is not None
    cursor, promoted = 0.0, 500
    while promoted == 500:
        promoted, _, last, *_ = do(
            bloating, "promote_jobs", after=cursor, upto=None, mark=False, now=now[0], batch=500
        )[0]
        cursor = max(cursor, last)
    soon = now[0] + timedelta(milliseconds=10)

    common = {"upto": None, "mark": False, "now": soon, "batch": 500}
    beyond = analyzed(bloating, "promote_jobs", after=cursor, **common)
    from_head = analyzed(bloating, "promote_jobs", after=0.0, **common)

    # And the next one that is due, in one page or two of the index.
    assert rows(beyond, "jobs_scheduled") == rows(from_head, "jobs_scheduled") == 10 + 1
    assert buffers(from_head, "jobs_scheduled") > 20 * buffers(beyond, "jobs_scheduled")


def test_rescue_does_not_walk_over_what_a_live_worker_has_run(bloating: psycopg.Connection) -> None:
    bloating.execute(RUNNING.format(worker=ME, count=20_000).encode())
    bloating.execute(DELETE_ALL)
    bloating.execute(RUNNING.format(worker="host:0:lost", count=10).encode())
    parameters = HOT["rescue_jobs"].parameters

    alive = analyzed(bloating, "rescue_jobs", **parameters)
    bloating.execute("delete from pgqueue.workers where id = %s", [ME])
    gone = analyzed(bloating, "rescue_jobs", **parameters)

    assert rows(alive, "jobs_running") == rows(gone, "jobs_running") == 10
    assert buffers(gone, "jobs_running") > 20 * buffers(alive, "jobs_running")


def test_rescue_does_not_walk_over_what_live_workers_are_running(bloating: psycopg.Connection) -> None:
    bloating.execute(RUNNING.format(worker=ME, count=20_000).encode())
    plan = analyzed(bloating, "rescue_jobs", **HOT["rescue_jobs"].parameters)
    assert rows(plan, "jobs_running") == 0
    assert buffers(plan, "jobs_running") < 100


def test_looking_for_cancelled_jobs_does_not_walk_over_what_the_worker_has_run(
    bloating: psycopg.Connection,
) -> None:
    bloating.execute(RUNNING.format(worker=ME, count=20_000).encode())
    bloating.execute("delete from pgqueue.jobs where id > %s", [IDS[9]])
    bloating.execute("update pgqueue.jobs set cancel_requested_at = now() where id = any(%s)", [IDS[:3]])

    plan = analyzed(bloating, "find_cancelled", worker=ME, ids=IDS[:10])

    scans = {node["Index Name"] for node in nodes(plan) if reads_jobs(node)}
    assert rows(plan, *scans) == 3
    assert buffers(plan, *scans) < 100


def test_looking_for_new_queues_does_not_walk_over_those_that_are_known(bloating: psycopg.Connection) -> None:
    bloating.execute(ONE_LANE.format(count=20_000).encode())
    bloating.execute("delete from pgqueue.jobs where position % 2 = 0")

    for known in (["q1"], ["q0", "q1"], ["q1", "q2"], ["q0", "q1", "q2"]):
        plan = analyzed(bloating, "find_queues", known=known)
        assert rows(plan, "jobs_ready") == 0
        assert buffers(plan, "jobs_ready") < 100


def one_lane(cursor: int) -> dict[str, Any]:
    lanes = {
        "queues": ["q1"],
        "priorities": [5],
        "after": [cursor],
        "upto": [END],
        "most": [500],
        "bare": False,
        "tasks": None,
        "but": False,
    }
    return {**lanes, "batch": 500, "worker": ME}


def do(connection: psycopg.Connection, name: str, **parameters: Any) -> list[Any]:
    """Run a statement as the worker does."""
    with connection.transaction():
        connection.execute("set transaction isolation level read committed")
        connection.execute(query("begin_work").text, TIMEOUTS)
        return connection.execute(query(name).text, parameters).fetchall()


def analyzed(connection: psycopg.Connection, name: str, **parameters: Any) -> Plan:
    """Run a statement and take it back; returns its plan with what it touched."""
    with connection.transaction(force_rollback=True):
        connection.execute("set transaction isolation level read committed")
        connection.execute(query("begin_work").text, TIMEOUTS)
        explain = "explain (analyze, buffers, timing off, format json)"
        row = connection.execute(f"{explain} {query(name).text}", parameters).fetchone()
    assert row is not None
    plan: Plan = row[0][0]["Plan"]
    return plan


def buffers(plan: Plan, *indexes: str) -> int:
    """Pages that scans by these indexes touched, of the index and of the table."""
    scans = [node for node in nodes(plan) if node.get("Index Name") in indexes]
    assert scans
    return sum(node["Shared Hit Blocks"] + node["Shared Read Blocks"] for node in scans)


def rows(plan: Plan, *indexes: str) -> int:
    """Rows that scans by these indexes found."""
    scans = [node for node in nodes(plan) if node.get("Index Name") in indexes]
    return sum(round(node["Actual Rows"] * node["Actual Loops"]) for node in scans)
