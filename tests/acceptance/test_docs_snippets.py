"""Every code block of README and docs/ runs: page by page, from top to bottom, on a migrated database.

How is in `snippets`; what a page takes for granted is in PRELUDES.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import jsonschema
import psycopg
import pytest

from pgqueue.database.migrate import upgrade
from tests.acceptance.snippets import (
    EXEMPT,
    PAGES,
    ROOT,
    Commands,
    Place,
    Snippet,
    as_printed,
    free_port,
    snippets,
)
from tests.acceptance.snippets import commands as commands_of
from tests.integration.test_sql_page import QUERIES

THE_JOB = "01890a5d-ac96-774b-bcce-b302099a8057"
"""The id in examples: a dead letter, before each block."""

ELSEWHERE = {
    "docs/moving-from-celery.md": "tests/acceptance/test_from_celery.py",
    "docs/testing.md": "tests/acceptance/test_testing.py",
    "docs/sql.md#Questions and answers": "tests/integration/test_sql_page.py",
}
"""Pages, or sections of them, whose blocks another test runs."""


@dataclass(frozen=True)
class Prelude:
    """What a page takes for granted.

    Attributes:
        shop: There is a module `shop`, the one of docs/tasks.md.
        orders: There is a table `orders`.
        python: Run before its first block, with the database's address filled in.
        roles: Of the database, which its grants name.
        installed: Its commands are run as the installed program, not in a process that has imported it.
        dead: A dead letter THE_JOB of `shop.send_email` is there before each block.
    """

    shop: bool = False
    orders: bool = False
    python: str = ""
    roles: tuple[str, ...] = ()
    installed: bool = False
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

import psycopg
from shop import app

def credit_after(task, cents):
    with psycopg.connect("postgresql://localhost/shop") as connection, app.eager():
        connection.execute("create table customers (id bigint, credit bigint)")
        connection.execute("insert into customers values (1, 100)")
        task.on(connection).delay(1, cents)
        return connection.execute("select credit from customers").fetchone()[0]
"""

IDLE = """
import psycopg
idle = psycopg.connect("postgresql://localhost/shop", application_name="psql")
idle.isolation_level = psycopg.IsolationLevel.REPEATABLE_READ
idle.execute("select 1")
"""

PRELUDES = {
    "README.md": Prelude(orders=True),
    "docs/quickstart.md": Prelude(installed=True),
    "docs/tasks.md": Prelude(python=HELPERS),
    "docs/workers.md": Prelude(shop=True, python=HELPERS),
    "docs/transactions.md": Prelude(shop=True, orders=True, roles=("web",), python=CONNECTIONS),
    "docs/retries.md": Prelude(shop=True, dead=True, python=HELPERS),
    "docs/schedules.md": Prelude(),
    "docs/hooks.md": Prelude(shop=True),
    "docs/canvas.md": Prelude(dead=True),
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
    return snippet.page in ELSEWHERE or f"{snippet.page}#{snippet.section}" in ELSEWHERE


ALL = [snippet for page in PAGES for snippet in snippets(page)]
RUN_HERE = [snippet for snippet in ALL if not elsewhere(snippet)]


@pytest.fixture(scope="module")
def commands() -> Iterator[Commands]:
    commands = Commands()
    yield commands
    commands.close()


@pytest.mark.parametrize("page", sorted({snippet.page for snippet in RUN_HERE}))
def test_a_page_runs_from_top_to_bottom(postgres: Any, commands: Commands, tmp_path: Path, page: str) -> None:
    prelude = PRELUDES.get(page, Prelude())
    database = postgres.create_database()
    try:
        upgrade(database.dsn)
        there = None if prelude.installed else commands
        dsn = database.dsn
        with Place(tmp_path, dsn, addresses(dsn), roles=prelude.roles, commands=there) as place:
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
            "insert into pgqueue.dead_letters (id, task, queue, dead_letter_queue, reason, args, kwargs,"
            " priority, attempt, retries, crashes, rescues, enqueued_at, enqueued_by, headers, error_class,"
            " error_message) values (%s, 'shop.send_email', 'email', 'failed_emails', 'retries_exhausted',"
            " '[1, \"a@b.c\"]', '{}', 5, 4, 3, 0, 0, now(), 'web', '{}', 'SMTPServerDisconnected',"
            " 'timed out') on conflict do nothing",
            [THE_JOB],
        )


def test_every_block_is_accounted_for() -> None:
    ways = Counter(snippet.way for snippet in RUN_HERE)
    not_run = [f"{each}: {each.notes['exempt']}" for each in RUN_HERE if each.way == "exempt"]
    print(dict(ways), f"{len(ALL) - len(RUN_HERE)} by other tests", *not_run, sep="\n")
    assert {each.notes["exempt"] for each in RUN_HERE if each.way == "exempt"} <= set(EXEMPT)
    assert ways["exempt"] <= 6
    assert ways["validated"] <= 14
    assert ways["executed"] >= 75


def test_what_another_test_runs_is_run_there() -> None:
    for where, test in ELSEWHERE.items():
        page, _, section = where.partition("#")
        assert any(each.page == page and section in ("", each.section) for each in ALL), where
        assert Path(page).name in (ROOT / test).read_text(encoding="utf-8"), f"{test} does not read {page}"
    on_sql = [each.code for each in ALL if elsewhere(each) and each.page == "docs/sql.md"]
    assert on_sql == [query.sql for query in QUERIES]


def test_python_that_runs_is_not_only_parsed() -> None:
    """`parsed` is for commands that take long, not a way around running things."""
    parsed = [line.line.split()[0] for each in ALL if "parsed" in each.notes for line in commands_of(each)]
    assert set(parsed) <= {"make", "python", "PGQUEUE_NEMESIS_SECONDS=600"}


WRONG = {
    "Python that raises": "```python\n1 / 0\n```\n",
    "Python that raises something else": "<!-- snippet: raises KeyError -->\n```python\n1 / 0\n```\n",
    "Python that does not raise": "<!-- snippet: raises KeyError -->\n```python\n1\n```\n",
    "an import that is not there": "```python\nfrom pgqueue import nothing\n```\n",
    "another thing printed": "```python\nprint(1)   # -> 2\n```\n",
    "a call that fails": "<!-- snippet: then f(1) -->\n```python\ndef f(): ...\n```\n",
    "a module that cannot be imported": "```python\n# wrong.py\nimport no_such_module\n```\n",
    "a command that is wrong": "```sh\npgqueue inspect nothing\n```\n",
    "a command that fails": "```sh\npgqueue dead show 01890a5d-ac96-774b-bcce-b302099a8057\n```\n",
    "a program that is not there": "```sh\nno-such-program\n```\n",
    "another output": "```console\n$ echo one\ntwo\n```\n",
    "more output than shown": "```console\n$ echo one two\none\n```\n",
    "a worker that does not start": "```sh\npgqueue -A no_such_module:app worker\n```\n",
    "SQL that is wrong": "```sql\nSELECT no_such_column FROM pgqueue.jobs;\n```\n",
    "an extra that is not there": "```sh\npip install 'pgqueue[nothing]'\n```\n",
    "a target that is not there": "<!-- snippet: parsed -->\n```sh\nmake nothing-of-the-kind\n```\n",
    "an option that is not there": "<!-- snippet: parsed -->\n```sh\npython -m benchmarks run --fast\n```\n",
    "tests that are not there": "<!-- snippet: parsed -->\n```sh\npython -m pytest tests/nothing.py\n```\n",
    "an unknown key of Compose": "```yaml\nhealthcheck:\n  test: [CMD, pgqueue]\n  intervall: 1\n```\n",
    "an unknown group": '```toml\n[project.entry-points."pgqueue.task"]\nshop = "shop"\n```\n',
    "a unit without a program": "```ini\n[Unit]\n[Service]\nExecStart=/bin/true\n[Install]\n```\n",
    "a block in no language": "```\nSELECT 1\n```\n",
}


WRONG_ENDS = (KeyError, click.UsageError, jsonschema.ValidationError, psycopg.Error)


@pytest.mark.parametrize("text", WRONG.values(), ids=WRONG)
def test_what_is_wrong_is_seen(db: str, commands: Commands, tmp_path: Path, text: str) -> None:
    (snippet,) = snippets("a page", text)
    with (
        Place(tmp_path, db, addresses(db), commands=commands) as place,
        pytest.raises((AssertionError, *WRONG_ENDS)),
    ):
        place.run(snippet)


def test_rows_are_compared(db: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tests.acceptance.snippets.PATIENCE", 0)
    right, wrong = snippets(
        "a page", "```sql\nSELECT 1, NULL;\n-- 1 |\n```\n```sql\nSELECT 1, 2;\n-- 1 | 3\n```\n"
    )
    with Place(tmp_path, db, addresses(db)) as place:
        place.run(right)
        with pytest.raises(AssertionError, match="the page says"):
            place.run(wrong)


def test_a_comment_that_says_nothing_is_seen() -> None:
    with pytest.raises(AssertionError, match="none of those"):
        snippets("a page", "<!-- snippet: skip -->\n```sh\npgqueue ping\n```\n")


def test_a_block_that_is_not_read_is_seen() -> None:
    with pytest.raises(AssertionError, match="a fence is not read"):
        snippets("a page", "- a list\n\n  ```sh\n  pgqueue nonsense\n  ```\n")


def test_what_varies_may_vary() -> None:
    assert as_printed("order 1,  job …").fullmatch("order 1, job 0189-ab")
    assert not as_printed("order 1, job …").fullmatch("order 2, job 0189-ab")
