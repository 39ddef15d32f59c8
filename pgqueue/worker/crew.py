"""How many executors a worker has: the dead are replaced, the worn renewed, and their number fits the work.

An executor that is to leave (it has run its number of jobs, or has grown too large) gets no more jobs, and
its successor is forked at once; that one starts its first job when the last one of its predecessor has ended.
So a renewal costs no slot, and never delays or loses a job.
"""

from __future__ import annotations

import asyncio
import logging
from typing import Protocol

from pgqueue.config import PoolSize
from pgqueue.worker.dispatcher import Dispatcher, Executor

log = logging.getLogger("pgqueue.worker")

RESTART_FIRST, RESTART_MOST = 0.05, 5.0
SHRINK_AFTER = 30.0
"""Seconds in which executors have not been needed before they leave, where their number follows the work."""


class SupportsFork(Protocol):
    """What is asked of the processes."""

    def count(self, pool: str) -> int:
        """Executors of this pool asked for and not gone."""

    def fork(self, pool: str, slots: int) -> None:
        """Ask for one more."""

    def retire(self, executor: Executor) -> None:
        """Let one without jobs leave."""


class Crew:
    """Keeps as many executors of one pool as are wanted.

    Args:
        size: Between its least and its most their number follows the work.
    """

    def __init__(self, processes: SupportsFork, dispatcher: Dispatcher, pool: str, size: PoolSize) -> None:
        self._processes = processes
        self._dispatcher = dispatcher
        self._pool = pool
        self._most = size.most
        self._least = size.least
        self._slots = size.slots
        self._loop = asyncio.get_running_loop()
        self._delay = RESTART_FIRST
        self._dismissed = False
        self._told: set[int] = set()
        self._busiest = 0
        self._shrink_at: float | None = None
        self._resize(size.least)

    def fill(self) -> None:
        """Fork what is missing."""
        if not self._dismissed:
            there = self._processes.count(self._pool) - len(self._dispatcher.leaving)
            for _ in range(self._wanted - there):
                self._processes.fork(self._pool, self._slots)

    def ready(self, executor: Executor) -> None:
        """One is up."""
        self._dispatcher.executors[executor.index] = executor
        self._delay = RESTART_FIRST

    def gone(self, executor: Executor) -> bool:
        """One has ended; returns whether it was to leave.

        Another one takes its place, later each time when they die before they are ready.
        """
        self._told.discard(executor.index)
        leaving = executor in self._dispatcher.leaving
        if leaving:
            self._dispatcher.leaving.remove(executor)
            self.fill()
        else:
            self._loop.call_later(self._delay, self.fill)
            self._delay = min(2 * self._delay, RESTART_MOST)
        return leaving

    def renew(self) -> None:
        """See to those that are to leave: a successor at once, and the door once their last job has ended."""
        if not self._dispatcher.leaving:
            return
        self.fill()
        for executor in self._dispatcher.leaving:
            if not executor.busy and executor.index not in self._told:
                self._told.add(executor.index)
                self._processes.retire(executor)

    def scale(self, now: float) -> None:
        """Follow the work: grow as soon as a job waits for a slot, shrink when some were not needed for a
        while.
        """
        if self._most == self._least:
            return
        dispatcher = self._dispatcher
        busy = sum(executor.busy for executor in dispatcher.executors.values())
        self._busiest = max(self._busiest, busy + dispatcher.waiting)
        if dispatcher.waiting and not dispatcher.free_slots and self._wanted < self._most:
            self._resize(min(self._wanted + dispatcher.waiting, self._most))
            self.fill()
        if self._shrink_at is None or now >= self._shrink_at:
            if self._shrink_at is not None:
                self._shrink(max(self._busiest, self._least))
            self._busiest, self._shrink_at = 0, now + SHRINK_AFTER

    def dismiss(self) -> None:
        """Fork no more."""
        self._dismissed = True

    def _shrink(self, wanted: int) -> None:
        idle = [e for e in self._dispatcher.executors.values() if not e.busy and not e.retiring]
        for executor in idle[: max(self._wanted - wanted, 0)]:
            self._dispatcher.retire(executor)
            self._resize(self._wanted - 1)
        self.renew()

    def _resize(self, wanted: int) -> None:
        if self._least < self._most:
            log.info("crew_resized executors=%d", wanted)
        self._wanted = wanted
        self._dispatcher.most = wanted * self._slots
        self._dispatcher.spare = (self._most - wanted) * self._slots
