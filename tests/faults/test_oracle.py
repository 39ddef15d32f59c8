"""The judge itself: what it must not hold against the queue, and what it must."""

from __future__ import annotations

from typing import Any

from tests.faults.oracle import Verdict, _judge_changes, _Runs

CLAIMED = [("INSERT", None, "ready", 0), ("UPDATE", "ready", "running", 1), ("DELETE", "running", None, None)]
REPEATED = [("INSERT", None, "ready", 0), ("DELETE", "ready", None, None)]
RAN = {"event": "start", "job": "j", "attempt": 1, "at": 1.0, "worker": "w", "pid": 1}


def broken(changes: list[tuple[str, str | None, str | None, int | None]], *runs: dict[str, Any]) -> list[str]:
    verdict = Verdict()
    columns = ("act", "state_before", "state_after", "attempt_after")
    rows = [{"job": "j", **dict(zip(columns, change, strict=True))} for change in changes]
    _judge_changes(verdict, rows, _Runs(list(runs)))
    return verdict.broken


def test_an_enqueue_repeated_after_the_end_forgets_no_claim() -> None:
    assert broken([*CLAIMED, *REPEATED], RAN) == []


def test_a_run_that_nobody_claimed_is_named() -> None:
    assert broken(REPEATED, RAN) == ["5: job j ran as attempt 1, claimed 0 times"]
    assert broken(CLAIMED, RAN, {**RAN, "attempt": 2}) == ["5: job j ran as attempt 2, claimed 1 times"]


def test_a_change_off_the_diagram_is_named() -> None:
    (said,) = broken(
        [("INSERT", None, "ready", 0), ("DELETE", "ready", None, None), ("INSERT", None, "running", 0)]
    )
    assert "went from None to running" in said
