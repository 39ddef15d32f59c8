"""An application with a database of its own, if the test says so."""

from __future__ import annotations

import os

from pgqueue import PgQueue

app = PgQueue("dsn", dsn=os.environ.get("APP_DSN") or None)


@app.task
def where() -> None:
    """Runs wherever its worker serves."""


@app.task
def enqueues() -> str:
    return where.delay().id
