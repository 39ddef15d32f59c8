"""What the demo shows while it runs: a live view on a terminal, a line a second elsewhere."""

from __future__ import annotations

import time
from collections import deque
from dataclasses import dataclass
from typing import Any, Protocol, Self

import psycopg
from psycopg import sql
from psycopg.rows import dict_row
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table

from shop.customers import Answer

JOBS_PER_ORDER = 3
RATE_WINDOW = 2.0  # seconds
LINE_INTERVAL = 1.0  # seconds

# The ids of this run's jobs sort behind first_id (they are UUIDv7), so each table is read by its index on id.
_COUNT_JOBS = """
SELECT count(*) FILTER (WHERE state = 'ready') AS ready,
       count(*) FILTER (WHERE state = 'scheduled') AS scheduled,
       count(*) FILTER (WHERE state = 'running') AS running,
       count(*) FILTER (WHERE state = 'dead') AS dead,
       count(*) FILTER (WHERE finished_at IS NOT NULL) AS ended,
       coalesce(sum(retries), 0)::integer AS retries
FROM {all_jobs} WHERE id >= %(first_id)s::uuid AND queue = ANY (%(queues)s)
"""


@dataclass(frozen=True)
class Moment:
    """How far a run is."""

    orders: int
    placed: int
    rolled_back: int
    ready: int
    scheduled: int
    running: int
    dead: int
    ended: int
    retries: int

    @property
    def expected(self) -> int:
        """How many jobs there will be: known for the orders that were answered, hoped for the others."""
        return JOBS_PER_ORDER * (self.orders - self.rolled_back)

    @property
    def done(self) -> bool:
        answered = self.placed + self.rolled_back == self.orders
        return answered and not (self.ready or self.scheduled or self.running)


class Gauge:
    """Reads the moment from the queue's tables."""

    def __init__(
        self, connection: psycopg.Connection[Any], schema: str, queues: tuple[str, ...], first_id: str
    ) -> None:
        self._connection = connection
        self._query = sql.SQL(_COUNT_JOBS).format(all_jobs=sql.Identifier(schema, "all_jobs"))
        self._names = {"queues": list(queues), "first_id": first_id}

    def read(self, orders: int, answers: list[Answer]) -> Moment:
        placed = sum(answer.status == 201 for answer in answers)
        with self._connection.cursor(row_factory=dict_row) as cursor:
            counts = cursor.execute(self._query, self._names).fetchone() or {}
        return Moment(orders, placed, len(answers) - placed, **counts)


class Screen(Protocol):
    """Where the moments are shown."""

    def show(self, moment: Moment) -> None: ...
    def __enter__(self) -> Self: ...
    def __exit__(self, *_: object) -> None: ...


def make_screen(console: Console) -> Screen:
    """A live view if the console is a terminal, else lines."""
    return (
        LiveScreen(console) if console.is_terminal and not console.is_dumb_terminal else LineScreen(console)
    )


class Pace:
    """Elapsed time, and jobs ended per second of late."""

    def __init__(self) -> None:
        self._start = time.monotonic()
        self._seen = deque([(self._start, 0)])

    @property
    def elapsed(self) -> float:
        return time.monotonic() - self._start

    def rate(self, ended: int) -> float:
        now = time.monotonic()
        self._seen.append((now, ended))
        while len(self._seen) > 2 and self._seen[1][0] < now - RATE_WINDOW:
            self._seen.popleft()
        then, before = self._seen[0]
        return (ended - before) / max(now - then, 0.001)


class LineScreen:
    """One line a second, and one at the end."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._pace = Pace()
        self._next = 0.0
        self._last: str | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._last is not None:
            self._print(self._last)

    def show(self, moment: Moment) -> None:
        rate = self._pace.rate(moment.ended)
        self._last = (
            f"{self._pace.elapsed:5.1f} s  orders {moment.placed + moment.rolled_back}/{moment.orders} "
            f"({moment.rolled_back} rolled back)  jobs {moment.ended}/{moment.expected}, {rate:.0f}/s  "
            f"ready {moment.ready}  running {moment.running}  waiting {moment.scheduled}  "
            f"retries {moment.retries}  dead {moment.dead}"
        )
        if self._pace.elapsed >= self._next:
            self._next = self._pace.elapsed + LINE_INTERVAL
            self._print(self._last)
            self._last = None

    def _print(self, line: str) -> None:
        self._console.print(line, markup=False, highlight=False, soft_wrap=True)


class LiveScreen:
    """A progress bar and a small table that stay in place."""

    def __init__(self, console: Console) -> None:
        self._pace = Pace()
        self._live = Live(console=console, auto_refresh=False)

    def __enter__(self) -> Self:
        self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._live.stop()

    def show(self, moment: Moment) -> None:
        self._live.update(self._view(moment, self._pace.rate(moment.ended)), refresh=True)

    def _view(self, moment: Moment, rate: float) -> RenderableType:
        head = Table.grid(padding=(0, 2))
        head.add_row(
            ProgressBar(
                total=max(moment.expected, 1),
                completed=moment.ended,
                width=40,
                complete_style="green",
                finished_style="green",
            ),
            f"{moment.ended} of {moment.expected} jobs",
            f"{rate:.0f} jobs/s",
            f"{self._pace.elapsed:.1f} s",
        )
        table = Table(box=None, padding=(0, 2), header_style="dim")
        for title in ("orders", "rolled back", "ready", "running", "waiting", "retries", "dead"):
            table.add_column(title, justify="right")
        table.add_row(
            f"{moment.placed + moment.rolled_back} of {moment.orders}",
            *(
                str(number)
                for number in (
                    moment.rolled_back,
                    moment.ready,
                    moment.running,
                    moment.scheduled,
                    moment.retries,
                )
            ),
            f"[red]{moment.dead}[/red]" if moment.dead else "0",
        )
        return Group(head, table)
