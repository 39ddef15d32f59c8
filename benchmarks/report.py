"""docs/performance.md's tables and docs/img's plots from the results.

A table stands between `<!-- bench:NAME -->` and `<!-- /bench -->`; the rest of the page is written by hand.
Figures are medians, with minimum and maximum in parentheses where there are several. Ratios are of runs side
by side.
"""

from __future__ import annotations

import json
import re
import statistics
import subprocess
import sys
import tempfile
import tomllib
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from benchmarks.measures import percentile
from benchmarks.peer import OURS, Peer, PeerError, environment, find_peers
from benchmarks.results import Results

HERE = Path(__file__).resolve().parent
PAGE = HERE.parent / "docs" / "performance.md"
IMAGES = HERE.parent / "docs" / "img"
MARKED = re.compile(r"(<!-- bench:(?P<name>[\w-]+) -->\n).*?(<!-- /bench -->)", re.DOTALL)
NOTHING = "Not measured yet."
CASES = {
    "none": "none scheduled",
    "beside": "{later:,} scheduled",
    "clean": "nothing held",
    "held": "a snapshot held",
    "one": "one lane",
    "spread": "{lanes:,} lanes",
}
"""Those of own.py in words, with figures of theirs; a case that is a number is so many jobs waiting."""
Bars = dict[str, Any]


class Report:
    """Tables and figures of one set of results."""

    def __init__(self, results: Results) -> None:
        self._results = results
        self._peers = find_peers()

    def table(self, name: str) -> str:
        """The Markdown of a name that the page uses; KeyError if there is none."""
        tables: dict[str, Callable[[], str]] = {
            "machine": self._machine,
            "targets": self._targets,
            "drain": self._drain,
            "pools": self._pools,
            "enqueue": lambda: self._enqueue(served=False),
            "enqueue-served": lambda: self._enqueue(served=True),
            "wake-up": self._wake_up,
            "args": self._args,
            "idle": self._idle,
            "startup": self._startup,
            "settings": self._settings,
            **{each: self._own(each) for each in ("backlog", "scheduled", "held-snapshot", "lanes")},
        }
        return tables[name]()

    def figures(self) -> dict[str, Any]:
        """What plots.py is to draw; only what there are results for."""
        drawn = {
            "drain.svg": ("How fast a worker drains a full queue", [
                ("history kept", "drain", "history on", "jobs_per_s", "jobs/s", True),
                ("nothing kept", "drain", "history off", "jobs_per_s", "jobs/s", True),
            ]),
            "cpu.svg": ("CPU per job while draining, worker and server", [
                ("history kept", "drain", "history on", ("worker_us", "server_us"), "µs per job", True),
                ("nothing kept", "drain", "history off", ("worker_us", "server_us"), "µs per job", True),
            ]),
            "enqueue.svg": ("Enqueueing, no worker", [
                ("one at a time, 1 client", "enqueue", "single, 1 client", "jobs_per_s", "jobs/s", False),
                ("one at a time, 64 clients", "enqueue", "single, 64 clients", "jobs_per_s", "jobs/s", False),
                ("1,000 at a time, 1 client", "enqueue", "bulk, 1 client", "jobs_per_s", "jobs/s", True),
            ]),
            "wake-up.svg": ("From the enqueue to the start of the job, 99 of 100 are faster", [
                ("at 50 jobs/s", "wake-up", "50 jobs/s", "p99_ms", "ms", True),
                ("at 50 % load", "wake-up", "50 % load", "p99_ms", "ms", True),
            ]),
        }  # fmt: skip
        found = {}
        for name, (title, panels) in drawn.items():
            made = [self._panel(*panel) for panel in panels]
            if shown := [panel for panel in made if panel["bars"]]:
                found[name] = {"title": title, "panels": shown}
        return found

    def _panel(
        self, title: str, measure: str, variant: str, figure: str | tuple[str, ...], unit: str, log: bool
    ) -> Bars:
        names = (figure,) if isinstance(figure, str) else figure
        bars = []
        for peer in self._peers.values():
            each = [self._results.values(measure, peer.name, variant, name) for name in names]
            values = [sum(parts) for parts in zip(*each, strict=False)]
            if values:
                bars.append(
                    {
                        "label": peer.title,
                        "low": min(values),
                        "middle": statistics.median(values),
                        "high": max(values),
                        "ours": peer.is_ours,
                    }
                )
        bars.sort(key=lambda bar: bar["middle"], reverse=unit == "jobs/s")
        return {"title": title, "log": log, "unit": unit, "bars": bars}

    # Tables -------------------------------------------------------------------------------------------------

    def _machine(self) -> str:
        measured = [self._results.facts(each) for each in ("drain", "enqueue")]
        facts = next((each for each in measured if each), None)
        if facts is None:
            return NOTHING
        cpu, server = facts["cpu"] or "unknown", facts["server_version"]
        return (
            f"{facts['date'][:10]}; {facts['cpus']} CPUs ({cpu}), {facts['memory_gb']} GB, {facts['system']};"
            f" PostgreSQL {server}, fsync {facts['fsync']},"
            f" synchronous_commit {facts['synchronous_commit']}, shared_buffers {facts['shared_buffers']};"
            f" Python {facts['python']}, psycopg {facts['psycopg']}."
            " The server, the worker and the producers share the CPUs."
        )

    def _targets(self) -> str:
        rows = []
        for target in tomllib.loads((HERE / "targets.toml").read_text())["target"]:
            values = self._reached(target)
            rows.append(
                [
                    target["name"],
                    _limit(target, "must"),
                    _limit(target, "aim"),
                    _middle(values),
                    _verdict(target, values),
                ]
            )
        return _markdown(["target", "must", "aim", "is", "verdict"], rows)

    def _reached(self, target: dict[str, Any]) -> list[float]:
        measure, variant, figure = target["measure"], target["variant"], target["figure"]
        if "over" in target:
            return self._results.shares(measure, OURS, variant, target["over"], figure)
        if "against" not in target:
            return self._results.values(measure, OURS, variant, figure)
        theirs = target.get("their_variant", variant)
        ratios = self._results.ratios(measure, target["against"], theirs, figure, our_variant=variant)
        return [1 / ratio for ratio in ratios if ratio]

    def _drain(self) -> str:
        rows = []
        for history in ("on", "off"):
            variant = f"history {history}"
            for peer in self._measured("drain", variant):
                rows.append(
                    [
                        _label(peer),
                        "kept" if history == "on" else "–",
                        self._value("drain", peer, variant, "jobs_per_s"),
                        self._ratio("drain", peer, variant, "jobs_per_s"),
                        self._value("drain", peer, variant, "worker_us"),
                        self._value("drain", peer, variant, "server_us"),
                        self._short("drain", peer, variant, "wal_bytes"),
                        self._short("drain", peer, variant, "transactions"),
                    ]
                )
        heads = ["", "history", "jobs/s", "to ours", "µs worker", "µs server", "WAL bytes", "transactions"]
        return _markdown(heads, rows)

    def _pools(self) -> str:
        rows = [
            [
                f"`{variant}`",
                *(
                    self._of(OURS, "pools", variant, name)
                    for name in ("jobs_per_s", "worker_us", "server_us")
                ),
            ]
            for variant in self._results.variants("pools", OURS)
        ]
        return _markdown(["pool", "jobs/s", "µs worker", "µs server"], rows)

    def _enqueue(self, *, served: bool) -> str:
        modes = [
            f"{mode}, {clients}"
            for mode in ("single", "transaction", "bulk")
            for clients in ("1 client", "64 clients")
        ]
        rows = []
        for peer in self._peers.values():
            variants = [f"{mode}, with a worker" if served else mode for mode in modes]
            cells = [self._with_ratio("enqueue", peer, variant, "jobs_per_s") for variant in variants]
            if any(cell != "–" for cell in cells):
                rows.append([_label(peer), *cells])
        heads = [
            "jobs/s (to ours)",
            "single, 1",
            "single, 64",
            "in a transaction, 1",
            "64",
            "bulk, 1",
            "bulk, 64",
        ]
        return _markdown(heads, rows)

    def _wake_up(self) -> str:
        variants = ["1 jobs/s", "50 jobs/s", "1,000 jobs/s", "50 % load"]
        rows = []
        for peer in self._peers.values():
            cells = []
            for variant in variants:
                each = [self._short("wake-up", peer, variant, f"p{part}_ms") for part in (50, 95, 99)]
                cell = "–" if "–" in each else " / ".join(each)
                cells.append(cell + self._to_ours("wake-up", peer, variant, "p50_ms", "p99_ms"))
            if any(cell != "–" for cell in cells):
                rows.append([_label(peer), *cells])
        return _markdown(["p50 / p95 / p99 in ms (p50 / p99 to ours)", *variants], rows)

    def _args(self) -> str:
        rows = []
        for variant in ("1 KiB", "100 KiB"):
            for peer in self._measured("args", variant):
                figures = ("enqueued_per_s", "jobs_per_s")
                cells = [self._with_ratio("args", peer, variant, figure) for figure in figures]
                wal = [
                    self._short("args", peer, variant, name) for name in ("enqueue_wal_bytes", "wal_bytes")
                ]
                rows.append([_label(peer), variant, *cells, " + ".join(wal)])
        return _markdown(
            ["", "argument", "in bulk/s (to ours)", "drain/s (to ours)", "WAL bytes, in + out"], rows
        )

    def _idle(self) -> str:
        rows = []
        for peer in self._peers.values():
            idle = [
                self._short("idle", peer, "", name)
                for name in ("transactions_per_s", "worker_cpu_ms_per_s", "server_cpu_ms_per_s")
            ]
            memory = [self._short("memory", peer, "", name) for name in ("worker_mb", "each_more_mb")]
            if any(cell != "–" for cell in (*idle, *memory)):
                rows.append([_label(peer), *idle, *memory])
        heads = ["", "transactions/s", "CPU ms/s, worker", "CPU ms/s, server", "MB", "MB for each more"]
        return _markdown(heads, rows)

    def _startup(self) -> str:
        variants = self._results.variants("startup", OURS)
        figures = ("beyond_ms", "beyond_cpu_ms")
        rows = [
            [f"`{name}`", *(self._of(OURS, "startup", name, figure) for figure in figures)]
            for name in variants
        ]
        return _markdown(["", "ms beyond Python's start", "ms of CPU"], rows)

    def _settings(self) -> str:
        rows = [
            [_label(peer), " ".join(peer.settings.split()), " ".join(peer.gives_up.split()) or "–"]
            for peer in self._peers.values()
        ]
        return _markdown(["", "settings", "gives up for it"], rows)

    def _own(self, measure: str) -> Callable[[], str]:
        """One of own.py's measures: a row per figure, a column per case."""

        def table() -> str:
            found = self._results.variants(measure, OURS).get("", {})
            cells: dict[str, dict[str, Any]] = {}
            for path, value in found.items():
                kind, *rest = path.split(" / ")
                if kind in ("runs", "sizes"):
                    cells.setdefault(" / ".join(rest[1:]), {})[rest[0]] = value
            cases = list(dict.fromkeys(case for each in cells.values() for case in each))
            rows = [
                [_figure_name(figure), *(_spread(each.get(case)) for case in cases), _spread(ratio)]
                for figure, each in cells.items()
                for ratio in [found.get(f"ratio / {figure.removesuffix(' / rate')}")]
            ]
            return _markdown(["", *(_case_name(case, found) for case in cases), "ratio"], rows)

        return table

    # Cells --------------------------------------------------------------------------------------------------

    def _measured(self, measure: str, variant: str) -> Iterable[Peer]:
        """Peers that have it, the fastest first."""
        speeds = {
            peer.name: statistics.median(values)
            for peer in self._peers.values()
            if (values := self._results.values(measure, peer.name, variant, "jobs_per_s"))
        }
        return (self._peers[name] for name in sorted(speeds, key=lambda name: -speeds[name]))

    def _of(self, name: str, measure: str, variant: str, figure: str) -> str:
        return _middle(self._results.values(measure, name, variant, figure))

    def _value(self, measure: str, peer: Peer, variant: str, figure: str) -> str:
        return self._of(peer.name, measure, variant, figure)

    def _short(self, measure: str, peer: Peer, variant: str, figure: str) -> str:
        values = self._results.values(measure, peer.name, variant, figure)
        return _number(statistics.median(values)) if values else "–"

    def _ratio(self, measure: str, peer: Peer, variant: str, figure: str) -> str:
        return _middle(self._results.ratios(measure, peer.name, variant, figure))

    def _with_ratio(self, measure: str, peer: Peer, variant: str, figure: str) -> str:
        return self._short(measure, peer, variant, figure) + self._to_ours(measure, peer, variant, figure)

    def _to_ours(self, measure: str, peer: Peer, variant: str, *figures: str) -> str:
        """Behind a cell: the medians of the ratios, nothing where there is none."""
        each = [self._results.ratios(measure, peer.name, variant, figure) for figure in figures]
        medians = [_number(statistics.median(ratios)) for ratios in each if ratios]
        return f" ({' / '.join(medians)})" if medians else ""


def _label(peer: Peer) -> str:
    return f"**{peer.title}**" if peer.is_ours else peer.title


def _number(value: float) -> str:
    if abs(value) >= 100:
        return f"{value:,.0f}"
    if abs(value) >= 10:
        return f"{value:.0f}" if value == int(value) else f"{value:.1f}"
    return f"{value:.2f}"


def _middle(values: Sequence[float]) -> str:
    """Median, with minimum and maximum where there are several."""
    if not values:
        return "–"
    if len(values) == 1:
        return _number(values[0])
    return f"{_number(statistics.median(values))} ({_number(min(values))}–{_number(max(values))})"


def _spread(value: Any) -> str:
    """A figure of all rounds; of samples, p50 and p99 of them all."""
    values = [value] if isinstance(value, (int, float)) else list(value or [])
    if not values or not isinstance(values[0], list):
        return _middle(values)
    samples = sorted(each for some in values for each in some)
    return f"{_number(percentile(samples, 0.5))}, p99 {_number(percentile(samples, 0.99))}"


def _figure_name(path: str) -> str:
    name, *rest = path.removesuffix(" / rate").replace("_us", " µs").replace("_ms", ", ms").split(" / ")
    kind = ["jobs/s"] if path.endswith(" / rate") else []
    return ", ".join(
        [name.replace("_", " "), *(f"`{each}`" if "_" in each else each for each in rest), *kind]
    )


def _case_name(case: str, figures: dict[str, Any]) -> str:
    return CASES[case].format_map(figures) if case in CASES else f"{int(case):,} waiting"


def _limit(target: dict[str, Any], name: str) -> str:
    sign = "≤" if target.get("better") == "lower" else "≥"
    return f"{sign} {target[name]:,}" if name in target else "–"


def _verdict(target: dict[str, Any], values: Sequence[float]) -> str:
    if not values:
        return "not measured"
    value = statistics.median(values)

    def reaches(limit: float) -> bool:
        return value <= limit if target.get("better") == "lower" else value >= limit

    if "aim" in target and reaches(target["aim"]):
        return "aim met"
    if "must" not in target:
        return "aim not met"
    return "met" if reaches(target["must"]) else "**not met**"


def _markdown(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    if not rows:
        return NOTHING
    head, *lines = ("| " + " | ".join(line) + " |" for line in (heads, *rows))
    return "\n".join([head, "|" + "---|" * len(heads), *lines])


def _image(name: str, figure: dict[str, Any]) -> str:
    return f"![{figure['title']}](img/{name})"


def write(results: Results, *, stdout: bool = False) -> int:
    """Put the tables into the page and draw the plots; or print the tables."""
    made = Report(results)
    figures = made.figures()
    page = PAGE.read_text(encoding="utf-8")
    images = {Path(name).stem: _image(name, figure) for name, figure in figures.items()}

    def fill(match: re.Match[str]) -> str:
        name = match["name"]
        text = made.table(name)
        if name in images:
            text = f"{images[name]}\n\n{text}"
        if name == "drain" and "cpu" in images:
            text = f"{text}\n\n{images['cpu']}"
        return f"{match[1]}{text}\n{match[3]}"

    if stdout:
        for match in MARKED.finditer(page):
            print(f"## {match['name']}\n\n{made.table(match['name'])}\n")
        return 0
    try:
        python = environment("report", HERE / "requirements.txt")
    except PeerError as error:
        print(f"bench: {error}", file=sys.stderr)
        return 1
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder) / "figures.json"
        data.write_text(json.dumps(figures))
        subprocess.run([str(python), str(HERE / "plots.py"), str(data), str(IMAGES)], check=True)
    PAGE.write_text(MARKED.sub(fill, page), encoding="utf-8")
    print(f"bench: wrote {PAGE.relative_to(HERE.parent)} and {len(figures)} plots", file=sys.stderr)
    return 0
