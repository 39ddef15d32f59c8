"""The queries of docs/sql.md run as they stand there, and find what they are to find."""

from __future__ import annotations

import re
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple

import psycopg
import pytest
from psycopg.rows import dict_row

from pgqueue import PgQueue
from pgqueue.database.migrate import upgrade

PAGE = Path(__file__).resolve().parents[2] / "docs" / "sql.md"
THE_JOB = "01890a5d-ac96-774b-bcce-b302099a8057"


class Query(NamedTuple):
    """A code block of the page, and the heading it stands under."""

    question: str
    sql: str


def queries() -> list[Query]:
    found = []
    for part in re.split(r"^### ", PAGE.read_text(encoding="utf-8"), flags=re.MULTILINE)[1:]:
        question = part.partition("\n")[0]
        found += [
            Query(question, sql) for sql in re.findall(r"^```sql\n(.*?)^```", part, re.MULTILINE | re.DOTALL)
        ]
    return found


QUERIES = queries()

SEED = PAGE.parents[1] / "tests" / "integration" / "sql_page.sql"


@pytest.fixture(scope="module")
def shop(postgres: Any) -> Iterator[psycopg.Connection[dict[str, Any]]]:
    """A queue with something of everything, and what people did in it."""
    database = postgres.create_database()
    try:
        upgrade(database.dsn)
        with psycopg.connect(database.dsn, autocommit=True, row_factory=dict_row) as connection:
            connection.execute(SEED.read_bytes())
            by_hand(PgQueue("shop", dsn=database.dsn), connection)
            yield connection
    finally:
        postgres.drop_database(database)


def by_hand(app: PgQueue, connection: psycopg.Connection[dict[str, Any]]) -> None:
    app.retention.set(task="shop.invoice", finished=timedelta(days=365), by="ann", reason="tax law")
    app.queues.pause("email", by="ann", reason="the mail server moves")
    app.dead_letters.requeue(["01890a5d-0000-7000-8000-000000000006"], by="ann", reason="mended")
    app.schedules.add("nightly", "shop.close_day", every=timedelta(hours=1), by="ann")
    app.schedules.pause("nightly", by="bob", reason="holidays")
    connection.execute("update pgqueue.schedules set missed = 3")
    job = app.send_task("shop.newsletter")
    job.cancel(reason="withdrawn")
    connection.execute(
        "insert into pgqueue.audit_log (action, job_id, reason, details)"
        " values ('run_now', %s, 'in a hurry', %s)",
        [THE_JOB, '{"by": "ann", "before": {"state": "scheduled"}, "after": {"state": "ready"}}'],
    )


def test_there_are_twenty_five_questions() -> None:
    assert len({query.question for query in QUERIES}) >= 25


@pytest.mark.parametrize("query", QUERIES, ids=lambda query: query.question)
def test_a_query_finds_something(shop: psycopg.Connection[dict[str, Any]], query: Query) -> None:
    cursor = shop.execute(query.sql.encode())
    rows = cursor.fetchall()
    assert rows
    assert cursor.description is not None
    assert "?column?" not in {column.name for column in cursor.description}


def answer(shop: psycopg.Connection[dict[str, Any]], question: str) -> list[dict[str, Any]]:
    sql = next(query.sql for query in QUERIES if query.question.startswith(question))
    return shop.execute(sql.encode()).fetchall()


def test_the_jobs_of_an_order_are_found_in_every_table(shop: psycopg.Connection[dict[str, Any]]) -> None:
    found = answer(shop, "Which jobs did order 42 cause?")
    assert {(row["task"], row["state"]) for row in found} == {
        ("shop.send_email", "succeeded"),
        ("shop.charge", "running"),
    }


def test_an_order_without_its_job_is_found(shop: psycopg.Connection[dict[str, Any]]) -> None:
    assert answer(shop, "Has every order its e-mail") == [{"id": 41, "jobs": 0, "sent": 0}]


def test_the_label_is_one_of_several(shop: psycopg.Connection[dict[str, Any]]) -> None:
    assert [row["tags"] for row in answer(shop, "Which jobs have a label?")] == [["vip", "eu"]]


def test_who_cancelled(shop: psycopg.Connection[dict[str, Any]]) -> None:
    (row,) = answer(shop, "Who cancelled this")
    assert row["reason"] == "withdrawn"


def test_task_stats_and_failures_say_the_numbers(shop: psycopg.Connection[dict[str, Any]]) -> None:
    stats = {row["task"]: row for row in shop.execute("select * from pgqueue.task_stats").fetchall()}
    mail, charge = stats["shop.send_email"], stats["shop.charge"]
    assert (mail["succeeded"], mail["failed"], mail["crashed"], mail["dead"]) == (1, 1, 0, 0)
    assert mail["run_p50"] == mail["run_p95"] == mail["run_max"] == timedelta(minutes=1)
    assert mail["wait_p95"] == timedelta(minutes=1)
    assert (charge["ready"], charge["scheduled"], charge["running"]) == (2, 1, 1)
    assert (charge["crashed"], charge["dead"], charge["run_p95"]) == (1, 1, None)
    summary = {row["task"]: row for row in shop.execute("select * from pgqueue.failure_summary").fetchall()}
    assert (summary["shop.charge"]["attempts"], summary["shop.charge"]["dead"]) == (1, 1)
    assert (summary["shop.send_email"]["jobs"], summary["shop.send_email"]["dead"]) == (1, 0)


def test_the_signature_is_the_functions(shop: psycopg.Connection[dict[str, Any]]) -> None:
    (shown,) = re.findall(r"^pgqueue\.enqueue\((.*?)\) RETURNS uuid$", PAGE.read_text("utf-8"), re.M | re.S)
    row = shop.execute("select pg_get_function_arguments('pgqueue.enqueue'::regproc) as arguments").fetchone()
    assert row is not None
    has = re.sub(r"::[a-z ]+", "", row["arguments"].replace("timestamp with time zone", "timestamptz"))
    ours, _, library = has.replace(" DEFAULT ", " = ").rpartition(", ")
    assert " ".join(shown.split()) == ours
    assert library.startswith("new_id ")
