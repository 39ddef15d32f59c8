"""An executor: a child process that runs jobs, one after another in each of its slots.

It is forked by the fork server, owns one end of a socket pair and one board per slot, and talks to the
queue's tables only where a transactional task ends: it has each job run by `body`, and sends the outcome
before it starts the slot's next one. End of file on the socket means that its supervisor is gone: it leaves.

Here is the executor with one slot, which runs its jobs in the main thread; those of several are in `threads`
and `coroutines`.
"""

from __future__ import annotations

import os
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, NoReturn, Protocol

import msgspec

from pgqueue.failpoints import failpoint
from pgqueue.hooks import HOOKS, ChildStarted
from pgqueue.job import ClaimedJob
from pgqueue.worker.body import Body
from pgqueue.worker.interrupts import Alarm
from pgqueue.worker.signals import stay, stay_when_asked_to_stop
from pgqueue.worker.wire import (
    Board,
    Ended,
    Failed,
    Frames,
    Jobs,
    Outbox,
    Ready,
    Skipped,
    Tired,
    clock,
    decode_hook,
    decode_jobs,
    frame,
)

if TYPE_CHECKING:
    from pgqueue.app import PgQueue


UNPROVEN_PAUSE = 0.05
HOLD = 0.002
"""Seconds that results of short jobs may gather: a system call for each, and the supervisor's waking up for
it, cost as much as a job that does nothing."""


class SupportsServe(Protocol):
    """An executor of any kind."""

    def serve(self) -> None:
        """Run jobs until the supervisor closes the channel."""


class Channel:
    """An executor's end of its socket pair."""

    def __init__(self, channel: socket.socket, outbox: Outbox) -> None:
        self._channel = channel
        self._outbox = outbox
        self._sent_at = 0.0
        self._descriptor = channel.fileno()
        self._identity = _identity(self._descriptor)
        self._frames = Frames()
        self._pid = os.getpid()
        self._lock = threading.Lock()

    def fileno(self) -> int:
        """Its descriptor."""
        return self._descriptor

    def receive(self) -> Iterator[Jobs] | None:
        """Wait for jobs; None when there will be none."""
        try:
            data = self._channel.recv(1 << 18)
        except ConnectionResetError:
            return None
        return (decode_jobs(payload) for payload in self._frames.feed(data)) if data else None

    def send(self, message: msgspec.Struct, of: ClaimedJob | None = None, more: bool = False) -> None:
        """Tell the supervisor; what became of a job only in the process that was to run it.

        Args:
            of: The job it is about.
            more: Another job of the slot follows at once: telling this one may wait for it in the outbox.
        """
        if os.getpid() != self._pid:
            _leave(message)
        data = frame(message)
        with self._lock:
            if more and clock() - self._sent_at < HOLD and self._outbox.put(data):
                return
            # A body that closed every descriptor may have opened others in their place.
            if of is not None and _identity(self._descriptor) != self._identity:
                raise OSError(f"job {of.id} has closed the descriptor of its executor's channel")
            self._channel.sendall(self._outbox.unsent + data)
            self._outbox.clear()
            self._sent_at = clock()


class Limits:
    """When an executor has done enough; shared by its slots.

    Args:
        most_memory: KiB; None for no limit.
    """

    def __init__(self, channel: Channel, most_memory: int | None) -> None:
        self._channel = channel
        self._most_memory = most_memory
        self.tired = False

    def look(self) -> None:
        """Between two jobs: say so, and start nothing more, if this process has grown too large."""
        if self._most_memory is None or self.tired:
            return
        memory = resident_memory()
        if memory > self._most_memory:
            self.tired = True
            self._channel.send(Tired(memory))


@contextmanager
def no_job_untold() -> Iterator[None]:
    """Around a slot's work: when it cannot be said any more how its jobs end, the process ends."""
    try:
        yield
    except (BrokenPipeError, ConnectionResetError):
        os._exit(0)  # the supervisor is gone
    except BaseException:
        traceback.print_exc()
        os._exit(1)


class Starter:
    """Decides at the last moment whether a job starts in its slot."""

    def __init__(self, app: PgQueue, board: Board, limits: Limits) -> None:
        self._tasks = app.tasks
        self._board = board
        self._limits = limits

    def pause(self, job: ClaimedJob) -> float | None:
        """Mark the job as started, and return None; or it must not start, and the seconds to wait until
        saying so.
        """
        failpoint("job_received")
        if self._limits.tired:
            return 0.0
        task = self._tasks.get(job.task)
        if task is not None and task.exclusive and not self._board.claim_exclusive(job.number, clock()):
            return UNPROVEN_PAUSE  # it comes back until the worker is heard of again, or has lost it
        return None if self._board.start(job.number) else 0.0


class SingleExecutor:
    """Runs the jobs that come over `channel`, for the tasks of `app`."""

    def __init__(self, app: PgQueue, channel: Channel, boards: list[Board]) -> None:
        (board,) = boards
        alarm = Alarm(lambda: board.cancelled)
        alarm.listen()
        self._body = Body(app, alarm, board)
        self._channel = channel
        self._limits = Limits(channel, app.config.max_memory_per_child)
        self._starter = Starter(app, board, self._limits)

    def serve(self) -> None:
        """Run jobs until the supervisor closes the channel."""
        self._channel.send(Ready(os.getpid()))
        while (received := self._channel.receive()) is not None:
            for jobs in received:
                last = jobs.jobs[-1]
                for job in jobs.jobs:
                    pause = self._starter.pause(job)
                    if pause is None:
                        message: Ended | Skipped = self._body.run(job)
                    else:
                        time.sleep(pause)
                        message = Skipped(job.number)
                    self._channel.send(message, of=job, more=job is not last)
                    self._limits.look()


def resident_memory() -> int:
    """KiB of this process; where the system does not say it, the most it has ever been."""
    try:
        with open("/proc/self/statm", "rb", buffering=0) as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE") >> 10
    except OSError:
        import resource

        most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return most >> 10 if sys.platform == "darwin" else most


def _identity(descriptor: int) -> tuple[int, int]:
    """What is behind a descriptor."""
    found = os.fstat(descriptor)
    return found.st_dev, found.st_ino


def _leave(message: msgspec.Struct) -> NoReturn:
    """End a process that a body forked and forgot to end: the outcome is told by the one that was asked."""
    status = 0
    if isinstance(message, Failed):
        asked = message.error_message
        status = int(asked) & 0xFF if message.error_class == "SystemExit" and asked.isdecimal() else 1
        if message.error_class != "SystemExit":
            with suppress(BaseException):
                print(message.traceback, file=sys.stderr)
    _flush()
    os._exit(status)


def run_hook(app: PgQueue, channel: socket.socket) -> NoReturn:
    """The life of a child that was forked to tell the worker's own hooks; never returns."""
    try:
        (payload,) = Frames().feed(channel.recv(1 << 16))
        message = decode_hook(payload)
        app.hooks.tell(message.name, HOOKS[message.name](message.worker))  # type: ignore[arg-type]
    except BaseException:
        traceback.print_exc()
    finally:
        _flush()
        os._exit(0)


def become_executor(
    app: PgQueue, channel: socket.socket, board_descriptor: int, pool: str, slots: int
) -> None:
    """The life of a freshly forked child; never returns."""
    status = 1
    try:
        stay_when_asked_to_stop()
        os.register_at_fork(before=_hold, after_in_parent=_release, after_in_child=_let_go)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        boards = Board.map(board_descriptor, slots)
        Board.seal(board_descriptor)
        os.close(board_descriptor)
        app.hooks.tell("child_started", ChildStarted(os.getpid(), pool))
        _executor(pool)(app, Channel(channel, Outbox(boards)), boards).serve()
        status = 0
    except (BrokenPipeError, ConnectionResetError):
        status = 0  # the supervisor is gone
    except BaseException:
        traceback.print_exc()
    finally:
        _flush()
        os._exit(status)


def _executor(pool: str) -> Callable[[PgQueue, Channel, list[Board]], SupportsServe]:
    if pool == "threads":
        from pgqueue.worker.threads import ThreadedExecutor

        return ThreadedExecutor
    if pool == "asyncio":
        from pgqueue.worker.coroutines import AsyncExecutor

        return AsyncExecutor
    return SingleExecutor


_mask = threading.local()


def _hold() -> None:
    """Before a task forks: a SIGTERM for the child must not come while it still has our handler."""
    _mask.before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})


def _release() -> None:
    signal.pthread_sigmask(signal.SIG_SETMASK, _mask.before)


def _let_go() -> None:
    """In a process that a task has forked: end when asked to, or `multiprocessing` could not terminate it."""
    if signal.getsignal(signal.SIGTERM) is stay:
        with suppress(ValueError):
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
    _release()


def _flush() -> None:
    for stream in (sys.stdout, sys.stderr):
        with suppress(BaseException):
            stream.flush()
