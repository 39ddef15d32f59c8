"""The table of docs/reliability.md: what each fault cost, written by the run that caused it."""

from __future__ import annotations

import fcntl
from pathlib import Path

from tests.faults.oracle import Verdict

PAGE = Path(__file__).parents[2] / "docs" / "reliability.md"
BEGIN, END = "<!-- faults: begin -->", "<!-- faults: end -->"
HEAD = (
    "| fault | jobs | lost | duplicated | stale acks rejected | recovery, s |",
    "|---|---:|---:|---:|---:|---:|",
)


class Report:
    """The verdicts of one run, by fault."""

    def __init__(self) -> None:
        self._rows: dict[str, Verdict] = {}

    def add(self, fault: str, verdict: Verdict) -> None:
        """Keep the verdict on a fault, described in a few words; of several the worst figures."""
        known = self._rows.get(fault)
        if known is not None:
            verdict = Verdict(
                jobs=known.jobs + verdict.jobs,
                lost=known.lost + verdict.lost,
                duplicated=known.duplicated + verdict.duplicated,
                stale=known.stale + verdict.stale,
                recovery=max(known.recovery, verdict.recovery),
            )
        self._rows[fault] = verdict

    def lines(self) -> list[str]:
        """The rows, as Markdown."""
        return [
            f"| {fault} | {v.jobs:,} | {v.lost} | {v.duplicated} | {v.stale} | {v.recovery:.1f} |"
            for fault, v in self._rows.items()
        ]

    def write(self) -> None:
        """Put the rows of this run into the page; rows of faults that did not run stay."""
        with PAGE.open() as page:
            fcntl.flock(page, fcntl.LOCK_EX)  # several processes may share one run
            self._write()

    def _write(self) -> None:
        text = PAGE.read_text()
        before, rest = text.split(BEGIN)
        old, after = rest.split(END)
        rows = {
            line.split("|")[1].strip(): line
            for line in old.splitlines()
            if line.startswith("| ") and line != HEAD[0]
        }
        rows |= {line.split("|")[1].strip(): line for line in self.lines()}
        table = "\n".join([*HEAD, *(rows[fault] for fault in sorted(rows))])
        PAGE.write_text(f"{before}{BEGIN}\n{table}\n{END}{after}")
