"""Whether a failed job runs again, and when. Pure: the clock and the dice are the caller's."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any, Final

import msgspec

from pgqueue.errors import (
    ConfigError,
    Reject,
    Retry,
    Signal,
    Snooze,
    SoftTimeLimitExceeded,
    TimeLimitExceeded,
    nearest,
    shown,
)
from pgqueue.job import DeadReason

if TYPE_CHECKING:
    from random import Random

FOREVER: Final = -1
"""`max_retries` without a limit."""

MAX_RETRIES: Final = 2**31 - 1
"""What the database's integer holds."""

MAX_DELAY: Final = 10 * 366 * 86_400.0
"""Seconds; a longer delay is shortened to this, so that an eta always fits a timestamp."""

_MAX_CRASH_DELAY = 60.0


class Again(msgspec.Struct, frozen=True):
    """Run again, `delay` seconds from now.

    Attributes:
        burned: It counts as a retry, and as a failure to keep; a snooze is neither.
    """

    delay: float
    burned: bool = True


class Dead(msgspec.Struct, frozen=True):
    """Do not run again."""

    reason: DeadReason


@dataclass(frozen=True, slots=True)
class RetryPolicy:
    """What a task's options say about failure, with Celery's names, defaults and precedence.

    Attributes:
        autoretry_for: Exceptions that are retried without `self.retry`.
        max_retries: Runs after the first; -1 for ever.
        default_retry_delay: Seconds, when nothing else says.
        retry_delay: Seconds, from `retry_kwargs["countdown"]`; None if not given.
        retry_backoff: Seconds, doubled with every retry; None for no backoff.
        retry_backoff_max: Seconds; the delay before jitter is at most this.
        retry_jitter: Draw the delay evenly from 0 to the backoff: "full jitter" of "Exponential Backoff And
            Jitter" (AWS Architecture Blog, 2015), as Celery does. Fixed delays are never changed.
        dont_autoretry_for: Exceptions taken out of `autoretry_for` again.
    """

    autoretry_for: tuple[type[BaseException], ...] = ()
    max_retries: int = 3
    default_retry_delay: float = 180.0
    retry_delay: float | None = None
    retry_backoff: float | None = None
    retry_backoff_max: float = 600.0
    retry_jitter: bool = True
    dont_autoretry_for: tuple[type[BaseException], ...] = ()

    @classmethod
    def from_options(cls, options: Mapping[str, Any], defaults: RetryPolicy | None = None) -> RetryPolicy:
        """The policy of a task's options; what they leave out comes from `defaults`.

        `retry_kwargs` may hold `max_retries`, which beats the option of that name, and `countdown`.

        Raises:
            ConfigError: Options are wrong or unknown; the message lists them all.
        """
        values: dict[str, Any] = {}
        errors = []
        for name, value in options.items():
            try:
                values |= _read_option(name, value)
            except ValueError as error:
                errors.append(str(error))
        if errors:
            raise ConfigError("; ".join(errors))
        values |= values.pop("retry_kwargs", {})
        return replace(defaults or cls(), **values)

    def numbers(self) -> dict[str, Any]:
        """What it says beside classes, to make a policy of elsewhere."""
        return {
            each.name: getattr(self, each.name)
            for each in fields(self)
            if each.name not in ("autoretry_for", "dont_autoretry_for")
        }

    def decide(
        self, error: BaseException, *, retries: int, max_retries: int | None, random: Random
    ) -> Again | Dead:
        """What becomes of a job whose run ended with `error`.

        Args:
            error: What the run raised; a `Retry` is the task's own wish, with its own delay and limit. A
                `TimeLimitExceeded` counts only where `autoretry_for` names it, not a class above it: the body
                was killed, whatever it was doing.
            retries: Failed runs that were retried before this one.
            max_retries: The job's own limit, -1 for ever, None for the policy's.
            random: Source of the jitter.
        """
        if isinstance(error, Snooze):
            return Again(_bounded(error.seconds), burned=False)
        if isinstance(error, Reject):
            return Dead("rejected")
        delay = None
        limit = self.max_retries if max_retries is None else max_retries
        if isinstance(error, Retry):
            delay = error.delay
            limit = limit if error.max_retries is None else error.max_retries
        elif isinstance(error, TimeLimitExceeded):
            if not self.retries_time_limit:
                return Dead("time_limit")
        elif not self._retries_by_itself(error):
            return Dead("not_retryable")
        if limit != FOREVER and retries >= limit:
            return Dead("retries_exhausted")
        return Again(self._delay(retries, random) if delay is None or math.isnan(delay) else _bounded(delay))

    @property
    def retries_time_limit(self) -> bool:
        """Whether a job that was killed at its hard time limit runs again."""
        # By identity: comparing may run code of the classes themselves.
        named = any(each is TimeLimitExceeded for each in self.autoretry_for)
        return named and not any(each is TimeLimitExceeded for each in self.dont_autoretry_for)

    def _retries_by_itself(self, error: BaseException) -> bool:
        return isinstance(error, self.autoretry_for) and not isinstance(error, self.dont_autoretry_for)

    def _delay(self, retries: int, random: Random) -> float:
        if self.retry_backoff is None:
            return _bounded(self.default_retry_delay if self.retry_delay is None else self.retry_delay)
        delay = _bounded(min(self.retry_backoff_max, _doubled(self.retry_backoff, retries)))
        return random.uniform(0.0, delay) if self.retry_jitter else delay


def crash_delay(crashes: int) -> float:
    """Seconds to wait after the job's process died for the `crashes`-th time: 1, 2, 4 … at most 60."""
    return min(_MAX_CRASH_DELAY, _doubled(1.0, max(crashes, 1) - 1))


def _doubled(first: float, times: int) -> float:
    try:
        return math.ldexp(first, max(times, 0))
    except OverflowError:
        return math.inf


def _bounded(delay: float) -> float:
    """From 0 to MAX_DELAY; NaN becomes 0."""
    return min(delay, MAX_DELAY) if delay > 0 else 0.0


def _read_option(name: str, value: object) -> dict[str, Any]:
    reader = _READERS.get(name)
    if reader is None:
        raise ValueError(f"unknown retry option {name!r}{_meant(name, _READERS)}")
    return {name: reader(name, value)}


def _meant(name: str, known: Iterable[str]) -> str:
    close = nearest(name, known)
    return f", did you mean {close!r}?" if close else f"; known are {', '.join(sorted(known))}"


def _classes(name: str, value: object) -> tuple[type[BaseException], ...]:
    classes = tuple(value) if isinstance(value, (tuple, list)) else (value,)
    for each in classes:
        known = isinstance(each, type) and issubclass(each, BaseException)
        if not known or (issubclass(each, Signal) and not issubclass(each, SoftTimeLimitExceeded)):
            raise ValueError(f"{name} must be exception classes, got {shown(each)}")
    return classes


def _limit(name: str, value: object) -> int:
    if value is None:
        return FOREVER
    if isinstance(value, bool) or not isinstance(value, int) or not FOREVER <= value <= MAX_RETRIES:
        raise ValueError(
            f"{name} must be a whole number from 0 to {MAX_RETRIES}, or None for ever, got {shown(value)}"
        )
    return value


def _seconds(name: str, value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value <= MAX_DELAY:
        raise ValueError(f"{name} must be seconds from 0 to {MAX_DELAY:.0f}, got {shown(value)}")
    return float(value)


def _backoff(name: str, value: object) -> float | None:
    if value is None or value is False or value == 0:
        return None
    return 1.0 if value is True else _seconds(name, value)


def _flag(name: str, value: object) -> bool:
    if not isinstance(value, bool):
        raise ValueError(f"{name} must be True or False, got {shown(value)}")
    return value


def _retry_kwargs(name: str, value: object) -> dict[str, Any]:
    if not isinstance(value, Mapping):
        raise ValueError(f"{name} must be a dict with max_retries or countdown, got {shown(value)}")
    found: dict[str, Any] = {}
    errors = [
        f"{name} takes max_retries and countdown only, got {shown(key)}"
        for key in value
        if key not in _RETRY_KWARGS
    ]
    for key in value.keys() & _RETRY_KWARGS.keys():
        field, read = _RETRY_KWARGS[key]
        try:
            found[field] = read(f"{name}[{key!r}]", value[key])
        except ValueError as error:
            errors.append(str(error))
    if errors:
        raise ValueError("; ".join(errors))
    return found


_RETRY_KWARGS: Final[dict[str, tuple[str, Callable[[str, object], object]]]] = {
    "max_retries": ("max_retries", _limit),
    "countdown": ("retry_delay", _seconds),
}
_READERS: Final[dict[str, Callable[[str, object], object]]] = {
    "autoretry_for": _classes,
    "dont_autoretry_for": _classes,
    "retry_kwargs": _retry_kwargs,
    "max_retries": _limit,
    "default_retry_delay": _seconds,
    "retry_backoff": _backoff,
    "retry_backoff_max": _seconds,
    "retry_jitter": _flag,
}

RETRY_OPTIONS: Final = frozenset(_READERS)
"""Names of the task options that `RetryPolicy.from_options` reads."""
