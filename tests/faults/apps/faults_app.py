"""The application of the fault suite. Every body notes its start and its end in the ledger, and returns which
run it was: what history holds must be the result of the run that was acked."""

from __future__ import annotations

import asyncio
import json
import os
import time
from typing import Any

import psycopg

from pgqueue import PgQueue, TaskContext

app = PgQueue("faults")


class Hiccup(Exception):
    """A failure that is retried."""


class Hopeless(Exception):
    """A failure that is not."""


def note(event: str, context: TaskContext, label: str, **facts: Any) -> None:
    """Append a line to the ledger: one write, which no other process's write can split."""
    request = context.request
    line = {"event": event, "job": request.id, "attempt": request.attempt, "worker": request.worker}
    line |= {"label": label, "pid": os.getpid(), "at": time.time(), **facts}
    file = os.open(os.environ["LEDGER"], os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    try:
        # On a line of its own also after one that a killed process could not finish.
        os.write(file, f"\n{json.dumps(line)}\n".encode())
    finally:
        os.close(file)


@app.task(bind=True, autoretry_for=(Hiccup,), max_retries=3, default_retry_delay=0.2)
def work(
    self: TaskContext, label: str, seconds: float = 0.0, hiccups: int = 0, hopeless: bool = False
) -> str:
    """Work for so long, after failing so many times; or fail for good."""
    note("start", self, label)
    if seconds:
        time.sleep(seconds)
    if self.request.retries < hiccups:
        note("failed", self, label)
        raise Hiccup(label)
    if hopeless:
        note("failed", self, label)
        raise Hopeless(label)
    note("end", self, label)
    return f"{label}/{self.request.attempt}/{self.request.worker}"


EFFECT = "insert into effects (job, attempt) values (%s, %s)"


def _fail(self: TaskContext, label: str, hiccups: int, hopeless: bool) -> None:
    if self.request.retries < hiccups or hopeless:
        note("failed", self, label)
        raise Hopeless(label) if hopeless else Hiccup(label)


@app.task(bind=True, transactional=True, autoretry_for=(Hiccup,), max_retries=3, default_retry_delay=0.2)
def charge(
    self: TaskContext, label: str, seconds: float = 0.0, hiccups: int = 0, hopeless: bool = False
) -> str:
    """`work`, with an effect that must happen exactly once."""
    note("start", self, label)
    self.connection.execute(EFFECT, (self.request.id, self.request.attempt))
    if seconds:
        time.sleep(seconds)
    _fail(self, label, hiccups, hopeless)
    note("end", self, label)
    return f"{label}/{self.request.attempt}/{self.request.worker}"


@app.task(bind=True, transactional=True, autoretry_for=(Hiccup,), max_retries=3, default_retry_delay=0.2)
async def acharge(
    self: TaskContext, label: str, seconds: float = 0.0, hiccups: int = 0, hopeless: bool = False
) -> str:
    """The same as a coroutine."""
    note("start", self, label)
    await self.connection.execute(EFFECT, (self.request.id, self.request.attempt))
    await asyncio.sleep(seconds)
    _fail(self, label, hiccups, hopeless)
    note("end", self, label)
    return f"{label}/{self.request.attempt}/{self.request.worker}"


@app.task(bind=True)
def charge_carelessly(self: TaskContext, label: str, **_: object) -> str:
    """What people do without: the effect is committed, and then the job ends."""
    note("start", self, label)
    with psycopg.connect(os.environ["PGQUEUE_DSN"]) as connection:
        connection.execute(EFFECT, (self.request.id, self.request.attempt))
    note("end", self, label)
    return f"{label}/{self.request.attempt}/{self.request.worker}"
