"""What an examination finds: a check per thing looked at, with findings that say what to do."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Final, Literal

Level = Literal["hint", "warning", "error"]
LEVELS: Final[tuple[Level, ...]] = ("hint", "warning", "error")


@dataclass(slots=True)
class Finding:
    """Something that is not as it should be.

    Attributes:
        what: What is seen, with its values.
        means: What comes of it.
        mend: The command that mends it: of a shell, or SQL.
        subject: What it is about; with the check's name it tells findings apart.
        facts: The values, for programs.
        fixable: `mend` is one SQL statement, safe to run now and to run again; or there is an `act`.
        atomic: It runs in a transaction; VACUUM does not.
        act: What --fix does instead, where it takes several transactions; returns what is left undone.
        fixed: It was run, and the check does not find it any more.
        refused: Why it could not be run, or did not help.
    """

    level: Level
    what: str
    means: str
    mend: str
    subject: str = ""
    facts: dict[str, Any] = field(default_factory=dict)
    fixable: bool = False
    atomic: bool = True
    act: Callable[[], str | None] | None = None
    fixed: bool = False
    refused: str | None = None


@dataclass(slots=True)
class Check:
    """One thing that was looked at.

    Attributes:
        fact: What is seen when all is well, in a few words.
        skipped: Why it was not looked at.
    """

    name: str
    fact: str = ""
    findings: list[Finding] = field(default_factory=list)
    skipped: str | None = None

    @property
    def level(self) -> str:
        """The worst that is left; `ok`, or `skipped`."""
        if self.skipped is not None:
            return "skipped"
        left = [finding.level for finding in self.findings if not finding.fixed]
        return max(left, key=LEVELS.index, default="ok")


def at_least(level: str, limit: Level) -> bool:
    """Whether it is as bad as the limit; `ok` and `skipped` are not."""
    return level in LEVELS and LEVELS.index(level) >= LEVELS.index(limit)


def span(seconds: float) -> str:
    """`12 s`, `3 min`, `5 h`, `2 d`."""
    for size, unit, most in ((1, "s", 120), (60, "min", 7200), (3600, "h", 172_800)):
        if seconds < most:
            return f"{seconds / size:.0f} {unit}"
    return f"{seconds / 86_400:.0f} d"


def some(names: list[str], most: int = 5) -> str:
    """`a, b and 3 more`."""
    shown = ", ".join(names[:most])
    return shown if len(names) <= most else f"{shown} and {len(names) - most} more"


def number(count: int, noun: str) -> str:
    """`1 job`, `2,000 jobs`."""
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


def identifier(name: str) -> str:
    """A name as SQL writes it."""
    plain = re.fullmatch(r"[a-z_][a-z0-9_]*", name)
    return name if plain else '"' + name.replace('"', '""') + '"'


def literal(text: str) -> str:
    """A text as SQL writes it."""
    return "'" + text.replace("'", "''") + "'"
