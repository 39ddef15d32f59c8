"""What a process loads: one that imports pgqueue, that enqueues, that asks for help, that works."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import pgqueue
from pgqueue import errors

HEAVY = (
    "alembic", "asyncpg", "click", "django", "psycopg", "psycopg2", "psycopg_pool", "rich", "sqlalchemy",
    "asyncio", "pgqueue.worker", "pgqueue.cli", "pgqueue.database.pool", "pgqueue.database.migrate",
    "cronsim", "pgqueue.schedules", "pgqueue.cron",
)  # fmt: skip

USE = """
from pgqueue import PgQueue
app = PgQueue("tests", dsn="postgresql://nowhere", imports=("a.b",), task_routes={"a.*": {"queue": "q"}})
@app.task(bind=True, max_retries=3)
def note(self, number: int) -> int:
    return number
note.s(1).set(queue="other")
app.configure(priority=3)
assert note(1) == 1
note.request_for((1,), {}, {"countdown": 3})
app.close()
"""

COMMAND_LINE = """
import sys
from pgqueue.cli.main import main
sys.argv = ["pgqueue", *{arguments!r}]
try:
    main()
except SystemExit as exit:
    assert exit.code == {status}, exit.code
"""

LISTED = {
    "pgqueue", "pgqueue.errors", "pgqueue.cli", "pgqueue.cli.main", "pgqueue.cli.context",
    "pgqueue.cli.status", "pgqueue.worker", "pgqueue.worker.signals",
}  # fmt: skip
"""Of ours, what it takes to list the commands."""


def loaded_by(code: str, **environment: str) -> set[str]:
    """The modules of a process that has run this, without those that every Python has."""
    environ = {key: value for key, value in os.environ.items() if not key.startswith("PGQUEUE_")}
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", f"{code}\nimport json, sys; print(json.dumps([*sys.modules]))"],
        capture_output=True,
        text=True,
        timeout=60,
        cwd=Path(pgqueue.__file__).parent.parent,
        env=environ | environment,
    )
    assert done.returncode == 0, done.stderr
    return set(json.loads(done.stdout.splitlines()[-1]))


def ours(modules: set[str]) -> set[str]:
    return {name for name in modules if name.partition(".")[0] == "pgqueue"}


def libraries(modules: set[str]) -> set[str]:
    """The packages that pgqueue depends on, of these."""
    known = {"alembic", "click", "cronsim", "msgspec", "psycopg", "psycopg_pool", "rich", "sqlalchemy"}
    return known & {name.partition(".")[0] for name in modules}


def test_no_driver_no_command_line_no_worker() -> None:
    loaded = loaded_by(USE)
    assert "pgqueue.app" in loaded
    assert loaded.intersection(HEAVY) == set()


def test_an_import_alone_loads_next_to_nothing() -> None:
    loaded = loaded_by("import pgqueue; pgqueue.errors.Retry")
    assert ours(loaded) == {"pgqueue", "pgqueue.errors"}
    assert libraries(loaded) == set()


def test_a_name_is_the_same_each_time() -> None:
    loaded_by("import pgqueue; assert pgqueue.chain is pgqueue.chain; from pgqueue import *; assert chain")
    assert set(pgqueue.__all__) <= set(dir(pgqueue))
    with pytest.raises(AttributeError, match="has no attribute 'chian'"):
        _ = pgqueue.chian  # type: ignore[attr-defined]


@pytest.mark.parametrize(("argument", "status"), [("--help", 0), ("--version", 0), ("enqeue", 2)])
def test_help_loads_no_command(argument: str, status: int) -> None:
    loaded = loaded_by(COMMAND_LINE.format(arguments=[argument], status=status))
    assert ours(loaded) == LISTED
    assert libraries(loaded) == {"click"}


def test_completion_loads_no_command() -> None:
    words = {"_PGQUEUE_COMPLETE": "bash_complete", "COMP_WORDS": "pgqueue in", "COMP_CWORD": "1"}
    loaded = loaded_by(COMMAND_LINE.format(arguments=[], status=0), **words)
    assert ours(loaded) == LISTED


@pytest.mark.parametrize("command", ["worker", "enqueue", "migrate", "demo"])
def test_these_commands_do_without(command: str) -> None:
    loaded = loaded_by(COMMAND_LINE.format(arguments=[command, "--help"], status=0))
    assert f"pgqueue.cli.{command}" in loaded
    assert libraries(loaded) <= {"click", "msgspec"}


def test_a_probe_does_without_the_tables() -> None:
    loaded = loaded_by(COMMAND_LINE.format(arguments=["ping", "--help"], status=0))
    assert libraries(loaded) == {"click", "msgspec", "psycopg", "rich"}


def test_an_executor_needs_no_database() -> None:
    loaded = loaded_by("import pgqueue.worker.forkserver")
    assert "pgqueue.worker.executor" in loaded
    assert libraries(loaded) == {"msgspec"}


def test_every_public_exception_is_importable() -> None:
    public = {
        name
        for name, value in vars(errors).items()
        if isinstance(value, type) and issubclass(value, BaseException) and not name.startswith("_")
    }
    assert public <= set(pgqueue.__all__)
    assert all(getattr(pgqueue, name) is getattr(errors, name) for name in public)


def test_all_names_exist() -> None:
    assert [name for name in pgqueue.__all__ if not hasattr(pgqueue, name)] == []
    assert len(set(pgqueue.__all__)) == len(pgqueue.__all__)
