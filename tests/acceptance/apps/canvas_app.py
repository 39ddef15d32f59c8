"""Jobs that wait for other jobs, in every kind of pool; runs are noted in the ledger."""

from __future__ import annotations

import asyncio
import os
import time
from typing import Any

from tests_app import note, wait_for

from pgqueue import PgQueue, TaskContext

app = PgQueue("canvas")


@app.task(bind=True)
def add(self: TaskContext, a: int, b: int) -> int:
    note("start", self, label="add")
    return a + b


@app.task
async def double(number: int) -> int:
    await asyncio.sleep(0)
    return 2 * number


@app.task(bind=True, transactional=True)
def triple(self: TaskContext, number: int) -> int:
    self.connection.execute("select 1")
    return 3 * number


@app.task(history=False)
def forgotten(number: int) -> int:
    return number


@app.task(bind=True)
def total(self: TaskContext, numbers: list[int]) -> int:
    note("start", self, label="total")
    return sum(numbers)


@app.task
def collect(*parts: Any) -> list[Any]:
    return list(parts)


@app.task(bind=True)
def slow(self: TaskContext, seconds: float, value: Any = None) -> Any:
    note("start", self, label="slow")
    time.sleep(seconds)
    return value


@app.task(bind=True)
def gated(self: TaskContext, gate: str, value: Any = None) -> Any:
    note("start", self, label="gated")
    wait_for(gate)
    return value


@app.task(bind=True)
def fails_until(self: TaskContext, path: str, value: Any = None) -> Any:
    """Fails until somebody has put a file there."""
    note("start", self, label="fails_until")
    if not os.path.exists(path):
        raise LookupError(f"{path} is not there")
    return value


@app.task(bind=True)
def dies(self: TaskContext) -> None:
    note("start", self, label="dies")
    os._exit(9)


@app.task(bind=True)
def handle(self: TaskContext, job_id: str, word: str) -> str:
    note("start", self, label=word, failed=job_id)
    return job_id
