"""`pgqueue bench`: how fast a queue is on a server of yours, and what decides it."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import asdict
from typing import Any, Final, Literal

import click
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from pgqueue import __version__
from pgqueue.benchmark import Figures, Plan, Spread, measure
from pgqueue.cli.context import Context
from pgqueue.cli.options import Seconds, json_option
from pgqueue.cli.output import is_terminal, plural, progress_bar, show, show_json
from pgqueue.cli.status import ExitStatus
from pgqueue.config import Config, usable_cpus
from pgqueue.database.benchmark import Speed, Tick
from pgqueue.database.dsn import connect_options
from pgqueue.errors import ConfigError
from pgqueue.worker.signals import stop_signals

EXIT_SIGNAL: Final = 128
"""And the signal's number, as a shell says it."""
WIDTH: Final = 40
"""Columns of the longest bar."""
BOUNDS: Final = tuple(digit * 10.0**power for power in range(-1, 5) for digit in (1, 1.5, 2, 3, 5, 7))
"""Of the histogram's rows, in milliseconds."""
_COLUMNS: Final[tuple[Literal["left", "right"], ...]] = ("left", "right", "left")
FAR: Final = 1.0
"""Milliseconds of a round trip from which on the network is worth a word."""


@click.command(
    epilog="""\b
Examples:
  pgqueue bench
  pgqueue --dsn postgresql://localhost/shop bench --seconds 10 -c 4
  pgqueue bench --json > bench.json

It is real load on the server for half a minute. Exit status: 0 measured, 130 after Ctrl-C."""
)
@click.option(
    "--jobs",
    type=click.IntRange(1, 10_000_000),
    default=50_000,
    show_default=True,
    help="That wait when the worker begins.",
)
@click.option(
    "--seconds", type=Seconds(0.1), default=3.0, show_default=True, help="Of each measure that goes by time."
)
@click.option(
    "-c",
    "--concurrency",
    type=click.IntRange(1, 1024),
    help="Executors of the worker.  [default: usable CPUs]",
)
@json_option
@click.pass_obj
def bench(context: Context, jobs: int, seconds: float, concurrency: int | None, as_json: bool) -> int:
    """Measure the queue on a server of yours.

    Enqueues jobs that do nothing, one by one and in bulk, lets a real worker run them, and says what your
    server's commits and your network have to do with it. It works in a schema of its own, pgqueue_bench_ and
    some letters, which it drops at the end; your jobs are left alone. The role needs CREATE on the database.

    Without a DSN it starts an embedded PostgreSQL.
    """
    if context.schema is not None:
        raise click.UsageError("bench makes a schema of its own: leave --schema out")
    # Not an application that happens to be installed: its database may be the one in production.
    config = context.config if context.target else Config.load(os.environ, dsn=context.dsn)
    plan = Plan(jobs, seconds, concurrency or usable_cpus())
    with ExitStack() as stack:
        check = stack.enter_context(_stoppable())
        dsn = _embedded(stack) if config.dsn is None else config.dsn
        connect_options(dsn)  # what is wrong with it is said before anything starts
        try:
            figures = measure(dsn, plan, _bars(check), settings=_settings(config))
        except _Stopped as stopped:
            if stopped.signal == signal.SIGINT:
                raise click.Abort from None
            click.echo(f"pgqueue: stopped by {stopped}; nothing it made is left", err=True)
            return EXIT_SIGNAL + stopped.signal
    if as_json:
        show_json(_document(figures, embedded=config.dsn is None))
    else:
        show(_picture(figures, embedded=config.dsn is None))
    return ExitStatus.DONE


def _embedded(stack: ExitStack) -> str:
    from pgqueue.database.embedded import EmbeddedPostgres

    try:
        return stack.enter_context(EmbeddedPostgres()).dsn
    except ConfigError as error:
        raise ConfigError(f"{error}; or name a server with --dsn or PGQUEUE_DSN") from error


def _settings(config: Config) -> dict[str, str]:
    """How the worker is to listen, which depends on the network and not on what is measured."""
    listen = {"listen": "1" if config.listen else "0"}
    return listen | ({"listen_dsn": config.listen_dsn} if config.listen_dsn else {})


class _Stopped(BaseException):
    """A signal asked us to stop."""

    def __init__(self, number: int) -> None:
        super().__init__(signal.strsignal(number))
        self.signal = number


@contextmanager
def _stoppable() -> Iterator[Callable[[], None]]:
    """What it gives raises `_Stopped` once a signal has come; a second one does not wait for that."""
    came: list[int] = []

    def note(number: int, _: object) -> None:
        came.append(number)
        if len(came) == 2:
            raise _Stopped(number)

    def check() -> None:
        if came:
            raise _Stopped(came[0])

    before = {number: signal.signal(number, note) for number in stop_signals()}
    try:
        yield check
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _bars(check: Callable[[], None]) -> Callable[[str, int], AbstractContextManager[Tick]]:
    """A bar on the terminal for each measure; between its steps a signal may end it."""

    @contextmanager
    def bar(words: str, total: int) -> Iterator[Tick]:
        check()
        with progress_bar(words, total, shown=True) as advance:

            def tick(steps: int) -> None:
                check()
                advance(steps)

            yield tick

    return bar


def _document(figures: Figures, *, embedded: bool) -> dict[str, Any]:
    """All figures, for programs."""

    def plain(value: object) -> Any:
        if isinstance(value, Speed):
            return {**asdict(value), "jobs_per_second": value.rate}
        if isinstance(value, Spread):
            return {f"{name}_ms" if name != "samples" else name: each for name, each in asdict(value).items()}
        return asdict(value)  # type: ignore[call-overload]

    return {
        "pgqueue": __version__,
        "embedded": embedded,
        **{name: plain(value) for name, value in vars(figures).items()},
        "verdict": verdict(figures),
    }


def verdict(figures: Figures) -> list[str]:
    """What the figures mean, in plain words."""
    server, wake, executors = figures.server, figures.wake_up, figures.plan.executors
    single, bulk, drain = figures.single.rate, figures.bulk.rate, figures.drain.rate
    call, trip = figures.single_calls.mean, figures.round_trip.mean
    commit = max(figures.commit.mean - trip, 0.0)  # without the way there and back
    said = []
    if server.fsync == "off":
        said.append("fsync is off: commits do not wait for the disk, and a power cut can lose the database.")
    if server.synchronous_commit == "off":
        said.append("synchronous_commit is off; for what the queue writes, pgqueue turns it on.")
    limits = (("the commit", commit), ("the way there and back", trip), ("both", commit + trip))
    limit = next((what for what, time in limits if time >= call / 2), "the CPU")
    said.append(
        f"Your server commits in {ms(commit)} and answers in {ms(trip)} on average: single enqueues,"
        f" {ms(call)} each, are limited by {limit}."
    )
    if trip >= FAR:
        said.append(
            f"{ms(trip)} is far for a database: each enqueue, claim and ack takes a round trip or more."
        )
    said.append(
        f"One connection enqueues {number(single)} jobs/s one by one, and {number(bulk)} jobs/s with"
        f" enqueue_many: {number(bulk / single)} times as many."
    )
    said.append(
        f"A worker ran {number(drain)} jobs/s that do nothing, {drain / figures.bare_loop.rate:.0%} of what"
        f" claiming and deleting alone gets from this server. Jobs that take longer than"
        f" {ms(1000 * executors / drain)} are limited by their own work on {plural(executors, 'executor')}."
    )
    said.append(
        f"An idle worker starts a lone job {ms(wake.p50)} after its enqueue, 19 of 20 within {ms(wake.p95)}"
        + (", most of it the commit." if commit >= wake.mean / 2 else ".")
    )
    return said


def ms(milliseconds: float) -> str:
    """`0.14 ms`, `4.1 ms`, `120 ms`."""
    digits = 2 if milliseconds < 1 else 1 if milliseconds < 10 else 0
    return f"{milliseconds:,.{digits}f} ms"


def number(value: float) -> str:
    """`4,100`: three digits are all it is good for."""
    return f"{float(f'{value:.3g}'):,.0f}" if value >= 10 else f"{value:.1f}"


def _picture(figures: Figures, *, embedded: bool) -> RenderableType:
    blocks = _has_blocks()
    server, plan = figures.server, figures.plan
    kind = "an embedded PostgreSQL" if embedded else "PostgreSQL"
    head = (
        f"pgqueue {__version__} on {kind} {server.version}, fsync {server.fsync}, synchronous_commit"
        f" {server.synchronous_commit}; {plural(plan.jobs, 'job')}, {plural(plan.executors, 'executor')}"
    )
    speeds = [
        ("single enqueues", figures.single.rate),
        ("bulk enqueues", figures.bulk.rate),
        ("a worker", figures.drain.rate),
        ("bare loop", figures.bare_loop.rate),
    ]
    times = [
        ("round trip", figures.round_trip),
        ("commit", figures.commit),
        ("single enqueue", figures.single_calls),
        ("wake-up", figures.wake_up),
    ]
    parts: list[RenderableType] = [
        Text(head),
        Text("\njobs per second", style="bold"),
        _bars_of([(name, number(rate), rate) for name, rate in speeds], blocks),
        Text("\nmilliseconds", style="bold"),
        _times_table(times),
        Text(f"\nwake-up, {figures.wake_up.samples} lone jobs", style="bold"),
        _bars_of(histogram(figures.wake_up.all), blocks),
        Text(""),
        *(Text(f"- {line}") for line in verdict(figures)),
    ]
    return Group(*parts)


def histogram(milliseconds: Sequence[float]) -> list[tuple[str, str, float]]:
    """Rows of 1, 1.5, 2, 3, 5, 7, 10, …: the range, how many fell into it, and the same as a number."""
    rows = []
    for low, high in zip((0.0, *BOUNDS), (*BOUNDS, float("inf")), strict=True):
        count = sum(low <= each < high for each in milliseconds)
        rows.append(
            (
                f"{low:g} to {high:g} ms" if high < float("inf") else f"over {low:g} ms",
                f"{count}",
                float(count),
            )
        )
    filled = [index for index, row in enumerate(rows) if row[2]]
    return rows[filled[0] : filled[-1] + 1] if filled else []


def _bars_of(rows: Sequence[tuple[str, str, float]], blocks: bool) -> Table:
    grid = Table.grid(padding=(0, 2, 0, 0))
    for justify in _COLUMNS:
        grid.add_column(justify=justify, no_wrap=True)
    most = max((value for *_, value in rows), default=0.0)
    for name, text, value in rows:
        grid.add_row(Text(f"  {name}"), Text(text), Text(bar_of(value / most, blocks), style="cyan"))
    return grid


def bar_of(part: float, blocks: bool) -> str:
    """So much of `WIDTH` columns; what is not nothing is seen."""
    if not blocks:
        return "#" * max(round(part * WIDTH), 1 if part else 0)
    eighths = max(round(part * WIDTH * 8), 1 if part else 0)
    return "█" * (eighths // 8) + " ▏▎▍▌▋▊▉"[eighths % 8].strip()


def _times_table(rows: Sequence[tuple[str, Spread]]) -> Table:
    grid = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="")
    grid.add_column("")
    for name in ("p50", "p95", "p99"):
        grid.add_column(name, justify="right")
    for name, spread in rows:
        grid.add_row(f"  {name}", *(f"{each:,.2f}" for each in (spread.p50, spread.p95, spread.p99)))
    return grid


def _has_blocks() -> bool:
    """Whether whoever reads this sees block characters: a terminal in UTF-8."""
    encoding = (getattr(sys.stdout, "encoding", None) or "").lower().replace("-", "")
    return is_terminal(sys.stdout) and encoding == "utf8"
