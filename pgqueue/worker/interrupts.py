"""Raising an exception in a body while it runs.

In the main thread by a timer (`Alarm`), whose signal the interpreter looks at between two instructions and
in calls that wait: a lock, a socket, a sleep. C code that does neither hears of it late, or never: for that
there is the hard limit, which is the supervisor's.

In another thread by asking the interpreter (`ThreadAlarm`), which raises between two instructions: a thread
that waits in a lock, a socket or a sleep hears of it only when that ends.

In a coroutine where it awaits: its asyncio task is cancelled, so whatever it waits for is let go in the usual
way, and instead of `CancelledError` the coroutine gets the exception meant for it.
"""

from __future__ import annotations

import asyncio
import ctypes
import signal
import threading
import types
from collections.abc import Callable, Coroutine, Generator, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from typing import Any, Final, Protocol, TypeVar

from pgqueue.errors import Signal, TaskCancelled

T = TypeVar("T")

NEVER: Final = 0.0
CANCEL_SIGNAL: Final = signal.SIGUSR1


class Interrupter(Protocol):
    """What can raise in the body that runs in one slot."""

    def enter(self, number: int) -> None:
        """From here until `leave` the body of this job runs."""

    def leave(self) -> None:
        """What comes late is for nobody."""

    def hold(self) -> None:
        """An event loop is about to run the body: nothing may be raised in its own code."""

    def hand_over(self, raise_in: Callable[[Signal], None]) -> None:
        """The body is a coroutine from here on, in which this raises; called in any thread, or in a signal
        handler.
        """

    def set(self, seconds: float, error: Signal) -> AbstractContextManager[None]:
        """Raise `error` in the block once it has run for so long."""

    def look(self) -> None:
        """Raise in the body if its job has been cancelled."""

    @property
    def is_cancelled(self) -> bool:
        """Somebody wants the job that runs cancelled."""


class Alarm:
    """Raises in what the main thread runs, once a time has passed, or when its job is cancelled.

    Args:
        cancelled: The number of the job that somebody wants cancelled.
    """

    def __init__(self, cancelled: Callable[[], int] = lambda: 0) -> None:
        self._raises: Signal | None = None
        self._cancelled = cancelled
        self._number = 0
        self._raise_in: Callable[[Signal], None] | None = None

    def listen(self) -> None:
        """Take over SIGALRM and SIGUSR1; in the main thread of a freshly forked process."""
        signal.signal(signal.SIGALRM, self._ring)
        signal.signal(CANCEL_SIGNAL, self.look)

    def enter(self, number: int) -> None:
        """From here until `leave` the body of this job runs."""
        self._number = number
        if number == self._cancelled():
            self.look()

    def leave(self) -> None:
        """What comes late is for nobody."""
        self._number = 0
        self._raise_in = None

    def hold(self) -> None:
        """An event loop is about to run the body: nothing may be raised in its own code."""
        self._raise_in = _nowhere

    def hand_over(self, raise_in: Callable[[Signal], None]) -> None:
        """The body is a coroutine from here on, in which this raises; it is called in a signal handler."""
        self._raise_in = raise_in
        self.look()

    @property
    def is_cancelled(self) -> bool:
        """Somebody wants the job that runs cancelled."""
        return 0 < self._number == self._cancelled()

    def look(self, *_: object) -> None:
        """Raise here, or in the coroutine that has taken over, if the job has been cancelled."""
        if self.is_cancelled:
            error = TaskCancelled("somebody has cancelled the job")
            if self._raise_in is None:
                raise error
            self._raise_in(error)

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


class ThreadAlarm:
    """Raises in a body that another thread runs.

    Args:
        cancelled: The number of the job that somebody wants cancelled.
    """

    def __init__(self, cancelled: Callable[[], int]) -> None:
        self._cancelled = cancelled
        self._lock = threading.Lock()
        self._number = 0
        self._thread = 0
        self._raise_in: Callable[[Signal], None] | None = None

    def enter(self, number: int) -> None:
        """From here until `leave` the body of this job runs, in this thread."""
        with self._lock:
            self._number = number
            self._thread = threading.get_ident()
        if self.is_cancelled:
            raise TaskCancelled("somebody has cancelled the job")

    def leave(self) -> None:
        """What comes late is for nobody."""
        self._stop_raising(None, leave=True)

    def hold(self) -> None:
        """An event loop is about to run the body: nothing may be raised in its own code."""
        self._stop_raising(_nowhere, leave=False)

    def hand_over(self, raise_in: Callable[[Signal], None]) -> None:
        """The body is a coroutine from here on, in which this raises."""
        with self._lock:
            self._raise_in = raise_in
        self.look()

    @property
    def is_cancelled(self) -> bool:
        """Somebody wants the job that runs cancelled."""
        return 0 < self._number == self._cancelled()

    def look(self) -> None:
        """Raise in the body if its job has been cancelled."""
        if self.is_cancelled:
            self._raise(TaskCancelled("somebody has cancelled the job"))

    @contextmanager
    def set(self, seconds: float, error: Signal) -> Iterator[None]:
        """Raise `error` in the block once it has run for so long."""
        timer = threading.Timer(seconds, self._raise, (error,))
        timer.daemon = True
        timer.start()
        try:
            yield
        finally:
            timer.cancel()

    def _raise(self, error: Signal) -> None:
        with self._lock:
            if self._number and self._raise_in is not None:
                self._raise_in(error)
            elif self._number:
                _raise_in_thread(self._thread, _class_of(error))

    def _stop_raising(self, raise_in: Callable[[Signal], None] | None, *, leave: bool) -> None:
        while True:
            # What was raised just now may arrive here; once the lock is ours nothing new comes.
            with suppress(Signal):
                with self._lock:
                    self._raise_in = raise_in
                    if leave:
                        self._number = 0
                    _raise_in_thread(self._thread, None)
                return


def _class_of(error: Signal) -> type[Signal]:
    """A class whose instances say the same: the interpreter raises by class."""
    kind = type(error)
    facts = {"__init__": lambda self: kind.__init__(self, *error.args), "__module__": kind.__module__}
    return type(kind.__name__, (kind,), facts)


def _raise_in_thread(thread: int, error: type[BaseException] | None) -> None:
    """None takes back what has not been raised yet."""
    what = ctypes.py_object(error) if error is not None else None
    ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread), what)


def _nowhere(_: Signal) -> None:
    """Who takes over looks again."""


async def interruptible(
    coroutine: Coroutine[Any, Any, T],
    error: Signal | None = None,
    after: float | None = None,
    *,
    hand_over: Callable[[Callable[[Signal], None]], None] | None = None,
) -> T:
    """Await it; where it awaits, it can be told to end.

    Args:
        error: What is raised in it after that time; None for nothing.
        after: Seconds from now.
        hand_over: Gets what raises in it at any other time, from any thread or signal handler.
    """
    wishes: list[Signal] = []
    raised: list[Signal] = []
    loop, task = asyncio.get_running_loop(), asyncio.current_task()

    def ring(wish: Signal) -> None:
        if task is not None:
            wishes.append(wish)
            raised.append(wish)
            task.cancel()

    timer = loop.call_later(after, ring, error) if error is not None and after is not None else None
    try:
        if hand_over is not None:
            hand_over(lambda wish: _soon(loop, ring, wish))
        return await _driven(coroutine, wishes)
    except BaseExceptionGroup as group:
        # It was waiting for a task group, which hands on nothing as it is.
        mine = next((wish for wish in raised if group.subgroup(lambda each: each is wish)), None)  # noqa: B023
        if mine is None:
            raise
        raise mine from group
    finally:
        if timer is not None:
            timer.cancel()


def _soon(loop: asyncio.AbstractEventLoop, ring: Callable[[Signal], None], wish: Signal) -> None:
    with suppress(RuntimeError):  # the loop has been closed
        loop.call_soon_threadsafe(ring, wish)


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
