"""Bodies for the pools: they wait, block, count and ask, in threads, coroutines and a debugger."""

from __future__ import annotations

import asyncio
import os
import threading
import time
from contextlib import suppress
from typing import Any

from tests_app import note, wait_for

from pgqueue import PgQueue, SoftTimeLimitExceeded, TaskContext

app = PgQueue("pools")


@app.task(bind=True)
def where(self: TaskContext, seconds: float = 0.0) -> list[Any]:
    note("start", self)
    time.sleep(seconds)
    return [os.getpid(), threading.current_thread() is threading.main_thread(), self.request.id]


@app.task(bind=True)
async def where_async(self: TaskContext, seconds: float = 0.0) -> list[Any]:
    note("start", self)
    await asyncio.sleep(seconds)
    return [os.getpid(), threading.current_thread() is threading.main_thread(), self.request.id]


@app.task(bind=True)
def gated(self: TaskContext, path: str) -> str:
    note("start", self)
    wait_for(path)
    return "through"


@app.task(bind=True)
async def gated_async(self: TaskContext, path: str) -> str:
    note("start", self)
    while not os.path.exists(path):  # noqa: ASYNC110, ASYNC240
        await asyncio.sleep(0.02)
    return "through"


@app.task
def short() -> None:
    time.sleep(0.01)


@app.task
async def short_async() -> None:
    await asyncio.sleep(0.01)


@app.task(soft_time_limit=0.3)
def busy() -> str:
    try:
        while True:
            with suppress(Exception):
                time.sleep(0.001)
    except SoftTimeLimitExceeded as error:
        return f"told: {error}"


@app.task(soft_time_limit=0.3)
async def awaits() -> str:
    try:
        await asyncio.sleep(30)
    except SoftTimeLimitExceeded as error:
        return f"told: {error}"
    return "slept"


@app.task(bind=True, time_limit=0.5)
def stuck(self: TaskContext) -> None:
    note("start", self)
    lock = threading.Lock()
    lock.acquire()
    lock.acquire()


@app.task(bind=True, time_limit=0.5)
async def stuck_async(self: TaskContext) -> None:
    note("start", self)
    while True:
        with suppress(BaseException):
            await asyncio.sleep(30)


@app.task(bind=True)
def asks(self: TaskContext) -> str:
    note("start", self)
    while not self.cancelled():
        with suppress(BaseException):
            time.sleep(0.005)
    return "stopped by itself"


@app.task(bind=True)
def works(self: TaskContext) -> None:
    note("start", self)
    try:
        while True:
            with suppress(Exception):
                time.sleep(0.005)
    finally:
        note("end", self)


@app.task(bind=True)
async def works_async(self: TaskContext) -> None:
    note("start", self)
    try:
        await asyncio.sleep(30)
    finally:
        note("end", self)


@app.task
def exits() -> None:
    raise SystemExit(3)


@app.task
async def exits_async() -> None:
    raise SystemExit(3)


@app.task(bind=True)
def reports(self: TaskContext, path: str) -> None:
    for done in range(10_000):
        self.progress(done, 20_000, "first half")
    self.progress(10_000, 20_000, "half of it, " + "\N{HANGUL SYLLABLE GA}" * 100)
    note("start", self)
    wait_for(path)
    self.progress(20_000)
    wait_for(path + "-2")


@app.task(bind=True)
async def reports_async(self: TaskContext, path: str) -> None:
    self.progress(10_000, 20_000, "half of it, " + "\N{HANGUL SYLLABLE GA}" * 100)
    note("start", self)
    while not os.path.exists(path):  # noqa: ASYNC110, ASYNC240
        await asyncio.sleep(0.02)
    self.progress(20_000)
    while not os.path.exists(path + "-2"):  # noqa: ASYNC110, ASYNC240
        await asyncio.sleep(0.02)


@app.task
def debugged() -> int:
    answer = 41
    breakpoint()
    return answer
