"""The executor that runs its jobs as coroutines of one event loop; the plain ones among them in threads.

A coroutine that blocks holds up the others of its executor, and nothing here can mend that: the hard time
limit, which is the supervisor's, ends the process.
"""

from __future__ import annotations

import asyncio
import os
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from contextvars import copy_context
from typing import TYPE_CHECKING

from pgqueue.job import ClaimedJob
from pgqueue.worker.body import Body
from pgqueue.worker.executor import Channel, Limits, Starter, no_job_untold
from pgqueue.worker.interrupts import CANCEL_SIGNAL, Alarm, Interrupter, ThreadAlarm
from pgqueue.worker.wire import Board, Ended, Ready, Skipped

if TYPE_CHECKING:
    from pgqueue.app import PgQueue


class _Slot:
    """One job after another, each in an asyncio task of its own."""

    def __init__(
        self,
        app: PgQueue,
        number: int,
        board: Board,
        channel: Channel,
        limits: Limits,
        threads: ThreadPoolExecutor,
    ) -> None:
        self.alarm: Interrupter
        self._app = app
        self._number = number
        self._alarms = Alarm(lambda: board.cancelled), ThreadAlarm(lambda: board.cancelled)
        self.alarm = self._alarms[0]
        self._bodies = Body(app, self._alarms[0], board), Body(app, self._alarms[1], board)
        self._starter = Starter(app, board, limits)
        self._channel = channel
        self._limits = limits
        self._threads = threads
        self._jobs: deque[ClaimedJob] = deque()
        self._working: asyncio.Task[None] | None = None

    def put(self, jobs: list[ClaimedJob]) -> None:
        """Run these after those that it has."""
        self._jobs += jobs
        if self._working is None:
            self._working = asyncio.get_running_loop().create_task(self._work())

    async def _work(self) -> None:
        with no_job_untold():
            while self._jobs:
                job = self._jobs.popleft()
                message = await self._run(job)
                message.slot = self._number
                self._channel.send(message, of=job, more=bool(self._jobs))
                self._limits.look()
        self._working = None

    async def _run(self, job: ClaimedJob) -> Ended | Skipped:
        pause = self._starter.pause(job)
        if pause is not None:
            await asyncio.sleep(pause)
            return Skipped(job.number)
        loop = asyncio.get_running_loop()
        task = self._app.tasks.get(job.task)
        plain = task is not None and not task.is_async
        self.alarm = self._alarms[plain]
        body = self._bodies[plain]
        if plain:
            return await loop.run_in_executor(self._threads, copy_context().run, body.run, job)
        return await loop.create_task(body.arun(job), context=copy_context())


class AsyncExecutor:
    """Runs the jobs that come over `channel`, for the tasks of `app`, as many at a time as there are
    boards.
    """

    def __init__(self, app: PgQueue, channel: Channel, boards: list[Board]) -> None:
        limits = Limits(channel, app.config.max_memory_per_child)
        threads = ThreadPoolExecutor(len(boards), thread_name_prefix="pgqueue-slot")
        self._channel = channel
        self._slots = [
            _Slot(app, number, board, channel, limits, threads) for number, board in enumerate(boards)
        ]

    def serve(self) -> None:
        """Run jobs until the supervisor closes the channel."""
        asyncio.run(self._serve())

    async def _serve(self) -> None:
        loop = asyncio.get_running_loop()
        closed: asyncio.Future[None] = loop.create_future()
        loop.add_signal_handler(CANCEL_SIGNAL, self._look)
        loop.add_reader(self._channel, self._receive, closed)
        self._channel.send(Ready(os.getpid()))
        await closed
        os._exit(0)  # what still runs is nobody's any more

    def _look(self) -> None:
        for slot in self._slots:
            slot.alarm.look()

    def _receive(self, closed: asyncio.Future[None]) -> None:
        received = self._channel.receive()
        if received is None:
            if not closed.done():
                closed.set_result(None)
            return
        for jobs in received:
            self._slots[jobs.slot].put(jobs.jobs)
