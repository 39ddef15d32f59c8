"""Where a supervisor looks for work: one lane per (queue, priority), each with a leading and a trailing
cursor.

A claim asks only beyond the position a lane has reached, because the rows before it are gone but their index
entries are not: while any session holds an old snapshot they cannot be cleaned, and a claim from the head
would walk over all of them.

Transactions commit in another order than they take positions, so a row may appear behind the leading cursor
at any time. The trailing cursor bounds where: it stays at a position until no transaction that could still
show an earlier one is open. When the leader reaches p, the id of the claim's own transaction is noted, above
which nobody was writing yet (`pg_snapshot_xmax` would be too low: it is above those that have ended); once a
later snapshot's `xmin` has reached it, everything up to p that will ever be is visible, and a look through it
settles the matter. (An insert takes its transaction id after its position, so one may slip through a gap of
microseconds: the full sweep, every few seconds, finds it.)

Pure values: nothing here talks to the database or reads a clock.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import ceil
from random import Random

START, END = -(2**63), 2**63 - 1
WINDOW = 10_000
"""Positions a trailing scan looks through at most: with every one of them a dead index entry that is about 2
ms."""
TRAILING_INTERVAL = 0.05
SWEEP_INTERVAL = 5.0
QUICK = 0.005
"""Seconds of server time that a look behind the cursors may take; one that takes longer becomes several."""
PARTS = 16
"""Looks that are made of one at most, each round."""
PACE = 20
"""Of the time such a look took: the pause until the next, so that they take a twentieth of a connection's."""
STEP = 250_000
"""Positions of a claim that finds its way through a past that is too much for one: at most 0.1 seconds."""
FAR = 20 * WINDOW
"""Positions between the cursors up to which one look goes through all of them: at most 0.1 seconds."""
SLEEPERS_SHARE = 0.8
"""Of the interval, from which on a look before sleeping sweeps along: the next comes up to five seconds
later."""
MAX_MARKS = 256
QUEUES_PER_CLAIM = 100
"""A thousand lanes cost 9 ms of server time a claim; a worker that serves more queues takes turns."""


class Cursor:
    """A leading and a trailing position in something that is read in order.

    Attributes:
        leader: The highest position taken.
        trailer: Nothing more will appear at or before this position.
    """

    __slots__ = ("_marks", "_settled", "leader", "trailer")

    def __init__(self) -> None:
        self.leader: float = 0
        self.trailer: float = 0
        self._marks: deque[tuple[float, int]] = deque()
        self._settled: float = 0

    def lead(self, position: float, xmax: int) -> None:
        """The leader has reached `position`, in a snapshot whose horizon is `xmax`."""
        self.leader = max(self.leader, position)
        marks = self._marks
        # A mark of a later horizon does not help an earlier position. When too many wait (a writer has been
        # open for long), the newest grows instead: its positions settle later than they could, never earlier.
        if marks and position <= marks[-1][0]:
            return
        if marks and (marks[-1][1] == xmax or len(marks) >= MAX_MARKS):
            marks[-1] = (position, xmax)
        else:
            marks.append((position, xmax))

    def covered(self, after: float, upto: float, xmin: int) -> None:
        """A snapshot with this `xmin` has seen, and taken, all there was in (after, upto]."""
        marks = self._marks
        while marks and marks[0][1] <= xmin:
            self._settled = max(self._settled, marks.popleft()[0])
        if after <= self.trailer:
            self.trailer = max(self.trailer, min(upto, self._settled, self.leader))

    def rewind(self, position: float) -> None:
        """Go on from an earlier position: late rows have filled a batch and must not wait for newer ones."""
        self.leader = position
        self.trailer = min(self.trailer, position)


class Rounds:
    """Looks through all there ever was, again and again: from the end back to the beginning, because what is
    late is late by little.

    One look is enough until it takes too long: then it becomes several, each round better fitted to where the
    dead entries lie; windows that are quick again become one. A window that failed is cut up too, and the
    round goes on from there.

    Attributes:
        at: When the next look is due.
    """

    def __init__(self, beginning: float, interval: float, grain: float) -> None:
        self._beginning = beginning
        self._interval = interval
        self._grain = grain
        self._edges: list[float] = []
        self._upto: float | None = None
        self._began = float("-inf")
        self._last = float("inf")
        self._hurry = False
        self.at = float("-inf")

    @property
    def whole(self) -> bool:
        """A single look goes through all."""
        return not self._edges

    @property
    def under_way(self) -> bool:
        """There is more to look at in this round."""
        return self._upto is not None or self._hurry

    def restart(self) -> None:
        """Look through all of it as soon as possible."""
        self._upto, self.at, self._hurry = None, float("-inf"), True

    def window(self, now: float) -> tuple[float, float | None] | None:
        """The stretch (after, upto] to look at now, None for the end; None if it is not time yet."""
        if now < self.at:
            return None
        if self._upto is None:
            self._began = max(self._began, now)
        return self._after(), self._upto

    def done(self, now: float, took: float, end: float) -> None:
        """The window has been looked through, in so many seconds of server time."""
        after, upto = self._after(), self._upto
        if took > QUICK:
            self._split(end, min(ceil(2 * took / QUICK), PARTS))
        elif upto is not None and took + self._last < QUICK / 2:
            self._edges.remove(upto)
            took += self._last
        self._last = took
        if after == self._beginning:
            self._upto, self._last, self._hurry = None, float("inf"), False
            self.at = max(self._began + self._interval, now + PACE * took)
            self._began = float("-inf")
        else:
            self._upto = after
            self.at = now + (0.0 if self._hurry else PACE * took)

    def may_go_along(self, now: float) -> bool:
        """It is nearly time, and a single look, the last of which took no time, goes through all of it."""
        due = self.at - (1 - SLEEPERS_SHARE) * self._interval
        return self.whole and not self.under_way and float("-inf") < due <= now

    def went_along(self, now: float, took: float, end: float) -> None:
        """A look for something else has gone through all of it."""
        self._began = now
        self.done(now, took, end)

    def failed(self, now: float, end: float) -> None:
        """The look at the window took so long that it was given up."""
        if self._split(end, PARTS):
            self.at = now
        else:
            self.done(now, QUICK, end)  # it cannot be looked at: on with the others

    def _after(self) -> float:
        return max(
            (edge for edge in self._edges if self._upto is None or edge < self._upto), default=self._beginning
        )

    def _split(self, end: float, parts: int) -> bool:
        """On a scale of how far back it is, because most of what is dead died lately; False if it is too
        short.
        """
        after, upto = self._after(), end if self._upto is None else self._upto
        if after == self._beginning and upto > 0:
            after = 0
        near, far = max(end - upto, self._grain), end - after
        between = (
            [end - near * (far / near) ** (part / parts) for part in range(1, parts)] if far > near else []
        )
        between = [edge for edge in between if after + self._grain / 2 < edge < upto - self._grain / 2]
        self._edges = sorted({*self._edges, *between})
        return bool(between)


class Lane(Cursor):
    """One (queue, priority) pair."""

    __slots__ = ("next_scan", "priority", "queue", "scanned", "turn")

    def __init__(self, queue: str, priority: int) -> None:
        super().__init__()
        self.queue = queue
        self.priority = priority
        self.scanned: float = 0
        self.turn: float = 0
        self.next_scan = 0.0

    def window(self, now: float) -> tuple[float, float] | None:
        """The next stretch behind the leader to look through, or None if there is none or it is not time
        yet.
        """
        if self.trailer >= self.leader or now < self.next_scan:
            return None
        # A round ends where the leader was when it began: otherwise it would run after the leader of a busy
        # lane and never turn back.
        if not self.trailer <= self.scanned < min(self.turn, self.leader):
            self.scanned, self.turn = self.trailer, self.leader
        return self.scanned, min(self.scanned + WINDOW, self.turn, self.leader)


@dataclass(frozen=True, slots=True)
class Range:
    """A stretch of one lane that a claim looks through: positions in (after, upto], at most `most` rows."""

    lane: Lane
    after: float
    upto: float
    most: int


@dataclass(frozen=True, slots=True)
class Plan:
    """What one claim asks for.

    Attributes:
        to_the_end: It leaves out nothing that is visible in its lanes.
        complete: With the empty answers before it, an empty answer means that there is no work at all.
        pause: Seconds after an empty answer that is not complete.
        sweep: It looks at what lies behind the cursors.
        turn: How many queues it leaves nothing out of.
    """

    ranges: tuple[Range, ...]
    batch: int
    to_the_end: bool
    complete: bool
    pause: float = 0.0
    sweep: bool = False
    turn: int = 0

    def parameters(self) -> dict[str, object]:
        """The parameters of `claim_jobs`, but for the worker."""
        return {
            "queues": [stretch.lane.queue for stretch in self.ranges],
            "priorities": [stretch.lane.priority for stretch in self.ranges],
            "after": [int(stretch.after) for stretch in self.ranges],
            "upto": [int(stretch.upto) for stretch in self.ranges],
            "most": [stretch.most for stretch in self.ranges],
            "batch": self.batch,
            "bare": False,
            "tasks": None,
            "but": False,
        }


class Lanes:
    """All lanes of one supervisor, in the order they are served.

    `weights` maps each queue to its weight; None serves the queues strictly in their order. With weights the
    order of the queues is drawn anew for each claim, and one queue's share of a batch is capped by its
    weight.
    """

    def __init__(self, queues: Iterable[str], weights: Mapping[str, float] | None, random: Random) -> None:
        self._weights = dict(weights) if weights is not None else None
        self._random = random
        self._turn = 0
        self._quiet = 0
        self._rounds = Rounds(START, SWEEP_INTERVAL, grain=1000)
        self._unswept: set[str] = set()
        self._swept_in = 0.0
        self._limit: tuple[int, int] | None = None
        self._first: set[str] = set()
        self._unseen: frozenset[str] = frozenset()
        self._lanes: dict[str, tuple[Lane, ...]] = {}
        for queue in queues:
            self.add(queue)

    def __contains__(self, queue: str) -> bool:
        """Whether the queue is served."""
        return queue in self._lanes

    @property
    def queues(self) -> list[str]:
        """The queues served."""
        return list(self._lanes)

    def add(self, queue: str, weight: float = 1.0) -> None:
        """Serve one more queue."""
        self._lanes.setdefault(queue, tuple(Lane(queue, priority) for priority in range(9, -1, -1)))
        if self._weights is not None:
            self._weights.setdefault(queue, weight)

    def forget_sweeps(self) -> None:
        """Sweep every lane as soon as possible: on every new connection, a promoted replica's sequence may be
        behind.
        """
        self._rounds.restart()
        self._unswept = set()

    @property
    def sweep_at(self) -> float | None:
        """When a sweep that has begun goes on; None if there is none."""
        goes_on = self._rounds.under_way or self._unswept
        return self._rounds.at if self._lanes and goes_on else None

    def sweep(self, batch: int, now: float) -> Plan | None:
        """What to look at again of what lies behind the leading cursors, if it is time for it.

        Never in one statement with a claim: how long it takes shows how much it can look at, and if it takes
        too long the claims go on.
        """
        while (window := self._rounds.window(now)) is not None and self._lanes:
            if not self._unswept:
                self._unswept, self._swept_in = set(self._lanes), 0.0
            after, upto = window
            chosen = [queue for queue in self._lanes if queue in self._unswept][:QUEUES_PER_CLAIM]
            ranges = []
            for queue in chosen:
                for lane in self._lanes[queue]:
                    end = max(lane.leader, 0) if upto is None else min(max(lane.leader, 0), upto)
                    if after < end:
                        ranges.append(Range(lane, after, end, batch))
            if ranges:
                return Plan(tuple(ranges), batch, to_the_end=False, complete=False, sweep=True)
            self._swept(chosen, now, 0.0)
        return None

    def sweeps_along(self, now: float) -> bool:
        """A look before sleeping sweeps as well: while that takes no time, it spares a transaction."""
        return not self._unswept and len(self._lanes) <= QUEUES_PER_CLAIM and self._rounds.may_go_along(now)

    def sweep_failed(self, now: float) -> None:
        """The sweep that was planned took too long."""
        self._unswept = set()
        self._rounds.failed(now, self._end())

    def _swept(self, queues: Iterable[str], now: float, took: float) -> None:
        self._unswept.difference_update(queues)
        self._swept_in = max(self._swept_in, took)
        if not self._unswept:
            self._rounds.done(now, self._swept_in, self._end())

    def _end(self) -> float:
        return max((lane.leader for lanes in self._lanes.values() for lane in lanes), default=0)

    def go_in_steps(self, position: int, xid: int) -> None:
        """A claim took too long: from here on look at so many positions at a time, up to `position`, which
        was the last one given out when no writer above `xid` had begun.
        """
        self._limit = position, xid

    def first(self, queue: str) -> None:
        """There is a job in this queue: it is claimed next, whoever's turn it is."""
        if queue in self._lanes:
            self._first.add(queue)

    def plan(self, batch: int, now: float, *, to_the_end: bool = False) -> Plan:
        """What to ask for next.

        Args:
            batch: Rows wanted.
            now: Seconds on any steady clock.
            to_the_end: Look from the trailing cursors on, so that nothing visible is missed: before going to
                sleep.
        """
        ranges: list[Range] = []
        turn, chosen = self._draw()
        # A claim of named queues alone says nothing of the others.
        complete = to_the_end and len(turn) >= min(len(chosen), 1)
        complete = complete and self._quiet + len(turn) >= len(self._lanes)
        cap = self._caps(chosen, batch)
        limit = self._limit[0] if self._limit is not None else None
        sweep = to_the_end and limit is None and len(chosen) == len(self._lanes) and self.sweeps_along(now)
        steps = far = False
        for queue in chosen:
            for lane in self._lanes[queue]:
                most = min(batch, cap[queue])
                end: float = END
                if sweep:
                    ranges.append(Range(lane, START, END, most))
                    continue
                if limit is not None and lane.leader < limit:
                    steps = steps or queue not in self._unseen
                    end = min(lane.leader + STEP, limit)
                if to_the_end and end == END and lane.leader - lane.trailer <= FAR:
                    ranges.append(Range(lane, lane.trailer, END, most))
                    continue
                far = far or (lane.leader - lane.trailer > FAR and queue not in self._unseen)
                window = lane.window(now)
                if window is not None:
                    ranges.append(Range(lane, *window, most))
                ranges.append(Range(lane, lane.leader, end, most))
        if limit is not None and not steps and len(turn) == len(self._lanes):
            self._limit = None
        all_of_it = to_the_end and not steps and not far
        return Plan(
            tuple(ranges),
            batch,
            to_the_end,
            complete=complete and all_of_it,
            pause=TRAILING_INTERVAL if far and not steps else 0.0,
            sweep=sweep,
            turn=len(turn) if all_of_it else 0,
        )

    def absorb(
        self,
        plan: Plan,
        found: Sequence[tuple[str, int, int]],
        xmin: int,
        xmax: int,
        now: float,
        *,
        took: float = 0.0,
        unseen: Iterable[str] = (),
    ) -> bool:
        """Move the cursors by a claim's answer: (queue, priority, position) of each row it took.

        Args:
            took: Seconds of server time.
            unseen: Queues that it has not looked at, because they are paused.

        Returns whether there may be more to claim at once.
        """
        only_sweeps = plan.sweep and not plan.to_the_end
        if found or not only_sweeps:
            self._quiet = self._quiet + plan.turn if plan.turn and not found else 0
        self._unseen = frozenset(unseen)
        rows: dict[tuple[str, int], list[int]] = {}
        for queue, priority, position in found:
            rows.setdefault((queue, priority), []).append(position)
        full = len(found) >= plan.batch
        last = -1
        matched: list[list[int]] = []
        for index, stretch in enumerate(plan.ranges):
            mine = [
                position
                for position in rows.get((stretch.lane.queue, stretch.lane.priority), ())
                if stretch.after < position <= stretch.upto
            ]
            matched.append(mine)
            if mine:
                last = index
        more = full
        for index, (stretch, mine) in enumerate(zip(plan.ranges, matched, strict=True)):
            if full and index > last:
                break  # the batch was full before the server came here
            if stretch.lane.queue in self._unseen:
                continue
            cut_short = len(mine) >= stretch.most or (full and index == last)
            more = more or cut_short
            self._absorb_range(stretch, mine, cut_short, xmin, xmax, None if only_sweeps else now)
        if plan.sweep and not more:
            took = took if len(found) < 20 else QUICK  # what was found took time too
            if only_sweeps:
                self._swept({each.lane.queue for each in plan.ranges}, now, took)
            else:
                self._rounds.went_along(now, took, self._end())
        return more

    def _absorb_range(
        self, stretch: Range, mine: list[int], cut_short: bool, xmin: int, xmax: int, now: float | None
    ) -> None:
        lane = stretch.lane
        top = max(mine) if mine else None
        behind = stretch.after < lane.leader
        if cut_short and top is not None:
            if behind and top < lane.leader:
                lane.rewind(top)
            lane.lead(top, xmax)
            lane.covered(stretch.after, top, xmin)
            return
        if top is not None:
            lane.lead(top, xmax)
        if not behind and stretch.upto != END and self._limit is not None:
            lane.lead(stretch.upto, self._limit[1])
        lane.covered(stretch.after, stretch.upto, xmin)
        if behind and stretch.upto != END and now is not None:
            lane.scanned = stretch.upto
            lane.next_scan = now + TRAILING_INTERVAL

    def _draw(self) -> tuple[list[str], list[str]]:
        """The queues whose turn it is, and those of one claim in serving order.

        Where they take turns, queues that somebody has named have a claim of their own first: a thousand
        lanes more would take it ten times as long.
        """
        queues = list(self._lanes)
        named, self._first = self._first, set()
        if len(queues) > QUEUES_PER_CLAIM:
            if named:
                return [], sorted(named, key=queues.index)[:QUEUES_PER_CLAIM]
            start = self._turn % len(queues)
            queues = (queues + queues)[start : start + QUEUES_PER_CLAIM]
            self._turn += QUEUES_PER_CLAIM
        turn, weights = queues, self._weights
        if weights is not None and len(queues) > 1:
            # A weighted draw without replacement: sort by u ** (1 / weight) (Efraimidis and Spirakis, 2006).
            queues = sorted(
                queues, key=lambda queue: self._random.random() ** (1 / weights[queue]), reverse=True
            )
        return turn, queues

    def _caps(self, queues: Sequence[str], batch: int) -> Mapping[str, int]:
        weights = self._weights
        if weights is None or len(queues) < 2:
            return dict.fromkeys(queues, batch)
        total = sum(weights[queue] for queue in queues)
        return {queue: max(1, int(batch * weights[queue] / total)) for queue in queues}
