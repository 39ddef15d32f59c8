"""What `inspect` says of queues and running jobs, and that it stays quick however many jobs wait."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import psycopg
import pytest

from pgqueue.database import stats
from pgqueue.database.queries import query
from pgqueue.database.session import Session, open_session
from pgqueue.database.stats import QueueStats, list_active_jobs, list_queues, list_scheduled_jobs
from pgqueue.job import new_id


@pytest.fixture
def session(db: str) -> Iterator[Session]:
    with open_session(db) as session:
        yield session


def sql(session: Session, text: str, *parameters: object) -> list[dict[str, Any]]:
    cursor = session.connection.execute(text.encode(), parameters)
    return cursor.fetchall() if cursor.description else []


def add(session: Session, queue: str, state: str = "ready", count: int = 1, priority: int = 5) -> None:
    sql(
        session,
        "insert into pgqueue.jobs (id, task, queue, state, priority, eta)"
        " select pgqueue.uuid7(), 't', %s, %s, %s,"
        " case when %s = 'scheduled' then now() + interval '1 hour' end"
        " from generate_series(1, %s)",
        queue,
        state,
        priority,
        state,
        count,
    )


def bury(session: Session, queue: str) -> None:
    sql(
        session,
        "insert into pgqueue.dead_letters (id, queue, task, args, kwargs, priority, attempt, retries,"
        " crashes, rescues, enqueued_at, enqueued_by, headers, dead_letter_queue, reason) values"
        " (%s, %s, 't', '[]', '{}', 5, 1, 0, 0, 0, now(), 'me', '{}', 'label', 'rejected')",
        new_id(),
        queue,
    )


def add_worker(session: Session, *queues: str, ago: int = 0, fenced: bool = False) -> str:
    worker = new_id()
    sql(
        session,
        "insert into pgqueue.workers (id, host, pid, queues, pool, concurrency, version, heartbeat_at,"
        " fenced)"
        " values (%s, 'box', 4711, %s, 'prefork', 1, '1', now() - %s * interval '1 second', %s)",
        worker,
        list(queues),
        ago,
        fenced,
    )
    return worker


def numbers(found: list[QueueStats]) -> dict[str, tuple[int, int, int, int, int]]:
    return {each.queue: (each.ready, each.scheduled, each.running, each.dead, each.workers) for each in found}


@pytest.mark.parametrize("exact", [False, True])
def test_queues_are_counted_by_state(session: Session, exact: bool) -> None:
    add(session, "a", count=3)
    add(session, "a", "scheduled", 2)
    add(session, "b", "running")
    bury(session, "b")
    bury(session, "only-dead")
    add_worker(session, "b", "idle")
    found = list_queues(session, exact=exact)
    assert [each.queue for each in found] == ["a", "b", "idle", "only-dead"]
    assert numbers(found) == {
        "a": (3, 2, 0, 0, 0),
        "b": (0, 0, 1, 1, 1),
        "idle": (0, 0, 0, 0, 1),
        "only-dead": (0, 0, 0, 1, 0),
    }
    assert all(each.at_least == frozenset() for each in found)


def test_an_empty_queue_has_no_stats(session: Session) -> None:
    assert list_queues(session) == list_queues(session, exact=True) == []


def test_the_bounded_survey_and_the_public_view_agree(session: Session) -> None:
    for number, queue in enumerate(["a", "b", "c.d", "Z"]):
        add(session, queue, count=number, priority=number)
        add(session, queue, count=2, priority=9 - number)
        add(session, queue, "scheduled", number)
    add_worker(session)
    add_worker(session, "a", "b")

    def without_clock(found: list[QueueStats]) -> list[tuple[object, ...]]:
        return [(each.queue, each.ready, each.scheduled, each.workers, each.oldest_ready) for each in found]

    assert without_clock(list_queues(session)) == without_clock(list_queues(session, exact=True))


@pytest.mark.parametrize("exact", [False, True])
def test_a_job_waits_since_it_was_due(session: Session, exact: bool) -> None:
    add(session, "a")
    sql(
        session,
        "update pgqueue.jobs set enqueued_at = now() - interval '1 day', eta = now() - interval '1 min'",
    )
    (found,) = list_queues(session, exact=exact)
    assert found.oldest_ready_seconds is not None
    assert 60 <= found.oldest_ready_seconds < 120


def test_counting_stops_early_and_says_so(session: Session, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stats, "COUNTED", 40)
    add(session, "deep", count=60)
    add(session, "shallow", count=5)
    add(session, "deep", "scheduled", 25)
    add(session, "shallow", "running", 50)
    found = {each.queue: each for each in list_queues(session)}
    assert found["deep"].ready == 40
    assert "ready" in found["deep"].at_least
    assert found["shallow"].ready == 5
    assert "ready" not in found["shallow"].at_least
    assert found["deep"].scheduled == 20
    assert "scheduled" in found["deep"].at_least
    assert found["shallow"].running == 50
    assert found["deep"].oldest_ready is not None
    exact = {each.queue: each for each in list_queues(session, exact=True)}
    assert (exact["deep"].ready, exact["deep"].scheduled, exact["deep"].at_least) == (60, 25, frozenset())


def test_a_count_that_ends_at_the_bound_is_exact(session: Session, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stats, "COUNTED", 40)
    add(session, "a", count=40)
    (found,) = list_queues(session)
    assert (found.ready, "ready" in found.at_least) == (40, False)


@pytest.mark.parametrize(
    ("queues", "ago", "fenced", "workers"),
    [
        (["a"], 0, False, 1),
        ([], 0, False, 1),
        (["b"], 0, False, 0),
        (["a"], 0, True, 0),
        (["a"], 90, False, 0),
        ([], 90, False, 0),
    ],
    ids=["named", "serves every queue", "another's", "fenced", "silent", "silent, served every queue"],
)
@pytest.mark.parametrize("exact", [False, True])
def test_a_queue_with_ready_jobs_and_no_live_worker_is_unserved(
    session: Session, queues: list[str], ago: int, fenced: bool, workers: int, exact: bool
) -> None:
    add(session, "a")
    add_worker(session, *queues, ago=ago, fenced=fenced)
    found = {each.queue: each for each in list_queues(session, exact=exact)}["a"]
    assert found.workers == workers
    assert found.served == bool(workers)


def test_a_queue_without_ready_jobs_misses_nobody(session: Session) -> None:
    add(session, "a", "scheduled")
    add(session, "b")
    add(session, "b", "running")  # discovered, and not yet in its worker's list
    assert [each.served for each in list_queues(session)] == [True, True]


def test_active_and_reserved_jobs_come_with_their_workers(session: Session) -> None:
    worker = add_worker(session, "a")
    add(session, "a", "running", 3)
    ids = [str(row["id"]) for row in sql(session, "select id from pgqueue.jobs order by id")]
    sql(
        session,
        "update pgqueue.jobs set worker_id = %s, claimed_at = now() - interval '1 min' where id <> %s",
        worker,
        ids[2],
    )
    sql(session, "update pgqueue.jobs set worker_id = 'vanished', claimed_at = now() where id = %s", ids[2])
    sql(session, "update pgqueue.workers set running = %s::uuid[]", [ids[1]])
    add(session, "a", count=5)
    (active,), reserved = list_active_jobs(session), list_active_jobs(session, active=False)
    assert (active.id, active.active, active.host, active.pid) == (ids[1], True, "box", 4711)
    assert active.seconds is not None
    assert active.seconds >= 60
    assert [job.id for job in reserved] == [ids[0], ids[2]]
    assert [job.active for job in reserved] == [False, False]
    assert [(job.host, job.pid) for job in reserved] == [("box", 4711), (None, None)]
    assert [job.id for job in list_active_jobs(session, active=False, limit=1)] == [ids[0]]


def test_jobs_that_wait_for_their_time(session: Session) -> None:
    add(session, "a", count=5)
    add(session, "a", "scheduled", 3)
    sql(
        session,
        "update pgqueue.jobs set eta = now() + position * interval '1 min', retries = mod(position, 2)",
    )
    sql(
        session,
        "insert into pgqueue.jobs (id, task, state, eta) values (%s, 't', 'scheduled', 'infinity')",
        new_id(),
    )
    found = list_scheduled_jobs(session)
    assert len(found) == 3, "one that never comes is left out"
    assert [job.seconds for job in found] == sorted(job.seconds for job in found)
    assert [job.retries for job in found] == [0, 1, 0] or [job.retries for job in found] == [1, 0, 1]
    assert [job.id for job in list_scheduled_jobs(session, limit=1)] == [found[0].id]


@pytest.mark.parametrize("name", ["list_active_jobs", "list_scheduled_jobs"])
def test_lists_read_no_more_jobs_than_they_show(session: Session, name: str) -> None:
    add(session, "a", count=3000)
    add(session, "a", "scheduled", 3000)
    add(session, "a", "running", 20)
    with session.transaction(by_index=True):
        text = f"explain (analyze, format json) {query(name).text}"
        (row,) = session.execute(text, {"limit": 50, "active": False})
    plan = row["QUERY PLAN"][0]["Plan"]
    reads = [node for node in nodes(plan) if node.get("Relation Name") == "jobs"]
    assert {node["Node Type"] for node in reads} <= {"Index Scan", "Index Only Scan"}
    assert sum(node["Actual Rows"] * node["Actual Loops"] for node in reads) <= 50, json.dumps(plan)


def test_the_survey_reads_waiting_jobs_by_index_only_as_far_as_it_counts(session: Session) -> None:
    add(session, "a", count=3000)
    add(session, "b", count=3000)
    with session.transaction(by_index=True):
        text = f"explain (analyze, format json) {query('survey_queues').text}"
        (row,) = session.execute(text, {"most": 200})
    plan = row["QUERY PLAN"][0]["Plan"]
    assert "Seq Scan" not in {
        node["Node Type"] for node in nodes(plan) if node.get("Relation Name") == "jobs"
    }
    read = sum(
        node["Actual Rows"] * node["Actual Loops"]
        for node in nodes(plan)
        if node.get("Relation Name") == "jobs"
    )
    assert read < 1000, json.dumps(plan)


def nodes(plan: dict[str, Any]) -> Iterator[dict[str, Any]]:
    yield plan
    for child in plan.get("Plans", []):
        yield from nodes(child)


def test_an_unmigrated_database_names_the_command(fresh_dsn: str) -> None:
    from pgqueue import SchemaMismatch

    with pytest.raises(SchemaMismatch, match="run `pgqueue migrate`"), open_session(fresh_dsn):
        pass


def test_a_broken_connection_is_one_error(db: str) -> None:
    from pgqueue import DatabaseUnavailable

    def survive() -> None:
        with open_session(db) as session:
            pid = session.connection.info.backend_pid
            with psycopg.connect(db, autocommit=True) as other:
                other.execute("select pg_terminate_backend(%s, 5000)", [pid])
            list_queues(session)

    with pytest.raises(DatabaseUnavailable, match="broke"):
        survive()
