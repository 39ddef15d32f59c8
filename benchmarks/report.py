"""docs/performance.md's tables and docs/img's plots from the results."""

from __future__ import annotations

from benchmarks.results import Results


def write(results: Results, *, stdout: bool = False) -> int:
    """Nothing yet."""
    return 0
