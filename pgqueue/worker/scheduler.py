"""Recurring jobs: what every worker does at each tick of a schedule, and only the first one does in effect.

There is no leader. A worker reads the schedules that are due, decides, and writes the decision together with
the jobs in one statement, from the version of the row that it has read. Who comes second finds another
version and has done nothing. So a worker that pauses or dies between reading and writing leaves the tick to
the others, and two that are late at once make one job.

Crash before the statement is committed: nothing has happened, somebody else looks within seconds. After it:
the jobs are there, and found by the next claim. Lost answer: the next look finds the tick decided. Clocks of
machines do not matter, the database's counts; one that is set back brings no tick a second time.
"""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Awaitable, Callable, Sequence
from datetime import UTC, datetime, timedelta
from random import Random
from typing import Any, Final, Protocol

import msgspec

from pgqueue.database.dsn import retry_delay
from pgqueue.database.link import GroupFailed, Row
from pgqueue.errors import DatabaseUnavailable
from pgqueue.schedule import CatchUp, Decision, Overlap, Standing, decide, read_cadence, tick_id, tick_share
from pgqueue.worker.identity import Identity

log = logging.getLogger("pgqueue.worker")

LOOK_INTERVAL: Final = 10.0
"""Seconds between looks for schedules that somebody has added or changed, if no notification came."""
HEARING_INTERVAL: Final = 30.0
"""The same where notifications arrive: for those that were lost."""
HELD_INTERVAL: Final = 1.0
"""The same while a tick waits for the end of the job before it."""
AGAIN_INTERVAL: Final = 0.1
"""The same when somebody else was first."""
OLD_INTERVAL: Final = 60.0
"""The same where the database has no schedules yet."""
SPREAD: Final = 0.002
"""Seconds for each worker, over which they come to a tick: the first makes the others' way unnecessary."""
REVISION: Final = "0005"
"""The one that made schedules."""


class DueSchedule(msgspec.Struct):
    """What `find_due_schedules` says of one; times in seconds since 1970."""

    name: str
    version: int
    task: str
    cron: str | None
    every: float | None
    timezone: str
    catch_up: CatchUp
    overlap: Overlap
    jitter: float
    last_tick: float
    busy: bool
    held: list[float]


_DECODER = msgspec.json.Decoder(list[DueSchedule])


class SupportsCall(Protocol):
    """What runs one statement in a transaction of its own."""

    async def call(self, name: str, /, **parameters: Any) -> list[Row]: ...


class Scheduler:
    """The schedules' loop of one worker, on its maintenance connection.

    Args:
        schedules: Those that the application has in its code, as documents of `put_schedules`.
        ready: Told the queues in which there are jobs now.
        hears: Whether notifications are known to arrive.
    """

    def __init__(
        self,
        link: SupportsCall,
        identity: Identity,
        schedules: Sequence[dict[str, Any]],
        *,
        ready: Callable[[list[str]], Awaitable[None]],
        random: Random,
        hears: Callable[[], bool] = lambda: False,
    ) -> None:
        self._link = link
        self._identity = identity
        self._schedules = list(schedules)
        self._ready = ready
        self._random = random
        self._hears = hears
        self._event = asyncio.Event()
        self._known = False
        self._said_off = False
        self._held_by: str | None = None
        self._broken: dict[str, int] = {}

    def wake(self) -> None:
        """Somebody has changed a schedule."""
        self._event.set()

    async def run(self) -> None:
        """Do what is due, until cancelled."""
        failures = 0
        while True:
            try:
                pause = await self.run_once()
                failures = 0
            except (DatabaseUnavailable, GroupFailed) as error:
                failures += 1
                if failures == 1:
                    log.warning("schedules_failed error=%s", error)
                pause = retry_delay(failures, self._random)
                await asyncio.sleep(pause)
                continue
            try:
                async with asyncio.timeout(pause):
                    await self._event.wait()
            except TimeoutError:
                pass
            self._event.clear()

    async def run_once(self, now: datetime | None = None) -> float:
        """Decide about every tick that is due; returns the seconds until the next look.

        Args:
            now: Another time than the database's, in tests.
        """
        if not self._known and not await self._find_tables():
            return OLD_INTERVAL
        if self._held_by != self._identity.id:
            await self._declare()
        ((at, next_in, workers, document),) = await self._link.call("find_due_schedules", now=now)
        moment = datetime.fromtimestamp(at, UTC)
        pause = HEARING_INTERVAL if self._hears() else LOOK_INTERVAL
        if next_in is not None:
            pause = min(pause, next_in)
        queues: set[str] = set()
        for each in _DECODER.decode(document):
            decision = self._decision(each, moment)
            if decision is None:
                continue
            try:
                rows = await self._carry_out(each, decision, moment)
            except GroupFailed as error:  # this one's: the others' ticks do not wait for it
                self._complain(each, error)
                continue
            if not rows:  # most often another worker was first; else the tick is still to be decided about
                pause = min(pause, AGAIN_INTERVAL)
                continue
            queues |= {queue for queue, jobs in rows if jobs}
            pause = min(pause, (decision.next_tick - moment).total_seconds())
            if decision.held:
                pause = min(pause, HELD_INTERVAL)
        if queues:
            await self._ready(sorted(queues))
        return max(pause, 0.0) + self._random.uniform(0, SPREAD * max(workers - 1, 0))

    async def _find_tables(self) -> bool:
        rows = await self._link.call("read_revision")
        self._known = rows[0][0] >= REVISION
        if not self._known and not self._said_off:
            self._said_off = True
            log.warning("schedules_off revision=%s needs=%s", rows[0][0], REVISION)
        return self._known

    async def _declare(self) -> None:
        """Write down what the code says, once; and say, under each new name, that this worker has it."""
        worker = self._identity.id
        if self._schedules and self._held_by is None:
            rows = await self._link.call(
                "put_schedules", schedules=json.dumps(self._schedules), source="code", replace=True
            )
            for name, before, written in rows:
                if before == "database":
                    log.error("schedule_name_taken name=%s", name)
                elif written:
                    log.info("schedule_written name=%s new=%s", name, before is None)
        if self._schedules:
            names = [each["name"] for each in self._schedules]
            await self._link.call("hold_schedules", names=names, worker=worker)
        self._held_by = worker

    def _decision(self, schedule: DueSchedule, now: datetime) -> Decision | None:
        """What is to be done; None if the row says nothing that has a meaning here."""
        try:
            return decide(
                read_cadence(schedule.cron, schedule.every, schedule.timezone),
                Standing(_moment(schedule.last_tick), tuple(map(_moment, schedule.held)), schedule.busy),
                now,
                catch_up=schedule.catch_up,
                overlap=schedule.overlap,
            )
        except (ValueError, OverflowError) as error:
            self._complain(schedule, error)
            return None

    def _complain(self, schedule: DueSchedule, error: Exception) -> None:
        """Once for each version of it: it is tried again at each look."""
        if self._broken.get(schedule.name) != schedule.version:
            self._broken[schedule.name] = schedule.version
            log.error("schedule_broken name=%s error=%s", schedule.name, error)

    async def _carry_out(self, schedule: DueSchedule, decision: Decision, now: datetime) -> list[Row]:
        """Write the decision and its jobs; returns their queue and how many there are, nothing if somebody
        else has changed the schedule meanwhile.
        """
        name, ticks = schedule.name, decision.fire
        etas = [tick + timedelta(seconds=schedule.jitter * tick_share(name, tick)) for tick in ticks]
        rows = await self._link.call(
            "fire_schedule",
            name=name,
            version=schedule.version,
            ids="{" + ",".join(tick_id(name, tick) for tick in ticks) + "}",
            ticks=[tick.timestamp() for tick in ticks],
            etas=[eta.timestamp() for eta in etas],
            last_tick=decision.last_tick.timestamp(),
            next_tick=decision.next_tick.timestamp(),
            held=[tick.timestamp() for tick in decision.held],
            missed=decision.missed,
            skipped=decision.skipped,
        )
        if not rows:
            return []
        for tick in ticks:
            log.info("schedule_fired name=%s task=%s tick=%s", name, schedule.task, _text(tick))
        if decision.missed:
            log.warning("schedule_missed name=%s ticks=%d until=%s", name, decision.missed, _text(now))
        if decision.skipped:
            log.info("schedule_skipped name=%s ticks=%d", name, decision.skipped)
        return rows


def _moment(seconds: float) -> datetime:
    return datetime.fromtimestamp(seconds, UTC)


def _text(moment: datetime) -> str:
    return moment.isoformat(timespec="seconds").replace("+00:00", "Z")
