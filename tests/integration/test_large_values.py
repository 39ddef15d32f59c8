"""Large values in the history: stored as the enqueue left them, never compressed anew."""

from __future__ import annotations

from collections.abc import Iterator

import psycopg
import pytest

from pgqueue.database.migrate import upgrade
from pgqueue.job import new_id


@pytest.fixture
def own(fresh_dsn: str) -> Iterator[psycopg.Connection]:
    """A migrated database of the test's own, for what changes partitions."""
    upgrade(fresh_dsn)
    with psycopg.connect(fresh_dsn, autocommit=True) as connection:
        yield connection


def storages(connection: psycopg.Connection) -> dict[str, set[str]]:
    """How each table of the history stores what a job was enqueued with."""
    rows = connection.execute(
        """
        SELECT c.relname, array_agg(a.attstorage::text)
        FROM pg_class c JOIN pg_attribute a ON a.attrelid = c.oid
        WHERE c.relnamespace = 'pgqueue'::regnamespace AND c.relkind IN ('r', 'p')
          AND c.relname ~ '^finished_jobs' AND a.attname IN ('args', 'kwargs', 'headers')
        GROUP BY 1
        """
    ).fetchall()
    return {name: set(found) for name, found in rows}


def test_every_day_takes_them_as_they_are(own: psycopg.Connection) -> None:
    before = storages(own)
    own.execute("SELECT pgqueue.make_partitions(20)")
    after = storages(own)
    assert len(after) > len(before) > 10
    assert {name for name, found in after.items() if found != {"e"}} == set()


def test_what_the_enqueue_compressed_stays_compressed(own: psycopg.Connection) -> None:
    job = new_id()
    own.execute(
        "INSERT INTO pgqueue.jobs (id, task, args) VALUES (%s, 't', jsonb_build_array(%s::text))",
        [job, "x" * 100_000],
    )
    own.execute(
        """
        WITH gone AS (DELETE FROM pgqueue.jobs RETURNING *)
        INSERT INTO pgqueue.finished_jobs (id, state, queue, task, args, kwargs, priority, attempt, retries,
            crashes, rescues, enqueued_at, enqueued_by, headers, finished_at)
        SELECT id, 'succeeded', queue, task, args, kwargs, priority, attempt, retries, crashes, rescues,
            enqueued_at, enqueued_by, headers, now()
        FROM gone
        """
    )
    sizes = own.execute(
        "SELECT pg_column_size(args), octet_length(args::text) FROM pgqueue.finished_jobs"
    ).fetchone()
    assert sizes is not None
    assert sizes[0] < sizes[1] / 20
