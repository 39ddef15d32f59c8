"""Unique keys between transactions: who waits for whom, and what the one that waited gets."""

from __future__ import annotations

import random
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from typing import Any

import psycopg
import pytest

from pgqueue import DuplicateJob, PgQueue, SchemaMismatch, UniqueWaitTimeout
from pgqueue.database.migrate import upgrade


@pytest.fixture
def app(db: str) -> Iterator[PgQueue]:
    with closing(PgQueue("tests", dsn=db)) as app:

        @app.task(name="tests.note")
        def note(number: int) -> None: ...

        yield app


@pytest.fixture
def note(app: PgQueue) -> Any:
    return app.find_task("tests.note")


def rows(dsn: str, query: str, *parameters: object) -> list[Any]:
    with psycopg.connect(dsn, autocommit=True) as connection:
        return connection.execute(query.encode(), parameters).fetchall()


def waits_for_a_lock(dsn: str) -> bool:
    found = rows(
        dsn,
        "select 1 from pg_stat_activity where datname = current_database() and wait_event_type = 'Lock'",
    )
    return bool(found)


def wait_until_one_waits(dsn: str) -> None:
    deadline = time.monotonic() + 10
    while not waits_for_a_lock(dsn):
        assert time.monotonic() < deadline, "nobody waits"


@pytest.mark.parametrize("on_conflict", ["return", "raise", "replace"])
@pytest.mark.parametrize("commits", [True, False])
def test_the_second_waits_for_the_first(db: str, note: Any, on_conflict: str, commits: bool) -> None:
    with psycopg.connect(db) as holder, ThreadPoolExecutor(1) as other:
        first = note.apply_async((1,), unique_key="a", connection=holder).id
        second = other.submit(note.apply_async, (2,), unique_key="a", on_conflict=on_conflict)
        wait_until_one_waits(db)
        holder.commit() if commits else holder.rollback()
        if commits and on_conflict == "raise":
            with pytest.raises(DuplicateJob) as caught:
                second.result()
            assert caught.value.job_id == first
        else:
            assert (second.result().id == first) is commits
    expected = 2 if on_conflict == "replace" or not commits else 1
    assert rows(db, "select args->0 from pgqueue.jobs") == [(expected,)]


def test_it_waits_a_second_at_most(db: str, note: Any) -> None:
    with psycopg.connect(db) as holder:
        note.apply_async((1,), unique_key="a", connection=holder)
        with pytest.raises(UniqueWaitTimeout, match="with the unique_key 'a'; try again when it has ended"):
            note.apply_async((2,), unique_key="a")
        with pytest.raises(UniqueWaitTimeout, match="with the unique_key given"):
            note.app.enqueue_many([note.s(2).set(unique_key="a")])
        note.apply_async((3,), unique_key="b")
    assert rows(db, "select args->0 from pgqueue.jobs order by 1") == [(1,), (3,)]


@pytest.mark.parametrize("state", ["running", "succeeded", "dead"])
def test_a_key_lives_as_long_as_its_job(db: str, note: Any, state: str) -> None:
    first = note.apply_async((1,), unique_key="a").id
    if state == "running":
        rows(db, "update pgqueue.jobs set state = 'running', attempt = 1, worker_id = 'w' returning 1")
    else:
        rows(db, "delete from pgqueue.jobs returning 1")
    for on_conflict in ("return", "replace"):
        again = note.apply_async((2,), unique_key="a", on_conflict=on_conflict).id
        if state == "running":
            assert again == first, "what runs is not changed"
            assert rows(db, "select args->0, state from pgqueue.jobs") == [(1, "running")]
        else:
            assert again != first
    if state == "running":
        with pytest.raises(DuplicateJob):
            note.apply_async((2,), unique_key="a", on_conflict="raise")


def test_a_repeat_of_an_id_is_no_duplicate(db: str, note: Any) -> None:
    mine = "01890000-0000-7000-8000-000000000001"
    for _ in range(2):
        assert note.apply_async((1,), unique_key="a", job_id=mine, on_conflict="raise").id == mine
    assert rows(db, "select count(*) from pgqueue.jobs") == [(1,)]


def test_two_tasks_may_have_the_same_key(db: str, app: PgQueue, note: Any) -> None:
    first = note.apply_async((1,), unique_key="a").id
    assert app.send_task("tests.other", unique_key="a").id != first


def test_there_are_never_two(db: str, note: Any) -> None:
    """Many threads enqueue under few keys while jobs are claimed and end."""
    seen: list[int] = []

    def produce(number: int) -> None:
        dice = random.Random(number)
        while len(seen) < 30:
            try:
                how = dice.choice(["return", "raise", "replace"])
                note.apply_async((number,), unique_key=dice.choice("ab"), on_conflict=how)
            except DuplicateJob:
                pass

    def end() -> None:
        while len(seen) < 30:
            rows(db, "update pgqueue.jobs set state = 'running' where random() < 0.5 returning 1")
            rows(db, "delete from pgqueue.jobs where state = 'running' and random() < 0.5 returning 1")
            seen.append(rows(db, "select count(*) from pgqueue.jobs")[0][0])

    with ThreadPoolExecutor(7) as threads:
        for each in [threads.submit(end), *(threads.submit(produce, number) for number in range(6))]:
            each.result()
    assert max(seen) <= 2
    assert rows(db, "select count(*) = count(distinct unique_key) from pgqueue.jobs") == [(True,)]


def test_a_database_before_it_says_what_to_do(fresh_dsn: str) -> None:
    upgrade(fresh_dsn, revision="0002")
    with closing(PgQueue("tests", dsn=fresh_dsn)) as app:
        first = app.send_task("t", unique_key="a").id
        assert app.send_task("t", unique_key="a").id == first
        with pytest.raises(DuplicateJob):
            app.send_task("t", unique_key="a", on_conflict="raise")
        with pytest.raises(SchemaMismatch, match="needs revision 0003 of the schema; run `pgqueue migrate`"):
            app.send_task("t", unique_key="a", on_conflict="replace")
