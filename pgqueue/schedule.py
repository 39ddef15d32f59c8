"""What a schedule is, and what is to be done at its ticks. Pure values, no I/O.

A tick is decided about once: its job is enqueued, or the tick was missed, skipped, or held until the job
before it has ended. `last_tick` is the last tick that was decided about; the row in the database keeps it,
with what is held.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Any, Final, Literal, get_args

from pgqueue.cron import Cadence, Cron, Every, ticks_between
from pgqueue.errors import shown
from pgqueue.job import timed_id

CatchUp = Literal["latest", "all", "none"]
Overlap = Literal["allow", "skip", "queue"]

GRACE: Final = timedelta(seconds=60)
"""A tick that nobody was there for is missed when it is so old; before, it is only late."""
CATCH_UP_MOST: Final = 1000
"""Ticks that are caught up at most, the latest."""
HELD_MOST: Final = 1000
"""Ticks that wait at most for the job before them, the latest."""
MOST_JITTER: Final = 86_400.0

_NAME_MOST: Final = 255


def read_cadence(cron: object, every: object, timezone: object = "UTC") -> Cadence:
    """The rule that these say; ValueError if one is wrong, or both or none are given.

    Args:
        every: Seconds, or a timedelta.
    """
    if (cron is None) == (every is None):
        raise ValueError(f"give one of cron and every, got {shown(cron)} and {shown(every)}")
    if cron is not None:
        return Cron(cron, timezone)  # type: ignore[arg-type]
    return Every(read_seconds("every", every))


def read_seconds(name: str, value: object) -> float:
    """Seconds, from a number or a timedelta."""
    if isinstance(value, timedelta):
        return value.total_seconds()
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError(f"{name} must be a timedelta or a number of seconds, got {shown(value)}")
    return value


def check_schedule_name(name: object) -> str:
    """The name; ValueError unless it is 1 to 255 characters that can be printed."""
    if not isinstance(name, str) or not 1 <= len(name) <= _NAME_MOST or not name.isprintable():
        raise ValueError(f"a schedule's name is 1 to {_NAME_MOST} printable characters, got {shown(name)}")
    return name


@dataclass(frozen=True, slots=True)
class Schedule:
    """A recurring job, checked and encoded: what the database keeps of a definition.

    Attributes:
        name: Its own, by default the task's.
        cron: An expression, see `pgqueue.cron`; None with `every`.
        every: Seconds; None with `cron`.
        timezone: Whose wall clock `cron` goes by.
        args: JSON array.
        kwargs: JSON object.
        expires_in: Seconds after its enqueue from which on a job is not run.
        headers: JSON object.
        catch_up: Of ticks that nobody was there for, the "latest", "all" (`CATCH_UP_MOST`) or "none" is made
            up for.
        overlap: While a job of it lives, "allow" another one, "skip" the tick, or "queue" it until then.
        jitter: Seconds by which a job is put off at most, each by its own share.

    Raises:
        ValueError: A value is wrong.
    """

    name: str
    task: str
    cron: str | None = None
    every: float | None = None
    timezone: str = "UTC"
    args: list[Any] = field(default_factory=list)
    kwargs: dict[str, Any] = field(default_factory=dict)
    queue: str = "default"
    priority: int = 5
    max_retries: int | None = None
    expires_in: float | None = None
    headers: dict[str, Any] = field(default_factory=dict)
    catch_up: CatchUp = "latest"
    overlap: Overlap = "allow"
    jitter: float = 0.0

    def __post_init__(self) -> None:
        check_schedule_name(self.name)
        _ = self.cadence
        check_policies(self.catch_up, self.overlap, self.jitter)

    @property
    def cadence(self) -> Cadence:
        """When it comes."""
        return read_cadence(self.cron, self.every, self.timezone)


def check_policies(catch_up: object, overlap: object, jitter: object) -> None:
    """ValueError unless they are such."""
    for name, value, choices in (
        ("catch_up", catch_up, get_args(CatchUp)),
        ("overlap", overlap, get_args(Overlap)),
    ):
        if value not in choices:
            raise ValueError(f"{name} must be {', '.join(map(repr, choices))}, got {shown(value)}")
    if not 0 <= read_seconds("jitter", jitter) <= MOST_JITTER:
        raise ValueError(f"jitter must be from 0 to {MOST_JITTER:g} seconds, got {shown(jitter)}")


@dataclass(frozen=True, slots=True)
class Standing:
    """How far a schedule has come.

    Attributes:
        last_tick: The last one that was decided about.
        held: Ticks whose jobs wait for the one before, oldest first.
        busy: A job of it is live.
    """

    last_tick: datetime
    held: tuple[datetime, ...] = ()
    busy: bool = False


@dataclass(frozen=True, slots=True)
class Decision:
    """What is to be done.

    Attributes:
        fire: Ticks whose jobs are to be enqueued now.
        held: Those that wait from now on.
        missed: Ticks that nobody was there for, and that are not made up for.
        skipped: Ticks left out because a job was live.
    """

    fire: tuple[datetime, ...]
    held: tuple[datetime, ...]
    last_tick: datetime
    next_tick: datetime
    missed: int
    skipped: int


def decide(
    cadence: Cadence, standing: Standing, now: datetime, *, catch_up: CatchUp, overlap: Overlap
) -> Decision:
    """What the ticks that are due, and those held, come to.

    A clock that was set back changes nothing: ticks up to `last_tick` do not come again.
    """
    due = ticks_between(cadence, standing.last_tick, now, CATCH_UP_MOST)
    chosen = due if catch_up == "all" else due[-1:]
    if catch_up == "none" and chosen and now - chosen[0] > GRACE:
        chosen = []
    fire, held, skipped = chosen, [*standing.held], 0
    if overlap == "skip":
        fire = [] if standing.busy else chosen[-1:]
        skipped = len(chosen) - len(fire)
    elif overlap == "queue":
        held += chosen
        skipped = max(len(held) - HELD_MOST, 0)
        held = held[skipped:]
        fire = [] if standing.busy else held[:1]
        held = held[len(fire) :]
    last = due[-1] if due else standing.last_tick
    return Decision(
        fire=tuple(fire),
        held=tuple(held),
        last_tick=last,
        next_tick=cadence.next_after(max(last, now)),
        missed=len(due) - len(chosen),
        skipped=skipped,
    )


def tick_id(schedule: str, tick: datetime) -> str:
    """The id of the job of a tick: a UUIDv7 of the tick's time, the same whoever makes it."""
    return timed_id(int(tick.timestamp() * 1000), _digest(schedule, tick))


def tick_share(schedule: str, tick: datetime) -> float:
    """A number from 0 to 1 for a tick, the same whoever asks: its share of the jitter."""
    return int.from_bytes(_digest(schedule, tick)[-4:], "big") / 2**32


def _digest(schedule: str, tick: datetime) -> bytes:
    text = f"{schedule}\0{tick.astimezone(UTC).isoformat()}"
    return hashlib.sha256(text.encode()).digest()[:10]
