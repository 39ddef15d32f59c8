"""Which stretches of the schedule a worker looks through for jobs that are due.

As lanes do it, with times in the place of positions: from a cursor on, because the entries of jobs that were
promoted may stay in the index for as long as somebody holds an old snapshot. A job is scheduled for later
than the moment it is written in; so once a transaction id was taken at some time, and every transaction with
a smaller one has ended, no job will appear that is due before that time. Where clocks were set back, or plain
SQL has written something else, the rounds through the whole past find it.

Pure values: nothing here talks to the database or reads a clock.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from pgqueue.database.link import Call
from pgqueue.worker.lanes import PACE, Cursor, Rounds

BATCH = 500
SWEEP_INTERVAL = 5.0
DEAR = 0.002
"""Seconds of server time for a look from the trailing cursor above which it is made more rarely, and looks
take a transaction id, so that the cursors follow also where others promote the jobs."""
SLACK = 1.0
"""Seconds before the present that the leading cursor keeps without having promoted anything."""
LATE_INTERVAL = 1.0
"""Seconds after which jobs that came late are looked for while more than a batch is due all the time."""
GIVEN_UP = 60.0
_ROW = 30e-6
"""Seconds that promoting a job takes, about."""
_TIMEOUTS = Call("set_timeouts", {"statement_timeout": "2s", "lock_timeout": "2s"})


@dataclass(frozen=True, slots=True)
class Promoted:
    """What came of the looks.

    Attributes:
        more: There may be more at once.
        next_in: Seconds until the next job is due.
    """

    count: int
    queues: list[str]
    more: bool
    next_in: float | None


class Promotion:
    """The eta cursors of one supervisor."""

    def __init__(self) -> None:
        self._etas = Cursor()
        self._etas.trailer = float("-inf")
        self._rounds = Rounds(float("-inf"), SWEEP_INTERVAL, grain=0.1)
        self._present = 0.0
        self._dear = False
        self._bursting = False
        self._trail_at = float("-inf")
        self._after: float | None = None
        self._trails = False
        self._whole = False
        self._window = False

    @property
    def at(self) -> float:
        """When a round through the past that has begun goes on."""
        return self._rounds.at if self._rounds.under_way else float("inf")

    def groups(self, now: float) -> list[list[Call]]:
        """What to ask now: a transaction for each look, for `absorb` or, when one was refused, `gave_up`."""
        leader = self._etas.leader or None
        window = self._rounds.window(now)
        self._whole = window is not None and self._rounds.whole and not self._bursting
        self._window = window is not None and not self._rounds.whole and leader is not None
        self._trails = self._whole or (now >= self._trail_at if self._dear or self._bursting else True)
        self._after = float("-inf") if self._whole else self._etas.trailer if self._trails else leader
        mark = self._dear or leader is None
        looks: list[tuple[float | None, float | None, bool]] = [(self._after, None, mark)]
        if window is not None and self._window:
            looks.append((window[0], leader if window[1] is None else window[1], False))
        common = {"now": None, "batch": BATCH}
        return [
            [_TIMEOUTS, Call("promote_jobs", {"after": after, "upto": upto, "mark": mark, **common})]
            for after, upto, mark in looks
        ]

    def gave_up(self, now: float, group: int) -> None:
        """This look took too long."""
        if self._whole or group > 0:
            self._rounds.failed(now, self._present or 2e9)
        if group == 0:
            self._dear, self._trail_at = True, now + GIVEN_UP

    def absorb(self, now: float, answers: Sequence[Sequence[Sequence[tuple[Any, ...]]]]) -> Promoted:
        """Take in the answers of `groups`: of all, or of those before one that was refused."""
        promoted, queues, last_eta, xmin, xmax, took, present, next_in = answers[0][-1][0]
        etas, after, full, self._present = self._etas, self._after, promoted >= BATCH, present
        cost = max(took - promoted * _ROW, 0.0)
        marked = self._dear or not etas.leader
        if full and last_eta < etas.leader:
            etas.rewind(last_eta)  # so many came late: on from there
        if promoted:
            etas.lead(last_eta, xmax)
        if full:
            etas.covered(float("inf") if after is None else after, last_eta, xmin)
            if not self._bursting or self._trails:
                self._trail_at = now + LATE_INTERVAL
            more = self._bursting = True
        else:
            more, self._bursting = self._bursting and not self._trails, False
            if marked:
                etas.lead(present - SLACK, xmax)
            if after is not None:
                etas.covered(after, float("inf"), xmin)
            if self._trails:
                self._dear = cost > DEAR
                self._trail_at = now + PACE * cost
            elif more:
                self._trail_at = now  # what came late during the burst
            if self._whole:
                self._rounds.done(now, cost, present)
        queues = list(queues)
        if self._window and len(answers) > 1:
            also, also_queues, *_, window_took, _, _ = answers[1][-1][0]
            promoted += also
            queues += also_queues
            if also < BATCH:
                self._rounds.done(now, max(window_took - also * _ROW, 0.0), present)
            else:
                more = True
        return Promoted(promoted, sorted(set(queues)), more, next_in)
