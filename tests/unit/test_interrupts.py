"""Raising in a body while it runs: by the alarm, and in a coroutine where it awaits."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Iterator
from signal import ITIMER_REAL, SIGALRM, getitimer, getsignal, signal

import pytest

from pgqueue.errors import SoftTimeLimitExceeded, TaskCancelled
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

        assert asyncio.run(interruptible(body(), TOLD, 0.01)) == "told"

    def test_the_error_comes_out(self) -> None:
        with pytest.raises(SoftTimeLimitExceeded, match="now"):
            asyncio.run(interruptible(_forever(), TOLD, 0.01))

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
            asyncio.run(interruptible(body(), TOLD, 0.01))
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

        assert asyncio.run(interruptible(body(), TOLD, 20)) == 10
        with pytest.raises(OSError, match="inner"):
            asyncio.run(interruptible(fails(), TOLD, 20))

    def test_another_cancellation_is_a_cancellation(self) -> None:
        async def outer() -> None:
            task = asyncio.ensure_future(interruptible(_forever(), TOLD, 20))
            await asyncio.sleep(0)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task

        asyncio.run(outer())


class TestCancelling:
    def test_a_late_signal_is_for_nobody(self) -> None:
        wanted = [0]
        alarm = Alarm(lambda: wanted[0])
        alarm.enter(1)
        wanted[0] = 1
        assert alarm.is_cancelled
        with pytest.raises(TaskCancelled):
            alarm.look()
        alarm.leave()
        alarm.look()
        alarm.enter(2)
        alarm.look()

    def test_one_that_was_cancelled_before_it_began_does_not(self) -> None:
        with pytest.raises(TaskCancelled):
            Alarm(lambda: 1).enter(1)

    def test_nothing_is_raised_in_a_loops_own_code(self) -> None:
        wanted = [0]
        alarm = Alarm(lambda: wanted[0])
        alarm.enter(1)
        alarm.hold()
        wanted[0] = 1
        alarm.look()

        async def body() -> str:
            try:
                await asyncio.sleep(30)
            except TaskCancelled:
                return "told"
            return "slept"

        assert asyncio.run(interruptible(body(), hand_over=alarm.hand_over)) == "told"
