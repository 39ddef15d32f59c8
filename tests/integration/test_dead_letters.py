"""Requeueing moves a dead letter back to its queue, once, whoever else does the same, and leaves a note."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from threading import Barrier
from typing import Any

import psycopg
import pytest
from psycopg.rows import dict_row

from pgqueue import DeadFilter, PgQueue, SchemaMismatch
from pgqueue.database.dead import (
    Requeued,
    count_dead_letters,
    find_state,
    list_dead_letters,
    requeue,
    requeue_where,
    show_dead_letter,
)
from pgqueue.database.migrate import upgrade
from pgqueue.database.queries import query
from pgqueue.database.session import Session, open_session
from pgqueue.job import new_id

Row = dict[str, Any]

LETTER: Row = {
    "queue": "email",
    "task": "shop.send",
    "args": "[1]",
    "kwargs": "{}",
    "priority": 7,
    "eta": datetime(2026, 1, 1, tzinfo=UTC),
    "expires_at": datetime(2026, 1, 2, tzinfo=UTC),
    "attempt": 4,
    "retries": 3,
    "max_retries": 3,
    "crashes": 2,
    "rescues": 1,
    "worker_id": "gone",
    "enqueued_at": datetime(2026, 1, 1, tzinfo=UTC),
    "enqueued_by": "somebody",
    "headers": '{"trace": "x"}',
    "dead_letter_queue": "failed_emails",
    "reason": "retries_exhausted",
    "error_class": "smtplib.SMTPServerDisconnected",
    "error_message": "lost",
    "traceback": "Traceback: lost",
}


class Queue:
    """The tables, as a test wants to see them."""

    def __init__(self, connection: psycopg.Connection[Row]) -> None:
        self.connection = connection

    def sql(self, text: str, **parameters: object) -> list[Row]:
        cursor = self.connection.execute(text.encode(), parameters)
        return cursor.fetchall() if cursor.description else []

    def bury(self, **changes: object) -> str:
        letter = {**LETTER, "id": new_id(), **changes}
        names = ", ".join(letter)
        values = ", ".join(f"%({name})s" for name in letter)
        self.sql(f"insert into pgqueue.dead_letters ({names}) values ({values})", **letter)
        return str(letter["id"])

    def add(self, **changes: object) -> str:
        job = {"id": new_id(), "task": "shop.send", "queue": "email", **changes}
        names, values = ", ".join(job), ", ".join(f"%({name})s" for name in job)
        self.sql(f"insert into pgqueue.jobs ({names}) values ({values})", **job)
        return str(job["id"])

    def ids(self, table: str) -> list[str]:
        return [row["id"] for row in self.sql(f"select id::text as id from pgqueue.{table} order by id")]

    def job(self, job_id: str) -> Row:
        (row,) = self.sql("select * from pgqueue.jobs where id = %(id)s", id=job_id)
        return row

    def die_again(self, job_id: str, message: str) -> None:
        """What a worker does: claim, fail, bury."""
        attempt = self.sql(
            "update pgqueue.jobs set state = 'running', attempt = attempt + 1, worker_id = 'w'"
            " where id = %(id)s returning attempt",
            id=job_id,
        )[0]["attempt"]
        self.sql(
            query("ack_dead").text,
            ids=[job_id],
            attempt=attempt,
            worker="w",
            kind="failed",
            dead_letter_queues=None,
            reasons=["not_retryable"],
            error_classes=["ValueError"],
            error_messages=[message],
            tracebacks=["Traceback: again"],
        )


@pytest.fixture
def queue(db: str) -> Iterator[Queue]:
    with psycopg.connect(db, autocommit=True, row_factory=dict_row) as connection:
        yield Queue(connection)


@pytest.fixture
def api(db: str) -> PgQueue:
    return PgQueue("operator", dsn=db)


@pytest.fixture
def session(db: str) -> Iterator[Session]:
    with open_session(db) as session:
        yield session


def test_a_requeued_job_is_ready_again_as_if_it_had_never_failed_but_for_its_attempt(
    queue: Queue, session: Session
) -> None:
    earlier = queue.add(queue="email", priority=7)
    job_id = queue.bury(unique_key="order-1")
    assert requeue(session, [job_id]) == Requeued(ids=[job_id])
    job = queue.job(job_id)
    kept = ("queue", "task", "priority", "max_retries", "enqueued_at", "enqueued_by", "attempt")
    assert {name: job[name] for name in kept} == {name: LETTER[name] for name in kept}
    assert (job["args"], job["kwargs"], job["headers"]) == ([1], {}, {"trace": "x"})
    assert (job["state"], job["unique_key"]) == ("ready", "order-1")
    assert (job["retries"], job["crashes"], job["rescues"]) == (0, 0, 0)
    assert [
        job[name] for name in ("eta", "expires_at", "worker_id", "claimed_at", "cancel_requested_at")
    ] == [None] * 5
    assert job["position"] > queue.job(earlier)["position"], "it stands at the end of its lane"
    assert queue.ids("dead_letters") == []


def test_every_requeued_job_leaves_a_note_with_who_and_why(queue: Queue, session: Session) -> None:
    ids = [queue.bury(), queue.bury()]
    requeue(session, ids, by="ada@example", reason="address corrected")
    notes = queue.sql("select *, session_user as me from pgqueue.audit_log order by id")
    assert [str(note["job_id"]) for note in notes] == sorted(ids)
    for note in notes:
        assert (note["action"], note["queue"], note["reason"]) == ("requeue", "email", "address corrected")
        assert note["actor"] == note["me"]
        assert note["details"]["by"] == "ada@example"
        assert note["details"]["before"]["state"] == "dead"
        assert note["details"]["before"]["reason"] == "retries_exhausted"
        assert note["details"]["after"] == {"state": "ready", "retries": 0, "crashes": 0}


def test_a_job_that_stays_dead_leaves_no_note(queue: Queue, session: Session) -> None:
    queue.add(unique_key="k")
    requeue(session, [queue.bury(unique_key="k")])
    assert queue.sql("select * from pgqueue.audit_log") == []


def test_a_job_whose_unique_key_is_taken_stays_dead_and_the_others_go(queue: Queue, session: Session) -> None:
    holder = queue.add(unique_key="k")
    taken, free = queue.bury(unique_key="k"), queue.bury(unique_key="other")
    done = requeue(session, [taken, free])
    assert done.ids == [free]
    ((refusal,), why) = done.refused, done.refused[0].why
    assert refusal.id == taken
    assert holder in why
    assert "'k'" in why
    assert queue.ids("dead_letters") == [taken]


def test_of_two_letters_with_one_unique_key_the_first_goes(queue: Queue, session: Session) -> None:
    first, second = queue.bury(unique_key="k"), queue.bury(unique_key="k")
    done = requeue(session, [second, first])
    assert done.ids == [first]
    assert [refusal.id for refusal in done.refused] == [second]
    assert first in done.refused[0].why


def test_a_letter_whose_id_is_live_stays_dead(queue: Queue, session: Session) -> None:
    job_id = queue.add()
    queue.bury(id=job_id)
    done = requeue(session, [job_id])
    assert done.ids == []
    assert "same id" in done.refused[0].why
    assert queue.ids("jobs") == queue.ids("dead_letters") == [job_id]


def test_a_key_held_by_an_open_transaction_does_not_fail_the_batch(
    queue: Queue, session: Session, db: str
) -> None:
    blocked, free = queue.bury(unique_key="k"), queue.bury()
    with psycopg.connect(db) as other:
        other.execute(
            "insert into pgqueue.jobs (id, task, unique_key) values (%s, 'shop.send', 'k')", [new_id()]
        )
        done = requeue(session, [blocked, free])
        other.rollback()
    assert done.ids == [free]
    assert [refusal.id for refusal in done.refused] == [blocked]
    assert "open transaction" in done.refused[0].why
    assert requeue(session, [blocked]).ids == [blocked]


def test_a_letter_that_somebody_holds_is_skipped_and_not_waited_for(
    queue: Queue, session: Session, db: str
) -> None:
    held, free = queue.bury(), queue.bury()
    with psycopg.connect(db) as other:
        other.execute("select from pgqueue.dead_letters where id = %s for update", [held])
        assert requeue(session, [held, free]) == Requeued(ids=[free], missing=[held])
        other.rollback()
    assert find_state(session, held) == "dead"


def test_an_id_that_is_not_dead_is_missing(queue: Queue, session: Session) -> None:
    live, never = queue.add(), new_id()
    assert sorted(requeue(session, [live, never]).missing) == sorted([live, never])
    assert find_state(session, live) == "ready"
    assert find_state(session, never) == "unknown"


def test_a_job_that_dies_again_replaces_nothing_and_can_be_requeued_again(
    queue: Queue, session: Session
) -> None:
    job_id = queue.bury()
    requeue(session, [job_id])
    queue.die_again(job_id, "this time")
    letter = show_dead_letter(session, job_id)
    assert letter is not None
    assert (letter["attempt"], letter["retries"], letter["error_message"]) == (5, 0, "this time")
    assert [failure["attempt"] for failure in letter["failures"]] == [5]
    assert requeue(session, [job_id]).ids == [job_id]


def test_burying_a_job_over_its_own_older_letter_replaces_the_letter(queue: Queue, session: Session) -> None:
    job_id = queue.add()
    queue.bury(id=job_id)
    queue.die_again(job_id, "the newer one")
    (letter,) = list_dead_letters(session)
    assert (letter.reason, letter.error_message, letter.attempt) == ("not_retryable", "the newer one", 1)
    assert queue.ids("jobs") == []


def test_requeued_jobs_keep_the_order_in_which_they_were_enqueued(queue: Queue, session: Session) -> None:
    start = datetime(2026, 1, 1, tzinfo=UTC)
    # Neither the ids nor the unique keys are in this order.
    ids = [
        queue.bury(enqueued_at=start - timedelta(minutes=minute), unique_key=f"{minute % 3}-{minute}")
        for minute in range(8)
    ]
    requeue(session, ids)
    placed = queue.sql("select id::text as id from pgqueue.jobs order by position")
    assert [row["id"] for row in placed] == ids[::-1]


def test_two_requeues_at_once_move_each_job_once(queue: Queue, db: str) -> None:
    ids = [queue.bury() for _ in range(1200)]
    together = Barrier(2)

    def run() -> list[str]:
        with open_session(db) as session:
            together.wait()
            return requeue_where(session, DeadFilter(queue="email")).ids

    with ThreadPoolExecutor(2) as pool:
        moved = [job_id for each in [pool.submit(run), pool.submit(run)] for job_id in each.result()]
    assert sorted(moved) == sorted(ids)
    assert queue.ids("jobs") == sorted(ids)
    assert queue.ids("dead_letters") == []
    (notes,) = queue.sql("select count(*) as count, count(distinct job_id) as jobs from pgqueue.audit_log")
    assert (notes["count"], notes["jobs"]) == (1200, 1200)


def test_a_letter_in_one_requeue_is_out_of_reach_for_another(
    queue: Queue, db: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else the second moves it again, from its older snapshot, after the job has run and is gone."""
    monkeypatch.setattr("pgqueue.database.session.LOCK_TIMEOUT", "30s")
    blocked, wanted = queue.bury(unique_key="k"), queue.bury()
    waits = (
        "select count(*) as count from pg_stat_activity"
        " where wait_event_type = 'Lock' and datname = current_database()"
    )

    def run() -> Requeued:
        with open_session(db) as session:
            return requeue(session, [blocked, wanted])

    with psycopg.connect(db) as holder, ThreadPoolExecutor(1) as pool, open_session(db) as session:
        holder.execute(
            "insert into pgqueue.jobs (id, task, unique_key) values (%s, 'shop.send', 'k')", [new_id()]
        )
        first = pool.submit(run)
        try:
            deadline = time.monotonic() + 20
            while queue.sql(waits) != [{"count": 1}]:
                assert time.monotonic() < deadline, "the first requeue should wait for the key"
                time.sleep(0.01)
            assert requeue(session, [wanted]) == Requeued(missing=[wanted])
        finally:
            holder.rollback()
        assert sorted(first.result().ids) == sorted([blocked, wanted])


def test_requeue_by_filter_ends_although_jobs_stay_dead(queue: Queue, session: Session) -> None:
    queue.add(unique_key="k")
    stuck = [queue.bury(unique_key="k") for _ in range(3)]
    free = [queue.bury() for _ in range(3)]
    steps: list[int] = []
    done = requeue_where(session, DeadFilter(), progress=steps.append)
    assert sorted(done.ids) == sorted(free)
    assert sorted(refusal.id for refusal in done.refused) == sorted(stuck)
    assert sum(steps) == 6


def test_requeue_by_filter_takes_no_more_than_its_limit(queue: Queue, session: Session) -> None:
    for _ in range(5):
        queue.bury()
    assert len(requeue_where(session, DeadFilter(), limit=2).ids) == 2
    assert count_dead_letters(session) == 3


def test_requeue_by_filter_leaves_what_dies_meanwhile(queue: Queue, session: Session) -> None:
    early = queue.bury()
    queue.bury(died_at=datetime.now(UTC) + timedelta(minutes=5))
    assert requeue_where(session, DeadFilter()).ids == [early]


MATCHES = [
    (DeadFilter(), {"a", "b", "c"}),
    (DeadFilter(queue="failed_emails"), {"a"}),
    (DeadFilter(queue="email"), {"a", "b"}),
    (DeadFilter(task="shop.other"), {"b"}),
    (DeadFilter(reason="crashed"), {"c"}),
    (DeadFilter(error_class="SMTPServerDisconnected"), {"a"}),
    (DeadFilter(error_class="smtplib.SMTPServerDisconnected"), {"a"}),
    (DeadFilter(error_class="Disconnected"), set()),
    (DeadFilter(error_class="ValueError"), {"b"}),
    (DeadFilter(since=timedelta(hours=2)), {"a", "b"}),
    (DeadFilter(until=datetime(2026, 1, 2, tzinfo=UTC)), {"c"}),
    (DeadFilter(queue="email", reason="crashed"), set()),
]


@pytest.mark.parametrize(
    ("where", "names"), MATCHES, ids=lambda value: str(sorted(value) if isinstance(value, set) else value)
)
def test_filters_say_which(queue: Queue, session: Session, where: DeadFilter, names: set[str]) -> None:
    ids = {
        "a": queue.bury(),
        "b": queue.bury(task="shop.other", dead_letter_queue="email", error_class="ValueError"),
        "c": queue.bury(
            queue="x",
            dead_letter_queue="x",
            reason="crashed",
            error_class=None,
            died_at=datetime(2026, 1, 1, tzinfo=UTC),
        ),
    }
    assert {letter.id for letter in list_dead_letters(session, where)} == {ids[name] for name in names}
    assert count_dead_letters(session, where) == len(names)
    assert set(requeue_where(session, where).ids) == {ids[name] for name in names}


def test_the_list_starts_with_the_last_that_died(queue: Queue, session: Session) -> None:
    now = datetime.now(UTC)
    ids = [queue.bury(died_at=now - timedelta(hours=hours)) for hours in (2, 1, 3)]
    assert [letter.id for letter in list_dead_letters(session)] == [ids[1], ids[0], ids[2]]
    assert [letter.id for letter in list_dead_letters(session, limit=1)] == [ids[1]]


def test_workers_asleep_on_the_queues_are_woken(queue: Queue, session: Session) -> None:
    queue.sql("insert into pgqueue.wake (queue, wake_until) values ('email', now() + interval '9 seconds')")
    queue.sql("listen pgqueue")
    requeue(session, [queue.bury(), queue.bury(queue="nobody sleeps here")])
    assert [notify.payload for notify in queue.connection.notifies(timeout=5, stop_after=1)] == ["email"]


@pytest.mark.parametrize("level", ["read committed", "repeatable read", "serializable"])
def test_the_default_isolation_level_does_not_matter(queue: Queue, db: str, level: str) -> None:
    options = "-c default_transaction_isolation=" + level.replace(" ", "\\ ")
    with open_session(psycopg.conninfo.make_conninfo(db, options=options)) as session:
        (default,) = session.connection.execute("show default_transaction_isolation").fetchall()
        assert default["default_transaction_isolation"] == level
        with session.transaction():
            (row,) = session.connection.execute("show transaction_isolation").fetchall()
        assert row["transaction_isolation"] == "read committed"
        job_id = queue.bury()
        assert requeue(session, [job_id]).ids == [job_id]


def test_every_statement_has_a_timeout(session: Session) -> None:
    with session.transaction():
        (row,) = session.connection.execute(
            "select current_setting('statement_timeout') as statement, current_setting('lock_timeout') lock"
        ).fetchall()
    assert row == {"statement": "30s", "lock": "1s"}


def test_a_letter_is_shown_with_all_its_failed_attempts(queue: Queue, session: Session) -> None:
    job_id = queue.bury()
    for attempt in (2, 1):
        queue.sql(
            "insert into pgqueue.failures (job_id, attempt, task, queue, kind, failed_at) values"
            " (%(id)s, %(attempt)s, 'shop.send', 'email', 'failed', now() + %(attempt)s * interval '1 s')",
            id=job_id,
            attempt=attempt,
        )
    letter = show_dead_letter(session, job_id)
    assert letter is not None
    assert json.dumps(letter["args"]) == LETTER["args"]
    assert letter["traceback"] == LETTER["traceback"]
    assert [failure["attempt"] for failure in letter["failures"]] == [1, 2]
    assert show_dead_letter(session, new_id()) is None


# The same from SQL and from Python.


def test_requeue_from_sql_is_the_same(queue: Queue, session: Session) -> None:
    """Column by column, as the library's own statement leaves them."""
    by_library, by_sql = queue.bury(), queue.bury()
    requeue(session, [by_library], by="ann", reason="mended")
    answer = queue.sql(
        "select * from pgqueue.requeue(%(ids)s::uuid[], 'mended', 'ann')", ids=[by_sql, new_id()]
    )
    assert [(str(row["id"]), row["requeued"]) for row in answer] == [(by_sql, True)]
    one, other = queue.job(by_library), queue.job(by_sql)
    assert other["position"] > one["position"]
    for row in (one, other):
        del row["id"], row["position"]
    assert one == other
    first, second = queue.sql(
        "select action, actor, queue, reason, details from pgqueue.audit_log order by id"
    )
    for note in (first, second):
        del note["details"]["before"]["died_at"]
    assert first == second


def test_requeue_from_sql_with_any_condition(queue: Queue) -> None:
    holder = queue.add(unique_key="k")
    taken, free, other = queue.bury(unique_key="k"), queue.bury(), queue.bury(queue="other")
    answer = queue.sql(
        "select r.* from"
        " (select array_agg(id) as ids from pgqueue.dead_letters where queue = 'email') as these,"
        " pgqueue.requeue(these.ids, 'mended') as r"
    )
    assert {str(row["id"]): row["requeued"] for row in answer} == {taken: False, free: True}
    assert queue.ids("dead_letters") == sorted([taken, other])
    assert queue.ids("jobs") == sorted([holder, free])
    assert len(queue.sql("select id from pgqueue.audit_log")) == 1
    assert queue.sql("select * from pgqueue.requeue(null)") == []


def test_purge_from_sql(queue: Queue) -> None:
    gone, kept = queue.bury(), queue.bury(queue="other")
    answer = queue.sql(
        "select pgqueue.purge_dead_letters(array_agg(id), 'obsolete', 'ann') as id from pgqueue.dead_letters"
        " where queue = 'email'"
    )
    assert [str(row["id"]) for row in answer] == [gone]
    assert queue.ids("dead_letters") == [kept]
    (note,) = queue.sql("select * from pgqueue.audit_log")
    assert (note["action"], note["reason"], note["details"]["by"]) == ("purge_dead_letter", "obsolete", "ann")
    assert note["details"]["before"]["error_class"] == "smtplib.SMTPServerDisconnected"
    assert "args" not in note["details"]["before"]


def test_from_python(queue: Queue, api: PgQueue) -> None:
    one, two, three = queue.bury(), queue.bury(queue="other"), queue.bury(queue="other")
    assert api.dead_letters.count() == 3
    assert {letter.id for letter in api.dead_letters.list(DeadFilter(queue="other"))} == {two, three}
    shown = api.dead_letters.show(one)
    assert shown is not None
    assert shown["traceback"] == "Traceback: lost"
    assert api.dead_letters.show(new_id()) is None
    assert api.dead_letters.requeue([one], by="ann", reason="mended").ids == [one]
    done = api.dead_letters.requeue(DeadFilter(queue="other"), limit=1, rate=100)
    first, second = sorted([two, three])  # made in one millisecond, they are in no order
    assert done.ids == [first]
    assert api.dead_letters.purge(DeadFilter(), reason="obsolete").ids == [second]
    assert api.dead_letters.purge([second]).missing == [second]
    assert queue.ids("jobs") == sorted([one, first])


def test_wrong_choices_from_python(api: PgQueue) -> None:
    with pytest.raises(TypeError, match="give a list of job ids or a DeadFilter, got 'x'"):
        api.dead_letters.requeue("x")
    with pytest.raises(TypeError, match="dead letters are chosen by a DeadFilter, got 5"):
        api.dead_letters.list(5)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="limit and rate go with a DeadFilter, not with ids"):
        api.dead_letters.requeue([new_id()], rate=5)
    for rate in (0, -1, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="rate must be greater than 0 a second"):
            api.dead_letters.requeue(DeadFilter(), rate=rate)
    with pytest.raises(ValueError, match="job_id must be a UUID"):
        api.dead_letters.purge(["7"])


def test_purging_needs_its_revision(fresh_dsn: str) -> None:
    """Requeueing does not: it works as before."""
    upgrade(fresh_dsn, revision="0006")
    api = PgQueue("operator", dsn=fresh_dsn)
    assert api.dead_letters.requeue([new_id()]).ids == []
    with pytest.raises(SchemaMismatch, match="purging needs revision 0007 of the schema"):
        api.dead_letters.purge([new_id()])
