"""Loads the arguments of jobs that were too large to travel with their claim, and sends the jobs on.

Jobs of one chunk are loaded together. When the server refuses, one of them may be at fault, or all of them
be too much at once: then the first is loaded on its own, and the others wait again; the next chunks are
small, and grow while all goes well. One that is refused for what it is, or takes too long too often, is dead.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Coroutine

import msgspec

from pgqueue.database.link import QUERY_CANCELED, GroupFailed, Link, Row
from pgqueue.errors import PgQueueError
from pgqueue.job import ClaimedJob
from pgqueue.worker.dispatcher import Dispatcher, Slot
from pgqueue.worker.wire import clock

log = logging.getLogger("pgqueue.worker")

TIMEOUTS = 3
"""How often loading the arguments of one job may time out before they count as unreadable."""
PAUSE = 0.5
"""Seconds before the next try."""


class Payloads:
    """Loads for the jobs of one dispatcher.

    Args:
        send: Called with jobs that have arguments.
        freed: Called when jobs wait again, or a slot has got none of what it was to get.
    """

    def __init__(
        self,
        link: Link,
        dispatcher: Dispatcher,
        *,
        send: Callable[[Slot, list[ClaimedJob]], None],
        freed: Callable[[], None],
    ) -> None:
        self._link = link
        self._dispatcher = dispatcher
        self._send = send
        self._freed = freed

    def load(self, slot: Slot, jobs: list[ClaimedJob]) -> Coroutine[None, None, None]:
        """Load the arguments of jobs that this slot is to get, and send them."""
        # By number, and from now on: a job that is taken back meanwhile gets another one.
        return self._load(slot, [job.number for job in jobs])

    async def _load(self, slot: Slot, numbers: list[int]) -> None:
        dispatcher = self._dispatcher
        timeouts = 0
        while jobs := dispatcher.loading(slot, numbers):
            try:
                rows = await self._rows(jobs)
                break
            except PgQueueError as error:
                asked, jobs = len(jobs), dispatcher.loading(slot, numbers)
                if not jobs:
                    return
                if isinstance(error, GroupFailed) and asked > 1:
                    dispatcher.load_less()
                    dispatcher.put_back(slot, numbers[1:], clock())
                    continue
                log.warning("payload_not_loaded job=%s error=%s", jobs[0].id, error)
                if isinstance(error, GroupFailed):
                    timeouts += error.sqlstate == QUERY_CANCELED
                    if timeouts == TIMEOUTS or error.blames_the_row:
                        dispatcher.unreadable(slot, jobs[0].number, str(error))
                        self._freed()
                        return
                await asyncio.sleep(PAUSE)
        else:
            return
        self._loaded(slot, numbers, rows)

    def _loaded(self, slot: Slot, numbers: list[int], rows: dict[tuple[str, int], Row]) -> None:
        dispatcher = self._dispatcher
        loaded: list[ClaimedJob] = []
        next_time: list[int] = []
        for job in dispatcher.loading(slot, numbers):
            row = rows.get((job.id, job.attempt))
            if row is None:
                log.warning("payload_gone job=%s attempt=%d", job.id, job.attempt)
                dispatcher.forget(slot, job.number)
                continue
            args, kwargs, headers = row
            if args is None:
                next_time.append(job.number)
            else:
                job.headers = headers
                loaded.append(msgspec.structs.replace(job, args=args, kwargs=kwargs))
        dispatcher.put_back(slot, next_time, clock())
        if loaded:
            dispatcher.loaded(slot, clock())
            self._send(slot, loaded)
        if next_time or not loaded:
            self._freed()

    async def _rows(self, jobs: list[ClaimedJob]) -> dict[tuple[str, int], Row]:
        """By id and attempt."""
        rows = await self._link.call(
            "load_payloads",
            ids=[job.id for job in jobs],
            attempts=[job.attempt for job in jobs],
            workers=[job.worker for job in jobs],
        )
        return {(job_id, attempt): tuple(texts) for job_id, attempt, *texts in rows}
