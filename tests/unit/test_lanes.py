"""Lanes and cursors against a small model of a table whose rows appear in any order."""

from __future__ import annotations

from dataclasses import dataclass, field
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pgqueue.worker.lanes import (
    END,
    FAR,
    MAX_MARKS,
    PACE,
    QUEUES_PER_CLAIM,
    QUICK,
    START,
    STEP,
    SWEEP_INTERVAL,
    WINDOW,
    Cursor,
    Lanes,
    Plan,
    Range,
    Rounds,
)

DEAD = 3e-7
"""Seconds that a dead entry costs."""


@dataclass
class Table:
    """Rows by (queue, priority, position), and the transactions that are still open."""

    ready: set[tuple[str, int, int]] = field(default_factory=set)
    open: dict[int, list[tuple[str, int, int]]] = field(default_factory=dict)
    dead: int = 0
    """Positions of the lane (q, 5) up to this one are in the index, and that is all."""
    next_position: int = 1
    next_xid: int = 1000

    def begin(self, *lanes: tuple[str, int]) -> int:
        xid = self.next_xid
        self.next_xid += 1
        self.open[xid] = []
        for queue, priority in lanes:
            self.open[xid].append((queue, priority, self.next_position))
            self.next_position += 1
        return xid

    def commit(self, xid: int) -> None:
        self.ready.update(self.open.pop(xid))

    def insert(self, queue: str = "q", priority: int = 5, count: int = 1) -> None:
        for _ in range(count):
            self.commit(self.begin((queue, priority)))

    def walked(self, stretch: Range) -> int:
        """Entries that a look at a stretch walks over, as long as nobody cleans up."""
        if (stretch.lane.queue, stretch.lane.priority) != ("q", 5):
            return 0
        return max(int(min(stretch.upto, self.dead)) - int(max(stretch.after, 0)), 0)

    def claim(self, plan: Plan) -> tuple[list[tuple[str, int, int]], int, int]:
        found: list[tuple[str, int, int]] = []
        for stretch in plan.ranges:
            key = (stretch.lane.queue, stretch.lane.priority)
            mine = sorted(
                row for row in self.ready if row[:2] == key and stretch.after < row[2] <= stretch.upto
            )
            found += mine[: min(stretch.most, plan.batch - len(found))]
        self.ready.difference_update(found)
        return found, min(self.open, default=self.next_xid), self.next_xid


def served(lanes: Lanes, table: Table, now: float, batch: int = 10, **options: bool) -> list[int]:
    positions: list[int] = []
    if (plan := lanes.sweep(batch, now)) is not None:
        positions += answered(lanes, table, plan, now)
    if len(positions) < batch:
        positions += answered(lanes, table, lanes.plan(batch - len(positions), now, **options), now)
    return positions


def answered(lanes: Lanes, table: Table, plan: Plan, now: float) -> list[int]:
    found, xmin, xmax = table.claim(plan)
    took = DEAD * sum(table.walked(stretch) for stretch in plan.ranges)
    lanes.absorb(plan, found, xmin, xmax, now, took=took)
    return [position for _, _, position in found]


def strict(*queues: str) -> Lanes:
    return Lanes(queues, None, Random(1))


def test_a_claim_asks_only_beyond_what_the_lane_has_reached() -> None:
    lanes, table = strict("q"), Table()
    table.insert(count=20)
    assert served(lanes, table, 0.0) == list(range(1, 11))
    plan = lanes.plan(10, 0.0)
    lane = next(stretch for stretch in plan.ranges if stretch.lane.priority == 5)
    assert lane.after == 10


def test_all_ten_priorities_larger_first_and_queues_in_order() -> None:
    plan = strict("high", "low").plan(1, 0.0)
    order = [(stretch.lane.queue, stretch.lane.priority) for stretch in plan.ranges]
    assert order == [(queue, priority) for queue in ("high", "low") for priority in range(9, -1, -1)]


def test_a_late_row_is_found_by_the_trailing_scan() -> None:
    lanes, table = strict("q"), Table()
    late = table.begin(("q", 5))
    table.insert(count=5)
    assert served(lanes, table, 0.0) == [2, 3, 4, 5, 6]
    table.commit(late)
    table.insert(count=3)
    assert served(lanes, table, 0.1) == [1, 7, 8, 9]


def test_without_open_writers_the_trailer_keeps_up_and_nothing_is_scanned_twice() -> None:
    lanes, table = strict("q"), Table()
    table.insert(count=30)
    served(lanes, table, 0.0)
    served(lanes, table, 0.1)
    plan = lanes.plan(10, 0.2)
    assert [stretch for stretch in plan.ranges if stretch.upto != END] == []


def test_an_open_writer_holds_the_trailer_and_its_end_lets_it_go() -> None:
    lanes, table = strict("q"), Table()
    table.insert(count=10)
    served(lanes, table, 0.0)
    writer = table.begin()
    table.insert(count=10)
    served(lanes, table, 0.1)
    lane = next(stretch.lane for stretch in lanes.plan(1, 0.1).ranges if stretch.lane.priority == 5)
    assert (lane.leader, lane.trailer) == (20, 10)
    table.commit(writer)
    served(lanes, table, 0.2)
    assert lane.trailer == 20


def test_many_late_rows_do_not_starve_behind_a_busy_lane() -> None:
    """Each claim is overtaken by as many new rows; the late ones, more than a window holds, still come first,
    in order.

    Another writer that stays open holds the trailing cursor all the while.
    """
    lanes, table = strict("q"), Table()
    table.begin()
    late = table.begin(*[("q", 5)] * (WINDOW + 2000))
    table.insert(count=1000)
    now, order = 0.0, []
    order += served(lanes, table, now, batch=500)
    table.commit(late)
    for _ in range(30):
        now += 0.06
        table.insert(count=500)
        order += served(lanes, table, now, batch=500)
    first = order.index(1)
    assert order[first : first + WINDOW + 2000] == list(range(1, WINDOW + 2001))


def test_trailing_scans_are_bounded_and_go_round() -> None:
    lanes, table = strict("q"), Table()
    table.open[999] = []  # an old writer
    table.next_position = 3 * WINDOW
    table.insert(count=5)
    served(lanes, table, 0.0)
    seen: list[tuple[float, float]] = []
    for step in range(1, 9):
        plan = lanes.plan(10, step * 0.1)
        seen += [(s.after, s.upto) for s in plan.ranges if s.upto != END]
        found, xmin, xmax = table.claim(plan)
        lanes.absorb(plan, found, xmin, xmax, step * 0.1)
    assert all(upto - after <= WINDOW for after, upto in seen)
    assert seen[:4] == seen[4:8]
    assert len(seen) == 8


def test_every_lane_is_swept_from_the_beginning_every_few_seconds() -> None:
    lanes, table = strict("q"), Table()
    table.insert(count=5)
    served(lanes, table, 0.0)
    # Rows the cursors cannot know of: from a promoted replica's sequence, and written by hand.
    table.ready.update({("q", 5, 1), ("q", 5, -7)})
    assert served(lanes, table, SWEEP_INTERVAL - 0.1) == []
    assert served(lanes, table, SWEEP_INTERVAL + 0.1) == [-7, 1]


def test_a_claim_that_fills_a_batch_goes_on_from_there() -> None:
    lanes, table = strict("q"), Table()
    table.insert(count=50)
    order = [position for step in range(5) for position in served(lanes, table, step * 0.001)]
    assert order == list(range(1, 51))
    assert all(stretch.after == 50 for stretch in lanes.plan(10, 0.01).ranges if stretch.lane.priority == 5)


def test_late_rows_that_fill_a_sweep_come_in_order_and_each_once() -> None:
    lanes, table = strict("q"), Table()
    table.insert(count=100)
    while served(lanes, table, 0.0):
        pass
    table.ready.update(("q", 5, position) for position in range(-30, 30))
    order = [position for step in range(10) for position in served(lanes, table, SWEEP_INTERVAL + step)]
    assert order == list(range(-30, 30))


def test_looking_to_the_end_leaves_nothing_out() -> None:
    lanes, table = strict("q"), Table()
    late = table.begin(("q", 5))
    table.insert(count=3)
    served(lanes, table, 0.0)
    table.commit(late)
    assert served(lanes, table, 0.001, to_the_end=True) == [1]


def test_an_empty_look_is_complete_only_after_all_queues_had_their_turn() -> None:
    lanes, table = strict(*(f"q{n}" for n in range(2 * QUEUES_PER_CLAIM + 1))), Table()
    complete = []
    for _ in range(3):
        plan = lanes.plan(10, 0.0, to_the_end=True)
        complete.append(plan.complete)
        lanes.absorb(plan, *table.claim(plan), 0.0)
    assert complete == [False, False, True]


def test_marks_stay_bounded_under_an_old_writer() -> None:
    cursor = Cursor()
    for n in range(1, 10_000):
        cursor.lead(n, 100 + n)
    assert len(cursor._marks) <= MAX_MARKS
    cursor.covered(0, END, 100 + 10_000)
    assert cursor.trailer == cursor.leader


def test_weights_share_a_batch_and_every_queue_comes_first_sometimes() -> None:
    lanes = Lanes(["a", "b"], {"a": 3, "b": 1}, Random(7))
    first = [lanes.plan(8, 0.0).ranges[0].lane.queue for _ in range(1000)]
    assert 650 < first.count("a") < 850
    caps = {stretch.lane.queue: stretch.most for stretch in lanes.plan(8, 0.0).ranges}
    assert caps == {"a": 6, "b": 2}


@settings(max_examples=200, deadline=None)
@given(data=st.data())
def test_every_row_is_served_once_whatever_commits_when(data: st.DataObject) -> None:
    lanes, table = strict("a", "b"), Table()
    now, order = 0.0, []
    for _ in range(data.draw(st.integers(1, 40))):
        act = data.draw(st.sampled_from(["begin", "commit", "insert", "claim", "look", "wait"]))
        if act == "begin":
            rows = data.draw(st.lists(st.tuples(st.sampled_from("ab"), st.sampled_from([1, 5])), max_size=15))
            table.begin(*rows)
        elif act == "commit" and table.open:
            table.commit(data.draw(st.sampled_from(sorted(table.open))))
        elif act == "insert":
            table.insert(data.draw(st.sampled_from("ab")), count=data.draw(st.integers(1, 12)))
        elif act == "claim":
            order += served(lanes, table, now, batch=data.draw(st.integers(1, 12)))
        elif act == "look":
            order += served(lanes, table, now, batch=12, to_the_end=True)
        else:
            now += 0.06
    for xid in sorted(table.open):
        table.commit(xid)
    # Without the sweep from zero: the cursors alone must find everything.
    while rest := served(lanes, table, now, batch=12, to_the_end=True):
        order += rest
        now += 0.001
    assert sorted(order) == sorted(set(order))
    assert len(order) == table.next_position - 1


@pytest.mark.parametrize("to_the_end", [False, True])
def test_the_statement_gets_parallel_arrays(to_the_end: bool) -> None:
    parameters = strict("q").plan(7, 0.0, to_the_end=to_the_end).parameters()
    assert parameters["batch"] == 7
    assert {len(parameters[name]) for name in ("queues", "priorities", "after", "upto", "most")} == {10}  # type: ignore[arg-type]


def past(lanes: Lanes, table: Table, count: int) -> None:
    """So many jobs have gone through, and their entries cannot be cleaned up."""
    table.dead = count
    table.next_position, table.next_xid = count + 1, table.next_xid + 1
    lane = next(lane for lane in lanes._lanes["q"] if lane.priority == 5)
    lane.lead(count, table.next_xid - 1)
    lane.covered(0, END, min(table.open, default=table.next_xid))


def test_a_sweep_of_much_that_is_dead_is_made_in_short_looks() -> None:
    lanes, table = strict("q"), Table()
    past(lanes, table, 300_000)
    now, looks = 0.0, []
    while now < 60:
        now = round(now + 0.01, 2)
        if (plan := lanes.sweep(10, now)) is not None:
            looks.append((now, sum(table.walked(stretch) for stretch in plan.ranges)))
            answered(lanes, table, plan, now)
        answered(lanes, table, lanes.plan(10, now), now)
    settled = [walked for at, walked in looks if at > 30]
    assert max(settled) * DEAD <= 1.1 * QUICK
    assert sum(settled) * DEAD < 1.2 * 30 / PACE
    assert sum(settled) > 3 * 300_000, "all of it is looked at within ten seconds"
    # When they can be cleaned up again a single look does it.
    table.dead = 0
    for _ in range(3000):
        now += 0.01
        if (plan := lanes.sweep(10, now)) is not None:
            answered(lanes, table, plan, now)
    assert lanes._rounds.whole


def test_a_late_row_is_found_wherever_it_is_among_what_is_dead() -> None:
    lanes, table = strict("q"), Table()
    past(lanes, table, 100_000)
    now = 0.0
    while now < 30:
        now += 0.05
        served(lanes, table, now)
    for position in (-5, 1, 4_711, 50_000, 99_999):
        table.ready.add(("q", 5, position))
        deadline = now + 2 * SWEEP_INTERVAL
        while not (found := served(lanes, table, now)):
            now += 0.05
            assert now < deadline
        assert found == [position]


def test_a_sweep_goes_on_after_failures_and_does_not_keep_to_what_cannot_be_looked_at() -> None:
    lanes, table = strict("q"), Table()
    past(lanes, table, 50_000)
    table.ready.add(("q", 5, -1))
    now, found = SWEEP_INTERVAL, []
    for _ in range(1000):
        now += 0.1
        if (plan := lanes.sweep(10, now)) is None:
            continue
        walked = sum(table.walked(stretch) for stretch in plan.ranges)
        if walked > 5_000 or any(stretch.after < 20_000 < stretch.upto for stretch in plan.ranges):
            lanes.sweep_failed(now)
        else:
            found += answered(lanes, table, plan, now)
    assert found == [-1]


def test_every_queue_is_swept_also_where_they_take_turns() -> None:
    lanes, table = strict(*(f"q{n}" for n in range(2 * QUEUES_PER_CLAIM + 1))), Table()
    served(lanes, table, 0.0)
    table.ready.update((f"q{n}", 5, -n) for n in range(1, 2 * QUEUES_PER_CLAIM + 1))
    found = []
    for step in range(60):
        found += served(lanes, table, SWEEP_INTERVAL + step)
    assert sorted(found) == sorted(-n for n in range(1, 2 * QUEUES_PER_CLAIM + 1))


def test_a_new_connection_sweeps_at_once_and_without_pauses() -> None:
    lanes, table = strict("q"), Table()
    past(lanes, table, 100_000)
    now = 0.0
    while now < 30:
        now += 0.05
        served(lanes, table, now)
    lanes.forget_sweeps()
    table.ready.add(("q", 5, 1))
    now += 0.001
    looks = 0
    while not served(lanes, table, now):
        looks += 1
        assert looks < 100
        assert lanes.sweep_at is not None
        assert lanes.sweep_at <= now


def test_after_a_claim_that_took_too_long_the_past_is_gone_through_in_steps() -> None:
    """A worker that starts among what is dead: progress with each claim, all jobs in order, none left out."""
    lanes, table = strict("q"), Table()
    past(lanes, table, 4 * STEP)
    writer = table.begin(("q", 5))
    late = table.next_position - 1
    table.insert(count=5)
    lanes = strict("q")
    lanes.go_in_steps(table.next_position - 1, table.next_xid)
    table.next_xid += 1
    now, order = 0.0, []
    for _ in range(6):
        now += 0.001
        plan = lanes.plan(10, now, to_the_end=True)
        assert not plan.complete
        assert sum(table.walked(stretch) for stretch in plan.ranges) <= STEP + WINDOW
        order += answered(lanes, table, plan, now)
    assert order == list(range(late + 1, late + 6))
    table.commit(writer)
    table.insert(count=1)
    found: list[int] = []
    for _ in range(2 * 4 * STEP // WINDOW):
        now += 0.06
        found += answered(lanes, table, lanes.plan(10, now), now)
    assert sorted(found) == [late, late + 6]


def test_before_sleeping_it_does_not_walk_over_all_that_an_old_writer_holds() -> None:
    lanes, table = strict("q"), Table()
    old = table.begin(("q", 5))
    past(lanes, table, FAR + 2 * WINDOW)
    now = 0.0
    for _ in range(50):
        now += 0.06
        plan = lanes.plan(10, now, to_the_end=True)
        assert sum(table.walked(stretch) for stretch in plan.ranges) <= WINDOW
        assert not plan.complete
        assert plan.pause > 0
        assert answered(lanes, table, plan, now) == []
    table.commit(old)
    found = []
    for _ in range(50):
        now += 0.06
        found += served(lanes, table, now, to_the_end=True)
    assert found == [1]


def test_what_a_paused_queue_holds_is_not_taken_for_seen() -> None:
    lanes, table = strict("q"), Table()
    late = table.begin(("q", 5))
    table.insert(count=3)
    served(lanes, table, 0.0)
    table.commit(late)
    for step in range(1, 20):
        plan = lanes.plan(10, step * 0.1, to_the_end=step % 2 == 0)
        lanes.absorb(plan, [], table.next_xid, table.next_xid, step * 0.1, unseen=["q"])
    assert served(lanes, table, 2.0, to_the_end=True) == [1]


def test_steps_through_a_paused_queue_do_not_keep_a_worker_busy() -> None:
    lanes = strict("q")
    lanes.go_in_steps(10 * STEP, 5)
    for _ in range(3):
        plan = lanes.plan(10, 0.0, to_the_end=True)
        lanes.absorb(plan, [], 10, 10, 0.0, unseen=["q"])
    assert lanes.plan(10, 0.0, to_the_end=True).complete


def test_a_queue_that_somebody_names_has_a_claim_of_its_own_where_queues_take_turns() -> None:
    lanes, table = strict(*(f"q{n}" for n in range(3 * QUEUES_PER_CLAIM))), Table()
    for number in (0, 150, 299):
        served(lanes, table, 0.0, to_the_end=True)
        table.insert(f"q{number}")
        lanes.first(f"q{number}")
        lanes.first("unknown")
        plan = lanes.plan(10, 0.0, to_the_end=True)
        assert len(plan.ranges) == 10
        assert not plan.complete
        assert len(answered(lanes, table, plan, 0.0)) == 1
        assert len(lanes.plan(10, 0.0, to_the_end=True).ranges) == 10 * QUEUES_PER_CLAIM


def test_rounds_keep_few_edges_and_split_where_the_time_goes() -> None:
    rounds = Rounds(float("-inf"), 5.0, grain=0.1)
    end, now = 1_800_000_000.0, 0.0
    dead = (end - 90_000.0, end - 89_000.0)  # a day ago, in a quarter of an hour
    for _ in range(3000):
        now += 0.1
        if (window := rounds.window(now)) is not None:
            after, upto = window[0], end if window[1] is None else window[1]
            share = max(min(upto, dead[1]) - max(after, dead[0]), 0.0) / 1000
            took = share * 0.2
            rounds.done(now, took, end)
    assert len(rounds._edges) < 150
    assert sum(dead[0] <= edge <= dead[1] for edge in rounds._edges) > 20


class TestNothingToServe:
    """A worker that serves every queue, before there is one."""

    def test_an_empty_look_is_complete_and_nothing_is_swept(self) -> None:
        lanes = Lanes([], {}, Random(1))
        lanes.forget_sweeps()
        for now in (100.0, 110.0):
            assert lanes.sweep(500, now) is None
            assert lanes.sweep_at is None
            plan = lanes.plan(500, now, to_the_end=True)
            assert plan.complete
            assert not lanes.absorb(plan, [], 5, 5, now)


class TestSweepingAlong:
    """A look before sleeping is a sweep too, as long as that takes no time."""

    def test_it_spares_the_sweep(self) -> None:
        lanes = Lanes(["default"], None, Random(1))
        first = lanes.sweep(500, 100.0)
        assert first is not None
        lanes.absorb(first, [], 5, 5, 100.0, took=0.001)
        assert not lanes.plan(500, 103.0, to_the_end=True).sweep, "it is not time"
        along = lanes.plan(500, 104.5, to_the_end=True)
        assert along.sweep
        assert along.complete
        assert {stretch.after for stretch in along.ranges} == {START}
        lanes.absorb(along, [], 5, 5, 104.5, took=0.001)
        assert lanes.sweep(500, 109.0) is None, "the look was one"
        assert lanes.sweep(500, 109.6) is not None

    def test_one_that_took_long_goes_by_itself(self) -> None:
        lanes = Lanes(["default"], None, Random(1))
        lanes.absorb(lanes.plan(500, 100.0), [("default", 5, 100_000)], 5, 5, 100.0)
        first = lanes.sweep(500, 100.0)
        assert first is not None
        lanes.absorb(first, [], 5, 5, 100.0, took=0.1)
        assert not lanes.plan(500, 105.0, to_the_end=True).sweep
        assert lanes.sweep(500, 105.0) is not None

    def test_a_full_batch_is_no_sweep(self) -> None:
        lanes = Lanes(["default"], None, Random(1))
        first = lanes.sweep(500, 100.0)
        assert first is not None
        lanes.absorb(first, [], 5, 5, 100.0, took=0.001)
        along = lanes.plan(2, 105.0, to_the_end=True)
        lanes.absorb(along, [("default", 5, 1), ("default", 5, 2)], 5, 5, 105.0, took=0.001)
        assert lanes.sweep(500, 105.0) is not None
