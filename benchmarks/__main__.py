"""Benchmarks against peers: pgqueue and others, each at its authors' best settings, on one PostgreSQL.

Speeds of one machine drift by a third within an hour, so read the ratios: each peer's run stands between
two of ours. Results are kept as they come, in JSON; what is there already is not measured again.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
import traceback
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks import measures, report
from benchmarks.measures import MEASURES, Measure, Run, Variants
from benchmarks.peer import OURS, Peer, PeerError, cache, find_peers
from benchmarks.results import Results
from benchmarks.server import Server

HERE = Path(__file__).resolve().parent
EXAMPLES = """examples:
  python -m benchmarks list
  python -m benchmarks run --quick --peers bare pgqueuer --measures drain enqueue
  python -m benchmarks run                          # everything, three rounds: hours
  python -m benchmarks run --peers celery-redis     # what is missing of it
  python -m benchmarks run --measures drain --again --rounds 5
  python -m benchmarks report                       # docs/performance.md and docs/img from the results
  make bench PEERS="pgqueuer celery-redis" MEASURES="drain wake-up"
"""


@dataclass(frozen=True)
class Turn:
    """One peer's turn at a measure in a round."""

    measure: Measure
    peer: Peer
    round: int


class Progress:
    """Says on stderr what runs, and how long the rest may take."""

    def __init__(self, nominal: float) -> None:
        self._left = nominal
        self._done = 0.0
        self._started = time.monotonic()

    def say(self, text: str) -> None:
        elapsed = time.monotonic() - self._started
        # As much slower or faster than guessed as it has been so far.
        pace = elapsed / self._done if self._done else 1.0
        print(
            f"[{_clock(elapsed)}, about {_clock(self._left * pace)} left] {text}", file=sys.stderr, flush=True
        )

    def advance(self, nominal: float) -> None:
        self._left = max(0.0, self._left - nominal)
        self._done += nominal


def _clock(seconds: float) -> str:
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


class Session:
    """A call of `run`: the server, the peers' commands, the results."""

    def __init__(self, server: Server, results: Results, options: argparse.Namespace, commands: Any) -> None:
        self._server = server
        self._results = results
        self._commands = commands
        self._scale = 0.1 if options.quick else 1.0
        self._facts = server.facts()
        self._failed: list[str] = []

    def work(self, turns: Sequence[Turn], ours: Peer) -> list[str]:
        """Take the turns, with runs of ours between them; returns what went wrong."""
        self._progress = Progress(self._nominal(turns))
        groups: dict[tuple[int, str], list[Turn]] = {}
        for turn in turns:
            groups.setdefault((turn.round, turn.measure.name), []).append(turn)
        for group in groups.values():
            if group[0].measure.compared:
                self._compare(group, ours)
            else:
                for turn in group:
                    self._take(turn)
        return self._failed

    def _nominal(self, turns: Sequence[Turn]) -> float:
        twice = [2 if turn.measure.compared and turn.peer.name != OURS else 1 for turn in turns]
        return (
            sum(turn.measure.nominal * times for turn, times in zip(turns, twice, strict=True)) * self._scale
        )

    def _compare(self, group: Sequence[Turn], ours: Peer) -> None:
        """Ours, a peer, ours, a peer, ours: each has a run of ours on both sides."""
        measure, number = group[0].measure, group[0].round
        peers = [turn for turn in group if turn.peer.name != OURS]
        our_turn = Turn(measure, ours, number)
        before = self._take(our_turn)
        for turn in peers:
            found = self._measure(turn)
            after = self._take(our_turn)
            if found is not None:
                beside = [run["at"] for run in (before, after) if run is not None]
                self._keep(turn, found, beside)
            before = after

    def _take(self, turn: Turn) -> dict[str, Any] | None:
        found = self._measure(turn)
        return None if found is None else self._keep(turn, found, [])

    def _measure(self, turn: Turn) -> Variants | None:
        name = f"{turn.measure.name} · {turn.peer.name} · round {turn.round}"
        self._progress.say(name)
        run = Run(self._server, turn.peer, self._commands[turn.peer.name], self._scale)
        try:
            return turn.measure.run(run)
        except Exception as error:  # a run takes hours: what goes wrong for one is told, and the others go on
            if not isinstance(error, PeerError):
                traceback.print_exc()
            self._failed.append(f"{name}: {error}")
            print(f"bench: {name}: {error}", file=sys.stderr, flush=True)
            return None
        finally:
            self._progress.advance(turn.measure.nominal * self._scale)

    def _keep(self, turn: Turn, found: Variants, beside: Sequence[str]) -> dict[str, Any]:
        for variant, figures in found.items():
            print(f"    {turn.peer.name:16} {variant:40} {_shown(figures)}", file=sys.stderr, flush=True)
        return self._results.add(turn.measure.name, turn.peer, turn.round, found, beside, self._facts)


def _shown(figures: Any) -> str:
    if not isinstance(figures, dict):
        return str(figures)
    return "  ".join(f"{name} {_number(value)}" for name, value in figures.items())


def _number(value: Any) -> str:
    if isinstance(value, list):  # of rounds, or of the samples of each round
        if any(isinstance(each, list) for each in value):
            return _number(statistics.median(each for samples in value for each in samples))
        return _number(statistics.median(value)) if value else "–"
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"
    return str(value)


def run(options: argparse.Namespace) -> int:
    """Measure what is missing."""
    all_peers = find_peers()
    peers = [all_peers[name] for name in options.peers or all_peers]
    chosen = [each for each in MEASURES if not options.measures or each.name in options.measures]
    results = Results(options.results or (cache() / "quick" if options.quick else HERE / "results"))
    rounds = options.rounds or (1 if options.quick else 3)
    turns = [
        Turn(measure, peer, number)
        for number in range(1, rounds + 1)
        for measure in chosen
        if number <= (measure.rounds or rounds)
        for peer in peers
        if measure.of == "all" or peer.is_ours
    ]
    if options.again:
        results.forget([(turn.measure.name, turn.peer.name, turn.round) for turn in turns])
    turns = [turn for turn in turns if not results.has(turn.measure.name, turn.peer.name, turn.round)]
    commands = {}
    for peer in dict.fromkeys([*(turn.peer for turn in turns), all_peers[OURS]]):
        try:
            commands[peer.name] = peer.prepare()
        except (PeerError, ModuleNotFoundError) as error:
            print(f"bench: {peer.name} is skipped: {error}", file=sys.stderr, flush=True)
    turns = [turn for turn in turns if turn.peer.name in commands]
    if not turns:
        print("bench: nothing is missing; --again measures anew", file=sys.stderr)
        return 0
    with Server(options.dsn) as server:
        failed = Session(server, results, options, commands).work(turns, all_peers[OURS])
    print(f"bench: results are in {results.folder}", file=sys.stderr)
    for each in failed:
        print(f"bench: failed: {each.splitlines()[0]}", file=sys.stderr)
    return 1 if failed else 0


def show(options: argparse.Namespace) -> int:
    """What there is, and how much of it has been measured."""
    results = Results(options.results or HERE / "results")
    print("measures:")
    for line in (measures.__doc__ or "").split("\n\n")[-1].strip().splitlines():
        print(f"  {line}")
    if others := [each.name for each in MEASURES if each.rounds is not None]:
        print(f"  see benchmarks/own.py: {', '.join(others)}")
    print("\npeers:")
    for peer in find_peers().values():
        rounds = {each.name: results.rounds(each.name, peer.name) for each in MEASURES}
        done = ", ".join(f"{name} {count}" for name, count in rounds.items() if count)
        print(f"  {peer.name:16} {peer.title:32} rounds measured: {done or 'none'}")
    return 0


def write(options: argparse.Namespace) -> int:
    """Tables and plots."""
    results = Results(options.results or HERE / "results")
    return report.write(results, stdout=options.stdout)


def main(arguments: Sequence[str] | None = None) -> int:
    shape = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks", description=__doc__, epilog=EXAMPLES, formatter_class=shape
    )
    commands = parser.add_subparsers(required=True, metavar="run | report | list")
    names = {"peers": list(find_peers()), "measures": [each.name for each in MEASURES]}

    command = commands.add_parser(
        "run",
        help="measure what is missing",
        description=measures.__doc__,
        epilog=EXAMPLES,
        formatter_class=shape,
    )
    command.set_defaults(call=run)
    command.add_argument(
        "--peers", nargs="+", choices=names["peers"], metavar="PEER", help="only these [all]"
    )
    command.add_argument(
        "--measures", nargs="+", choices=names["measures"], metavar="MEASURE", help="only these [all]"
    )
    command.add_argument("--rounds", type=int, help="rounds that there shall be [3; with --quick 1]")
    command.add_argument("--again", action="store_true", help="also what has been measured")
    command.add_argument(
        "--quick", action="store_true", help="a tenth of the size, to see that it works; kept apart"
    )
    command.add_argument("--dsn", help="a server on this machine to make databases on [an embedded one]")
    command.add_argument(
        "--results", type=Path, metavar="DIR", help="where they are kept [benchmarks/results]"
    )

    command = commands.add_parser("report", help="write docs/performance.md's tables and docs/img")
    command.set_defaults(call=write)
    command.add_argument(
        "--results", type=Path, metavar="DIR", help="where they are kept [benchmarks/results]"
    )
    command.add_argument("--stdout", action="store_true", help="print the tables instead, draw nothing")

    command = commands.add_parser("list", help="measures, peers, and what has been measured")
    command.set_defaults(call=show)
    command.add_argument(
        "--results", type=Path, metavar="DIR", help="where they are kept [benchmarks/results]"
    )

    options = parser.parse_args(arguments)
    return int(options.call(options))


if __name__ == "__main__":
    sys.exit(main())
