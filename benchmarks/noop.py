"""The application that the benchmarks run: one task that does nothing."""

from __future__ import annotations

from pgqueue import PgQueue

app = PgQueue("benchmark")


@app.task(name="noop")
def noop() -> None:
    """Nothing: what remains is the queue's own work."""
