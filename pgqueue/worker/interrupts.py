"""Raising an exception in a body while it runs.

In the main thread by a timer, whose signal the interpreter looks at between two instructions and in calls
that wait: a lock, a socket, a sleep. C code that does neither hears of it late, or never: for that there is
the hard limit, which is the supervisor's.

In a coroutine where it awaits: its asyncio task is cancelled, so whatever it waits for is let go in the usual
way, and instead of `CancelledError` the coroutine gets the exception meant for it.
"""

from __future__ import annotations

import asyncio
import signal
import types
from collections.abc import Coroutine, Generator, Iterator
from contextlib import contextmanager
from typing import Any, Final, TypeVar

from pgqueue.errors import Signal

T = TypeVar("T")

NEVER: Final = 0.0


class Alarm:
    """Raises in what the main thread runs, once a time has passed."""

    def __init__(self) -> None:
        self._raises: Signal | None = None

    def listen(self) -> None:
        """Take over SIGALRM; in the main thread of a freshly forked process."""
        signal.signal(signal.SIGALRM, self._ring)

    @contextmanager
    def set(self, seconds: float, error: Signal) -> Iterator[None]:
        """Raise `error` in the block once it has run for so long."""
        self._raises = error
        signal.setitimer(signal.ITIMER_REAL, seconds)
        try:
            yield
        finally:
            self._raises = None  # first: from here on it rings for nobody
            signal.setitimer(signal.ITIMER_REAL, NEVER)

    def _ring(self, *_: object) -> None:
        error, self._raises = self._raises, None
        if error is not None:
            raise error


async def limited(coroutine: Coroutine[Any, Any, T], seconds: float, error: Signal) -> T:
    """Await it; where it awaits once it has run for so long, raise `error` in it."""
    wishes: list[Signal] = []

    def ring(task: asyncio.Task[Any] | None) -> None:
        if task is not None:
            wishes.append(error)
            task.cancel()

    timer = asyncio.get_running_loop().call_later(seconds, ring, asyncio.current_task())
    try:
        return await _driven(coroutine, wishes)
    except BaseExceptionGroup as group:
        if group.subgroup(lambda each: each is error) is None:
            raise
        raise error from group  # it was waiting for a task group, which hands on nothing as it is
    finally:
        timer.cancel()


@types.coroutine
def _driven(coroutine: Coroutine[Any, Any, T], wishes: list[Signal]) -> Generator[Any, Any, T]:
    """Step by step what `await` does, but for a cancellation that stands for a wish."""
    try:
        awaited = coroutine.send(None)
        while True:
            try:
                answer = yield awaited
            except asyncio.CancelledError as cancelled:
                if wishes:
                    if task := asyncio.current_task():
                        task.uncancel()
                    awaited = coroutine.throw(wishes.pop())
                else:
                    awaited = coroutine.throw(cancelled)
            except Exception as raised:
                awaited = coroutine.throw(raised)
            else:
                awaited = coroutine.send(answer)
    except StopIteration as end:
        value: T = end.value
        return value
    finally:
        coroutine.close()
