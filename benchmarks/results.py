"""What has been measured, a JSON file per measure, written as it comes.

    {"measure": "drain", "runs": [{"peer": "pgqueuer", "round": 1, "at": "…", "beside": ["…", "…"],
      "title": "PgQueuer 1.6.0", "facts": {…}, "variants": {"history on": {"jobs_per_s": 25700.0}}}]}

`at` names a run. A peer's run names those of ours that stood before and after it.
"""

from __future__ import annotations

import json
import os
import statistics
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from benchmarks.peer import OURS, Peer


class Results:
    """The files of a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def runs(self, measure: str) -> list[dict[str, Any]]:
        """All of a measure, in the order in which they were taken."""
        path = self._path(measure)
        return list(json.loads(path.read_text())["runs"]) if path.exists() else []

    def has(self, measure: str, peer: str, number: int) -> bool:
        """It has been measured in that round."""
        return any(run["peer"] == peer and run["round"] == number for run in self.runs(measure))

    def rounds(self, measure: str, peer: str) -> int:
        """In how many rounds."""
        return len({run["round"] for run in self.runs(measure) if run["peer"] == peer})

    def add(
        self,
        measure: str,
        peer: Peer,
        number: int,
        variants: dict[str, Any],
        beside: Sequence[str],
        facts: dict[str, Any],
    ) -> dict[str, Any]:
        """Keep a run, and return it as it is kept."""
        run = {
            "peer": peer.name,
            "title": peer.title,
            "round": number,
            "at": datetime.now(UTC).isoformat(timespec="milliseconds"),
            "beside": list(beside),
            "facts": facts,
            "variants": variants,
        }
        self._write(measure, [*self.runs(measure), run])
        return run

    def forget(self, turns: Iterable[tuple[str, str, int]]) -> None:
        """Drop these (measure, peer, round); of ours only what no other peer's run stands beside."""
        gone = set(turns)
        for measure in {each[0] for each in gone}:
            runs = self.runs(measure)
            kept = [run for run in runs if (measure, run["peer"], run["round"]) not in gone]
            needed = {at for run in kept for at in run["beside"]}
            kept = [run for run in runs if run in kept or run["at"] in needed]
            self._write(measure, kept)

    def values(self, measure: str, peer: str, variant: str, figure: str) -> list[float]:
        """A figure in all runs of a peer that have it; all values of one that is a list."""
        found: list[float] = []
        for run in self.runs(measure):
            value = _figure(run["variants"], variant, figure) if run["peer"] == peer else None
            found += value if isinstance(value, list) else [] if value is None else [value]
        return found

    def ratios(
        self, measure: str, peer: str, variant: str, figure: str, *, our_variant: str | None = None
    ) -> list[float]:
        """Theirs through ours, run by run: the peer's divided by the mean of ours before and after it.

        Args:
            our_variant: Of ours, where it is another one than theirs.
        """
        runs = self.runs(measure)
        ours = {run["at"]: run["variants"] for run in runs if run["peer"] == OURS}
        found = []
        for run in runs:
            theirs = _figure(run["variants"], variant, figure) if run["peer"] == peer else None
            values = [_figure(ours[at], our_variant or variant, figure) for at in run["beside"] if at in ours]
            beside = [value for value in values if value is not None]
            if theirs is not None and beside:
                found.append(theirs / statistics.fmean(beside))
        return found

    def shares(self, measure: str, peer: str, variant: str, of: str, figure: str) -> list[float]:
        """One variant's figure divided by another's, run by run."""
        found = []
        for run in self.runs(measure):
            part, whole = (_figure(run["variants"], each, figure) for each in (variant, of))
            if run["peer"] == peer and part is not None and whole:
                found.append(part / whole)
        return found

    def facts(self, measure: str) -> dict[str, Any]:
        """Of the machine and the server, as the last run saw them."""
        runs = self.runs(measure)
        return dict(runs[-1]["facts"]) if runs else {}

    def variants(self, measure: str, peer: str) -> dict[str, Any]:
        """The last run's, to see what there is."""
        runs = [run for run in self.runs(measure) if run["peer"] == peer]
        return dict(runs[-1]["variants"]) if runs else {}

    def _path(self, measure: str) -> Path:
        return self.folder / f"{measure}.json"

    def _write(self, measure: str, runs: Sequence[dict[str, Any]]) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        scratch = self.folder / f".{measure}.new"
        scratch.write_text(json.dumps({"measure": measure, "runs": runs}, indent=1) + "\n")
        os.replace(scratch, self._path(measure))


def _figure(variants: dict[str, Any], variant: str, figure: str) -> Any:
    """None where the peer has no such variant, or not this figure in it."""
    figures = variants.get(variant)
    return figures.get(figure) if isinstance(figures, dict) else None
