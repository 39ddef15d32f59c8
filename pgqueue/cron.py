"""When something recurring comes: cron expressions by a zone's wall clock, and fixed intervals.

What cron fields mean is cronsim's, which follows Debian's cron. It is asked on a clock without a zone; what
happens where a zone's clock jumps is decided here:

- An entry for certain hours goes by the wall clock. A time that the clock jumps over comes right after the
  jump, once, however many such times there were; a time that comes twice counts the first time.
- An entry for every hour (`*` in the hour field) goes by elapsed time: it comes 23 times on the short day
  and 25 times on the long one.

A tick is a whole second, and depends on nothing but the entry: whoever computes it finds the same ones.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta, tzinfo
from functools import cache, cached_property
from typing import Final, Protocol

from pgqueue.errors import shown

_NICKNAMES: Final = {
    "@yearly": "0 0 1 1 *",
    "@annually": "0 0 1 1 *",
    "@monthly": "0 0 1 * *",
    "@weekly": "0 0 * * 0",
    "@daily": "0 0 * * *",
    "@midnight": "0 0 * * *",
    "@hourly": "0 * * * *",
}
_SECOND: Final = timedelta(seconds=1)
_DAY: Final = timedelta(days=1)
_EPOCH: Final = datetime(1970, 1, 1, tzinfo=UTC)
_FIRST_LOOK: Final = timedelta(hours=1)
"""How far back the latest ticks are looked for first; four times as far each time there were too few."""

LEAST_INTERVAL: Final = 1.0
MOST_INTERVAL: Final = 366 * 86_400.0
"""Seconds of an `Every`, at least and at most."""


class Cadence(Protocol):
    """A rule that says when something comes."""

    def next_after(self, moment: datetime) -> datetime:
        """The first tick later than this, in UTC. `moment`: aware."""


@cache
def find_zone(name: object) -> tzinfo:
    """The time zone of this IANA name; ValueError if there is none."""
    from zoneinfo import ZoneInfo

    if isinstance(name, str) and name == "UTC":
        return UTC
    try:
        return ZoneInfo(name) if isinstance(name, str) and name else _no_zone(name)
    except (OSError, ValueError, KeyError):  # a folder, a path, a NUL; ZoneInfoNotFoundError
        return _no_zone(name)


def _no_zone(name: object) -> tzinfo:
    raise ValueError(f"timezone must be a name like Asia/Seoul or UTC, got {shown(name)}") from None


@dataclass(frozen=True)
class Every:
    """Every so many seconds, counted from 1970-01-01T00:00Z: every hour is on the hour, whoever asks.

    Raises:
        ValueError: It is less than a second, over a year, or no whole number of seconds.
    """

    seconds: float

    def __post_init__(self) -> None:
        if not LEAST_INTERVAL <= self.seconds <= MOST_INTERVAL or self.seconds != int(self.seconds):
            raise ValueError(
                f"every must be a whole number of seconds, from 1 second to 366 days, got {self.seconds:g} s"
            )

    def next_after(self, moment: datetime) -> datetime:
        """The first tick later than this, in UTC."""
        every = timedelta(seconds=self.seconds)
        return _EPOCH + ((moment - _EPOCH) // every + 1) * every


@dataclass(frozen=True)
class Cron:
    """A cron expression by the wall clock of a zone.

    Attributes:
        expression: Five fields (minute, hour, day of month, month, day of week), six with seconds in front,
            or a nickname such as `@daily`.
        timezone: An IANA name.

    Raises:
        ValueError: The expression or the zone is none, or the time never comes.
    """

    expression: str
    timezone: str = "UTC"

    def __post_init__(self) -> None:
        from cronsim import CronSimError

        _ = self._zone
        try:
            next(self._walls(datetime(2000, 1, 1)))
        except (CronSimError, AttributeError) as error:
            why = str(error) if isinstance(error, CronSimError) else "it must be text"
            raise ValueError(
                f"cron must be five fields like '0 9 * * MON-FRI', got {shown(self.expression)}: "
                f"{why[:1].lower()}{why[1:]}"
            ) from None
        except StopIteration:
            raise ValueError(f"cron {shown(self.expression)} never comes") from None

    @cached_property
    def _zone(self) -> tzinfo:
        return find_zone(self.timezone)

    @cached_property
    def _fields(self) -> str:
        text = self.expression.strip()
        return _NICKNAMES.get(text.lower(), text)

    @cached_property
    def _hourly(self) -> bool:
        return self._fields.split()[-4] in ("*", "*/1")

    def _walls(self, after: datetime) -> Iterator[datetime]:
        """Times on the wall clock later than this one, both without a zone."""
        from cronsim import CronSim

        return CronSim(self._fields, after)

    def next_after(self, moment: datetime) -> datetime:
        """The first tick later than this, in UTC."""
        moment = moment.astimezone(UTC).replace(microsecond=0)
        return self._next_elapsed(moment) if self._hourly else self._next_by_wall(moment)

    def _next_by_wall(self, moment: datetime) -> datetime:
        # In the hour that comes a second time the first walls belong to the first time, and are past.
        for wall in self._walls(self._wall(moment)):
            tick = self._first_instant(wall)
            if tick > moment:
                return tick
        raise ValueError(f"cron {self.expression!r} does not come again")

    def _first_instant(self, wall: datetime) -> datetime:
        """When the zone's clock first shows this time, or has jumped over it."""
        before = wall.replace(tzinfo=self._zone, fold=0).astimezone(UTC)
        if self._wall(before) == wall:
            return before
        # Read with the offset from before the jump it lies after it by as much as it was into the gap.
        return self._jump(before - _DAY, before)

    def _next_elapsed(self, moment: datetime) -> datetime:
        start, wall = moment, self._wall(moment)
        while True:
            tick = (next(self._walls(wall)) - self._offset(start)).replace(tzinfo=UTC)
            change = self._change(start, tick)
            if change is None:
                return tick
            start, wall = change, self._wall(change) - _SECOND  # go on with the new offset, change included

    def _change(self, low: datetime, high: datetime) -> datetime | None:
        """The first second in (low, high] with another offset than `low`, looking a day at a time."""
        while low < high:
            step = min(low + _DAY, high)
            if self._offset(step) != self._offset(low):
                return self._jump(low, step)
            low = step
        return None

    def _jump(self, low: datetime, high: datetime) -> datetime:
        """The second from which on the zone has the offset that it has at `high`; at `low` it has another.

        Both are whole seconds.
        """
        new = self._offset(high)
        while high - low > _SECOND:
            middle = low + (high - low) // (2 * _SECOND) * _SECOND
            low, high = (low, middle) if self._offset(middle) == new else (middle, high)
        return high

    def _wall(self, moment: datetime) -> datetime:
        return moment.astimezone(self._zone).replace(tzinfo=None, fold=0)

    def _offset(self, moment: datetime) -> timedelta:
        return moment.astimezone(self._zone).utcoffset() or timedelta()


def ticks_between(cadence: Cadence, after: datetime, until: datetime, most: int) -> list[datetime]:
    """The ticks later than `after` and not later than `until`; of more than `most` only the latest."""
    back = _FIRST_LOOK
    while True:
        start = max(after, until - back)
        ticks = []
        tick = cadence.next_after(start)
        while tick <= until:
            ticks.append(tick)
            tick = cadence.next_after(tick)
        if len(ticks) >= most or start <= after:
            return ticks[-most:]
        back *= 4
