"""Bodies that run into their limits, grow, or end their processes."""

from __future__ import annotations

import hashlib
import os
import threading
import time
from contextlib import suppress

from tests_app import note

from pgqueue import PgQueue, SoftTimeLimitExceeded, TaskContext, TimeLimitExceeded

app = PgQueue("limits")
_kept: list[bytearray] = []


@app.task(bind=True, soft_time_limit=0.3)
def sleeps(self: TaskContext) -> str:
    try:
        time.sleep(30)
    except SoftTimeLimitExceeded as error:
        return f"told: {error}"
    return "slept"


@app.task(bind=True)
def naps(self: TaskContext, seconds: float) -> str:
    note("start", self)
    time.sleep(seconds)
    return "rested"


@app.task(soft_time_limit=0.3, time_limit=20)
def ignores_exceptions() -> str:
    while True:
        with suppress(Exception):
            time.sleep(0.01)


@app.task(soft_time_limit=0.3, time_limit=20)
def waits_for_a_lock() -> None:
    lock = threading.Lock()
    lock.acquire()
    lock.acquire()


@app.task(soft_time_limit=0.3, time_limit=20)
async def awaits() -> str:
    import asyncio

    try:
        await asyncio.sleep(30)
    except SoftTimeLimitExceeded:
        return "told"
    return "slept"


@app.task(soft_time_limit=0.3, autoretry_for=SoftTimeLimitExceeded, max_retries=1, default_retry_delay=0)
def named() -> None:
    time.sleep(30)


@app.task(bind=True, soft_time_limit=0.2, time_limit=0.7)
def holds_the_interpreter(self: TaskContext) -> None:
    note("start", self, pid=os.getpid())
    hashlib.pbkdf2_hmac("sha256", b"x", b"y", 1_000_000_000)
    sum(range(10**12))


@app.task(bind=True, time_limit=0.5)
def swallows(self: TaskContext) -> None:
    note("start", self)
    while True:
        with suppress(BaseException):
            time.sleep(30)


@app.task(bind=True, time_limit=0.5, autoretry_for=(TimeLimitExceeded,), max_retries=1, default_retry_delay=0)
def tries_again(self: TaskContext) -> None:
    note("start", self)
    time.sleep(30)


@app.task(bind=True)
def says_its_pid(self: TaskContext, index: int) -> int:
    note("start", self, index=index)
    return os.getpid()


@app.task
def leaks(kilobytes: int) -> int:
    _kept.append(bytearray(os.urandom(1024)) * kilobytes)
    return os.getpid()


@app.task(bind=True, exclusive=True)
def alone(self: TaskContext, seconds: float) -> None:
    note("start", self)
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        note("still", self)
        time.sleep(0.02)
    note("end", self)


_loops: list[object] = []


@app.task
async def loop_of_before() -> bool:
    import asyncio

    _loops.append(asyncio.get_running_loop())
    return _loops[0] is _loops[-1]


@app.task
async def leaves_one_behind() -> str:
    import asyncio

    _loops.append(asyncio.create_task(asyncio.sleep(60), name="left behind"))
    return "done"


@app.task
async def closes_the_loop() -> None:
    import asyncio

    loop = asyncio.get_running_loop()
    loop.call_soon(loop.stop)
    await asyncio.sleep(60)


@app.task
def returns_a_coroutine() -> object:
    return _answer()


async def _answer() -> str:
    return "awaited"


@app.task(bind=True)
async def sees_its_request(self: TaskContext) -> str:
    import asyncio

    try:
        app.AsyncResult(self.request.id).get(timeout=0)
    except RuntimeError as error:
        await asyncio.sleep(0)
        return str(error)
    return "waited"


@app.task(bind=True, autoretry_for=Exception, max_retries=5)
def cancellable(self: TaskContext, how: str) -> str:
    note("start", self)
    try:
        while how == "sleeps":
            time.sleep(30)
        while how == "busy":
            pass
        while how == "swallows":
            with suppress(Exception):
                time.sleep(0.01)
        while how == "asks":
            with suppress(BaseException):
                time.sleep(0.01)
            if self.cancelled():
                return "stopped by itself"
        if how == "fails":
            with suppress(BaseException):
                time.sleep(30)
            raise OSError("on the way out")
        if how == "stubborn":
            while True:
                with suppress(BaseException):
                    hashlib.pbkdf2_hmac("sha256", b"x", b"y", 1_000_000_000)
    finally:
        note("end", self)
    return "never told"


@app.task(bind=True)
async def cancellable_later(self: TaskContext) -> None:
    import asyncio

    note("start", self)
    try:
        await asyncio.gather(asyncio.sleep(30), asyncio.sleep(30))
    finally:
        note("end", self)
