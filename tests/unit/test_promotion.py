"""Looks for due jobs against a small model of a schedule, of which nothing is ever cleaned up."""

from __future__ import annotations

from bisect import bisect_left, bisect_right, insort
from collections.abc import Sequence
from dataclasses import dataclass, field
from random import Random
from typing import Any

import pytest

from pgqueue.database.link import Call
from pgqueue.worker.promotion import BATCH, SWEEP_INTERVAL, Promotion

EPOCH = 1_800_000_000.0
DEAD = 3e-7
"""Seconds that a dead entry costs."""
Rows = list[list[tuple[Any, ...]]]


@dataclass
class Schedule:
    """Jobs by the time they are due at, and the transactions that are still open."""

    now: float = 0.0
    waiting: list[float] = field(default_factory=list)
    dead: list[float] = field(default_factory=list)
    open: dict[int, list[float]] = field(default_factory=dict)
    next_xid: int = 1000
    walked: int = 0
    limit: float = float("inf")

    def begin(self, *etas: float) -> int:
        self.next_xid += 1
        self.open[self.next_xid] = [EPOCH + eta for eta in etas]
        return self.next_xid

    def commit(self, xid: int) -> None:
        for eta in self.open.pop(xid):
            insort(self.waiting, eta)

    def add(self, *etas: float) -> None:
        self.commit(self.begin(*etas))

    def ask(self, group: Sequence[Call]) -> Rows | None:
        """The answer of the look in this transaction; None if it would take too long."""
        given = group[-1].parameters
        present = EPOCH + self.now
        after = present if given["after"] is None else given["after"]
        upto = present if given["upto"] is None else min(present, given["upto"])
        dead = max(bisect_right(self.dead, upto) - bisect_left(self.dead, after), 0)
        if dead > self.limit:
            return None
        first, last = bisect_left(self.waiting, after), bisect_right(self.waiting, upto)
        taken = self.waiting[first : min(last, first + BATCH)]
        xmin = min(self.open, default=self.next_xid + 1)
        if taken or given["mark"]:
            self.next_xid += 1
        del self.waiting[first : first + len(taken)]
        for eta in taken:
            insort(self.dead, eta)
        self.walked += dead
        took = DEAD * dead + 20e-6 * len(taken)
        later = self.waiting[bisect_right(self.waiting, present) :]
        next_in = later[0] - present if later and given["upto"] is None else None
        last_eta = taken[-1] if taken else 0.0
        return [
            [],
            [(len(taken), ["q"] * bool(taken), last_eta, xmin, self.next_xid, took, present, next_in)],
        ]


def look(promotion: Promotion, schedule: Schedule) -> int:
    """One pass, and more as long as there is more at once; how many jobs it promoted."""
    count, passes = 0, 0
    while True:
        passes += 1
        assert passes < 1000, "it never ends"
        groups = promotion.groups(schedule.now)
        answers = []
        for number, group in enumerate(groups):
            answer = schedule.ask(group)
            if answer is None:
                promotion.gave_up(schedule.now, number)
                break
            answers.append(answer)
        if not answers:
            return count
        found = promotion.absorb(schedule.now, answers)
        count += found.count
        schedule.now += 0.001
        if not found.more:
            return count


def run(promotion: Promotion, schedule: Schedule, seconds: float, step: float = 0.1) -> int:
    end, count = schedule.now + seconds, 0
    while schedule.now < end:
        count += look(promotion, schedule)
        schedule.now += step
    return count


def among_dead(count: int, within: float = 600.0) -> Schedule:
    return Schedule(dead=[EPOCH - within * (1 - n / count) for n in range(count)])


def test_a_worker_that_starts_among_what_is_dead_walks_over_it_a_few_times_only() -> None:
    promotion, schedule = Promotion(), among_dead(500_000)
    run(promotion, schedule, 10)
    assert schedule.walked < 3 * 500_000
    schedule.walked = 0
    run(promotion, schedule, 60)
    # The rounds through the whole past take a twentieth.
    assert schedule.walked * DEAD < 60 / 15


def test_a_worker_follows_where_others_promote() -> None:
    promotion, schedule = Promotion(), Schedule()
    for step in range(1200):
        schedule.now = step * 0.1
        schedule.dead += [EPOCH + schedule.now] * 500
        look(promotion, schedule)
    assert schedule.walked * DEAD < 120 / 10, "and does not walk over all of it each time"


def test_a_clean_schedule_is_looked_through_without_transaction_ids() -> None:
    promotion, schedule = Promotion(), Schedule()
    run(promotion, schedule, 1)
    before = schedule.next_xid
    run(promotion, schedule, 60)
    assert schedule.next_xid == before


def test_a_burst_is_not_walked_over_with_each_batch() -> None:
    promotion, schedule = Promotion(), Schedule()
    run(promotion, schedule, 1)
    writer = schedule.begin()  # which holds the trailing cursor
    schedule.add(*[schedule.now + 0.5 + n * 1e-6 for n in range(50_000)])
    schedule.walked = 0
    assert run(promotion, schedule, 2) == 50_000
    assert schedule.walked < 8 * 50_000
    schedule.commit(writer)


def test_jobs_that_come_late_into_a_burst_do_not_wait_for_its_end() -> None:
    promotion, schedule = Promotion(), Schedule()
    run(promotion, schedule, 1)
    late = schedule.begin(*[schedule.now + 0.1] * (2 * BATCH))
    schedule.now += 0.2
    schedule.add(*[schedule.now + n * 1e-7 for n in range(500 * BATCH)])
    schedule.now += 1
    passes = 0
    committed = False
    while True:
        passes += 1
        answers = [schedule.ask(group) or [] for group in promotion.groups(schedule.now)]
        promotion.absorb(schedule.now, answers)
        schedule.now += 0.02
        if passes == 50:
            schedule.commit(late)
            committed = True
        if committed and schedule.waiting[0] > EPOCH + 1.2:
            break
        assert passes < 150
    assert schedule.waiting, "the burst goes on"


@pytest.mark.parametrize("seed", range(30))
def test_every_job_is_promoted_once_and_in_time_whatever_commits_when(seed: int) -> None:
    """Without the rounds through the past: the cursors alone must find everything."""
    random, promotion, schedule = Random(seed), Promotion(), among_dead(20_000 * (seed % 2))
    run(promotion, schedule, 0.5)
    promotion._rounds.at = float("inf")
    written = promoted = 0
    for _ in range(400):
        act = random.random()
        if act < 0.3:
            count = random.choice([1, 3, 700])
            # Due later than it is written, as everything is.
            schedule.begin(*[schedule.now + random.uniform(0.001, 2) for _ in range(count)])
            written += count
        elif act < 0.6 and schedule.open:
            schedule.commit(random.choice(list(schedule.open)))
        else:
            promoted += look(promotion, schedule)
        schedule.now += random.uniform(0, 0.1)
    for xid in list(schedule.open):
        schedule.commit(xid)
    schedule.now += 2
    promoted += look(promotion, schedule)
    promoted += run(promotion, schedule, 1)
    assert promoted == written


@pytest.mark.parametrize("eta", [-1e9, -599.0, -300.0, -0.5])
def test_what_is_due_before_all_that_was_seen_is_found_by_the_rounds(eta: float) -> None:
    """Of clocks that were set back, and plain SQL."""
    promotion, schedule = Promotion(), among_dead(500_000)
    run(promotion, schedule, 30)
    schedule.add(eta)
    assert run(promotion, schedule, 3 * SWEEP_INTERVAL) == 1


def test_a_past_that_is_too_long_for_a_look_holds_nothing_up() -> None:
    promotion, schedule = Promotion(), among_dead(500_000)
    schedule.limit = 50_000
    schedule.add(-599.5)
    found = run(promotion, schedule, 5)
    schedule.add(schedule.now + 0.2)
    before = schedule.now
    while not (new := look(promotion, schedule)):
        schedule.now += 0.1
        assert schedule.now < before + 0.7, "a job that has just become due is ready at once"
    found += new + run(promotion, schedule, 60)
    assert found == 2, "and the past is gone through all the same"


def test_it_tells_when_the_next_job_is_due() -> None:
    promotion, schedule = Promotion(), Schedule()
    schedule.add(7.0, 9.0)
    for step in range(3):
        answers = [schedule.ask(group) or [] for group in promotion.groups(schedule.now)]
        assert promotion.absorb(schedule.now, answers).next_in == pytest.approx(7.0 - step)
        schedule.now += 1
