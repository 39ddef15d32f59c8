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
from random import Random

START, END = -(2**63), 2**63 - 1
WINDOW = 10_000
"""Positions a trailing scan looks through at most: with every one of them a dead index entry that is about 2
ms."""
TRAILING_INTERVAL = 0.05
SWEEP_INTERVAL = 5.0
SLEEPERS_SHARE = 0.8
"""Of that, from which on a look before sleeping sweeps: the next comes up to five seconds later."""
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


class Lane(Cursor):
    """One (queue, priority) pair."""

    __slots__ = ("next_scan", "priority", "queue", "scanned", "swept", "turn")

    def __init__(self, queue: str, priority: int) -> None:
        super().__init__()
        self.queue = queue
        self.priority = priority
        self.scanned: float = 0
        self.turn: float = 0
        self.next_scan = 0.0
        self.swept = float("-inf")

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
    """

    ranges: tuple[Range, ...]
    batch: int
    to_the_end: bool
    complete: bool

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
        """Sweep every lane with the next claim: on every new connection, a promoted replica's sequence may be
        behind.
        """
        for lanes in self._lanes.values():
            for lane in lanes:
                lane.swept = float("-inf")

    def plan(self, batch: int, now: float, *, to_the_end: bool = False) -> Plan:
        """What to ask for next.

        Args:
            batch: Rows wanted.
            now: Seconds on any steady clock.
            to_the_end: Look from the trailing cursors on, so that nothing visible is missed: before going to
                sleep.
        """
        ranges: list[Range] = []
        chosen = self._draw()
        complete = to_the_end and self._quiet + len(chosen) >= len(self._lanes)
        cap = self._caps(chosen, batch)
        stale = SWEEP_INTERVAL * (SLEEPERS_SHARE if to_the_end else 1.0)
        for queue in chosen:
            for lane in self._lanes[queue]:
                most = min(batch, cap[queue])
                if now - lane.swept >= stale:
                    ranges.append(Range(lane, START, END, most))
                elif to_the_end:
                    ranges.append(Range(lane, lane.trailer, END, most))
                else:
                    window = lane.window(now)
                    if window is not None:
                        ranges.append(Range(lane, *window, most))
                    ranges.append(Range(lane, lane.leader, END, most))
        return Plan(tuple(ranges), batch, to_the_end, complete)

    def absorb(
        self, plan: Plan, found: Sequence[tuple[str, int, int]], xmin: int, xmax: int, now: float
    ) -> bool:
        """Move the cursors by a claim's answer: (queue, priority, position) of each row it took.

        Returns whether there may be more to claim at once.
        """
        if plan.to_the_end and not found:
            self._quiet += len({stretch.lane.queue for stretch in plan.ranges})
        else:
            self._quiet = 0
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
            cut_short = len(mine) >= stretch.most or (full and index == last)
            more = more or cut_short
            self._absorb_range(stretch, mine, cut_short, xmin, xmax, now)
        return more

    @staticmethod
    def _absorb_range(
        stretch: Range, mine: list[int], cut_short: bool, xmin: int, xmax: int, now: float
    ) -> None:
        lane = stretch.lane
        top = max(mine) if mine else None
        behind = stretch.after < lane.leader
        if cut_short and top is not None:
            if behind and top < lane.leader:
                lane.rewind(top)
            lane.lead(top, xmax)
            lane.covered(stretch.after, top, xmin)
            if stretch.after == START:
                lane.swept = now  # the rest of the sweep goes on from the leader
            return
        if top is not None:
            lane.lead(top, xmax)
        lane.covered(stretch.after, stretch.upto, xmin)
        if stretch.after == START and stretch.upto == END:
            lane.swept = now
        elif stretch.upto != END:
            lane.scanned = stretch.upto
            lane.next_scan = now + TRAILING_INTERVAL

    def _draw(self) -> list[str]:
        """The queues of one claim, in serving order."""
        queues = list(self._lanes)
        if len(queues) > QUEUES_PER_CLAIM:
            start = self._turn % len(queues)
            queues = (queues + queues)[start : start + QUEUES_PER_CLAIM]
            self._turn += QUEUES_PER_CLAIM
        weights = self._weights
        if weights is not None and len(queues) > 1:
            # A weighted draw without replacement: sort by u ** (1 / weight) (Efraimidis and Spirakis, 2006).
            queues.sort(key=lambda queue: self._random.random() ** (1 / weights[queue]), reverse=True)
        return queues

    def _caps(self, queues: Sequence[str], batch: int) -> Mapping[str, int]:
        weights = self._weights
        if weights is None or len(queues) < 2:
            return dict.fromkeys(queues, batch)
        total = sum(weights[queue] for queue in queues)
        return {queue: max(1, int(batch * weights[queue] / total)) for queue in queues}
