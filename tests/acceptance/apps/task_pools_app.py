"""Tasks that ask for their pool."""

from __future__ import annotations

import asyncio
import os
import threading
import time
from typing import Any

from tests_app import note, wait_for

from pgqueue import PgQueue, TaskContext

app = PgQueue("task_pools")


def place(self: TaskContext) -> list[Any]:
    note("start", self)
    return [os.getpid(), threading.current_thread() is threading.main_thread()]


@app.task(bind=True)
def own(self: TaskContext, seconds: float = 0.0) -> list[Any]:
    time.sleep(seconds)
    return place(self)


@app.task(bind=True, pool="threads")
def threaded(self: TaskContext, seconds: float = 0.0) -> list[Any]:
    time.sleep(seconds)
    return place(self)


@app.task(bind=True, pool="asyncio")
async def waiting(self: TaskContext, seconds: float = 0.0) -> list[Any]:
    found = place(self)
    await asyncio.sleep(seconds)
    return found


@app.task(bind=True, pool="prefork")
def forked(self: TaskContext) -> list[Any]:
    return place(self)


@app.task(bind=True)
def gated(self: TaskContext, path: str) -> None:
    note("start", self)
    wait_for(path)


@app.task(bind=True, pool="asyncio")
async def gated_waiting(self: TaskContext, path: str) -> None:
    note("start", self)
    while not os.path.exists(path):  # noqa: ASYNC110, ASYNC240
        await asyncio.sleep(0.02)
