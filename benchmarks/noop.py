"""The application that the benchmarks run: tasks that do nothing."""

from __future__ import annotations

from pgqueue import PgQueue

app = PgQueue("benchmark")


@app.task(name="noop")
def noop() -> None:
    """Nothing: what remains is the queue's own work."""


@app.task(name="body")
def body(results: list[None]) -> int:
    """What a chord ends with."""
    return len(results)
