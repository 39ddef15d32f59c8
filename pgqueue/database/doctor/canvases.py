"""The check of canvases that can never end: nobody will tell what waits in them to go on."""

from __future__ import annotations

import re
import time
from collections import Counter
from collections.abc import Sequence
from typing import Final

from pgqueue.database.doctor.report import Finding, number, some
from pgqueue.database.doctor.visit import Seen, Visit
from pgqueue.database.session import Row
from pgqueue.database.stats import list_worker_facts
from pgqueue.errors import SchemaMismatch

SINCE: Final = "0011"
COUNTED: Final = 5_000
"""Rows looked at from either end of an index, and listed; with a million nodes 0.25 s."""
FIRST: Final = 100
"""Ends watched: a heartbeat passes on a thousand, the first ones first."""
UNATTENDED: Final = 1.0
"""Seconds an end may wait when no worker is alive: whoever cancels or deletes may be about to pass it on."""
HEARTBEAT: Final = 5.0
SLACK: Final = 3.0
LONGEST: Final = 30.0
"""Seconds to watch at most, however rarely the workers beat."""
PAUSE: Final = 0.1
NAMED: Final = 10
"""Jobs named in a command."""
FIX_FOR: Final = 60.0
"""Seconds after which --fix leaves the rest to workers, or to another --fix."""


def check_canvases(visit: Visit) -> Seen:
    """Whether each canvas has somebody who takes it on."""
    if (visit.revision or "") < SINCE:
        raise SchemaMismatch(f"canvases need revision {SINCE} of the schema; run `pgqueue migrate`")
    findings = [*_judge_lost(visit), *_judge_ends(visit), *_judge_stranded(visit)]
    return "nothing waits for what will never come", findings


def _judge_lost(visit: Visit) -> list[Finding]:
    rows = _lost(visit)
    if not rows:
        return []
    kept = sum(row["found"] is not None for row in rows)
    rest = f"history has the end of {number(kept, 'job')}" if kept else "history has no end of them"
    return [
        Finding(
            "error",
            f"{_counted(rows, 'job')} of {_canvases(rows)} are neither in jobs nor noted as ended; {rest}",
            "what waits for them waits for ever: they were taken away past the triggers, as by TRUNCATE or "
            "a restore of one table; --fix notes the ends that history has, and cancels the others",
            visit.command("doctor", "--only", "canvases", "--fix"),
            "lost",
            _facts(rows) | {"in_history": kept},
            fixable=True,
            act=lambda: _end_lost(visit),
        )
    ]


def _judge_ends(visit: Visit) -> list[Finding]:
    """Ends that stay as they are while one looks. Of live workers each heartbeat passes them on."""
    left = {row["id"] for row in _unpassed(visit, FIRST)}
    if not left:
        return []
    live = visit.live
    began = time.monotonic()
    patience = _patience(visit) if live else UNATTENDED
    while time.monotonic() < began + patience:
        time.sleep(PAUSE)
        left &= {row["id"] for row in _unpassed(visit, FIRST)}
        if not left:
            return []
    rows = _unpassed(visit, COUNTED)
    older = sorted({each.version for each in live if _release(each.version) < _release(visit.release)})
    if not live:
        who = "no live worker is there to do it"
    elif len(older) == len({each.version for each in live}):
        who = (
            f"all live workers are of release {some(older)}, before this one ({visit.release}), and do not "
            "know how if that has no canvases"
        )
    else:
        who = "workers are alive and should have done it; look for canvas_not_settled in their logs"
    return [
        Finding(
            "error" if live else "warning",
            f"{_counted(rows, 'end')} in {_canvases(rows)} wait to be passed on, the first for over "
            f"{patience:.0f} s",
            f"what waits for them does not go on: {who}",
            f"SELECT {visit.schema}.settle_canvases()   -- and, so that somebody goes on doing it: "
            f"{visit.worker_command}",
            "ends",
            _facts(rows) | {"versions": sorted({each.version for each in live})},
            fixable=True,
            act=lambda: _settle(visit),
        )
    ]


def _judge_stranded(visit: Visit) -> list[Finding]:
    rows = visit.read("find_stranded_jobs", by_index=True, most=COUNTED)
    if not rows:
        return []
    reasons = [f"{count:,} {why}" for why, count in Counter(row["why"] for row in rows).most_common()]
    named = [row["id"] for row in rows[:NAMED]]
    rest = "" if len(rows) <= NAMED else "   # and the others: --json has a thousand"
    return [
        Finding(
            "error",
            f"{_counted(rows, 'blocked job')} will never be released: {some(reasons, 5)}",
            "rows of canvas_nodes were changed or taken away by hand, or one table was restored alone",
            visit.command("job", "cancel", *named) + rest,
            "stranded",
            _facts(rows) | {"reasons": dict(Counter(row["why"] for row in rows))},
        )
    ]


def _lost(visit: Visit) -> list[Row]:
    return visit.read("find_lost_nodes", by_index=True, most=COUNTED)


def _unpassed(visit: Visit, most: int) -> list[Row]:
    return visit.read("find_unpassed_ends", by_index=True, most=most)


def _patience(visit: Visit) -> float:
    """Seconds in which one of the live workers has beaten twice."""
    live = {each.id for each in visit.live}
    said = [facts.conf.get("heartbeat") for facts in list_worker_facts(visit.session) if facts.id in live]
    beats = [float(each) for each in said if isinstance(each, int | float)]
    return min(2 * min(beats, default=HEARTBEAT) + SLACK, LONGEST)


def _release(version: str) -> tuple[int, ...]:
    """`0.12.1` as numbers that compare; what is no version is older than all."""
    return tuple(int(part) for part in re.findall(r"\d+", version)[:3])


def _counted(rows: Sequence[Row], noun: str) -> str:
    return f"{'at least ' if len(rows) >= COUNTED else ''}{number(len(rows), noun)}"


def _canvases(rows: Sequence[Row]) -> str:
    """`canvas 0190…`, or how many."""
    named = {row["canvas"] for row in rows}
    return f"canvas {next(iter(named))}" if len(named) == 1 else f"{len(named):,} canvases"


def _facts(rows: Sequence[Row]) -> dict[str, object]:
    canvases = list(dict.fromkeys(row["canvas"] for row in rows if row["canvas"] is not None))
    return {"count": len(rows), "ids": [row["id"] for row in rows[:1000]], "canvases": canvases[:1000]}


def _end_lost(visit: Visit) -> str | None:
    """Note the ends of all lost jobs, and pass them on."""
    until = time.monotonic() + FIX_FOR
    while rows := _lost(visit):
        ended = visit.read("end_lost_nodes", by_index=True, ids=[row["id"] for row in rows])
        if not ended or time.monotonic() > until:
            break  # somebody holds them, or there are very many
    return _settle(visit)


def _settle(visit: Visit) -> str | None:
    """Pass on all ends but those that somebody else has in hand; what is left undone."""
    until = time.monotonic() + FIX_FOR
    ids: str | None = None
    before: list[Row] = []
    while True:
        (row,) = visit.read("settle_canvases", ids=ids)
        ids = row["left_over"]
        if ids is None:
            first = _unpassed(visit, 1)
            if not first or first == before:
                return None
            before = first
        if time.monotonic() > until:
            break
    return f"not all ends were passed on in {FIX_FOR:.0f} s; workers do the rest, or another --fix"
