"""An executor: a child process that runs one job after another.

It is forked by the fork server, owns one end of a socket pair and one board, and never talks to the queue's
tables: it has each job run by `body`, and sends the outcome before it starts the next one. End of file on the
socket means that its supervisor is gone: it leaves.
"""

from __future__ import annotations

import os
import signal
import socket
import sys
import threading
import time
import traceback
from contextlib import suppress
from typing import TYPE_CHECKING, NoReturn

from pgqueue.failpoints import failpoint
from pgqueue.worker.body import Body, Outcome
from pgqueue.worker.interrupts import Alarm
from pgqueue.worker.signals import stay, stay_when_asked_to_stop
from pgqueue.worker.wire import (
    Board,
    Failed,
    Frames,
    Job,
    Ready,
    Skipped,
    Tired,
    clock,
    decode_jobs,
    frame,
)

if TYPE_CHECKING:
    from pgqueue.app import PgQueue


UNPROVEN_PAUSE = 0.05


class Executor:
    """Runs the jobs that come over `channel`, for the tasks of `app`."""

    def __init__(self, app: PgQueue, channel: socket.socket, board: Board) -> None:
        alarm = Alarm(lambda: board.cancelled)
        alarm.listen()
        self._body = Body(app, alarm)
        self._channel = channel
        self._board = board
        self._most_memory = app.config.max_memory_per_child
        self._tired = False
        self._tasks = app.tasks

    def serve(self) -> None:
        """Run jobs until the supervisor closes the channel."""
        frames = Frames()
        pid = os.getpid()
        descriptor = self._channel.fileno()
        channel = _identity(descriptor)
        self._channel.sendall(frame(Ready(pid)))
        while data := self._receive():
            for payload in frames.feed(data):
                for job in decode_jobs(payload):
                    failpoint("job_received")
                    starts = not self._tired and self._may_start(job)
                    message = self._body.run(job) if starts else Skipped(job.number)
                    if os.getpid() != pid:
                        _leave(message)
                    # A body that closed every descriptor may have opened others in their place.
                    if _identity(descriptor) != channel:
                        raise OSError(f"job {job.id} has closed the descriptor of its executor's channel")
                    self._channel.sendall(frame(message))
                    if self._most_memory is not None and not self._tired:
                        self._look_at_memory(self._most_memory)

    def _may_start(self, job: Job) -> bool:
        task = self._tasks.get(job.task)
        if task is not None and task.exclusive and not self._board.claim_exclusive(job.number, clock()):
            time.sleep(UNPROVEN_PAUSE)  # it comes back until the worker is heard of again, or has lost it
            return False
        return self._board.start(job.number)

    def _look_at_memory(self, most: int) -> None:
        """Between two jobs: say so, and start nothing more, if this process has grown too large."""
        memory = resident_memory()
        if memory > most:
            self._tired = True
            self._channel.sendall(frame(Tired(memory)))

    def _receive(self) -> bytes:
        try:
            return self._channel.recv(1 << 18)
        except ConnectionResetError:
            return b""


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


def _leave(message: Outcome | Skipped) -> NoReturn:
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


def become_executor(app: PgQueue, channel: socket.socket, board_descriptor: int) -> None:
    """The life of a freshly forked child; never returns."""
    status = 1
    try:
        stay_when_asked_to_stop()
        os.register_at_fork(before=_hold, after_in_parent=_release, after_in_child=_let_go)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        board = Board(board_descriptor)
        Board.seal(board_descriptor)
        os.close(board_descriptor)
        Executor(app, channel, board).serve()
        status = 0
    except (BrokenPipeError, ConnectionResetError):
        status = 0  # the supervisor is gone
    except BaseException:
        traceback.print_exc()
    finally:
        _flush()
        os._exit(status)


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
