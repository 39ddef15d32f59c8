"""Every code block of README and docs/ runs: page by page, from top to bottom, on a migrated database.

How is in `snippets`; what a page takes for granted is in PRELUDES.
"""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import psycopg
import pytest

from pgqueue.database.migrate import upgrade
from tests.acceptance.snippets import EXEMPT, PAGES, ROOT, Place, Snippet, as_printed, free_port, snippets

THE_JOB = "01890a5d-ac96-774b-bcce-b302099a8057"
"""The id in examples: a dead letter, before each block."""

ELSEWHERE = {("docs/sql.md", "Questions and answers"): "tests/integration/test_sql_page.py"}
"""Sections whose blocks another test runs: page, heading, test."""


@dataclass(frozen=True)
class Prelude:
    """What a page takes for granted.

    Attributes:
        shop: There is a module `shop`, the one of docs/tasks.md.
        orders: There is a table `orders`.
        python: Run before its first block, with the database's address filled in.
        roles: Of the database, which its grants name.
        dead: A dead letter THE_JOB of `shop.send_email` is there before each block.
    """

    shop: bool = False
    orders: bool = False
    python: str = ""
    roles: tuple[str, ...] = ()
    dead: bool = False


HELPERS = """
def call_shipping(order_id): ...
def find_report(report_id): ...
class ServiceBusy(Exception): retry_after = 1
async def post(url): return 200
def render_invoice(order_id): return "invoice"
def render_plain(order_id): return "plain"
def store(row): ...
"""

CONNECTIONS = """
import asyncpg
from django.conf import settings
from sqlalchemy.ext.asyncio import AsyncSession, create_async_engine
from sqlalchemy.engine import make_url

url = make_url("postgresql+psycopg://localhost/shop")
async_engine = create_async_engine(url.set(drivername="postgresql+asyncpg"))
pool = await asyncpg.create_pool("postgresql://localhost/shop", min_size=1, max_size=1)
settings.configure(DATABASES={"default": {
    "ENGINE": "django.db.backends.postgresql", "NAME": url.database, "USER": url.username,
    "PASSWORD": url.password, "HOST": url.host, "PORT": url.port,
}})
import django
django.setup()
"""

IDLE = """
import psycopg
idle = psycopg.connect("postgresql://localhost/shop", application_name="psql")
idle.isolation_level = psycopg.IsolationLevel.REPEATABLE_READ
idle.execute("select 1")
"""

PRELUDES = {
    "README.md": Prelude(orders=True),
    "docs/tasks.md": Prelude(python=HELPERS),
    "docs/workers.md": Prelude(shop=True, python=HELPERS),
    "docs/transactions.md": Prelude(shop=True, orders=True, roles=("web",), python=CONNECTIONS),
    "docs/retries.md": Prelude(shop=True, dead=True, python=HELPERS),
    "docs/schedules.md": Prelude(),
    "docs/hooks.md": Prelude(shop=True),
    "docs/doctor.md": Prelude(shop=True, python=IDLE),
    "docs/operations.md": Prelude(shop=True, dead=True, roles=("worker", "operator")),
    "docs/sql.md": Prelude(orders=True),
}


def addresses(dsn: str) -> dict[str, str]:
    """What stands in the pages for the reader's own: databases, ports, parameters."""
    on_psycopg = dsn.replace("postgresql://", "postgresql+psycopg://", 1)
    return {
        "postgresql+psycopg://localhost/shop": on_psycopg,
        "postgresql://localhost/shop": dsn,
        "postgresql://shop@localhost/shop": dsn,
        "postgresql://postgres.internal/shop": dsn,
        " 8080": f" {free_port()}",
        "$worker": "'w'",
        "$queues": "'{default}'::text[]",
        "$priorities": "'{5}'::smallint[]",
        "$after": "'{0}'::bigint[]",
        "$upto": "'{9}'::bigint[]",
        "$most": "'{9}'::integer[]",
        "$batch": "9",
        "$ids": "'{}'::uuid[]",
        "$attempt": "1",
        "attempt, …": "attempt",
        "session 4711 (shop,": "session … (…,",
        "for 12 min,": "for …,",
        "_backend(4711)": "_backend(…)",
    }


def elsewhere(snippet: Snippet) -> bool:
    """Whether another test runs it."""
    text = (ROOT / snippet.page).read_text(encoding="utf-8")
    for page, heading in ELSEWHERE:
        begin = text.find(f"\n## {heading}\n")
        if page == snippet.page and text.count("\n", 0, begin) < snippet.line:
            return True
    return False


ALL = [snippet for page in PAGES for snippet in snippets(page)]
RUN_HERE = [snippet for snippet in ALL if not elsewhere(snippet)]


@pytest.mark.parametrize("page", sorted({snippet.page for snippet in RUN_HERE}))
def test_a_page_runs_from_top_to_bottom(postgres: Any, tmp_path: Path, page: str) -> None:
    prelude = PRELUDES.get(page, Prelude())
    database = postgres.create_database()
    try:
        upgrade(database.dsn)
        with Place(tmp_path, database.dsn, addresses(database.dsn), prelude.roles) as place:
            prepare(place, prelude)
            for snippet in RUN_HERE:
                if snippet.page == page and snippet.way != "exempt":
                    if prelude.dead:
                        bury(database.dsn)
                    place.run(snippet)
    finally:
        postgres.drop_database(database)


def prepare(place: Place, prelude: Prelude) -> None:
    if prelude.shop:
        (shop,) = [each for each in snippets("docs/tasks.md") if each.module == "shop"]
        (place.folder / "shop.py").write_text(shop.code)
    if prelude.orders:
        with psycopg.connect(place.dsn) as connection:
            connection.execute(
                "create table orders (id bigint generated always as identity primary key, email text,"
                " placed_at timestamptz default now())"
            )
            connection.execute("insert into orders (email) values ('a@b.c')")
    if prelude.python:
        place.evaluate(prelude.python)


def bury(dsn: str) -> None:
    """Have THE_JOB as a dead letter, and nowhere else."""
    with psycopg.connect(dsn) as connection:
        connection.execute("delete from pgqueue.jobs where id = %s", [THE_JOB])
        connection.execute("delete from pgqueue.finished_jobs where id = %s", [THE_JOB])
        connection.execute(
            "insert into pgqueue.dead_letters (id, task, queue, dead_letter_queue, reason, args, kwargs, priority,"
            " attempt, retries, crashes, rescues, enqueued_at, enqueued_by, headers, error_class, error_message)"
            " values (%s, 'shop.send_email', 'email', 'failed_emails', 'retries_exhausted', '[1, \"a@b.c\"]', '{}',"
            " 5, 4, 3, 0, 0, now(), 'web', '{}', 'SMTPServerDisconnected', 'timed out') on conflict do nothing",
            [THE_JOB],
        )
