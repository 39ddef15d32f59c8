"""What each statement of a worker does to a job in each state, column by column, and what it leaves alone."""

from __future__ import annotations

import asyncio
import json
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import UUID, uuid4

import psycopg
import pytest
from psycopg import sql
from psycopg.rows import dict_row
from psycopg.types.json import Jsonb

from pgqueue.database.link import GroupFailed, Link
from pgqueue.database.migrate import upgrade
from pgqueue.database.queries import query
from pgqueue.database.store import Claim, Outcome, ack_calls, decode_claim, decode_claimed
from pgqueue.job import new_id
from pgqueue.worker.maintenance import MAX_RESCUES

ME, OTHER = "host:1:aaaa", "host:2:bbbb"
END = 2**63 - 1
DEADLINE = 10.0
TABLES = ("jobs", "finished_jobs", "dead_letters", "failures", "workers")

Connection = psycopg.Connection[Any]
Row = dict[str, Any]


@pytest.fixture
def connection(db: str) -> Iterator[Connection]:
    """A session on an empty queue with two live workers."""
    with psycopg.connect(db, autocommit=True) as connection:
        register(connection, ME)
        register(connection, OTHER)
        yield connection


@pytest.fixture
def second(db: str) -> Iterator[Connection]:
    """Another session on the same queue."""
    with psycopg.connect(db, autocommit=True) as connection:
        yield connection


@pytest.fixture
def own_dsn(fresh_dsn: str) -> str:
    """URL of a migrated database of the test's own, for what changes partitions."""
    upgrade(fresh_dsn)
    return fresh_dsn


@pytest.fixture
def own(own_dsn: str) -> Iterator[Connection]:
    with psycopg.connect(own_dsn, autocommit=True) as connection:
        register(connection, ME)
        yield connection


def do(connection: Connection, name: str, /, **parameters: Any) -> list[Any]:
    """Run a statement as a worker does; returns its rows."""
    with connection.transaction():
        connection.execute("set transaction isolation level read committed")
        connection.execute(query("begin_work").text, {"statement_timeout": "20s", "lock_timeout": "2s"})
        cursor = connection.execute(query(name).text, parameters)
        return cursor.fetchall() if cursor.description else []


def register(connection: Connection, worker: str) -> None:
    facts = dict(host="h", pid=1, queues=["default"], pool="prefork", concurrency=1, version="1")
    do(connection, "register_worker", worker=worker, **facts)


def add(connection: Connection, /, **columns: Any) -> str:
    """Write a job by plain SQL; returns its id."""
    columns = {"id": new_id(), "task": "t", **columns}
    values = [Jsonb(value) if isinstance(value, list | dict) else value for value in columns.values()]
    places = ", ".join(["%s"] * len(columns))
    connection.execute(f"insert into pgqueue.jobs ({', '.join(columns)}) values ({places})".encode(), values)
    return str(columns["id"])


def add_running(connection: Connection, /, worker: str | None = ME, attempt: int = 1, **columns: Any) -> str:
    claimed = datetime.now(UTC) - timedelta(minutes=1)
    return add(connection, state="running", worker_id=worker, attempt=attempt, claimed_at=claimed, **columns)


def look(connection: Connection, table: str, job_id: str) -> Row | None:
    """The row of this job in a table, if it is there."""
    key = "job_id" if table == "failures" else "id"
    with connection.cursor(row_factory=dict_row) as cursor:
        found = cursor.execute(
            f"select * from pgqueue.{table} where {key} = %s".encode(), [job_id]
        ).fetchall()
    assert len(found) <= 1
    return found[0] if found else None


def everything(connection: Connection) -> dict[str, list[str]]:
    """All rows of all tables, by job."""
    found: dict[str, list[str]] = {}
    for table in TABLES:
        key = "job_id" if table == "failures" else "id"
        rows = connection.execute(
            f"select {key}::text, t::text from pgqueue.{table} t order by 1, 2".encode()
        )
        for job_id, text in rows:
            found.setdefault(job_id, []).append(f"{table}: {text}")
    return found


def claim(
    connection: Connection,
    worker: str = ME,
    batch: int = 100,
    queues: Sequence[str] = ("default",),
    tasks: list[str] | None = None,
    but: bool = False,
) -> Any:
    lanes = [(queue, priority) for queue in queues for priority in range(9, -1, -1)]
    rows = do(
        connection,
        "claim_jobs",
        queues=[queue for queue, _ in lanes],
        priorities=[priority for _, priority in lanes],
        after=[0] * len(lanes),
        upto=[END] * len(lanes),
        most=[batch] * len(lanes),
        bare=False,
        tasks=tasks,
        but=but,
        batch=batch,
        worker=worker,
    )
    return decode_claim(rows, worker).jobs


def ack(connection: Connection, *outcomes: Outcome, now: float = 100.0) -> list[tuple[int, list[str] | None]]:
    """Record outcomes; returns the answer of each statement it took."""
    return [do(connection, call.name, **call.parameters)[0] for call, _ in ack_calls(outcomes, now)]


def outcome(
    job_id: str, verb: Any = "finish", /, attempt: int = 1, worker: str = ME, **facts: Any
) -> Outcome:
    return Outcome(job_id, attempt, worker, verb, **facts)


def promote(
    connection: Connection,
    batch: int = 500,
    after: float | None = 0.0,
    now: datetime | None = None,
    upto: float | None = None,
    mark: bool = False,
) -> Any:
    return do(connection, "promote_jobs", batch=batch, after=after, upto=upto, mark=mark, now=now)[0]


def rescue(connection: Connection, batch: int = 100, letters: Mapping[str, str] | None = None) -> Any:
    return do(
        connection,
        "rescue_jobs",
        batch=batch,
        max_crashes=3,
        max_rescues=MAX_RESCUES,
        dead_letter_queues=json.dumps(letters or {}),
        task_max_crashes="{}",
        once=[],
    )[0]


def seconds(before: datetime, after: datetime) -> float:
    return (after - before).total_seconds()


def clock(connection: Connection) -> datetime:
    row = connection.execute("select clock_timestamp()").fetchone()
    assert row is not None
    assert isinstance(row[0], datetime)
    return row[0]


def wait_until(condition: Callable[[], object], what: str) -> None:
    deadline = time.monotonic() + DEADLINE
    while not condition():
        assert time.monotonic() < deadline, f"waited in vain until {what}"
        time.sleep(0.005)


def is_waiting(watcher: Connection, waiter: Connection) -> bool:
    row = watcher.execute(
        "select wait_event_type = 'Lock' from pg_stat_activity where pid = %s", [waiter.info.backend_pid]
    ).fetchone()
    return bool(row and row[0])


# Every state × every operation

STATES = (
    *("later", "due", "ready", "mine", "mine, other attempt", "another's", "of a fenced worker", "nobody's"),
    *("finished", "dead"),
)


def one_of_each(connection: Connection) -> dict[str, str]:
    """A job in every state a statement may meet, each by itself in its lane's order."""
    now = datetime.now(UTC)
    register(connection, "host:3:cccc")
    connection.execute("update pgqueue.workers set fenced = true where id = 'host:3:cccc'")
    jobs = {
        "later": add(connection, state="scheduled", eta=now + timedelta(hours=1), attempt=1),
        "due": add(connection, state="scheduled", eta=now - timedelta(hours=1), attempt=1),
        "ready": add(connection, attempt=1),
        "mine": add_running(connection),
        "mine, other attempt": add_running(connection, attempt=2),
        "another's": add_running(connection, OTHER),
        "of a fenced worker": add_running(connection, "host:3:cccc"),
        "nobody's": add_running(connection, None),
        "finished": add_running(connection),
        "dead": add_running(connection),
    }
    assert ack(connection, outcome(jobs["finished"])) == [(1, None)]
    assert ack(connection, outcome(jobs["dead"], "bury")) == [(1, None)]
    assert tuple(jobs) == STATES
    return jobs


@pytest.mark.parametrize(
    ("act", "changed"),
    [
        ("finish", {"mine"}),
        ("retry", {"mine"}),
        ("bury", {"mine"}),
        ("release", {"mine"}),
        ("snooze", {"mine"}),
        ("claim", {"ready"}),
        ("promote", {"due"}),
        ("rescue", {"of a fenced worker", "nobody's"}),
    ],
)
def test_a_statement_changes_the_jobs_in_its_state_and_no_other(
    connection: Connection, act: str, changed: set[str]
) -> None:
    jobs = one_of_each(connection)
    before = everything(connection)

    if act == "claim":
        assert [job.id for job in claim(connection)] == [jobs["ready"]]
    elif act == "promote":
        assert promote(connection)[:2] == (1, ["default"])
    elif act == "rescue":
        assert rescue(connection) == (2, ["default"], 0)
    else:
        # One at a time: none is carried by another's success. Then all at once.
        for state, job_id in jobs.items():
            if state != "mine":
                assert ack(connection, outcome(job_id, act)) == [(0, None)], state
        assert everything(connection) == before
        assert ack(connection, *(outcome(job_id, act) for job_id in jobs.values())) == [(1, [jobs["mine"]])]

    after = everything(connection)
    assert {state for state, job_id in jobs.items() if before[job_id] != after.get(job_id)} == changed
    assert {key: before[key] for key in before if key not in jobs.values()} == {
        key: after[key] for key in after if key not in jobs.values()
    }


def test_reading_changes_nothing_and_shows_a_worker_only_its_own(connection: Connection) -> None:
    jobs = one_of_each(connection)
    before = everything(connection)

    for state, job_id in jobs.items():
        rows = do(connection, "load_payloads", ids=[job_id], attempts=[1], workers=[ME])
        assert rows == ([(job_id, 1, "[]", "{}", "{}")] if state == "mine" else []), state
    listed, unreadable = decode_claimed(do(connection, "list_claimed", worker=ME), ME)
    assert {job.id for job in listed} == {jobs["mine"], jobs["mine, other attempt"]}
    assert not unreadable
    states = {state: do(connection, "find_job", id=job_id)[0][0] for state, job_id in jobs.items()}
    assert states == {
        "later": "scheduled",
        "due": "scheduled",
        "ready": "ready",
        **dict.fromkeys(STATES[3:8], "running"),
        "finished": "succeeded",
        "dead": "dead",
    }
    assert do(connection, "find_job", id=new_id()) == []
    assert everything(connection) == before


def test_an_ack_asks_for_the_state_too(connection: Connection) -> None:
    # Whoever sets a job back by hand may forget to clear its worker.
    by_hand = [add(connection, attempt=1, worker_id=ME), add(connection, attempt=1, worker_id=ME)]
    connection.execute("update pgqueue.jobs set state = 'scheduled', eta = now() where id = %s", [by_hand[0]])
    before = everything(connection)
    for verb in ("finish", "retry", "snooze", "bury", "release"):
        assert ack(connection, *(outcome(job_id, verb) for job_id in by_hand)) == [(0, None)]
    assert everything(connection) == before


def test_a_repeated_ack_finds_nothing(connection: Connection) -> None:
    for verb in ("finish", "retry", "snooze", "bury", "release"):
        job_id = add_running(connection)
        assert ack(connection, outcome(job_id, verb)) == [(1, None)]
        before = everything(connection)
        for again in ("finish", "retry", "snooze", "bury", "release"):
            assert ack(connection, outcome(job_id, again)) == [(0, None)]
        assert everything(connection) == before


# Claim


def test_a_claim_leaves_paused_queues_out(connection: Connection) -> None:
    paused, other = add(connection, queue="a"), add(connection, queue="b")
    connection.execute("SELECT pgqueue.pause_queue('a')")
    assert [job.id for job in claim(connection, queues=["a", "b"])] == [other]
    connection.execute("SELECT pgqueue.resume_queue('a')")
    assert [job.id for job in claim(connection, queues=["a", "b"])] == [paused]


def test_a_claim_tells_what_it_has_left_out_and_how_long_it_took(connection: Connection) -> None:
    def answer(worker: str = ME) -> Claim:
        lanes = {
            "queues": ["a", "b"],
            "priorities": [5, 5],
            "after": [0, 0],
            "upto": [END] * 2,
            "most": [9] * 2,
        }
        options = {"bare": False, "tasks": None, "but": False, "batch": 9, "worker": worker}
        return decode_claim(do(connection, "claim_jobs", **lanes, **options), worker)

    add(connection, queue="b")
    connection.execute("SELECT pgqueue.pause_queue('a')")
    claim = answer()
    assert (len(claim.jobs), claim.unseen) == (1, ["a"])
    assert 0 < claim.took < DEADLINE
    assert answer("nobody").unseen == ["a", "b"]
    connection.execute("UPDATE pgqueue.workers SET fenced = true WHERE id = %s", [ME])
    assert answer().unseen == ["a", "b"]


def test_the_last_position_and_a_transaction_id_after_it(connection: Connection) -> None:
    add(connection)
    row = connection.execute("SELECT max(position) FROM pgqueue.jobs").fetchone()
    ((position, first),) = do(connection, "last_position")
    assert (position,) == row
    ((_, second),) = do(connection, "last_position")
    assert second > first


def test_a_pause_that_is_over_counts_no_more(connection: Connection) -> None:
    job_id = add(connection, queue="a")
    over = {"a": {"since": "2020-01-01T00:00Z", "until": "2020-01-02T00:00Z"}, "b": {}}
    connection.execute("UPDATE pgqueue.meta SET paused = %s::jsonb", [json.dumps(over)])
    assert [job.id for job in claim(connection, queues=["a"])] == [job_id]


def test_a_claim_takes_a_job_for_one_more_attempt(connection: Connection) -> None:
    columns: dict[str, Any] = dict(
        queue="mail",
        task="shop.send",
        args=[1, "ü", None],
        kwargs={"a": {"b": []}},
        priority=7,
        headers={"trace": "x"},
        attempt=3,
        retries=2,
        max_retries=-1,
        crashes=1,
        eta=datetime(2024, 2, 29, tzinfo=UTC),
    )
    job_id = add(connection, **columns)
    before = look(connection, "jobs", job_id)
    assert before is not None

    (job,) = claim(connection, queues=["mail"])

    after = look(connection, "jobs", job_id)
    assert after is not None
    assert after == {
        **before,
        "state": "running",
        "attempt": 4,
        "worker_id": ME,
        "claimed_at": after["claimed_at"],
    }
    assert before["enqueued_at"] <= after["claimed_at"] <= clock(connection)
    assert (job.id, job.queue, job.priority, job.position) == (job_id, "mail", 7, before["position"])
    assert (job.task, job.attempt, job.retries, job.max_retries, job.crashes) == ("shop.send", 4, 2, -1, 1)
    assert json.loads(job.args) == [1, "ü", None]
    assert json.loads(job.kwargs) == {"a": {"b": []}}
    assert json.loads(job.headers) == {"trace": "x"}
    assert job.eta == datetime(2024, 2, 29, tzinfo=UTC).timestamp()
    assert not job.expired
    assert job.worker == ME


@pytest.mark.parametrize("state", ["fenced", "missing"])
def test_a_fenced_or_missing_worker_claims_nothing(connection: Connection, state: str) -> None:
    add(connection)
    change = (
        "update pgqueue.workers set fenced = true" if state == "fenced" else "delete from pgqueue.workers"
    )
    connection.execute(change.encode())
    before = everything(connection)
    assert claim(connection) == []
    assert everything(connection) == before


def test_a_claim_takes_its_lanes_in_turn_up_to_the_batch_and_locks_nothing_else(
    connection: Connection, second: Connection
) -> None:
    low = [add(connection, priority=1) for _ in range(3)]
    high = [add(connection, priority=8) for _ in range(3)]
    with connection.transaction():
        connection.execute("set transaction isolation level read committed")
        rows = connection.execute(
            query("claim_jobs").text,
            dict(
                queues=["default"] * 2,
                priorities=[8, 1],
                after=[0, 0],
                upto=[END, END],
                most=[10, 10],
                bare=False,
                tasks=None,
                but=False,
                batch=4,
                worker=ME,
            ),
        ).fetchall()
        taken = sorted(decode_claim(rows, ME).jobs, key=lambda job: job.position)
        assert [job.id for job in taken] == [low[0], *high]
        free = second.execute(
            "select id::text from pgqueue.jobs order by position for update skip locked"
        ).fetchall()
        assert [row[0] for row in free] == low[1:]


def test_a_claim_stays_within_the_range_of_each_lane(connection: Connection) -> None:
    jobs = [add(connection) for _ in range(6)]
    positions = [row[0] for row in connection.execute("select position from pgqueue.jobs order by position")]
    rows = do(
        connection,
        "claim_jobs",
        queues=["default"] * 2,
        priorities=[5, 5],
        after=[positions[0], positions[3]],
        upto=[positions[2], END],
        most=[10, 1],
        bare=False,
        tasks=None,
        but=False,
        batch=10,
        worker=ME,
    )
    claimed = {job.id for job in decode_claim(rows, ME).jobs}
    assert claimed == {jobs[1], jobs[2], jobs[4]}


def test_a_claim_skips_what_others_hold(connection: Connection, second: Connection) -> None:
    held, free = add(connection), add(connection)
    with second.transaction():
        second.execute("select from pgqueue.jobs where id = %s for update", [held])
        assert [job.id for job in claim(connection)] == [free]


def test_a_claim_says_what_has_expired(connection: Connection) -> None:
    now = datetime.now(UTC)
    expired = add(connection, expires_at=now - timedelta(seconds=1))
    fresh = add(connection, expires_at=now + timedelta(hours=1))
    assert {job.id: job.expired for job in claim(connection)} == {expired: True, fresh: False}
    listed, _ = decode_claimed(do(connection, "list_claimed", worker=ME), ME)
    assert {job.id: job.expired for job in listed} == {expired: True, fresh: False}


def test_large_arguments_do_not_travel_with_the_claim(connection: Connection) -> None:
    small = add(connection, args=["x" * 8000])
    large = add(connection, args=["x" * 8200])  # compressed it would fit
    random = add(connection, kwargs={"a": "".join(new_id() for _ in range(500))})
    jobs = {job.id: job for job in claim(connection)}
    assert jobs[small].args is not None
    for job_id in (large, random):
        assert jobs[job_id].args is jobs[job_id].kwargs is None
        ((_, _, args, kwargs, headers),) = do(
            connection, "load_payloads", ids=[job_id], attempts=[1], workers=[ME]
        )
        assert len(args) + len(kwargs) > 8192
        assert headers == "{}"


def test_arguments_behind_a_megabyte_of_others_are_for_the_next_time(connection: Connection) -> None:
    sizes = (2_000, 2_000_000, 2_000, 10)
    random = "".join(new_id() for _ in range(60_000))
    jobs = sorted(new_id() for _ in sizes)  # they are read in this order
    for job, size in zip(jobs, sizes, strict=True):
        add(connection, id=job, args=[random[:size]])
    claim(connection)

    def load(ids: list[str]) -> list[int | None]:
        count = len(ids)
        rows = do(connection, "load_payloads", ids=ids, attempts=[1] * count, workers=[ME] * count)
        assert [row[0] for row in rows] == ids
        assert all(len({text is None for text in row[2:]}) == 1 for row in rows)
        return [row[2] and len(row[2]) - 4 for row in rows]

    assert load(jobs) == [2_000, 2_000_000, None, None]
    assert load(jobs[1:]) == [2_000_000, None, None]
    assert load(jobs[2:]) == [2_000, 10]


# Finish


def test_a_finished_job_moves_to_history_with_all_it_had(connection: Connection) -> None:
    columns: dict[str, Any] = dict(
        queue="mail",
        task="shop.send",
        args=[1],
        kwargs={"a": 1},
        priority=7,
        headers={"trace": "x"},
        attempt=4,
        retries=2,
        max_retries=5,
        crashes=1,
        rescues=3,
        eta=datetime(2024, 2, 29, tzinfo=UTC),
        expires_at=datetime(2994, 1, 1, tzinfo=UTC),
        unique_key="order-1",
        enqueued_by="somebody",
    )
    job_id = add_running(connection, **columns)
    before = look(connection, "jobs", job_id)
    assert before is not None

    done = outcome(job_id, attempt=4, result='{"sum": 1}', started=97.0, finished=99.0)
    assert ack(connection, done, now=100.0) == [(1, None)]

    after = look(connection, "finished_jobs", job_id)
    assert after is not None
    kept = {key: value for key, value in before.items() if key in after}
    assert set(before) - set(after) == {"position", "max_retries", "cancel_requested_at"}
    own = {"state": "succeeded", "result": {"sum": 1}, "result_error": None}
    times = {"started_at": after["started_at"], "finished_at": after["finished_at"]}
    assert after == {**kept, **own, **times}
    assert seconds(after["started_at"], after["finished_at"]) == pytest.approx(2.0, abs=0.5)
    assert after["claimed_at"] < after["started_at"] < after["finished_at"] <= clock(connection)
    assert look(connection, "jobs", job_id) is None
    partition = connection.execute(
        "select tableoid::regclass::text from pgqueue.finished_jobs where id = %s", [job_id]
    ).fetchone()
    assert partition is not None
    assert partition[0] == f"pgqueue.finished_jobs_p{after['finished_at'].astimezone(UTC):%Y%m%d}"


@pytest.mark.parametrize(
    "result",
    [None, "null", "0", '"é🎉\\n"', '{"a": [1, null, {"b": "ü"}]}', "1" * 5000, "[" * 500 + "]" * 500],
)
def test_a_result_is_kept_as_json(connection: Connection, result: str | None) -> None:
    job_id, plain = add_running(connection), add_running(connection)
    assert ack(connection, outcome(job_id, result=result), outcome(plain, result="1")) == [(2, None)]
    row = connection.execute(
        "select result is null, result::text, result = %s::jsonb, result_error from pgqueue.finished_jobs"
        " where id = %s",
        [result, job_id],
    ).fetchone()
    assert row is not None
    assert row[0] is (result is None)
    assert row[2] is (None if result is None else True)
    assert row[3] is None
    assert do(connection, "find_job", id=job_id)[0][1] == row[1]


def test_a_result_that_could_not_be_stored_leaves_its_error(connection: Connection) -> None:
    good, bad = add_running(connection), add_running(connection)
    answers = ack(connection, outcome(good, result="1"), outcome(bad, result_error="not JSON: <object>"))
    assert answers == [(2, None)]
    rows = [look(connection, "finished_jobs", job_id) for job_id in (good, bad)]
    assert [(row["state"], row["result"], row["result_error"]) for row in rows if row] == [
        ("succeeded", 1, None),
        ("succeeded", None, "not JSON: <object>"),
    ]


def test_an_expired_job_ends_without_having_started(connection: Connection) -> None:
    job_id = add_running(connection)
    assert ack(connection, outcome(job_id, state="expired", finished=100.0)) == [(1, None)]
    row = look(connection, "finished_jobs", job_id)
    assert row is not None
    assert (row["state"], row["started_at"], row["result"]) == ("expired", None, None)
    assert row["claimed_at"] < row["finished_at"] <= clock(connection)


def test_outcomes_of_many_kinds_and_attempts_are_each_recorded_as_their_own(connection: Connection) -> None:
    jobs = {n: add_running(connection, attempt=n) for n in range(1, 8)}
    stale = add_running(connection, attempt=9)
    outcomes = [
        outcome(jobs[1], attempt=1, result="1"),
        outcome(jobs[2], attempt=2, result="2"),
        outcome(stale, attempt=2, result="no"),
        outcome(jobs[3], attempt=3, state="expired"),
        outcome(jobs[4], "retry", attempt=4),
        outcome(jobs[5], "retry", attempt=5, kind="crashed"),
        outcome(jobs[6], "bury", attempt=6),
        outcome(jobs[7], "release", attempt=7),
    ]
    calls = ack_calls(outcomes, 100.0)
    answers = ack(connection, *outcomes)
    assert sorted(answer[0] for answer in answers) == [1] * 7
    assert [answer[1] for (_, group), answer in zip(calls, answers, strict=True) if len(group) > 1] == [
        [jobs[2]]
    ]
    ended = connection.execute(
        "select attempt, state, result from pgqueue.finished_jobs order by attempt"
    ).fetchall()
    assert ended == [(1, "succeeded", 1), (2, "succeeded", 2), (3, "expired", None)]
    live = connection.execute(
        "select attempt, state, retries, crashes from pgqueue.jobs order by attempt"
    ).fetchall()
    assert live == [(4, "scheduled", 1, 0), (5, "scheduled", 0, 1), (7, "ready", 0, 0), (9, "running", 0, 0)]
    dead = connection.execute("select attempt from pgqueue.dead_letters").fetchall()
    assert dead == [(6,)]


def test_each_result_goes_to_its_own_job(connection: Connection) -> None:
    jobs = [add_running(connection) for _ in range(50)]
    jobs = jobs[::3] + jobs[1::3] + jobs[2::3]
    outcomes = [outcome(job_id, result=f'"{job_id}"') for job_id in jobs]
    assert ack(connection, *outcomes) == [(50, None)]
    row = connection.execute(
        "select count(*) from pgqueue.finished_jobs where result #>> '{}' = id::text"
    ).fetchone()
    assert row == (50,)


# Retry, bury, release


@pytest.mark.parametrize("kind", ["failed", "crashed"])
def test_a_retried_job_waits_for_its_eta_and_leaves_a_failure(connection: Connection, kind: Any) -> None:
    job_id = add_running(connection, retries=4, crashes=1, max_retries=9, attempt=6, queue="mail", rescues=2)
    before = look(connection, "jobs", job_id)
    assert before is not None
    facts = dict(error_class="ValueError", error_message="é", traceback="Traceback…")
    start = clock(connection)
    assert ack(connection, outcome(job_id, "retry", attempt=6, kind=kind, delay=60.0, **facts)) == [(1, None)]
    end = clock(connection)

    after = look(connection, "jobs", job_id)
    assert after is not None
    failed, crashed = (1, 0) if kind == "failed" else (0, 1)
    changes = {"state": "scheduled", "worker_id": None, "claimed_at": None, "eta": after["eta"]}
    counts = {"retries": 4 + failed, "crashes": 1 + crashed}
    assert after == {**before, **changes, **counts}
    assert start <= after["eta"] - timedelta(seconds=60) <= end
    failure = look(connection, "failures", job_id)
    assert failure is not None
    assert start <= failure.pop("failed_at") <= end
    same = {"job_id": before["id"], "attempt": 6, "task": "t", "queue": "mail", "kind": kind, "worker_id": ME}
    assert failure == {**same, **facts}


def test_a_retry_may_change_the_limit_of_one_job_and_keep_that_of_another(connection: Connection) -> None:
    changed, kept = add_running(connection, max_retries=3), add_running(connection, max_retries=5)
    outcomes = [outcome(changed, "retry", max_retries=-1, delay=1.0), outcome(kept, "retry", delay=1000.0)]
    assert ack(connection, *outcomes) == [(2, None)]
    rows = [look(connection, "jobs", job_id) for job_id in (changed, kept)]
    assert [row["max_retries"] for row in rows if row] == [-1, 5]
    assert rows[0] is not None
    assert rows[1] is not None
    assert seconds(rows[0]["eta"], rows[1]["eta"]) == pytest.approx(999.0, abs=0.5)


@pytest.mark.parametrize("kind", ["failed", "crashed"])
def test_a_buried_job_becomes_a_dead_letter_with_all_it_had(connection: Connection, kind: Any) -> None:
    columns: dict[str, Any] = dict(
        queue="mail",
        task="shop.send",
        args=[1],
        kwargs={"a": 1},
        priority=7,
        headers={"trace": "x"},
        attempt=4,
        retries=2,
        max_retries=5,
        crashes=1,
        rescues=3,
        eta=datetime(2024, 2, 29, tzinfo=UTC),
        expires_at=datetime(2994, 1, 1, tzinfo=UTC),
        unique_key="order-1",
        enqueued_by="somebody",
    )
    job_id = add_running(connection, **columns)
    before = look(connection, "jobs", job_id)
    assert before is not None
    facts = dict(error_class="ValueError", error_message="é", traceback="Traceback…")
    start = clock(connection)

    where = dict(reason="retries_exhausted", dead_letter_queue="failed_mail")
    assert ack(connection, outcome(job_id, "bury", attempt=4, kind=kind, **where, **facts)) == [(1, None)]

    letter = look(connection, "dead_letters", job_id)
    assert letter is not None
    assert set(before) - set(letter) == {"state", "position", "cancel_requested_at"}
    assert start <= letter.pop("died_at") <= clock(connection)
    kept = {key: value for key, value in before.items() if key in letter}
    assert letter == {**kept, **where, **facts, "crashes": 1 + (kind == "crashed")}
    failure = look(connection, "failures", job_id)
    assert failure is not None
    assert (failure["attempt"], failure["kind"], failure["queue"]) == (4, kind, "mail")
    assert {key: failure[key] for key in facts} == facts
    assert look(connection, "jobs", job_id) is None
    assert do(connection, "find_job", id=job_id) == [
        ("dead", None, None, "retries_exhausted", "ValueError", "é", "Traceback…")
    ]


def test_without_a_dead_letter_queue_a_letter_goes_under_its_own_queue(connection: Connection) -> None:
    here, there = add_running(connection, queue="mail"), add_running(connection, queue="mail")
    outcomes = [outcome(here, "bury"), outcome(there, "bury", dead_letter_queue="failed")]
    assert ack(connection, *outcomes) == [(2, None)]
    letters = [look(connection, "dead_letters", job_id) for job_id in (here, there)]
    assert [letter["dead_letter_queue"] for letter in letters if letter] == ["mail", "failed"]


def test_a_job_that_dies_again_replaces_its_letter(connection: Connection) -> None:
    job_id = add_running(connection)
    assert ack(connection, outcome(job_id, "bury", reason="rejected", error_message="first")) == [(1, None)]
    first = look(connection, "dead_letters", job_id)
    connection.execute("delete from pgqueue.failures")
    add_running(connection, id=job_id, attempt=5, retries=2, crashes=1)
    facts: Any = dict(reason="bad_payload", dead_letter_queue="other", error_class="E", traceback="T")
    assert ack(connection, outcome(job_id, "bury", attempt=5, **facts)) == [(1, None)]

    second_letter = look(connection, "dead_letters", job_id)
    assert first is not None
    assert second_letter is not None
    assert first["died_at"] < second_letter["died_at"]
    new = {key: second_letter[key] for key in (*facts, "attempt", "retries", "crashes", "error_message")}
    assert new == {**facts, "attempt": 5, "retries": 2, "crashes": 1, "error_message": None}


@pytest.mark.parametrize(
    ("state", "answer"),
    [("scheduled", "cancelled"), ("ready", "cancelled"), ("running", "requested"), ("gone", "too_late")],
)
def test_what_cancelling_answers(connection: Connection, state: str, answer: str) -> None:
    others = one_of_each(connection)
    before = everything(connection)
    eta = datetime.now(UTC) + timedelta(hours=1) if state == "scheduled" else None
    job_id = new_id()
    if state == "running":
        add_running(connection, id=job_id, unique_key="k")
    elif state != "gone":
        add(connection, id=job_id, state=state, eta=eta, unique_key="k")
    row: Any = connection.execute("select pgqueue.cancel(%s, 'why')", [job_id]).fetchone()
    assert row == (answer,)
    after = everything(connection)
    assert {key: after[key] for key in others.values()} == {key: before[key] for key in others.values()}
    if answer == "cancelled":
        ended = look(connection, "finished_jobs", job_id)
        assert ended is not None
        assert (ended["state"], ended["unique_key"], ended["started_at"]) == ("cancelled", "k", None)
        assert look(connection, "jobs", job_id) is None
    noted = connection.execute("select action, reason, details from pgqueue.audit_log").fetchall()
    changes = {"before": {"state": state}, "after": {"state": "running" if state == "running" else answer}}
    assert noted == ([] if answer == "too_late" else [("cancel", "why", {"answer": answer, **changes})])


@pytest.mark.parametrize("verb", ["retry", "snooze", "release", "crash"])
def test_a_cancelled_run_that_was_to_run_again_is_claimed_only_to_end(
    connection: Connection, verb: str
) -> None:
    """Whoever ends the run may not have heard of it."""
    job_id = add_running(connection)
    connection.execute("select pgqueue.cancel(%s)", [job_id])
    facts = {"kind": "crashed"} if verb == "crash" else {}
    verb = "retry" if verb == "crash" else verb
    assert ack(connection, outcome(job_id, verb, delay=3600.0, **facts)) == [(1, None)]
    if verb != "release":
        assert promote(connection)[0] == 1
    (job,) = claim(connection)
    assert (job.id, job.cancelled) == (job_id, True)


def test_a_snoozed_job_waits_and_nothing_is_counted(connection: Connection) -> None:
    job_id = add_running(connection, attempt=5, retries=2)
    assert ack(connection, outcome(job_id, "snooze", attempt=5, delay=60.0)) == [(1, None)]
    row = look(connection, "jobs", job_id)
    assert row is not None
    assert (row["state"], row["attempt"], row["retries"], row["crashes"]) == ("scheduled", 5, 2, 0)
    assert (row["worker_id"], row["claimed_at"]) == (None, None)
    assert 50 < seconds(row["enqueued_at"], row["eta"]) <= 61
    assert connection.execute("select count(*) from pgqueue.failures").fetchone() == (0,)


def test_a_forgotten_job_leaves_nothing(connection: Connection) -> None:
    kept, forgotten = add_running(connection), add_running(connection)
    answers = ack(connection, outcome(forgotten, "finish", history=False), outcome(kept, "finish"))
    assert answers == [(1, None), (1, None)]
    assert [row[0] for row in connection.execute("select id::text from pgqueue.all_jobs")] == [kept]
    assert ack(connection, outcome(forgotten, "finish", history=False)) == [(0, None)]


@pytest.mark.parametrize(
    ("task_max_crashes", "once", "crashes", "dead"),
    [
        ({}, [], 1, False),
        ({}, [], 2, True),
        ({"task": 5}, [], 2, False),
        ({"task": 1}, [], 0, True),
        ({"other": 1}, [], 0, False),
    ],
)
def test_a_task_has_crashes_of_its_own(
    connection: Connection, task_max_crashes: Mapping[str, int], once: list[str], crashes: int, dead: bool
) -> None:
    job_id = add_running(connection, worker="gone", crashes=crashes, task="task")
    register(connection, "gone")
    connection.execute(
        "update pgqueue.workers set fenced = true, running = array[%s::uuid] where id = 'gone'", [job_id]
    )
    answer = do(
        connection, "rescue_jobs", batch=9, max_crashes=3, max_rescues=10, dead_letter_queues="{}",
        task_max_crashes=json.dumps(task_max_crashes), once=once,
    )[0]  # fmt: skip
    assert answer[2] == dead


def test_a_lost_run_that_may_have_begun_is_not_repeated_if_its_task_must_not_run_twice(
    connection: Connection,
) -> None:
    once = add_running(connection, "missing", task="charge")
    often = add_running(connection, "missing", task="mail")
    answer = do(
        connection, "rescue_jobs", batch=9, max_crashes=3, max_rescues=10, dead_letter_queues="{}",
        task_max_crashes='{"charge": 1}', once=["charge"],
    )[0]  # fmt: skip
    assert answer == (1, ["default"], 1)
    row: Any = connection.execute("select id::text, reason, crashes from pgqueue.dead_letters").fetchone()
    assert row == (once, "crashed", 1)
    row = connection.execute("select id::text, state, rescues from pgqueue.jobs").fetchone()
    assert row == (often, "ready", 1)


def test_a_released_job_goes_to_the_end_of_its_lane_and_keeps_its_attempt(connection: Connection) -> None:
    job_id = add_running(
        connection, retries=1, crashes=1, rescues=1, attempt=5, eta=datetime(2024, 1, 1, tzinfo=UTC)
    )
    before = look(connection, "jobs", job_id)
    last = look(connection, "jobs", add(connection))
    assert before is not None
    assert last is not None
    assert ack(connection, outcome(job_id, "release", attempt=5)) == [(1, None)]
    after = look(connection, "jobs", job_id)
    assert after is not None
    assert after["position"] > last["position"]
    changes = {"state": "ready", "worker_id": None, "claimed_at": None, "position": after["position"]}
    assert after == {**before, **changes}
    assert not everything(connection).keys() - {job_id, str(last["id"]), ME, OTHER}
    assert {job.id: job.attempt for job in claim(connection)}[job_id] == 6


# Promotion


def test_due_jobs_become_ready_in_order_of_eta_a_batch_at_a_time(connection: Connection) -> None:
    noon = datetime(2030, 1, 1, 12, tzinfo=UTC)
    by_eta = {}
    for n in (3, 0, 4, 1, 2):
        job_id = str(UUID(int=100 - n))  # the earlier its eta, the later in order of id
        eta = noon + timedelta(minutes=n)
        by_eta[n] = add(connection, id=job_id, state="scheduled", eta=eta, queue=f"q{n}", attempt=1)
    waiting = add(connection, state="scheduled", eta=noon + timedelta(minutes=5, microseconds=1))
    ready = add(connection)
    assert promote(connection)[:3] == (0, [], 0.0)

    first = promote(connection, batch=3, now=noon + timedelta(minutes=5))
    assert first[:3] == (3, ["q0", "q1", "q2"], (noon + timedelta(minutes=2)).timestamp())
    rest = promote(connection, batch=3, after=first[2], now=noon + timedelta(minutes=5))
    assert rest[:3] == (2, ["q3", "q4"], (noon + timedelta(minutes=4)).timestamp())
    assert first[3] <= first[4] <= rest[4]

    order_now = connection.execute(
        "select id::text from pgqueue.jobs where state = 'ready' order by position"
    )
    assert [row[0] for row in order_now] == [ready, *(by_eta[n] for n in sorted(by_eta))]
    row = look(connection, "jobs", by_eta[0])
    assert row is not None
    assert (row["attempt"], row["eta"], row["worker_id"]) == (1, noon, None)
    assert look(connection, "jobs", waiting) is not None
    assert promote(connection, now=noon + timedelta(minutes=5))[0] == 0


def test_promotion_looks_only_from_its_cursor_on(connection: Connection) -> None:
    eta = datetime(2024, 1, 1, microsecond=123457, tzinfo=UTC)
    before = add(connection, state="scheduled", eta=eta - timedelta(microseconds=1))
    at = add(connection, state="scheduled", eta=eta)
    assert promote(connection, after=eta.timestamp())[0] == 1
    rows = [look(connection, "jobs", job_id) for job_id in (before, at)]
    assert [row["state"] for row in rows if row] == ["scheduled", "ready"]
    assert promote(connection)[0] == 1


def test_promotion_from_the_beginning_finds_even_an_infinite_past(connection: Connection) -> None:
    job_id = str(uuid4())
    connection.execute(
        "INSERT INTO pgqueue.jobs (id, task, state, eta) VALUES (%s, 't', 'scheduled', '-infinity')", [job_id]
    )
    assert promote(connection, after=float("-inf"))[0] == 1


def test_promotion_skips_what_others_hold(connection: Connection, second: Connection) -> None:
    eta = datetime(2024, 1, 1, tzinfo=UTC)
    held, free = (add(connection, state="scheduled", eta=eta) for _ in range(2))
    with second.transaction():
        second.execute("select from pgqueue.jobs where id = %s for update", [held])
        assert promote(connection)[0] == 1
    rows = [look(connection, "jobs", job_id) for job_id in (held, free)]
    assert [row["state"] for row in rows if row] == ["scheduled", "ready"]


def test_promotion_tells_when_the_next_job_is_due(connection: Connection) -> None:
    assert promote(connection)[7] is None
    now = clock(connection)
    add(connection, state="scheduled", eta=now + timedelta(hours=2))
    add(connection, state="scheduled", eta=now + timedelta(hours=1))
    add(connection, state="scheduled", eta=now - timedelta(hours=1))
    add(connection)
    add_running(connection, eta=now)
    for after in (0.0, now.timestamp(), None):
        assert 3600 - DEADLINE < promote(connection, after=after)[7] <= 3600
        assert promote(connection, after=after, upto=now.timestamp())[7] is None
    connection.execute("update pgqueue.jobs set state = 'ready' where state = 'scheduled'")
    assert promote(connection)[7] is None


def test_promotion_in_the_past_looks_no_further_than_it_is_told(connection: Connection) -> None:
    eta = datetime(2024, 1, 1, tzinfo=UTC)
    for seconds in (-1, 0, 1):
        add(connection, state="scheduled", eta=eta + timedelta(seconds=seconds))
    assert promote(connection, after=float("-inf"), upto=eta.timestamp())[:3] == (
        2,
        ["default"],
        eta.timestamp(),
    )
    assert promote(connection, after=None)[0] == 0
    assert promote(connection)[0] == 1


def test_promotion_takes_a_transaction_id_when_it_is_to_mark_how_far_it_came(connection: Connection) -> None:
    before = clock(connection).timestamp()
    first, second = promote(connection, mark=True), promote(connection, mark=True)
    assert before <= first[6] <= second[6]
    assert second[4] > first[4]
    assert second[3] <= second[4]
    assert 0 < first[5] < DEADLINE


# Rescue


def test_rescue_gives_back_what_nobody_runs_any_more(connection: Connection) -> None:
    register(connection, "host:3:cccc")
    connection.execute("update pgqueue.workers set fenced = true where id = 'host:3:cccc'")
    lost = [
        add_running(connection, worker, attempt=4, retries=1) for worker in ("host:3:cccc", "gone:1:x", None)
    ]
    live = [add_running(connection, ME), add_running(connection, OTHER)]
    before = {job_id: look(connection, "jobs", job_id) for job_id in lost + live}
    last = look(connection, "jobs", live[-1])

    assert rescue(connection) == (3, ["default"], 0)

    for job_id in live:
        assert look(connection, "jobs", job_id) == before[job_id]
    for job_id in lost:
        after, was = look(connection, "jobs", job_id), before[job_id]
        assert after is not None
        assert was is not None
        assert last is not None
        assert after["position"] > last["position"]
        changes = {"state": "ready", "worker_id": None, "claimed_at": None, "rescues": 1}
        assert after == {**was, **changes, "position": after["position"]}
    assert connection.execute("select count(*) from pgqueue.failures").fetchone() == (0,)
    assert rescue(connection) == (0, [], 0)


def test_rescue_leaves_live_workers_alone_wherever_their_ids_sort(connection: Connection) -> None:
    connection.execute("delete from pgqueue.workers")
    ids = [
        "!",
        "0",
        "A",
        "B",
        "Z",
        "a",
        "b",
        "host:1:aaaa",
        "host:10:aaaa",
        "host:9:ffff",
        "z",
        "zz",
        "é",
        "日本",
    ]
    jobs: dict[str, list[str]] = {}
    for number, worker in enumerate(ids):
        register(connection, worker)
        if number % 3 == 0:
            connection.execute("update pgqueue.workers set fenced = true where id = %s", [worker])
        jobs[worker] = [add_running(connection, worker) for _ in range(3)]
        jobs[worker + "-gone"] = [add_running(connection, worker + "-gone")]
    live = {worker for number, worker in enumerate(ids) if number % 3}

    assert rescue(connection)[0] == sum(len(of) for worker, of in jobs.items() if worker not in live)

    running = connection.execute(
        "select distinct worker_id from pgqueue.jobs where state = 'running'"
    ).fetchall()
    assert {row[0] for row in running} == live


@pytest.mark.parametrize(
    ("ago", "taken"), [("1 millisecond", 1), ("-1 second", 0), ("-59 seconds", 0), ("-1 day", 1)]
)
@pytest.mark.parametrize("live", [[], ["zebra"]], ids=["beyond the live ones", "between the live ones"])
def test_rescue_leaves_alone_what_was_claimed_after_it_looked(
    connection: Connection, live: list[str], ago: str, taken: int
) -> None:
    """By a worker that it cannot see yet. From the future by a day: somebody set the clock back."""
    for worker in live:
        register(connection, worker)
    job_id = add_running(connection, "a new one")
    connection.execute(
        "update pgqueue.jobs set claimed_at = now() - %s::interval where id = %s", [ago, job_id]
    )
    assert rescue(connection)[0] == taken


def test_rescue_takes_a_batch_at_a_time(connection: Connection) -> None:
    for worker in ("gone:1", "i-am-gone", "zz-gone", None):
        for _ in range(10):
            add_running(connection, worker)
    add_running(connection, ME)
    taken = [rescue(connection, batch=15)[0] for _ in range(4)]
    assert taken == [15, 15, 10, 0]
    row = connection.execute(
        "select count(*), min(rescues), max(rescues) from pgqueue.jobs where state = 'ready'"
    )
    assert row.fetchone() == (40, 1, 1)


def test_two_rescuers_at_once_take_each_job_once(connection: Connection, second: Connection) -> None:
    for _ in range(20):
        add_running(connection, "gone")
    parameters = dict(
        batch=15, max_crashes=3, max_rescues=10, dead_letter_queues="{}", task_max_crashes="{}", once=[]
    )
    with connection.transaction():
        connection.execute("set transaction isolation level read committed")
        assert connection.execute(query("rescue_jobs").text, parameters).fetchall() == [(15, ["default"], 0)]
        assert rescue(second, batch=15)[0] == 5
    assert rescue(second)[0] == 0
    row = connection.execute(
        "select count(*) from pgqueue.jobs where state = 'ready' and rescues = 1"
    ).fetchone()
    assert row == (20,)


def fence(connection: Connection, worker: str, running: list[str]) -> None:
    connection.execute(
        "update pgqueue.workers set fenced = true, running = %s::uuid[] where id = %s", [running, worker]
    )


def test_a_job_that_was_recorded_as_running_has_crashed(connection: Connection) -> None:
    ran, waited = add_running(connection, OTHER, attempt=2, queue="mail"), add_running(connection, OTHER)
    fence(connection, OTHER, [ran])
    assert rescue(connection) == (2, ["default", "mail"], 0)
    rows = [look(connection, "jobs", job_id) for job_id in (ran, waited)]
    assert [(row["state"], row["crashes"], row["rescues"]) for row in rows if row] == [
        ("ready", 1, 0),
        ("ready", 0, 1),
    ]
    failure = look(connection, "failures", ran)
    assert failure is not None
    assert failure["failed_at"] <= clock(connection)
    assert (failure["attempt"], failure["kind"], failure["queue"]) == (2, "crashed", "mail")
    assert (failure["task"], failure["worker_id"], failure["error_class"]) == ("t", OTHER, "WorkerLost")
    assert failure["error_message"] == f"worker {OTHER} went silent while it was running the job"
    assert look(connection, "failures", waited) is None


def test_the_third_crash_buries_under_the_tasks_dead_letter_queue(connection: Connection) -> None:
    named = add_running(
        connection, OTHER, crashes=2, task="shop.send", queue="mail", attempt=7, unique_key="k"
    )
    plain = add_running(connection, OTHER, crashes=2, task="other", queue="mail")
    second_crash = add_running(connection, OTHER, crashes=1)
    fence(connection, OTHER, [named, plain, second_crash])
    before = look(connection, "jobs", named)

    assert rescue(connection, letters={"shop.send": "failed_mail"}) == (1, ["default"], 2)

    letter, other = look(connection, "dead_letters", named), look(connection, "dead_letters", plain)
    assert before is not None
    assert letter is not None
    assert other is not None
    assert other["dead_letter_queue"] == "mail"
    kept = {key: value for key, value in before.items() if key in letter}
    own = {
        "crashes": 3,
        "dead_letter_queue": "failed_mail",
        "reason": "crashed",
        "error_class": "WorkerLost",
        "error_message": f"worker {OTHER} went silent or lost the job too often (crashes 3, rescues 0)",
        "traceback": None,
    }
    assert letter == {**kept, **own, "died_at": letter["died_at"]}
    failure = look(connection, "failures", named)
    assert failure is not None
    assert (failure["attempt"], failure["kind"]) == (7, "crashed")
    assert look(connection, "jobs", named) is None
    row = look(connection, "jobs", second_crash)
    assert row is not None
    assert row["crashes"] == 2


def test_a_job_that_is_lost_too_often_is_buried(connection: Connection) -> None:
    job_id = add(connection, queue="mail")
    for times in range(1, MAX_RESCUES + 1):
        assert [job.id for job in claim(connection, OTHER, queues=["mail"])] == [job_id]
        connection.execute("update pgqueue.jobs set worker_id = 'gone'")
        assert rescue(connection) == (1, ["mail"], 0)
        row = look(connection, "jobs", job_id)
        assert row is not None
        assert (row["rescues"], row["crashes"], row["attempt"]) == (times, 0, times)
    claim(connection, OTHER, queues=["mail"])
    connection.execute("update pgqueue.jobs set worker_id = NULL")
    assert rescue(connection) == (0, [], 1)
    letter = look(connection, "dead_letters", job_id)
    assert letter is not None
    assert (letter["reason"], letter["rescues"], letter["dead_letter_queue"]) == (
        "crashed",
        MAX_RESCUES,
        "mail",
    )
    assert "(none)" in letter["error_message"]
    assert look(connection, "failures", job_id) is None


def test_a_job_that_is_rescued_into_death_again_replaces_its_letter(connection: Connection) -> None:
    job_id = add_running(connection)
    assert ack(connection, outcome(job_id, "bury", error_message="first", traceback="T")) == [(1, None)]
    add_running(connection, "gone", id=job_id, attempt=5, rescues=10, retries=2)
    assert rescue(connection) == (0, [], 1)
    letter = look(connection, "dead_letters", job_id)
    assert letter is not None
    assert (letter["attempt"], letter["retries"], letter["rescues"]) == (5, 2, 10)
    assert (letter["reason"], letter["worker_id"], letter["traceback"]) == ("crashed", "gone", None)


# Workers


def test_a_heartbeat_counts_up_and_records_what_runs(connection: Connection) -> None:
    job_id = new_id()
    beat = dict(worker=ME, running="{" + job_id + "}", stats='{"succeeded": 1}')
    assert do(connection, "beat_heart", **beat) == [(1,)]
    assert do(connection, "beat_heart", **beat) == [(2,)]
    row = look(connection, "workers", ME)
    assert row is not None
    assert [str(each) for each in row["running"]] == [job_id]
    assert row["stats"] == {"succeeded": 1}
    assert row["started_at"] <= row["heartbeat_at"] <= clock(connection)


def test_a_fenced_or_missing_worker_has_no_heartbeat(connection: Connection) -> None:
    connection.execute("update pgqueue.workers set fenced = true where id = %s", [ME])
    before = everything(connection)
    for worker in (ME, "missing"):
        assert do(connection, "beat_heart", worker=worker, running="{}", stats="{}") == []
    assert everything(connection) == before
    assert do(connection, "list_heartbeats") == [(OTHER, 0)]


def test_a_worker_is_fenced_only_while_its_counter_stands_still(connection: Connection) -> None:
    assert do(connection, "fence_worker", worker=ME, heartbeat=1) == []
    assert do(connection, "fence_worker", worker=ME, heartbeat=0) == [(ME,)]
    assert do(connection, "fence_worker", worker=ME, heartbeat=0) == []
    assert do(connection, "list_heartbeats") == [(OTHER, 0)]


def test_a_worker_stays_on_the_list_while_jobs_run_under_it(connection: Connection) -> None:
    job_id = add_running(connection)
    add_running(connection, OTHER)
    add(connection)
    assert do(connection, "delete_worker", worker=ME) == []
    assert look(connection, "workers", ME) is not None
    assert ack(connection, outcome(job_id)) == [(1, None)]
    assert do(connection, "delete_worker", worker=ME) == [(ME,)]
    assert do(connection, "delete_worker", worker=ME) == []
    assert look(connection, "workers", OTHER) is not None


def test_fenced_workers_are_forgotten_after_an_hour_without_jobs(connection: Connection) -> None:
    for worker in ("busy", "long gone", "just fenced", "silent"):
        register(connection, worker)
    connection.execute(
        "update pgqueue.workers set fenced = true where id in ('busy', 'long gone', 'just fenced')"
    )
    connection.execute(
        "update pgqueue.workers set heartbeat_at = now() - interval '2 hours' where id <> 'just fenced'"
    )
    add_running(connection, "busy")
    assert do(connection, "delete_fenced_workers") == [("long gone",)]
    assert rescue(connection)[0] == 1
    assert do(connection, "delete_fenced_workers") == [("busy",)]


# New queues


def test_every_new_queue_is_found_and_no_known_one(connection: Connection) -> None:
    queues = {
        "!",
        "-",
        "0",
        "A",
        "B",
        "Zz",
        "a",
        "a.b",
        "a:b",
        "aa",
        "b",
        "default",
        "mail",
        "mail2",
        "z",
        "z" * 63,
        "é",
    }
    for queue in sorted(queues):
        for _ in range(2):
            add(connection, queue=queue)
    add(connection, queue="scheduled-only", state="scheduled", eta=datetime(2024, 1, 1, tzinfo=UTC))
    add_running(connection, queue="running-only")
    known = ["served", "mail", "a", "A", "served"]
    new: list[str] = []
    while found := [row[0] for row in do(connection, "find_queues", known=known)]:
        assert not set(found) & set(known)
        assert len(found) == len(set(found))
        known += found
        new += found
    assert sorted(new) == sorted(queues - {"mail", "a", "A"})
    assert do(connection, "find_queues", known=sorted(queues)) == []


def test_with_no_queue_known_the_first_one_is_found(connection: Connection) -> None:
    assert do(connection, "find_queues", known=[]) == []
    add(connection, queue="b")
    add(connection, queue="a")
    assert do(connection, "find_queues", known=[]) == [("a",)]


# The wake hint


@pytest.fixture
def heard(db: str) -> Iterator[Callable[[Connection], list[str]]]:
    """Call it with the connection that may have notified: what has been heard since the last call."""
    with psycopg.connect(db, autocommit=True) as listener:
        listener.execute("listen pgqueue")

        def hear(sender: Connection) -> list[str]:
            sender.execute("notify pgqueue, 'that is all'")  # notifications arrive in the order of commits
            found: list[str] = []
            for notification in listener.notifies(timeout=DEADLINE):
                if notification.payload == "that is all":
                    return found
                found.append(notification.payload)
            pytest.fail("nothing was heard")

        yield hear


def enqueue(connection: Connection, queue: str = "mail", eta_in: float | None = None) -> None:
    connection.execute(
        "select pgqueue.enqueue('t', queue => %s, eta => clock_timestamp() + %s * interval '1 second')",
        [queue, eta_in],
    )


def enqueue_many(connection: Connection, queue: str = "mail", eta_in: float | None = None) -> None:
    eta = None if eta_in is None else (clock(connection) + timedelta(seconds=eta_in)).isoformat()
    job = {"id": new_id(), "queue": queue, "task": "t", "eta": eta}
    connection.execute("select pgqueue.enqueue_many(%s, true)", [Jsonb([job])])


ENQUEUE = pytest.mark.parametrize("put", [enqueue, enqueue_many])


@ENQUEUE
def test_an_enqueue_notifies_while_somebody_sleeps_on_its_queue(
    connection: Connection, heard: Callable[[Connection], list[str]], put: Callable[..., None]
) -> None:
    put(connection)
    assert heard(connection) == []
    do(connection, "arm_wake", queues=["mail", "other"], next_eta=None)
    put(connection)
    assert heard(connection) == ["mail"]
    put(connection, "third")
    assert heard(connection) == []
    do(connection, "disarm_wake", queues=["mail"])
    put(connection)
    put(connection, "other")
    assert heard(connection) == ["other"]
    do(connection, "arm_wake", queues=["mail"], next_eta=None)
    put(connection)
    assert heard(connection) == ["mail"]
    with connection.transaction(force_rollback=True):
        put(connection)
    assert heard(connection) == []


@ENQUEUE
@pytest.mark.parametrize("until", ["-1 microseconds", "11 seconds", "1 hour"])
def test_a_hint_that_is_expired_or_from_a_wrong_clock_wakes_nobody(
    connection: Connection, heard: Callable[[Connection], list[str]], put: Callable[..., None], until: str
) -> None:
    do(connection, "arm_wake", queues=["mail"], next_eta=None)
    connection.execute("update pgqueue.wake set wake_until = clock_timestamp() + %s::interval", [until])
    put(connection)
    assert heard(connection) == []


@ENQUEUE
def test_a_scheduled_job_wakes_only_those_who_know_of_nothing_earlier(
    connection: Connection, heard: Callable[[Connection], list[str]], put: Callable[..., None]
) -> None:
    do(connection, "arm_wake", queues=["mail"], next_eta=3600.0)
    put(connection, eta_in=7200.0)
    assert heard(connection) == []
    put(connection, eta_in=1800.0)
    assert heard(connection) == ["mail"]
    put(connection, eta_in=-5.0)  # due at once
    assert heard(connection) == ["mail"]
    do(connection, "arm_wake", queues=["mail"], next_eta=None)
    put(connection, eta_in=1e9)
    assert heard(connection) == ["mail"]


@ENQUEUE
def test_who_sleeps_on_every_queue_is_notified_of_one_that_nobody_sleeps_on(
    connection: Connection, heard: Callable[[Connection], list[str]], put: Callable[..., None]
) -> None:
    do(connection, "arm_wake", queues=["*", "mail", "busy"], next_eta=60.0)
    do(connection, "disarm_wake", queues=["busy"])
    put(connection)
    assert heard(connection) == ["mail"], "who sleeps on it knows it"
    put(connection, "busy")
    assert heard(connection) == [], "who keeps up with it polls"
    put(connection, "new")
    assert heard(connection) == ["*"]
    put(connection, "new", eta_in=30.0)
    assert heard(connection) == ["*"]
    put(connection, "new", eta_in=90.0)
    assert heard(connection) == []
    connection.execute("update pgqueue.wake set wake_until = clock_timestamp() where queue = 'mail'")
    put(connection)
    assert heard(connection) == ["*"], "who slept on it is gone, or has its hands full"
    connection.execute("update pgqueue.wake set wake_until = clock_timestamp() where queue = '*'")
    put(connection)
    put(connection, "new")
    assert heard(connection) == []


def test_many_new_queues_make_one_notification(
    connection: Connection, heard: Callable[[Connection], list[str]]
) -> None:
    do(connection, "arm_wake", queues=["*", "mail"], next_eta=None)
    names = ["mail", "x" * 10_000, "", *(f"new-{number}" for number in range(1000))]
    do(connection, "wake_workers", queues=names, eta=None)
    assert sorted(heard(connection)) == ["*", "mail"]
    do(connection, "wake_workers", queues=[], eta=None)
    assert heard(connection) == []


def test_wake_workers_tells_only_who_sleeps(
    connection: Connection, heard: Callable[[Connection], list[str]]
) -> None:
    do(connection, "arm_wake", queues=["a", "b", "c"], next_eta=60.0)
    do(connection, "disarm_wake", queues=["b"])
    do(connection, "wake_workers", queues=["a", "b", "d"], eta=None)
    assert heard(connection) == ["a"]
    now = clock(connection)
    do(connection, "wake_workers", queues=["a", "c"], eta=now + timedelta(seconds=30))
    assert sorted(heard(connection)) == ["a", "c"]
    do(connection, "wake_workers", queues=["a", "c"], eta=now + timedelta(seconds=90))
    assert heard(connection) == []


def test_notify_workers_tells_everybody(
    connection: Connection, heard: Callable[[Connection], list[str]]
) -> None:
    do(connection, "arm_wake", queues=["a", "b"], next_eta=None)
    do(connection, "disarm_wake", queues=["b"])
    do(connection, "notify_workers", queues=["b", "c"])
    assert sorted(heard(connection)) == ["b", "c"]


@pytest.mark.parametrize(
    ("tasks", "but", "found"),
    [
        (None, False, "abc"),
        (["a", "x"], False, "a"),
        (["a", "b"], True, "c"),
        ([], True, "abc"),
        ([], False, ""),
    ],
)
def test_a_claim_of_some_tasks_passes_over_the_others(
    connection: Connection, tasks: list[str] | None, but: bool, found: str
) -> None:
    for task in "abc":
        add(connection, task=task)
    register(connection, ME)
    claim(connection, tasks=tasks, but=but)
    rows = connection.execute("select task, state from pgqueue.jobs order by task").fetchall()
    assert rows == [(task, "running" if task in found else "ready") for task in "abc"]


def test_end_transactions_spares_what_is_not_one(connection: Connection, second: Connection) -> None:
    pids = [each.execute("select pg_backend_pid()").fetchall()[0][0] for each in (connection, second)]
    assert do(connection, "end_transactions", backends=pids) == [], "itself, and one that has none open"
    second.execute("begin")
    second.execute("select 1")
    assert do(connection, "end_transactions", backends=[pids[0]]) == []
    assert do(connection, "end_transactions", backends=pids) == [(True,)]
    with pytest.raises(psycopg.OperationalError):
        second.execute("select 1")


def test_arming_and_disarming_step_over_a_hint_that_is_held(
    connection: Connection, second: Connection
) -> None:
    do(connection, "arm_wake", queues=["held", "free"], next_eta=None)
    connection.execute("update pgqueue.wake set wake_until = 'epoch'")
    with second.transaction():
        second.execute("select from pgqueue.wake where queue = 'held' for update")
        do(connection, "arm_wake", queues=["free", "held", "new"], next_eta=5.0)
        rows = connection.execute(
            "select queue, wake_until > clock_timestamp(), next_eta < 'infinity'"
            " from pgqueue.wake order by queue"
        ).fetchall()
        assert rows == [("free", True, True), ("held", False, False), ("new", True, True)]
        do(connection, "disarm_wake", queues=["free", "held"])
        rows = connection.execute(
            "select queue, isfinite(wake_until) from pgqueue.wake order by queue"
        ).fetchall()
        assert rows == [("free", False), ("held", True), ("new", True)]


def test_an_open_edit_of_the_hint_does_not_hold_up_an_enqueue(
    connection: Connection, second: Connection
) -> None:
    do(connection, "arm_wake", queues=["mail"], next_eta=None)
    with second.transaction():
        second.execute("select from pgqueue.wake for update")
        connection.execute("set lock_timeout = '1s'")
        enqueue(connection)


def test_asking_how_full_the_notify_queue_is(connection: Connection) -> None:
    ((usage,),) = do(connection, "drain_notify_queue")
    assert 0 <= usage < 1


# Rows that nobody should write, written by plain SQL

DEEP = "[" * 6000 + "]" * 6000
HOSTILE: dict[str, dict[str, str]] = {
    "arguments that are no array": {"args": "'{\"a\": 1}'", "kwargs": "'[1]'"},
    "arguments that are scalars": {"args": "'1'", "kwargs": "'null'", "headers": "'\"x\"'"},
    "an infinite eta": {"eta": "'infinity'", "expires_at": "'infinity'"},
    "an eta before all times": {"eta": "'-infinity'", "expires_at": "'-infinity'"},
    "an eta in the year 20000": {"eta": "'20000-01-01+00'", "expires_at": "'20000-01-01+00'"},
    "a number of 5,000 digits": {"args": f"'[{'9' * 5000}]'", "headers": f"'{{\"a\": {'9' * 1000}}}'"},
    "deep arguments": {
        "args": f"'{DEEP}'",
        "kwargs": f"'{{\"a\": {DEEP}}}'",
        "headers": f"'{{\"a\": {DEEP}}}'",
    },
    "no task name": {"task": "''"},
    "control characters": {"task": "E'\\x01\\n'", "queue": "'default'", "unique_key": "E'\\x7f'"},
    "a large header": {"headers": "jsonb_build_object('a', repeat('x', 100000))"},
}


def add_hostile(connection: Connection, columns: dict[str, str], state: str) -> str:
    job_id = new_id()
    pairs = {"task": "'t'", "state": f"'{state}'", **columns, "id": f"'{job_id}'"}
    if state == "scheduled":
        pairs.setdefault("eta", "'2024-01-01+00'")
    connection.execute(
        f"insert into pgqueue.jobs ({', '.join(pairs)}) values ({', '.join(pairs.values())})".encode()
    )
    return job_id


@pytest.mark.parametrize("columns", HOSTILE.values(), ids=HOSTILE.keys())
def test_a_hostile_row_is_claimed_read_and_ended_like_any_other(
    connection: Connection, columns: dict[str, str]
) -> None:
    before, hostile, after = add(connection), add_hostile(connection, columns, "ready"), add(connection)
    jobs = {job.id: job for job in claim(connection)}
    assert jobs.keys() == {before, hostile, after}
    ((_, _, *texts),) = do(connection, "load_payloads", ids=[hostile], attempts=[1], workers=[ME])
    assert all(isinstance(text, str) for text in texts)
    listed, unreadable = decode_claimed(do(connection, "list_claimed", worker=ME), ME)
    assert {job.id for job in listed} == jobs.keys()
    assert not unreadable

    assert ack(connection, outcome(before), outcome(hostile, "retry"), outcome(after)) == [
        (2, None),
        (1, None),
    ]
    connection.execute("update pgqueue.jobs set state = 'running', worker_id = 'gone'")
    assert rescue(connection)[0] == 1
    assert len(claim(connection)) == 1
    assert ack(connection, outcome(hostile, "bury", attempt=2)) == [(1, None)]
    assert do(connection, "find_job", id=hostile)[0][0] == "dead"


@pytest.mark.parametrize("columns", HOSTILE.values(), ids=HOSTILE.keys())
def test_a_hostile_row_does_not_stop_promotion(connection: Connection, columns: dict[str, str]) -> None:
    hostile = add_hostile(connection, columns, "scheduled")
    due = add(connection, state="scheduled", eta=datetime(2024, 6, 1, tzinfo=UTC))
    promoted, queues, last, *_ = promote(connection)
    assert (promoted, queues) in ((1, ["default"]), (2, ["default"]))
    assert last == datetime(2024, 6, 1, tzinfo=UTC).timestamp()
    row = look(connection, "jobs", due)
    assert row is not None
    assert row["state"] == "ready"
    for after in (0.0, last):
        do(connection, "arm_wake", queues=["default"], next_eta=promote(connection, after=after)[7])
    text = connection.execute("select state from pgqueue.jobs where id = %s", [hostile]).fetchone()
    assert text is not None
    assert text[0] == ("scheduled" if "eta" in columns else "ready")


def test_running_without_a_worker_is_nobodys_and_rescued(connection: Connection) -> None:
    job_id = add(connection, state="running")
    assert claim(connection) == []
    assert ack(connection, outcome(job_id, attempt=0)) == [(0, None)]
    assert rescue(connection) == (1, ["default"], 0)
    assert [job.id for job in claim(connection)] == [job_id]


# History: partitions and retention


def partitions(connection: Connection, parent: str = "finished_jobs") -> list[str]:
    rows = connection.execute(
        "select c.relname from pg_inherits i join pg_class c on c.oid = i.inhrelid"
        f" where i.inhparent = 'pgqueue.{parent}'::regclass and c.relname like '%\\_p%' order by 1".encode()
    )
    return [row[0] for row in rows]


def names(parent: str, today: datetime, first: int, last: int) -> list[str]:
    return [f"{parent}_p{today + timedelta(days=n):%Y%m%d}" for n in range(first, last + 1)]


def drop_today(connection: Connection) -> str:
    name = f"finished_jobs_p{clock(connection).astimezone(UTC):%Y%m%d}"
    connection.execute(f"drop table pgqueue.{name}".encode())
    return name


def where(connection: Connection, job_id: str) -> str:
    row = connection.execute(
        "select replace(tableoid::regclass::text, 'pgqueue.', '') from pgqueue.finished_jobs where id = %s",
        [job_id],
    ).fetchone()
    assert row is not None
    return str(row[0])


def test_partitions_are_made_from_yesterday_to_two_weeks_ahead_once(own: Connection) -> None:
    today = clock(own).astimezone(UTC)
    for parent in ("finished_jobs", "failures"):
        assert partitions(own, parent) == names(parent, today, -1, 14)
    assert do(own, "make_partitions") == [(0,)]
    own.execute(f"drop table pgqueue.{names('failures', today, 14, 14)[0]}".encode())
    assert do(own, "make_partitions") == [(1,)]
    assert partitions(own, "failures") == names("failures", today, -1, 14)


def test_without_a_partition_for_today_an_ack_lands_in_the_default_one_and_moves_later(
    own: Connection,
) -> None:
    today = drop_today(own)
    job_id = add_running(own)
    assert ack(own, outcome(job_id, result="1")) == [(1, None)]
    assert where(own, job_id) == "finished_jobs_default"
    assert do(own, "find_job", id=job_id)[0][:2] == ("succeeded", "1")
    assert do(own, "make_partitions") == [(1,)]
    assert where(own, job_id) == today
    assert do(own, "find_job", id=job_id)[0][:2] == ("succeeded", "1")


def test_a_long_reader_holds_up_neither_the_maker_of_partitions_nor_an_ack(
    own: Connection, own_dsn: str
) -> None:
    today = drop_today(own)
    job_id = add_running(own)
    with psycopg.connect(own_dsn) as reader:
        reader.execute("select count(*) from pgqueue.finished_jobs")
        assert do(own, "make_partitions") == [(0,)]  # it has given up: the reader is still there
        assert ack(own, outcome(job_id)) == [(1, None)]
        assert where(own, job_id) == "finished_jobs_default"
    assert do(own, "make_partitions") == [(1,)]
    assert where(own, job_id) == today


def test_acks_go_on_while_the_maker_of_partitions_waits_for_a_reader(own: Connection, own_dsn: str) -> None:
    for name in partitions(own):
        own.execute(f"drop table pgqueue.{name}".encode())
    jobs = [add_running(own) for _ in range(5)]
    with (
        psycopg.connect(own_dsn) as reader,
        psycopg.connect(own_dsn, autocommit=True) as maker,
        in_thread(lambda: do(maker, "make_partitions")) as made,
    ):
        reader.execute("select count(*) from pgqueue.finished_jobs")
        for job_id in jobs:
            wait_until(lambda: is_waiting(own, maker) or made, "the maker waits")
            assert ack(own, outcome(job_id)) == [(1, None)]
            assert where(own, job_id) == "finished_jobs_default"


def test_two_makers_of_partitions_at_once_make_each_once(own: Connection, own_dsn: str) -> None:
    today = clock(own).astimezone(UTC)
    for parent in ("finished_jobs", "failures"):
        for name in partitions(own, parent):
            own.execute(f"drop table pgqueue.{name}".encode())
    with psycopg.connect(own_dsn) as first, psycopg.connect(own_dsn, autocommit=True) as late:
        assert first.execute(query("make_partitions").text).fetchall() == [(32,)]
        assert do(late, "make_partitions") == [(0,)]  # it leaves it to the first, without waiting
        first.commit()
        assert do(late, "make_partitions") == [(0,)]
    for parent in ("finished_jobs", "failures"):
        assert partitions(own, parent) == names(parent, today, -1, 14)


def test_an_ack_that_meets_the_making_of_its_partition_is_not_blamed(own: Connection, own_dsn: str) -> None:
    # It has chosen the default partition when it begins to wait, and is refused when the wait is over.
    today = drop_today(own)
    job_id = add_running(own)
    (call, _), *_ = ack_calls([outcome(job_id, result="1")], 100.0)

    async def send() -> list[list[list[Any]]]:
        link = Link(own_dsn, schema="pgqueue", name="acker")
        try:
            return await link.run([call])
        except GroupFailed as refused:
            if refused.blames_the_row:
                raise
            return await link.run([call])
        finally:
            await link.close()

    def waits() -> bool:
        row = own.execute(
            "select count(*) from pg_stat_activity"
            " where application_name = 'pgqueue acker' and wait_event_type = 'Lock'"
        ).fetchone()
        return row == (1,)

    with psycopg.connect(own_dsn) as maker:
        assert maker.execute(query("make_partitions").text).fetchall() == [(1,)]
        with in_thread(lambda: asyncio.run(send())) as answers:
            wait_until(waits, "the ack waits for the new partition")
            maker.commit()
    assert answers == [[[[(1, None)]]]]
    assert where(own, job_id) == today
    row = look(own, "finished_jobs", job_id)
    assert row is not None
    assert row["result"] == 1


def test_the_making_of_a_partition_that_meets_an_ack_gives_way(own: Connection, own_dsn: str) -> None:
    today = drop_today(own)
    job_id = add_running(own)
    with psycopg.connect(own_dsn) as acker:
        for call, _ in ack_calls([outcome(job_id)], 100.0):
            assert acker.execute(query(call.name).text, call.parameters).fetchall() == [(1, None)]
        with psycopg.connect(own_dsn, autocommit=True) as maker:
            with in_thread(lambda: do(maker, "make_partitions")) as made:
                wait_until(lambda: is_waiting(own, maker) or made, "the maker waits for the ack")
                acker.commit()
    assert made in ([[(0,)]], [[(1,)]])
    do(own, "make_partitions")
    assert where(own, job_id) == today


def test_bounds_are_days_of_utc_whatever_the_databases_time_zone(fresh_dsn: str) -> None:
    with psycopg.connect(fresh_dsn, autocommit=True) as connection:
        name = connection.info.dbname
        connection.execute(f'alter database "{name}" set timezone to "Asia/Seoul"'.encode())
    upgrade(fresh_dsn)
    with psycopg.connect(fresh_dsn, autocommit=True) as connection:
        assert connection.execute("show timezone").fetchone() == ("Asia/Seoul",)
        drop_today(connection)
        assert do(connection, "make_partitions") == [(1,)]
        register(connection, ME)
        job_id = add_running(connection)
        assert ack(connection, outcome(job_id)) == [(1, None)]
        row = look(connection, "finished_jobs", job_id)
        assert row is not None
        assert where(connection, job_id) == f"finished_jobs_p{row['finished_at'].astimezone(UTC):%Y%m%d}"
        connection.execute("set timezone to 'UTC'")
        bounds = connection.execute(
            "select c.relname, pg_get_expr(c.relpartbound, c.oid) from pg_inherits i"
            " join pg_class c on c.oid = i.inhrelid where i.inhparent in"
            " ('pgqueue.finished_jobs'::regclass, 'pgqueue.failures'::regclass)"
            " and c.relname not like '%default'"
        ).fetchall()
        assert len(bounds) == 32
        for table, bound in bounds:
            day = datetime.strptime(table[-8:], "%Y%m%d")
            assert bound == f"FOR VALUES FROM ('{day}+00') TO ('{day + timedelta(days=1)}+00')"
        # Dropped by days of UTC too: yesterday ended at UTC midnight.
        today = clock(connection).astimezone(UTC)
        connection.execute("set timezone to 'Asia/Seoul'")
        assert do(connection, "drop_partitions", finished_days=0, failures_days=1) == [(1,)]
        assert partitions(connection) == names("finished_jobs", today, 0, 14)


def add_partition(connection: Connection, parent: str, day: str) -> str:
    name = f"{parent}_p{day.replace('-', '')}"
    connection.execute(
        f"create table pgqueue.{name} partition of pgqueue.{parent}"
        f" for values from ('{day} 00:00+00') to ('{day} 24:00+00')".encode()
    )
    return name


def test_only_days_that_are_wholly_past_their_retention_are_dropped(own: Connection) -> None:
    today = clock(own).astimezone(UTC)
    days = [f"{today - timedelta(days=n):%Y-%m-%d}" for n in (7, 8, 30, 31)]
    for day in days:
        add_partition(own, "finished_jobs", day)
        add_partition(own, "failures", day)
    add_partition(own, "finished_jobs", "2020-01-01")
    assert do(own, "drop_partitions", finished_days=7, failures_days=30) == [(5,)]
    # Seven days ago ended less than seven days ago.
    assert partitions(own) == [*names("finished_jobs", today, -7, -7), *names("finished_jobs", today, -1, 14)]
    kept = [*names("failures", today, -30, -30), *names("failures", today, -8, -7)]
    assert partitions(own, "failures") == [*kept, *names("failures", today, -1, 14)]
    assert do(own, "drop_partitions", finished_days=7, failures_days=30) == [(0,)]
    own.execute("select from pgqueue.finished_jobs_default, pgqueue.failures_default")


def test_rows_of_the_default_partition_are_kept_as_long_as_others(own: Connection) -> None:
    old, new = add_running(own), add_running(own)
    assert ack(own, outcome(old), outcome(new)) == [(2, None)]
    assert ack(own, outcome(failed := add_running(own), "retry")) == [(1, None)]
    for job_id, days in ((old, 8), (new, 6)):
        own.execute(
            "update pgqueue.finished_jobs set finished_at = now() - %s * interval '1 day' where id = %s",
            [days, job_id],
        )
        assert where(own, job_id) == "finished_jobs_default"
    own.execute("update pgqueue.failures set failed_at = now() - interval '8 days'")
    do(own, "drop_partitions", finished_days=7, failures_days=30)
    assert look(own, "finished_jobs", old) is None
    assert look(own, "finished_jobs", new) is not None
    assert look(own, "failures", failed) is not None
    do(own, "drop_partitions", finished_days=7, failures_days=7)
    assert look(own, "failures", failed) is None


def test_a_partition_that_is_being_read_stays_until_the_next_pass(own: Connection, own_dsn: str) -> None:
    read, other = (add_partition(own, "finished_jobs", day) for day in ("2020-01-01", "2020-01-02"))
    job_id = add_running(own)
    with psycopg.connect(own_dsn) as reader:
        reader.execute(f"select from pgqueue.{read}".encode())
        do(own, "drop_partitions", finished_days=7, failures_days=30)
        assert read in partitions(own)
        assert ack(own, outcome(job_id)) == [(1, None)]
    do(own, "drop_partitions", finished_days=7, failures_days=30)
    assert not {read, other} & set(partitions(own))


def test_dead_letters_and_audit_entries_are_pruned_by_age(connection: Connection, second: Connection) -> None:
    old, new, held = (add_running(connection) for _ in range(3))
    assert ack(connection, *(outcome(job_id, "bury") for job_id in (old, new, held))) == [(3, None)]
    connection.execute(
        "update pgqueue.dead_letters set died_at = now() - interval '91 days' where id <> %s", [new]
    )
    connection.execute(
        "insert into pgqueue.audit_log (at, action) values (now() - interval '366 days', 'a'), (now(), 'b')"
    )
    with second.transaction():
        second.execute("select from pgqueue.dead_letters where id = %s for update", [held])
        assert [str(row[0]) for row in do(connection, "prune_dead_letters", days=90.0)] == [old]
    assert [str(row[0]) for row in do(connection, "prune_dead_letters", days=90.0)] == [held]
    assert len(do(connection, "prune_audit_log", days=365.0)) == 1
    assert look(connection, "dead_letters", new) is not None
    assert connection.execute("select action from pgqueue.audit_log").fetchall() == [("b",)]


class in_thread:
    """Run a call in a thread; the list it gives holds its answer once it is there."""

    def __init__(self, call: Callable[[], Any]) -> None:
        self.answers: list[Any] = []
        self.error: BaseException | None = None
        self.thread = threading.Thread(target=self._run, args=[call])

    def _run(self, call: Callable[[], Any]) -> None:
        try:
            self.answers.append(call())
        except BaseException as error:
            self.error = error

    def __enter__(self) -> list[Any]:
        self.thread.start()
        return self.answers

    def __exit__(self, *_: object) -> None:
        self.thread.join(DEADLINE)
        assert not self.thread.is_alive(), "the call did not return"
        if self.error is not None:
            raise self.error


@pytest.mark.parametrize("count", ["attempt", "retries", "crashes", "rescues"])
def test_a_row_that_could_not_be_counted_up_is_refused(connection: Connection, count: str) -> None:
    # Adding one to it would fail the claim of its whole lane, good jobs included.
    with pytest.raises(psycopg.errors.CheckViolation, match="jobs_counts_range"):
        connection.execute(
            sql.SQL("INSERT INTO pgqueue.jobs (id, task, {}) VALUES (%s, 't', 2147483647)").format(
                sql.Identifier(count)
            ),
            [str(uuid4())],
        )
