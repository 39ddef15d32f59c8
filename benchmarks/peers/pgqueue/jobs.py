"""The application that pgqueue's driver enqueues to and its workers run."""

from __future__ import annotations

import os

import driving

from pgqueue import PgQueue

app = PgQueue("bench", dsn=os.environ.get("BENCH_URL"))
history = os.environ.get("BENCH_HISTORY") != "off"

if os.environ.get("BENCH_POOL") == "asyncio":

    @app.task(name="noop", history=history)
    async def noop(text: str = "") -> None:
        """Nothing, as a coroutine: a plain task would go to a thread of the asyncio pool."""

else:

    @app.task(name="noop", history=history)
    def noop(text: str = "") -> None:
        """Nothing: what remains is the queue's own work."""


@app.task(name="stamp", history=history)
def stamp(nanoseconds: int) -> None:
    """How long ago it was enqueued goes into a file."""
    driving.record_stamp(nanoseconds)
