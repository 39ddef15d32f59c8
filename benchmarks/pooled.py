"""The application of `pools.py`: jobs that wait, and jobs that leak."""

from __future__ import annotations

import asyncio
import os
import time

from pgqueue import PgQueue

app = PgQueue("pools")
_kept: list[bytearray] = []


@app.task(name="wait")
def wait(seconds: float) -> None:
    """A job that takes so long."""
    time.sleep(seconds)


@app.task(name="wait_async")
async def wait_async(seconds: float) -> None:
    """The same as a coroutine."""
    await asyncio.sleep(seconds)


@app.task(name="leak")
def leak(kilobytes: int) -> None:
    """A job that keeps some memory for ever."""
    _kept.append(bytearray(os.urandom(1024)) * kilobytes)
