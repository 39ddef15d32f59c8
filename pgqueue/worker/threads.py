"""The executor that runs its jobs in threads, one per slot.

The main thread reads the channel and nothing else, so it always hears of cancellations. A thread sends what
became of its job by itself.
"""

from __future__ import annotations

import os
import selectors
import signal
import socket
import threading
import time
from queue import SimpleQueue
from typing import TYPE_CHECKING

from pgqueue.job import ClaimedJob
from pgqueue.worker.body import Body
from pgqueue.worker.executor import Channel, Limits, Starter, no_job_untold
from pgqueue.worker.interrupts import CANCEL_SIGNAL, ThreadAlarm
from pgqueue.worker.wire import Board, Ended, Ready, Skipped

if TYPE_CHECKING:
    from pgqueue.app import PgQueue


class _Slot:
    """One thread and its jobs."""

    def __init__(self, app: PgQueue, number: int, board: Board, channel: Channel, limits: Limits) -> None:
        self.alarm = ThreadAlarm(lambda: board.cancelled)
        self.jobs: SimpleQueue[ClaimedJob] = SimpleQueue()
        self._number = number
        self._body = Body(app, self.alarm, board)
        self._starter = Starter(app, board, limits)
        self._channel = channel
        self._limits = limits

    def run(self) -> None:
        """Run jobs as they come, for ever."""
        with no_job_untold():
            while True:
                job = self.jobs.get()
                message = self._run(job)
                message.slot = self._number
                self._channel.send(message, of=job, more=not self.jobs.empty())
                self._limits.look()

    def _run(self, job: ClaimedJob) -> Ended | Skipped:
        pause = self._starter.pause(job)
        if pause is None:
            return self._body.run(job)
        time.sleep(pause)
        return Skipped(job.number)


class ThreadedExecutor:
    """Runs the jobs that come over `channel`, for the tasks of `app`, in as many threads as there are
    boards.
    """

    def __init__(self, app: PgQueue, channel: Channel, boards: list[Board]) -> None:
        limits = Limits(channel, app.config.max_memory_per_child)
        self._channel = channel
        self._slots = [_Slot(app, number, board, channel, limits) for number, board in enumerate(boards)]

    def serve(self) -> None:
        """Run jobs until the supervisor closes the channel."""
        # No handler acts by itself: one could interrupt another that holds a thread's lock.
        wakes, waker = socket.socketpair()
        waker.setblocking(False)
        signal.set_wakeup_fd(waker.fileno(), warn_on_full_buffer=False)
        signal.signal(CANCEL_SIGNAL, lambda *_: None)
        for number, slot in enumerate(self._slots):
            threading.Thread(target=slot.run, name=f"pgqueue-slot-{number}", daemon=True).start()
        self._channel.send(Ready(os.getpid()))
        with selectors.DefaultSelector() as selector:
            selector.register(self._channel, selectors.EVENT_READ)
            selector.register(wakes, selectors.EVENT_READ)
            while True:
                for key, _ in selector.select():
                    if key.fileobj is wakes:
                        wakes.recv(4096)
                        for slot in self._slots:
                            slot.alarm.look()
                    elif not self._receive():
                        return

    def _receive(self) -> bool:
        received = self._channel.receive()
        if received is None:
            return False
        for jobs in received:
            for job in jobs.jobs:
                self._slots[jobs.slot].jobs.put(job)
        return True
