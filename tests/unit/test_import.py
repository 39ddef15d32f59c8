"""What `import pgqueue` costs a web process."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pgqueue
from pgqueue import errors

HEAVY = (
    "alembic", "asyncpg", "click", "django", "psycopg", "psycopg2", "psycopg_pool", "rich", "sqlalchemy",
    "asyncio", "pgqueue.worker", "pgqueue.cli", "pgqueue.database.pool", "pgqueue.database.migrate",
)  # fmt: skip

USE = """
import json, sys
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
print(json.dumps(sorted(sys.modules)))
"""


def test_no_driver_no_command_line_no_worker() -> None:
    environ = {key: value for key, value in os.environ.items() if not key.startswith("PGQUEUE_")}
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", USE],
        capture_output=True,
        text=True,
        timeout=60,
        cwd=Path(pgqueue.__file__).parent.parent,
        env=environ,
    )
    assert done.returncode == 0, done.stderr
    loaded = set(json.loads(done.stdout))
    assert "pgqueue.app" in loaded
    assert loaded.intersection(HEAVY) == set()


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
