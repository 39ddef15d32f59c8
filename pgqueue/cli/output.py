"""How commands print: tables for people, one JSON document for programs."""

from __future__ import annotations

import io
import json
import re
import signal
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, is_dataclass
from datetime import datetime
from typing import Any, Literal
from uuid import UUID

import click
from rich.console import Console, RenderableType
from rich.table import Table
from rich.text import Text

NO_WRAP = 100_000
"""Columns of a pipe: nothing is folded or cut there."""

_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")
_HIDDEN = re.compile(r"[\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")
_CONTROL_IN_LINES = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")


def is_terminal(stream: Any) -> bool:
    """Whether this stream is one; it is None when the shell has closed it."""
    return stream is not None and bool(stream.isatty())


def console() -> Console:
    """Standard output: with the terminal's colours and width, or plain."""
    if is_terminal(sys.stdout):
        return Console(highlight=False)
    return Console(highlight=False, width=NO_WRAP, color_system=None, force_terminal=False)


def table(columns: Sequence[str], rows: Iterable[Sequence[object]], *, right: Sequence[str] = ()) -> Table:
    """A table of texts; None is a dash. Columns named in `right` are aligned to the right."""
    # On a terminal a cell that does not fit is folded, never cut, and ids not even that: they are copied.
    grid = Table(box=None, pad_edge=False, header_style="bold", padding=(0, 2, 0, 0))
    for name in columns:
        justify: Literal["left", "right"] = "right" if name in right else "left"
        grid.add_column(name, justify=justify, overflow="fold", no_wrap=name == "id")
    for row in rows:
        grid.add_row(*(cell if isinstance(cell, Text) else Text(clean(cell)) for cell in row))
    return grid


def show(renderable: RenderableType) -> None:
    """Print it; in a pipe, without blanks at the ends of lines."""
    out = console()
    _never_fail_on_a_letter()
    if out.is_terminal:
        out.print(renderable)
        return
    with out.capture() as captured:
        out.print(renderable)
    click.echo("\n".join(line.rstrip() for line in captured.get().splitlines()))


def show_json(value: object) -> None:
    """Print one JSON document."""
    _never_fail_on_a_letter()
    click.echo(to_json(value, indent=2))


def to_json(value: object, *, indent: int = 0) -> str:
    """Dataclasses as objects, times in ISO 8601."""
    text = json.dumps(_plain(value), ensure_ascii=False, indent=indent or None)
    return _HIDDEN.sub(lambda match: f"\\u{ord(match[0]):04x}", text)  # JSON escapes only those below 32


def clean(value: object) -> str:
    """One line without control characters: an error message must not steer somebody's terminal."""
    if value is None:
        return "-"
    return _CONTROL.sub(_escape, re.sub(r"\s*[\r\n]+\s*", " ", str(value).strip()))


def clean_lines(value: object) -> str:
    """`clean`, with the line breaks kept."""
    return _CONTROL_IN_LINES.sub(_escape, str(value))


def shortened(value: object, length: int) -> str:
    """`clean`, cut on a terminal; a pipe gets it all."""
    text = clean(value)
    return f"{text[: length - 1]}…" if is_terminal(sys.stdout) and len(text) > length else text


def moment(time: datetime) -> str:
    """`2026-01-31 09:00:00+00:00`."""
    return time.isoformat(sep=" ", timespec="seconds")


def duration(seconds: float | None) -> str:
    """`0.4 s`, `12 s`, `3 min`, `5 h`, `2 d`."""
    if seconds is None:
        return "-"
    seconds = max(seconds, 0.0)
    if seconds < 10:
        return f"{seconds:.1f} s"
    for size, unit, most in ((1, "s", 120), (60, "min", 7200), (3600, "h", 172_800)):
        if seconds < most:
            return f"{seconds / size:.0f} {unit}"
    return f"{seconds / 86_400:.0f} d"


def confirmed(question: str) -> bool:
    """Ask, where there is somebody to ask; elsewhere False."""
    if not (is_terminal(sys.stdin) and is_terminal(sys.stderr)):
        return False
    return click.confirm(question, err=True)


@contextmanager
def progress_bar(words: str, total: int, *, shown: bool) -> Iterator[Callable[[int], None]]:
    """A bar on a terminal's stderr while the block runs; it gets what to call with each step's size."""
    from rich.progress import Progress

    disable = not shown or not is_terminal(sys.stderr)
    with Progress(console=Console(stderr=True), transient=True, disable=disable) as progress:
        bar = progress.add_task(words, total=total)
        yield lambda steps: progress.advance(bar, steps)


def plural(count: int, noun: str) -> str:
    """`1 dead letter`, `2,000 dead letters`."""
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


def repeat(
    look: Callable[[], Any], render: Callable[[Any], RenderableType], *, watch: float | None, as_json: bool
) -> None:
    """Show what `look` finds, once, or every `watch` seconds until Ctrl-C.

    Watching, a terminal is painted in place, and a JSON document is a line.
    """
    if watch is None:
        found = look()
        show_json(found) if as_json else show(render(found))
        return
    from rich.live import Live

    look = _undisturbed(look)
    try:
        if as_json or not is_terminal(sys.stdout):
            while True:
                found = look()
                click.echo(to_json(found)) if as_json else show(render(found))
                time.sleep(watch)
        with Live(render(look()), console=console(), auto_refresh=False, vertical_overflow="crop") as live:
            while True:
                time.sleep(watch)
                live.update(render(look()), refresh=True)
    except KeyboardInterrupt:
        return  # the way to stop watching


def _undisturbed(look: Callable[[], Any]) -> Callable[[], Any]:
    """`look`, with a Ctrl-C in the middle of it raised at its end, and a second one at once.

    A query that is interrupted leaves a connection behind that cannot be used, and at times waits for an
    answer that has come already.
    """

    def undisturbed() -> Any:
        asked = False

        def ask(*_: object) -> None:
            nonlocal asked
            if asked:
                raise KeyboardInterrupt
            asked = True

        before = signal.getsignal(signal.SIGINT)
        if before is not signal.SIG_IGN:
            signal.signal(signal.SIGINT, ask)
        try:
            found = look()
        finally:
            signal.signal(signal.SIGINT, before)
        if asked:
            raise KeyboardInterrupt
        return found

    return undisturbed


def _never_fail_on_a_letter() -> None:
    """Where the locale has no `≥`, or an argument has a letter it does not know, print its number instead."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")


def _escape(match: re.Match[str]) -> str:
    code = ord(match[0])
    return f"\\x{code:02x}" if code < 256 else f"\\u{code:04x}"


def _plain(value: object) -> Any:
    if is_dataclass(value) and not isinstance(value, type):
        return _plain(asdict(value))
    if isinstance(value, dict):
        return {key: _plain(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(each) for each in value]
    if isinstance(value, set | frozenset):
        return sorted(_plain(each) for each in value)
    if isinstance(value, datetime):
        return value.isoformat()
    return str(value) if isinstance(value, UUID) else value
