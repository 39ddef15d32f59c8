"""Raising in a body while it runs: by the alarm, and in a coroutine where it awaits."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Iterator
from signal import ITIMER_REAL, SIGALRM, getitimer, getsignal, signal

import pytest

from pgqueue.errors import SoftTimeLimitExceeded
from pgqueue.worker.interrupts import Alarm, interruptible

TOLD = SoftTimeLimitExceeded("now")


@pytest.fixture
def alarm() -> Iterator[Alarm]:
    before = getsignal(SIGALRM)
    alarm = Alarm()
    alarm.listen()
    yield alarm
    signal(SIGALRM, before)


class TestAlarm:
    def test_it_interrupts_a_lock(self, alarm: Alarm) -> None:
        lock = threading.Lock()
        lock.acquire()
        with pytest.raises(SoftTimeLimitExceeded, match="now"), alarm.set(0.01, TOLD):
            lock.acquire()

    def test_it_is_off_after_the_block(self, alarm: Alarm) -> None:
        with alarm.set(0.05, TOLD):
            pass
        assert getitimer(ITIMER_REAL) == (0.0, 0.0)
        with pytest.raises(OSError, match="mine"), alarm.set(0.05, TOLD):
            raise OSError("mine")
        assert getitimer(ITIMER_REAL) == (0.0, 0.0)

    def test_it_rings_once(self, alarm: Alarm) -> None:
        with alarm.set(0.01, TOLD):
            try:
                time.sleep(30)
            except SoftTimeLimitExceeded:
                time.sleep(0.05)


async def _forever() -> None:
    await asyncio.sleep(30)


class TestCoroutine:
    def test_it_is_told_where_it_awaits(self) -> None:
        async def body() -> str:
            try:
                await _forever()
            except SoftTimeLimitExceeded:
                await asyncio.sleep(0)  # it may clean up
                return "told"
            return "slept"

        assert asyncio.run(interruptible(body(), after=0.01, error=TOLD)) == "told"

    def test_the_error_comes_out(self) -> None:
        with pytest.raises(SoftTimeLimitExceeded, match="now"):
            asyncio.run(interruptible(_forever(), after=0.01, error=TOLD))

    @pytest.mark.parametrize("way", ["gather", "group", "timeout"])
    def test_what_it_waits_for_is_let_go(self, way: str) -> None:
        seen: list[str] = []

        async def child() -> None:
            try:
                await _forever()
            except asyncio.CancelledError:
                seen.append("cancelled")
                raise
            except SoftTimeLimitExceeded:
                seen.append("told")
                raise

        async def body() -> None:
            if way == "gather":
                await asyncio.gather(child(), child())
            elif way == "group":
                async with asyncio.TaskGroup() as group:
                    group.create_task(child())
                    group.create_task(child())
            else:
                async with asyncio.timeout(20):
                    await child()

        with pytest.raises(SoftTimeLimitExceeded):
            asyncio.run(interruptible(body(), after=0.01, error=TOLD))
        assert seen == {"gather": ["cancelled"] * 2, "group": ["cancelled"] * 2, "timeout": ["told"]}[way]

    def test_in_time_it_is_what_await_is(self) -> None:
        async def body() -> int:
            total = 0
            for number in range(5):
                total += await asyncio.sleep(0, number)
            with pytest.raises(OSError, match="inner"):
                await fails()
            return total

        async def fails() -> None:
            await asyncio.sleep(0)
            raise OSError("inner")

        assert asyncio.run(interruptible(body(), after=20, error=TOLD)) == 10
        with pytest.raises(OSError, match="inner"):
            asyncio.run(interruptible(fails(), after=20, error=TOLD))

    def test_another_cancellation_is_a_cancellation(self) -> None:
        async def outer() -> None:
            task = asyncio.ensure_future(interruptible(_forever(), after=20, error=TOLD))
            await asyncio.sleep(0)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task

        asyncio.run(outer())
