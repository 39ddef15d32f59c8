"""The application that `pgqueue bench` runs: one task that does nothing, so what is measured is the queue."""

from __future__ import annotations

from typing import Final

from pgqueue.app import PgQueue

TASK: Final = "pgqueue.noop"

app = PgQueue("pgqueue-bench")


@app.task(name=TASK)
def noop() -> None:
    """Nothing."""
