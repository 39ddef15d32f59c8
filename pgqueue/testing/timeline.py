"""The time of a test: the database's clock, put forward, and what falls due on the way.

What moves: which waiting jobs are due, when retries come, what has expired, `countdown` and `expires` of what
the application enqueues, and schedules, which go by the time that was travelled alone: the milliseconds that
a test takes bring no tick. What does not: `now()` in anybody's SQL, and the clock of Python.
"""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from random import Random
from typing import Any, Final, TypeVar

from msgspec import structs

from pgqueue.database.connection import AsyncCaller, SyncCaller
from pgqueue.database.link import Row
from pgqueue.database.session import Session
from pgqueue.enqueue import Client
from pgqueue.errors import shown
from pgqueue.job import JobRequest
from pgqueue.options import check_time
from pgqueue.worker.identity import Identity
from pgqueue.worker.scheduler import Scheduler

T = TypeVar("T")

MOST_TICKS: Final = 1000
"""Of schedules, on one journey."""


@dataclass(frozen=True, slots=True)
class Moment:
    """A time to go to.

    Attributes:
        ticks: By the clock of schedules, which stands still while a test runs.
        offset: By that of jobs, so far from the database's: what a test takes meanwhile is not counted, so a
            retry in a minute is within a minute of the run that failed.
        at: By that of jobs, instead.
    """

    ticks: datetime
    offset: timedelta = timedelta(0)
    at: datetime | None = None


class Timeline:
    """Where in time a test is.

    Args:
        schedules: Those that the application has in its code, as documents of `put_schedules`.
    """

    def __init__(self, session: Session, worker: str, schedules: Sequence[dict[str, Any]]) -> None:
        self._session = session
        self._worker = worker
        self._schedules = schedules
        self._scheduler: Scheduler | None = None
        self._ticked: datetime | None = None  # up to when schedules are decided about
        self.offset = timedelta(0)

    @property
    def now(self) -> datetime:
        """The test's time, in UTC."""
        return self._real + self.offset

    @property
    def _real(self) -> datetime:
        with self._session.transaction():
            now: datetime = self._session.run("read_time")[0]["now"]
        return now.astimezone(UTC)

    @property
    def shown_to_statements(self) -> datetime | None:
        """`now` as statements take it: None as long as it is the database's own."""
        return self.now if self.offset else None

    def later(self, by: timedelta) -> Moment:
        """The moment that is so much later than now."""
        if by < timedelta(0):
            raise ValueError(f"time travel goes forward only, got {by.total_seconds():g} seconds")
        return Moment((self._ticked or self.now) + by, self.offset + by)

    def at(self, when: datetime, name: str = "when") -> Moment:
        """The moment at which it is `when`."""
        when = check_time(name, when)
        now = self.now
        if when < now:
            raise ValueError(
                f"time travel goes forward only: it is {now:%Y-%m-%d %H:%M:%S} UTC already, got {shown(when)}"
            )
        return Moment(when, at=when)

    def travel(self, to: Moment, *, ticks: bool = True) -> None:
        """Go there; schedules enqueue their jobs at each tick on the way, or let them all pass."""
        self._settle()
        if ticks:
            fired = 0
            while (tick := self._ahead()["tick"]) is not None and tick <= to.ticks:
                self.tick(tick)
                fired += 1
                if fired > MOST_TICKS:
                    raise RuntimeError(
                        f"there are over {MOST_TICKS} ticks of schedules on the way; travel in smaller "
                        "steps, or let them pass with ticks=False"
                    )
        else:
            with self._session.transaction():
                self._session.run("start_schedules", at=to.ticks, all=True)
        self._ticked = max(to.ticks, self._ticked or to.ticks)
        self.put_forward(self._time_of(to))

    def put_forward(self, to: datetime) -> None:
        """Have it be `to`, unless it is later already."""
        now = self.now
        if now < to:
            self.offset += to - now

    def next_tick(self, until: Moment | None) -> datetime | None:
        """The next tick of a schedule; None if there is none until then."""
        self._settle()
        tick: datetime | None = self._ahead()["tick"]
        return tick if tick is not None and (until is None or tick <= until.ticks) else None

    def next_eta(self, until: Moment | None) -> datetime | None:
        """When the next job that waits is due; None if none is until then."""
        eta: datetime | None = self._ahead()["eta"]
        return eta if eta is not None and (until is None or eta <= self._time_of(until)) else None

    def _time_of(self, moment: Moment) -> datetime:
        """When that is for jobs, as seen from now."""
        return moment.at or self._real + moment.offset

    def tick(self, at: datetime) -> None:
        """Have the schedules do what is to be done at this time."""
        self._ticked = max(at, self._ticked or at)
        self.put_forward(at)
        self._look(self._ticked)
        with self._session.transaction():
            self._session.run("expire_ticks", tick=at)

    def look_again(self) -> None:
        """A job has ended, for which a tick may be waiting."""
        if self._ticked is not None:
            self._settle()

    def _settle(self) -> None:
        """See to it that every schedule knows its next tick, counted from where we are."""
        if self._ticked is None:
            self._ticked = self.now
        if self._scheduler is None or self._ahead()["unsettled"]:
            with self._session.transaction():
                self._session.run("start_schedules", at=self._ticked, all=False)
            self._look(self._ticked)

    def _look(self, at: datetime) -> None:
        if self._scheduler is None:
            link, identity = _Link(self._session), Identity(self._worker)
            self._scheduler = Scheduler(link, identity, self._schedules, ready=_nobody, random=Random())
        _at_once(self._scheduler.run_once(at))

    def _ahead(self) -> dict[str, Any]:
        with self._session.transaction():
            return self._session.run("look_ahead")[0]


class _Link:
    """The session, as what a worker's scheduler speaks to. It never waits for an event loop."""

    def __init__(self, session: Session) -> None:
        self._session = session

    async def call(self, name: str, /, **parameters: Any) -> list[Row]:
        return self.rows(name, **parameters)

    def rows(self, name: str, /, **parameters: Any) -> list[Row]:
        with self._session.transaction():
            return [tuple(row.values()) for row in self._session.run(name, **parameters)]


async def _nobody(queues: list[str]) -> None:
    """Who is told of ready jobs where nobody sleeps."""


def _at_once(coroutine: Coroutine[Any, Any, T]) -> T:
    """What a coroutine returns that waits for nothing, also where an event loop runs."""
    try:
        coroutine.send(None)
    except StopIteration as end:
        value: T = end.value
        return value
    coroutine.close()
    raise AssertionError("it has waited")


class TravellingClient(Client):
    """Enqueues by the test's clock what counts from now."""

    def __init__(self, schema: str, dsn: str) -> None:
        super().__init__(schema, dsn)
        self.timeline: Timeline | None = None

    def enqueue(self, request: JobRequest, caller: SyncCaller | None) -> str:
        """As `Client`."""
        return super().enqueue(self._moved(request), caller)

    async def aenqueue(self, request: JobRequest, caller: AsyncCaller | None) -> str:
        """As `Client`."""
        return await super().aenqueue(self._moved(request), caller)

    def enqueue_many(self, requests: Sequence[JobRequest], caller: SyncCaller | None) -> list[str]:
        """As `Client`."""
        return super().enqueue_many([self._moved(each) for each in requests], caller)

    async def aenqueue_many(self, requests: Sequence[JobRequest], caller: AsyncCaller | None) -> list[str]:
        """As `Client`."""
        return await super().aenqueue_many([self._moved(each) for each in requests], caller)

    def _moved(self, request: JobRequest) -> JobRequest:
        offset = self.timeline.offset.total_seconds() if self.timeline is not None else 0.0
        if not offset:
            return request
        countdown, expires_in = request.countdown, request.expires_in
        return structs.replace(
            request,
            countdown=None if countdown is None else countdown + offset,
            expires_in=None if expires_in is None else expires_in + offset,
        )


def is_in_event_loop() -> bool:
    """Whether an event loop runs in this thread."""
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return False
    return True
