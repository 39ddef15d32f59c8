"""What several commands take: types of options that click does not have, and the options themselves."""

from __future__ import annotations

import getpass
import math
import re
import socket
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from typing import Any, Final, TypeVar

import click

from pgqueue.errors import shown
from pgqueue.job import check_id, check_queue

Command = TypeVar("Command", bound=Callable[..., Any])

MOST_ROWS: Final = 1_000_000_000
"""The largest --limit: what Postgres counts with has room for more."""

_LONGEST: Final = timedelta(days=36_525)
"""A century: what lies further back may fall off the database's calendar."""

MOST_SECONDS: Final = 1e9
"""Thirty years: a longer sleep does not fit every clock."""


class Seconds(click.FloatRange):
    """A finite number of seconds; click's own takes NaN for one in every range."""

    name = "seconds"
    what = "a number of seconds"

    def __init__(self, min: float = 0.0, *, min_open: bool = False) -> None:
        super().__init__(min, MOST_SECONDS, min_open=min_open)

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        number: float = super().convert(value, param, ctx)
        if math.isnan(number):
            self.fail(f"{shown(value)} is not {self.what}", param, ctx)
        return number


class Rate(Seconds):
    """A number a second, more than 0."""

    name = "rate"
    what = "a number"

    def __init__(self) -> None:
        super().__init__(min_open=True)


_UNITS: Final = {"s": 1, "m": 60, "min": 60, "h": 3600, "d": 86_400, "w": 604_800}


def read_duration(text: str) -> float | None:
    """Seconds of `90s`, `15m`, `2h`, `3d`, `1w`; None for anything else."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([a-z]+)", text.strip())
    if match is None or match[2] not in _UNITS:
        return None
    return float(match[1]) * _UNITS[match[2]]


class Duration(click.ParamType[float]):
    """Seconds, written as `30`, `90s`, `15m`, `2h` or `1d`."""

    name = "duration"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        text = str(value)
        seconds = float(text) if re.fullmatch(r"\d+(\.\d+)?", text) else read_duration(text)
        if seconds is None or seconds > MOST_SECONDS:
            self.fail(f"must be like 30s, 15m, 2h or 1d, got {shown(text)}", param, ctx)
        return seconds


class Words(click.ParamType[str]):
    """Text that is not empty and that a database takes: an argument may hold any bytes."""

    name = "text"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        text = str(value)
        if not text:
            self.fail("must not be empty; leave the option out", param, ctx)
        try:
            text.encode()
        except UnicodeEncodeError:
            self.fail(f"must be text in UTF-8, got {shown(text)}", param, ctx)
        return text


def read_queue(ctx: click.Context, param: click.Parameter, value: str | None) -> str | None:
    """A queue's name."""
    try:
        return None if value is None else check_queue(value)
    except ValueError as error:
        raise click.BadParameter(str(error)) from None


json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON.")
note_option = click.option("--note", type=Words(), metavar="TEXT", help="Why you do it, for the audit log.")


def limit_option(default: int) -> Callable[[Command], Command]:
    """How many rows a list has at most."""
    return click.option(
        "--limit",
        type=click.IntRange(1, MOST_ROWS),
        default=default,
        show_default=True,
        help="So many at most.",
    )


watch_option = click.option(
    "--watch",
    type=Seconds(0.1),
    metavar="SECONDS",
    help="Look again every so often, until Ctrl-C; with --json, a line each time.",
)


def read_since(ctx: click.Context, param: click.Parameter, value: str | None) -> datetime | timedelta | None:
    """`90s`, `15m`, `2h`, `3d`, `1w`: that long ago; or ISO 8601, in UTC unless it says otherwise."""
    if value is None:
        return None
    try:
        if (seconds := read_duration(value)) is not None:
            ago = timedelta(seconds=seconds)
            if ago > _LONGEST:
                raise ValueError
            return ago
        found = datetime.fromisoformat(value)
        return found if found.tzinfo is not None else found.replace(tzinfo=UTC)
    except (ValueError, OverflowError):
        raise click.BadParameter(
            f"must be like 30m, 2h, 3d or 2026-01-31T09:00Z, a century at most, got {shown(value)}"
        ) from None


def read_id(ctx: click.Context, param: click.Parameter, value: str) -> str:
    """A job id in its usual spelling."""
    try:
        return check_id(value)
    except ValueError:
        raise click.BadParameter(f"a job id is a UUID, got {shown(value)}") from None


def read_ids(ctx: click.Context, param: click.Parameter, values: tuple[str, ...]) -> tuple[str, ...]:
    """Job ids, each once."""
    return tuple(dict.fromkeys(read_id(ctx, param, value) for value in values))


def bulk(command: Command) -> Command:
    """The options of acts on many."""
    for option in (
        json_option,
        click.option("-y", "--yes", is_flag=True, help="Do not ask."),
        click.option("--dry-run", is_flag=True, help="Only say how many it would be."),
        note_option,
    ):
        command = option(command)
    return command


def who() -> str:
    """Who is at the keyboard, for the audit log."""
    try:
        user = getpass.getuser()
    except (OSError, KeyError):  # a container's user without a name
        user = "?"
    return f"{user}@{socket.gethostname()}"
