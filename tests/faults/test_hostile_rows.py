"""Rows that nobody should have written: each harms itself only, and its lane goes on.

Every case is plain SQL. The database refuses the row at once, or the job ends in exactly one place; ten good
jobs before it and ten after it, in the same lane, all succeed within seconds, in the executors that were
there before.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import psycopg
import pytest

from tests.acceptance.conftest import own_queue
from tests.acceptance.workers import Jobs, Worker, Workers

AT_ONCE = 10.0
"""Seconds within which the good neighbours of a bad row have run, on a busy machine."""

BIGINT = 2**63 - 1


@dataclass(frozen=True)
class House:
    """One worker for every case of this module."""

    jobs: Jobs
    worker: Worker
    crew: frozenset[int]

    def insert(self, queue: str = "default", **columns: str) -> str:
        """Write a row; the values are SQL. Its id."""
        given = {"id": "gen_random_uuid()", "task": "'tests_app.echo'", "args": "'[1]'", **columns}
        names, values = ", ".join(given), ", ".join(given.values()).replace("%", "%%")
        query = f"insert into pgqueue.jobs (queue, {names}) values (%s, {values}) returning id::text as id"
        row = self.jobs.connection.execute(query.encode(), [queue]).fetchone()
        assert row is not None
        self.jobs.sql("select pgqueue.wake_workers(array[%s])", queue)
        return str(row["id"])

    def good(self, count: int = 10) -> list[str]:
        return self.jobs.add_many("echo", [(number,) for number in range(count)])

    def unharmed(self, good: list[str]) -> None:
        """The neighbours have all run, and nobody died of the row."""
        assert self.jobs.ends(good, within=AT_ONCE) == Counter(succeeded=len(good))
        assert {each.pid for each in self.worker.executors} == self.crew, "an executor died"
        assert "Traceback" not in self.worker.log

    def end(self, job: str) -> tuple[str, str]:
        """Where the job ended: its state, and the reason of a dead letter."""
        (state,) = self.jobs.ends([job])
        letters = self.jobs.sql("select reason from pgqueue.dead_letters where id = %s", job)
        finished = self.jobs.sql("select id from pgqueue.finished_jobs where id = %s", job)
        assert len(letters) + len(finished) == 1
        return state, letters[0]["reason"] if letters else ""


@pytest.fixture(scope="module")
def house(postgres: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[House]:
    with own_queue(postgres, tmp_path_factory.mktemp("house")) as (jobs, workers):
        worker = workers.start("-c", "2", "--heartbeat", "0.3", "--lease", "5", all_queues=True)
        jobs.finished(jobs.add("echo", "warm"))
        crew = frozenset(each.pid for each in worker.full_crew())
        yield House(jobs, worker, crew)


def nested(levels: int, inside: str = "1") -> str:
    return f"(repeat('[', {levels}) || '{inside}' || repeat(']', {levels}))::jsonb"


DEEP_OBJECTS = "('[' || repeat('{\"a\":', 3000) || '1' || repeat('}', 3000) || ']')::jsonb"

REFUSED: dict[str, tuple[dict[str, str], str]] = {
    "a NUL character": ({"args": r"""'["\u0000"]'"""}, "22P05"),
    "a NUL character in a key": ({"kwargs": r"""'{"\u0000": 1}'"""}, "22P05"),
    "a lone high surrogate": ({"args": r"""'["\ud800"]'"""}, "22P02"),
    "a lone low surrogate": ({"headers": r"""'{"a": "\udfff"}'"""}, "22P02"),
    "not a number": ({"args": "'[NaN]'"}, "22P02"),
    "infinity": ({"args": "'[Infinity]'"}, "22P02"),
    "a number beyond numeric": ({"args": "'[1e131072]'"}, "22003"),
    "a fraction beyond numeric": ({"args": "'[1e-16384]'"}, "22003"),
    "20,000 levels": ({"args": nested(20_000)}, "54001"),
    "more than 16 MiB": ({"args": "jsonb_build_array(repeat('x', 1 << 24))"}, "23514"),
    "an attempt above the limit": ({"attempt": "1000000001"}, "23514"),
    "retries above the limit": ({"retries": "1000000001"}, "23514"),
    "an attempt beyond integer": ({"attempt": "2147483648"}, "22003"),
    "priority ten": ({"priority": "10"}, "23514"),
    "priority minus one": ({"priority": "-1"}, "23514"),
    "a priority beyond smallint": ({"priority": "32768"}, "22003"),
    "a position beyond bigint": ({"position": "9223372036854775808"}, "22003"),
    "the highest position": ({"position": "9223372036854775807"}, "23514"),
    "a negative position": ({"position": "-1"}, "23514"),
    "the lowest position": ({"position": "(-9223372036854775808)"}, "23514"),
    "a worker without a name": ({"worker_id": "''"}, "23514"),
    "an unknown state": ({"state": "'paused'"}, "23514"),
    "a state of another table": ({"state": "'succeeded'"}, "23514"),
    "scheduled for no time": ({"state": "'scheduled'"}, "23514"),
    "no task": ({"task": "null"}, "23502"),
    "no args": ({"args": "null"}, "23502"),
    "a huge unique key": (
        {"unique_key": "(select string_agg(md5(n::text), '') from generate_series(1, 300) n)"},
        "54000",
    ),
}

ENDS: dict[str, tuple[dict[str, str], str]] = {
    # Payloads.
    "a number of 200 bits": ({"args": "jsonb_build_array(2::numeric ^ 200)"}, "succeeded"),
    "a number of 100,000 digits": ({"args": "('[' || repeat('9', 100000) || ']')::jsonb"}, "bad_payload"),
    "the largest numeric": ({"args": "'[1e131071]'"}, "bad_payload"),
    "a number of 100,000 digits in kwargs": (
        {"args": "'[]'", "kwargs": "('{\"value\": ' || repeat('9', 100000) || '}')::jsonb"},
        "bad_payload",
    ),
    "the smallest fraction": ({"args": "'[1e-16383]'"}, "succeeded"),
    "minus zero": ({"args": "'[-0.0]'"}, "succeeded"),
    "a float of 400 digits": ({"args": "'[1e400]'"}, "succeeded"),
    "duplicate keys": ({"args": """'[{"a": 1, "a": 2}]'"""}, "succeeded"),
    "duplicate arguments": ({"args": "'[]'", "kwargs": """'{"value": 1, "value": 2}'"""}, "succeeded"),
    "65 levels": ({"args": nested(65)}, "succeeded"),
    "66 levels": ({"args": nested(66)}, "bad_payload"),
    "3,000 objects in each other": ({"args": DEEP_OBJECTS}, "bad_payload"),
    "brackets in a string": ({"args": "jsonb_build_array(repeat('[{\"', 5000))"}, "succeeded"),
    "a string of 5 MB": ({"args": "jsonb_build_array(repeat('x', 5000000))"}, "succeeded"),
    # Each character is one byte in the row and six in the text: more than a frame to an executor takes.
    "72 MB of control characters": ({"args": "jsonb_build_array(repeat(chr(1), 12000000))"}, "bad_payload"),
    "a hundred thousand arguments": (
        {"args": "(select jsonb_agg(n) from generate_series(1, 100000) n)"},
        "bad_payload",
    ),
    "a hundred thousand keywords": (
        {"kwargs": "(select jsonb_object_agg('k' || n, n) from generate_series(1, 100000) n)"},
        "bad_payload",
    ),
    "args are true": ({"args": "'true'"}, "bad_payload"),
    "kwargs are a string": ({"kwargs": "'\"{}\"'"}, "bad_payload"),
    "kwargs are null": ({"kwargs": "'null'"}, "bad_payload"),
    "an argument twice": ({"kwargs": """'{"value": 2}'"""}, "bad_payload"),
    "a keyword that is no name": ({"args": "'[]'", "kwargs": """'{"no name": 2}'"""}, "bad_payload"),
    "a keyword of 100 kB": (
        {"args": "'[]'", "kwargs": "jsonb_build_object(repeat('k', 100000), 1)"},
        "bad_payload",
    ),
    "the keyword self": ({"task": "'tests_app.facts'", "kwargs": """'{"self": 2}'"""}, "bad_payload"),
    "nothing fits a body": ({"task": "'tests_app.length'", "args": "'[null]'"}, "bad_payload"),
    # Names of tasks.
    "a name with a line break": ({"task": "E'tests_app.echo\\n'"}, "unknown_task"),
    "a name that ends in a blank": ({"task": "'tests_app.echo '"}, "unknown_task"),
    "a name in capitals": ({"task": "'TESTS_APP.ECHO'"}, "unknown_task"),
    "a name of a megabyte": ({"task": "repeat('t', 1 << 20)"}, "unknown_task"),
    "a name of 5 MB": ({"task": "repeat('é', 5 << 19)"}, "unknown_task"),
    "a name that is a pattern": ({"task": "'tests_app.*'"}, "unknown_task"),
    "a name with formats in it": ({"task": "'%s %(x)s {0} {x}'"}, "unknown_task"),
    "a name that escapes": ({"task": "E'\\x1b[31m\\u2028\\u202e'"}, "unknown_task"),
    "a name that is a path": ({"task": "'../../etc/passwd'"}, "unknown_task"),
    "a name of the class": ({"task": "'tests_app.app.__class__'"}, "unknown_task"),
    # Headers.
    "headers are null": ({"headers": "'null'"}, "succeeded"),
    "headers are a string": ({"headers": "'\"x\"'"}, "succeeded"),
    "headers are a number": ({"headers": "'1e400'"}, "succeeded"),
    "headers of 10 kB": ({"headers": "jsonb_build_object('a', repeat('h', 10240))"}, "succeeded"),
    "ten thousand headers": (
        {"headers": "(select jsonb_object_agg(md5(n::text), n) from generate_series(1, 10000) n)"},
        "succeeded",
    ),
    "headers with keys of ours": (
        {"headers": """'{"id": [], "task": 1, "eta": {}, "traceparent": 7, "retries": null, "": ""}'"""},
        "succeeded",
    ),
    "headers of 72 MB": ({"headers": "jsonb_build_object('a', repeat(chr(1), 12000000))"}, "bad_payload"),
    # Times.
    "an eta before Christ": ({"eta": "'4713-01-01 BC'"}, "succeeded"),
    "ready at the end of the calendar": ({"eta": "'294276-12-31'"}, "succeeded"),
    "expired before all time": ({"expires_at": "'-infinity'"}, "expired"),
    "expired before Christ": ({"expires_at": "'4713-01-01 BC'"}, "expired"),
    "expires at the end of the calendar": ({"expires_at": "'294276-12-31'"}, "succeeded"),
    "enqueued at the end of time": ({"enqueued_at": "'infinity'"}, "succeeded"),
    "enqueued before Christ": ({"enqueued_at": "'4713-01-01 BC'"}, "succeeded"),
    "cancelled before all time": ({"cancel_requested_at": "'-infinity'"}, "cancelled"),
    # Counts.
    "the lowest attempt": ({"attempt": "-2147483648"}, "succeeded"),
    "the lowest counts": (
        {"retries": "-2147483648", "crashes": "-2147483648", "rescues": "-2147483648"},
        "succeeded",
    ),
    "the highest counts": (
        {"retries": "1000000000", "crashes": "1000000000", "rescues": "1000000000"},
        "succeeded",
    ),
    "fails with the highest retries": (
        {"task": "'tests_app.asks_again'", "args": """'[{"countdown": 0}]'""", "retries": "1000000000"},
        "retries_exhausted",
    ),
    "fails with the highest retries, for ever": (
        {
            "task": "'tests_app.asks_again'",
            "args": """'[{"countdown": 0}]'""",
            "retries": "1000000000",
            "max_retries": "-1",
        },
        "retries_exhausted",
    ),
    "fails with the lowest limit": (
        {"task": "'tests_app.asks_again'", "args": """'[{"countdown": 0}]'""", "max_retries": "-2147483648"},
        "retries_exhausted",
    ),
    "the highest limit": ({"max_retries": "2147483647"}, "succeeded"),
    "lost by a worker too often": (
        {"state": "'running'", "worker_id": "'nobody'", "rescues": "1000000000"},
        "crashed",
    ),
    # Keys, owners.
    "an empty unique key": ({"unique_key": "''"}, "succeeded"),
    "an odd unique key": ({"unique_key": "E'\\'\"\\\\\\n{},%s\\u2028'"}, "succeeded"),
    "a unique key of 2,000 characters": ({"unique_key": "repeat('k', 2000)"}, "succeeded"),
    "ready, and somebody's": ({"worker_id": "'somebody'", "claimed_at": "'infinity'"}, "succeeded"),
    "enqueued by nobody": ({"enqueued_by": "''"}, "succeeded"),
}

# Found by the sweep of a lane or of the scheduled jobs, every five seconds: all at once.
BY_SWEEP: dict[str, tuple[dict[str, str], str]] = {
    "position zero": ({"position": "0"}, "succeeded"),
    "a position twice": ({"position": "0"}, "succeeded"),
    "a position of somebody else's": (
        {"position": "(select last_value from pgqueue.jobs_position_seq)"},
        "succeeded",
    ),
    "scheduled before Christ": ({"state": "'scheduled'", "eta": "'4713-01-01 BC'"}, "succeeded"),
    "scheduled before all time": ({"state": "'scheduled'", "eta": "'-infinity'"}, "succeeded"),
    "scheduled and expired": (
        {"state": "'scheduled'", "eta": "'-infinity'", "expires_at": "'-infinity'"},
        "expired",
    ),
    "running for nobody": ({"state": "'running'"}, "succeeded"),
    "running for an unknown worker": ({"state": "'running'", "worker_id": "'~'"}, "succeeded"),
}

ODD_QUEUES = (
    "a,b",
    "{}",
    '{"a"}',
    "NULL",
    "it's",
    'a"b',
    "back\\slash",
    "%s%(x)s{0}",
    " ",
    "line\nbreak",
    "\x01\x1b[31m",
    "Ünïcødé",
    "\u202e\u2028",
    "ü" * 63,
    "\U0001f480" * 63,
)


@pytest.mark.parametrize("case", REFUSED)
def test_the_database_refuses_it(house: House, case: str) -> None:
    columns, sqlstate = REFUSED[case]
    with pytest.raises(psycopg.Error) as refused:
        house.insert(**columns)
    assert refused.value.sqlstate == sqlstate
    house.unharmed(house.good(2))


@pytest.mark.parametrize("case", ENDS)
def test_it_ends_once_and_its_lane_goes_on(house: House, case: str) -> None:
    columns, expected = ENDS[case]
    before = house.good()
    job = house.insert(**columns)
    after = house.good()
    house.unharmed(before + after)
    state, reason = house.end(job)
    assert (reason or state) == expected
    if reason in ("bad_payload", "unknown_task"):
        # The letter keeps what was written, so that it can be mended and requeued.
        columns = {
            key: value for key, value in columns.items() if key in ("task", "args", "kwargs", "headers")
        }
        same = " and ".join(f"{key} = {value.replace('%', '%%')}" for key, value in columns.items())
        kept = f"select error_message from pgqueue.dead_letters where id = %s and {same}"
        (letter,) = house.jobs.sql(kept, job)
        assert 0 < len(letter["error_message"]) <= 8 << 10
    house.unharmed([])


def test_what_only_a_sweep_finds_ends_too(house: House) -> None:
    rows = {}
    good = []
    for case, (columns, _) in BY_SWEEP.items():
        good += house.good(2)
        rows[case] = house.insert(**columns)
    good += house.good()
    house.unharmed(good)
    ends = {case: house.end(job) for case, job in rows.items()}
    assert ends == {case: (expected, "") for case, (_, expected) in BY_SWEEP.items()}
    house.unharmed([])


def test_queues_of_any_name_are_served(house: House) -> None:
    rows = {queue: house.insert(queue) for queue in ODD_QUEUES}
    house.unharmed(house.good())
    assert house.jobs.ends(list(rows.values())) == Counter(succeeded=len(rows))
    house.unharmed([])


def test_a_row_that_cannot_be_counted_up_blocks_nobody(jobs: Jobs, workers: Workers) -> None:
    jobs.add_row(task="tests_app.echo", args="[1]", attempt=1_000_000_000)
    good = jobs.add_many("echo", [(number,) for number in range(20)])
    workers.start("-c", "1")
    assert jobs.ends(good, within=AT_ONCE) == Counter(succeeded=20)


@pytest.mark.slow
def test_rows_that_take_seconds_to_print_block_nobody(jobs: Jobs, workers: Workers) -> None:
    """A few bytes stored, megabytes as text: a claim of all of them would never end in time."""
    bombs = [
        str(row["id"])
        for row in jobs.sql(
            "insert into pgqueue.jobs (id, task, args) select gen_random_uuid(), 'tests_app.echo',"
            "    (select jsonb_agg('1e131071'::jsonb) from generate_series(1, 700))"
            " from generate_series(1, 15) returning id"
        )
    ]
    good = jobs.add_many("echo", [(number,) for number in range(20)])
    workers.start("-c", "2")
    assert jobs.ends(good, within=90) == Counter(succeeded=20)
    assert jobs.ends(bombs, within=90) == Counter(dead=15)


@pytest.mark.slow
def test_arguments_that_cannot_be_printed_are_a_dead_letter(jobs: Jobs, workers: Workers) -> None:
    (row,) = jobs.sql(
        "insert into pgqueue.jobs (id, task, args) select gen_random_uuid(), 'tests_app.echo',"
        "    (select jsonb_agg('1e131071'::jsonb) from generate_series(1, 20000)) returning id::text as id"
    )
    workers.start("-c", "1")
    jobs.wait(row["id"], within=100)
    # Not the whole row: the arguments still cannot be printed.
    (letter,) = jobs.sql("select reason, error_message from pgqueue.dead_letters where id = %s", row["id"])
    assert letter["reason"] == "bad_payload"
    assert "the arguments cannot be read" in letter["error_message"]


def test_an_ack_that_is_always_refused_holds_up_nobody(jobs: Jobs, workers: Workers) -> None:
    """A trigger of somebody's own refuses whatever becomes of one job."""
    jobs.sql(
        "create function refuse() returns trigger language plpgsql as $$ begin"
        " if new.args = '[\"refused\"]' then raise 'not this one'; end if; return new; end $$"
    )
    tables = ("finished_jobs", "dead_letters")
    try:
        for table in tables:
            jobs.sql(
                f"create trigger refuse before insert on pgqueue.{table} execute function refuse()".replace(
                    " execute", " for each row execute"
                )
            )
        worker = workers.start("-c", "1")
        bad = jobs.add("echo", "refused")
        worker.wait_for_log(f"ack_refused job={bad}")
        good = jobs.add_many("echo", [(number,) for number in range(20)])
        assert jobs.ends(good, within=AT_ONCE) == Counter(succeeded=20)
        assert jobs.live(bad)["state"] == "running"
    finally:
        for table in tables:
            jobs.sql(f"drop trigger if exists refuse on pgqueue.{table}")
        jobs.sql("drop function refuse()")
    # It is tried again every half minute, and when the worker stops.
    assert worker.stop() == 0
    assert jobs.finished(bad)["state"] == "succeeded"
