"""When cron entries and intervals come, against a calculation that looks at every minute."""

from __future__ import annotations

import zoneinfo
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from functools import cache
from zoneinfo import ZoneInfo

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pgqueue.cron import Cron, Every, find_zone, ticks_between

MINUTE, DAY = timedelta(minutes=1), timedelta(days=1)
FIRST_YEAR, LAST_YEAR = 2020, 2030


def at(text: str) -> datetime:
    """A time in UTC."""
    return datetime.fromisoformat(text).replace(tzinfo=UTC)


def after(entry: Cron | Every, start: datetime, count: int) -> list[datetime]:
    ticks = []
    for _ in range(count):
        start = entry.next_after(start)
        ticks.append(start)
    return ticks


@dataclass(frozen=True)
class Transition:
    """A jump of a zone's clock: the first second with the new offset."""

    zone: str
    moment: datetime
    jump: timedelta

    def __repr__(self) -> str:
        return f"{self.zone} {self.moment:%Y-%m-%dT%H:%MZ} {self.jump.total_seconds() / 3600:+g} h"


@cache
def transitions() -> list[Transition]:
    """Every jump of every zone in ten years; of zones that are the same, only the first one's."""
    found = []
    seen: set[tuple[tuple[datetime, timedelta, timedelta], ...]] = set()
    for name in sorted(zoneinfo.available_timezones() - {"localtime"}):
        zone = ZoneInfo(name)
        jumps = []
        day, end = at(f"{FIRST_YEAR}-01-01"), at(f"{LAST_YEAR}-01-01")
        while day < end:
            before, then = offset(day, zone), offset(day + DAY, zone)
            if before != then:
                low, high = day, day + DAY
                while high - low > timedelta(seconds=1):
                    middle = low + (high - low) // 2
                    middle = middle.replace(microsecond=0)
                    low, high = (middle, high) if offset(middle, zone) == before else (low, middle)
                jumps.append((high, then - before, then))
            day += DAY
        if jumps and tuple(jumps) not in seen:
            seen.add(tuple(jumps))
            found += [Transition(name, moment, jump) for moment, jump, _ in jumps]
    return found


def offset(moment: datetime, zone: ZoneInfo) -> timedelta:
    return moment.astimezone(zone).utcoffset() or timedelta()


@dataclass(frozen=True)
class Fields:
    """Fields of an expression, as sets, and how they are written."""

    minutes: frozenset[int] | None
    hours: frozenset[int] | None
    weekdays: frozenset[int] | None

    @property
    def expression(self) -> str:
        written = ["*" if s is None else ",".join(map(str, sorted(s))) for s in (self.minutes, self.hours)]
        days = "*" if self.weekdays is None else ",".join(map(str, sorted(self.weekdays)))
        return f"{' '.join(written)} * * {days}"

    def matches(self, wall: datetime) -> bool:
        return (
            (self.minutes is None or wall.minute in self.minutes)
            and (self.hours is None or wall.hour in self.hours)
            and (self.weekdays is None or wall.isoweekday() % 7 in self.weekdays)
        )


def minutes(start: datetime, end: datetime) -> Iterator[datetime]:
    while start <= end:
        yield start
        start += MINUTE


def expected(fields: Fields, zone: ZoneInfo, start: datetime, end: datetime) -> list[datetime]:
    """The ticks in (start, end]: of each matching wall time the first instant that shows it, or else the
    first that shows a later one; of an entry for every hour, each instant that shows it.
    """
    shown = [
        (moment, moment.astimezone(zone).replace(tzinfo=None)) for moment in minutes(start - 2 * DAY, end)
    ]
    if fields.hours is None:
        return [moment for moment, wall in shown if fields.matches(wall) and moment > start]
    first: dict[datetime, datetime] = {}
    for moment, wall in shown:
        first.setdefault(wall, moment)
    ticks = set()
    for wall in minutes(shown[0][1], max(first)):
        if fields.matches(wall):
            tick = first.get(wall) or next(moment for moment, later in shown if later > wall)
            if start < tick <= end:
                ticks.add(tick)
    return sorted(ticks)


some = st.one_of(st.none(), st.frozensets(st.integers(0, 59), min_size=1, max_size=4))
hours = st.one_of(st.none(), st.frozensets(st.integers(0, 23), min_size=1, max_size=6))
weekdays = st.one_of(st.none(), st.frozensets(st.integers(0, 6), min_size=1, max_size=3))


@settings(max_examples=300, deadline=None)
@given(st.data(), some, hours, weekdays, st.integers(-1500, 1500))
def test_around_every_jump_of_every_clock(
    data: st.DataObject,
    some: frozenset[int] | None,
    hours: frozenset[int] | None,
    weekdays: frozenset[int] | None,
    shift: int,
) -> None:
    jump = data.draw(st.sampled_from(transitions()))
    fields = Fields(some, hours, weekdays)
    entry = Cron(fields.expression, jump.zone)
    start = jump.moment + shift * MINUTE
    end = start + DAY
    assert ticks_between(entry, start, end, 10_000) == expected(fields, ZoneInfo(jump.zone), start, end)


def test_each_jump_with_an_entry_in_the_middle_of_it() -> None:
    """A time that is jumped over comes right after, one that is shown twice comes the first time."""
    assert len(transitions()) > 500
    for jump in transitions():
        # Half a jump before the clock jumps, it shows (or would show again) the time in the middle.
        tick = jump.moment if jump.jump > timedelta() else jump.moment + jump.jump / 2
        wall = (jump.moment + jump.jump / 2 + offset(jump.moment - DAY, ZoneInfo(jump.zone))).replace(
            tzinfo=None
        )
        entry = Cron(f"{wall.minute} {wall.hour} {wall.day} {wall.month} *", jump.zone)
        assert ticks_between(entry, jump.moment - 2 * DAY, jump.moment + 2 * DAY, 100) == [tick], jump


@given(st.data(), st.integers(1, 50))
@settings(max_examples=100, deadline=None)
def test_it_does_not_matter_where_one_starts(data: st.DataObject, most: int) -> None:
    jump = data.draw(st.sampled_from(transitions()))
    expression = data.draw(st.sampled_from(["*/20 * * * *", "7,37 1-3 * * *", "0 0 * * *", "*/15 2 * * *"]))
    entry = Cron(expression, jump.zone)
    everything = after(entry, jump.moment - DAY, 150)
    seconds = st.integers(0, 2 * 86_400) | st.integers(86_400 - 1500, 86_400 + 1500)
    starts = st.tuples(seconds, st.sampled_from([0, 1, 999_999]))
    for start, micro in data.draw(st.lists(starts, min_size=1, max_size=5)):
        moment = jump.moment - DAY + timedelta(seconds=start, microseconds=micro)
        later = [tick for tick in everything if tick > moment]
        assert entry.next_after(moment) == later[0]
        end = later[min(most, len(later)) - 1]
        assert ticks_between(entry, moment, end, 3) == later[: min(most, len(later))][-3:]


@pytest.mark.timeout(20)
def test_between_two_seconds() -> None:
    entry = Cron("*/20 * * * *", "Europe/Berlin")
    for micro in (1, 300_000, 999_999):
        moment = at("2026-10-25T00:59:58") + timedelta(microseconds=micro)
        assert entry.next_after(moment) == at("2026-10-25T01:00")
        assert entry.next_after(moment - timedelta(minutes=1)) == at("2026-10-25T01:00")


def test_the_short_and_the_long_day() -> None:
    daily = Cron("30 2 * * *", "Europe/Berlin")
    assert after(daily, at("2026-03-28T12:00"), 2) == [at("2026-03-29T01:00"), at("2026-03-30T00:30")]
    assert after(daily, at("2026-10-24T12:00"), 2) == [at("2026-10-25T00:30"), at("2026-10-26T01:30")]
    hourly = Cron("0 * * * *", "Europe/Berlin")
    assert len(ticks_between(hourly, at("2026-03-28T22:59"), at("2026-03-29T21:59"), 99)) == 23
    assert len(ticks_between(hourly, at("2026-10-24T21:59"), at("2026-10-25T22:59"), 99)) == 25


def test_several_times_in_the_gap_come_once() -> None:
    entry = Cron("*/10 2 * * *", "Europe/Berlin")
    assert after(entry, at("2026-03-28T12:00"), 2) == [at("2026-03-29T01:00"), at("2026-03-30T00:00")]


def test_a_day_that_was_left_out() -> None:
    """Samoa had no 30 December 2011."""
    entry = Cron("0 9 * * *", "Pacific/Apia")
    assert after(entry, at("2011-12-29T20:00"), 2) == [at("2011-12-30T10:00"), at("2011-12-30T19:00")]


def test_the_calendar() -> None:
    assert after(Cron("0 9 * * MON-FRI", "Asia/Seoul"), at("2026-11-20T00:00"), 2) == [
        at("2026-11-23T00:00"),
        at("2026-11-24T00:00"),
    ]
    assert after(Cron("0 0 29 2 *"), at("2026-01-01T00:00"), 2) == [
        at("2028-02-29T00:00"),
        at("2032-02-29T00:00"),
    ]
    assert after(Cron("0 * 29 2 *", "Europe/Berlin"), at("2026-01-01T00:00"), 1) == [at("2028-02-28T23:00")]
    assert after(Cron("*/20 * * * * *"), at("2026-01-01T00:00:05"), 3) == [
        at("2026-01-01T00:00:20"),
        at("2026-01-01T00:00:40"),
        at("2026-01-01T00:01:00"),
    ]
    assert after(Cron("0 12 L * *"), at("2026-02-01T00:00"), 1) == [at("2026-02-28T12:00")]


@pytest.mark.parametrize(
    ("nickname", "tick"),
    [
        ("@hourly", "2026-05-06T08:00"),
        ("@daily", "2026-05-07T00:00"),
        ("@midnight", "2026-05-07T00:00"),
        ("@weekly", "2026-05-10T00:00"),
        ("@monthly", "2026-06-01T00:00"),
        ("@yearly", "2027-01-01T00:00"),
        ("@annually", "2027-01-01T00:00"),
    ],
)
def test_nicknames(nickname: str, tick: str) -> None:
    assert Cron(nickname).next_after(at("2026-05-06T07:08:09")) == at(tick)


def test_intervals_are_counted_from_the_epoch() -> None:
    assert after(Every(3600), at("2026-05-06T07:08:09"), 2) == [
        at("2026-05-06T08:00"),
        at("2026-05-06T09:00"),
    ]
    assert Every(1).next_after(at("2026-05-06T07:08:09")) == at("2026-05-06T07:08:10")
    assert Every(7 * 86_400).next_after(at("1970-01-01T00:00")) == at("1970-01-08T00:00")


def test_only_the_latest_of_many() -> None:
    entry = Cron("* * * * *", "Asia/Seoul")
    ticks = ticks_between(entry, at("1999-01-01T00:00"), at("2026-05-06T07:08:09"), 3)
    assert ticks == [at("2026-05-06T07:06"), at("2026-05-06T07:07"), at("2026-05-06T07:08")]
    assert ticks_between(Cron("0 0 1 1 *"), at("1990-06-01T00:00"), at("2026-01-01T00:00"), 2) == [
        at("2025-01-01T00:00"),
        at("2026-01-01T00:00"),
    ]
    assert ticks_between(entry, at("2026-05-06T07:08:09"), at("2026-05-06T07:08:30"), 3) == []
    assert ticks_between(entry, at("2026-05-06T07:08:09"), at("2025-01-01T00:00"), 3) == []


@pytest.mark.parametrize(
    ("expression", "why"),
    [
        ("0 9 * *", "wrong number of fields"),
        ("", "wrong number of fields"),
        ("60 9 * * *", "bad minute"),
        ("0 24 * * *", "bad hour"),
        ("0 9 32 * *", "bad day-of-month"),
        ("0 9 31 2 *", "bad day-of-month"),
        ("0 9 * 13 *", "bad month"),
        ("0 9 * * 8", "bad day-of-week"),
        ("0 9 * * MON-", "bad day-of-week"),
        ("*/0 * * * *", "bad minute"),
        ("@reboot", "wrong number of fields"),
        (None, "it must be text"),
        (5, "it must be text"),
    ],
)
def test_wrong_expressions(expression: object, why: str) -> None:
    with pytest.raises(
        ValueError, match=f"cron must be five fields like '0 9 [*] [*] MON-FRI', got .*: {why}"
    ):
        Cron(expression)  # type: ignore[arg-type]


def test_a_time_that_never_comes() -> None:
    with pytest.raises(ValueError, match=r"cron '0 0 \*/31 2 MON#5' never comes"):
        Cron("0 0 */31 2 MON#5")  # the first of February is no fifth Monday


@pytest.mark.parametrize(
    "zone", ["", "Mars/Olympus", "../../etc/passwd", "Europe", "\0", None, 5, "/etc/passwd"]
)
def test_wrong_zones(zone: object) -> None:
    with pytest.raises(ValueError, match="timezone must be a name like Asia/Seoul or UTC, got "):
        find_zone(zone)


@pytest.mark.parametrize("seconds", [0.0, 0.5, 1.5, -5.0, 367 * 86_400.0, float("nan"), float("inf")])
def test_wrong_intervals(seconds: float) -> None:
    with pytest.raises(
        ValueError, match="every must be a whole number of seconds, from 1 second to 366 days"
    ):
        Every(seconds)
