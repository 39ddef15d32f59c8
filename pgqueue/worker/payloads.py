"""Loads the arguments of jobs that were too large to travel with their claim, and sends the jobs on.

Jobs of one chunk are loaded together. When the server refuses, one of them may be at fault, or all of them
be too much at once: then the first is loaded on its own, and the others wait again; the next chunks are
small, and grow while all goes well. One that is refused for what it is, or takes too long too often, is dead.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable

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
        freed: Called when a slot that was to get jobs has got none.
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

    async def load(self, slot: Slot, jobs: list[ClaimedJob]) -> None:
        """Load the arguments of jobs that this slot is to get, and send them."""
        dispatcher = self._dispatcher
        numbers = [job.number for job in jobs]  # a job that is taken back gets another one
        timeouts = 0
        while here := dispatcher.loading(slot, numbers):
            try:
                rows = await self._rows(here)
                break
            except PgQueueError as error:
                refused = isinstance(error, GroupFailed)
                if refused and len(here) > 1:
                    dispatcher.load_less()
                    dispatcher.put_back(slot, here[1:])
                    continue
                log.warning("payload_not_loaded job=%s error=%s", here[0].id, error)
                if isinstance(error, GroupFailed):
                    timeouts += error.sqlstate == QUERY_CANCELED
                    if timeouts == TIMEOUTS or error.blames_the_row:
                        dispatcher.unreadable(slot, here[0].number, str(error))
                        self._freed()
                        return
                await asyncio.sleep(PAUSE)
        else:
            return  # taken back meanwhile
        loaded: list[ClaimedJob] = []
        next_time: list[ClaimedJob] = []
        for job in dispatcher.loading(slot, numbers):
            if job.id not in rows:
                log.warning("payload_gone job=%s attempt=%d", job.id, job.attempt)
                dispatcher.forget(slot, job.number)
                continue
            args, kwargs, headers = rows[job.id]
            if args is None:
                next_time.append(job)
            else:
                job.headers = headers
                loaded.append(msgspec.structs.replace(job, args=args, kwargs=kwargs))
        dispatcher.put_back(slot, next_time)
        if loaded:
            dispatcher.loaded(slot, clock())
            self._send(slot, loaded)
        else:
            self._freed()

    async def _rows(self, jobs: list[ClaimedJob]) -> dict[str, Row]:
        rows = await self._link.call(
            "load_payloads",
            ids=[job.id for job in jobs],
            attempts=[job.attempt for job in jobs],
            workers=[job.worker for job in jobs],
        )
        return {job_id: tuple(texts) for job_id, *texts in rows}
