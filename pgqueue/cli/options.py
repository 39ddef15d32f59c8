"""Types of options that click does not have."""

from __future__ import annotations

import math
from typing import Any, Final

import click

from pgqueue.errors import shown

MOST_ROWS: Final = 1_000_000_000
"""The largest --limit: what Postgres counts with has room for more."""

MOST_SECONDS: Final = 1e9
"""Thirty years: a longer sleep does not fit every clock."""


class Seconds(click.FloatRange):
    """A finite number of seconds; click's own takes NaN for one in every range."""

    name = "seconds"

    def __init__(self, min: float = 0.0, *, min_open: bool = False) -> None:
        super().__init__(min, MOST_SECONDS, min_open=min_open)

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        number: float = super().convert(value, param, ctx)
        if math.isnan(number):
            self.fail(f"{shown(value)} is not a number of seconds", param, ctx)
        return number


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
