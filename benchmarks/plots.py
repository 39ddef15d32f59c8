"""Draws bars with whiskers: `plots.py FIGURES.json FOLDER`; report.py has an environment for it.

{"drain.svg": {"title": "…", "panels": [{"title": "…", "log": true, "unit": "jobs/s",
  "bars": [{"label": "pgqueue", "low": 1.0, "middle": 2.0, "high": 3.0, "ours": true}]}]}}
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("svg")
# The same figures give the same file: no date, no random ids.
matplotlib.rcParams.update(
    {
        "svg.hashsalt": "pgqueue",
        "svg.fonttype": "none",
        "font.family": "sans-serif",
        "font.size": 10,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.spines.left": False,
    }
)
import matplotlib.pyplot as plt  # noqa: E402
from matplotlib.axes import Axes  # noqa: E402
from matplotlib.ticker import FuncFormatter  # noqa: E402

OURS, THEIRS, INK = "#1f6feb", "#9aa7b5", "#24292f"


def draw(figure: dict[str, Any], path: Path) -> None:
    """One file: panels beside each other, bars below each other."""
    panels = figure["panels"]
    rows = max(len(panel["bars"]) for panel in panels)
    shape, axes = plt.subplots(
        1, len(panels), figsize=(3.2 + 3.4 * len(panels), 1.1 + 0.34 * rows), squeeze=False
    )
    for panel, place in zip(panels, axes[0], strict=True):
        _bars(panel, place)
    shape.suptitle(figure["title"], x=0.01, ha="left", fontsize=12, fontweight="bold", color=INK)
    shape.tight_layout()
    shape.savefig(path, metadata={"Date": None}, facecolor="white")
    plt.close(shape)


def _bars(panel: dict[str, Any], axes: Axes) -> None:
    bars = panel["bars"][::-1]
    middles = [bar["middle"] for bar in bars]
    spread = [
        [bar["middle"] - bar["low"] for bar in bars],
        [bar["high"] - bar["middle"] for bar in bars],
    ]
    axes.barh(
        [bar["label"] for bar in bars],
        middles,
        xerr=spread,
        height=0.62,
        color=[OURS if bar["ours"] else THEIRS for bar in bars],
        error_kw={"ecolor": INK, "elinewidth": 1, "capsize": 2.5},
    )
    if panel["log"]:
        axes.set_xscale("log")
        axes.set_xlim(min(bar["low"] for bar in bars) / 2)
    largest = max(bar["high"] for bar in bars)
    for row, bar in enumerate(bars):
        end = bar["high"] * 1.12 if panel["log"] else bar["high"] + 0.02 * largest
        axes.text(end, row, _number(bar["middle"]), va="center", fontsize=9, color=INK)
    axes.set_xlim(right=largest * (3.5 if panel["log"] else 1.22))
    axes.set_title(panel["title"], loc="left", fontsize=10, color=INK)
    axes.set_xlabel(panel["unit"], fontsize=9)
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: _number(value)))
    axes.xaxis.set_minor_formatter(FuncFormatter(lambda value, _: ""))
    axes.tick_params(axis="y", length=0)
    axes.grid(axis="x", color="#d8dee4", linewidth=0.6)
    axes.set_axisbelow(True)


def _number(value: float) -> str:
    if value >= 100:
        return f"{value:,.0f}"
    return f"{value:.3g}"


def main() -> None:
    """Draw all."""
    folder = Path(sys.argv[2])
    folder.mkdir(parents=True, exist_ok=True)
    for name, figure in json.loads(Path(sys.argv[1]).read_text()).items():
        draw(figure, folder / name)


if __name__ == "__main__":
    main()
