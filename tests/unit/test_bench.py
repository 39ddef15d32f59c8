"""What `pgqueue bench` says of its figures, and how it draws them."""

from __future__ import annotations

from dataclasses import replace

import pytest

from pgqueue.benchmark import Figures, Plan, Spread
from pgqueue.cli.bench import WIDTH, bar_of, histogram, ms, number, verdict
from pgqueue.database.benchmark import Server, Speed

MS = 1e-3
FAST = Figures(
    server=Server("18.4", "shop", fsync="on", synchronous_commit="on"),
    plan=Plan(jobs=50_000, seconds=3, executors=2),
    round_trip=Spread.of([0.05 * MS]),
    commit=Spread.of([0.15 * MS]),
    single=Speed(6000, 3.0),
    single_calls=Spread.of([0.5 * MS]),
    bulk=Speed(300_000, 3.0),
    bare_loop=Speed(50_000, 1.0),
    drain=Speed(50_000, 2.0),
    wake_up=Spread.of([2 * MS] * 98 + [9 * MS] * 2),
)


def said(figures: Figures) -> str:
    return " ".join(verdict(figures))


def test_percentiles_are_of_the_sorted_times() -> None:
    spread = Spread.of([number * MS for number in range(100, 0, -1)])
    assert (spread.p50, spread.p95, spread.p99) == pytest.approx((51, 96, 100))
    assert (spread.samples, len(spread.all)) == (100, 100)
    assert spread.mean == pytest.approx(50.5)
    assert Spread.of([MS]).p99 == 1


@pytest.mark.parametrize(
    ("trip", "commit", "call", "limit"),
    [
        (0.1, 4.2, 4.5, "the commit"),
        (5.0, 5.5, 5.6, "the way there and back"),
        (1.0, 2.0, 3.0, "both"),
        (0.1, 0.2, 1.0, "the CPU"),
    ],
)
def test_it_says_what_limits_single_enqueues(trip: float, commit: float, call: float, limit: str) -> None:
    times = {"round_trip": trip, "commit": commit, "single_calls": call}
    figures = replace(FAST, **{name: Spread.of([time * MS]) for name, time in times.items()})
    assert f"single enqueues, {ms(call)} each, are limited by {limit}." in said(figures)
    assert ("is far for a database" in said(figures)) == (trip >= 1)


def test_a_commit_is_said_without_the_way_there_and_back() -> None:
    assert "commits in 0.10 ms and answers in 0.05 ms" in said(FAST)


def test_it_compares() -> None:
    assert "2,000 jobs/s one by one, and 100,000 jobs/s with enqueue_many: 50 times as many" in said(FAST)
    assert "A worker ran 25,000 jobs/s that do nothing, 50% of what claiming and deleting alone" in said(FAST)
    assert "longer than 0.08 ms are limited by their own work on 2 executors" in said(FAST)
    assert "a lone job 2.0 ms after its enqueue, 19 of 20 within 2.0 ms." in said(FAST)


def test_it_says_when_commits_are_not_safe() -> None:
    assert "is off" not in said(FAST)
    careless = replace(FAST, server=Server("18.4", "shop", fsync="off", synchronous_commit="off"))
    assert "fsync is off" in said(careless)
    assert "synchronous_commit is off" in said(careless)


def test_a_wake_up_that_is_mostly_commit() -> None:
    slow = replace(FAST, commit=Spread.of([8 * MS]), wake_up=Spread.of([10 * MS]))
    assert "a lone job 10 ms after its enqueue, 19 of 20 within 10 ms, most of it the commit." in said(slow)


def test_a_histogram_has_every_row_between_the_first_and_the_last() -> None:
    rows = histogram([0.05, 1.0, 1.2, 2.5])
    assert rows[0] == ("0 to 0.1 ms", "1", 1.0)
    assert rows[-1] == ("2 to 3 ms", "1", 1.0)
    assert ("1 to 1.5 ms", "2", 2.0) in rows
    assert ("0.5 to 0.7 ms", "0", 0.0) in rows
    assert sum(count for *_, count in rows) == 4
    assert histogram([1e9])[0][0] == "over 70000 ms"


@pytest.mark.parametrize("blocks", [True, False])
def test_bars(blocks: bool) -> None:
    assert len(bar_of(1.0, blocks)) == WIDTH
    assert len(bar_of(0.5, blocks)) == WIDTH / 2
    assert bar_of(0.0, blocks) == ""
    assert len(bar_of(1e-9, blocks)) == 1, "what is not nothing is seen"
    assert bar_of(0.3, blocks).isascii() is not blocks


def test_numbers_are_as_good_as_they_are() -> None:
    assert [number(value) for value in (34567.8, 123456, 12.34, 1.234)] == ["34,600", "123,000", "12", "1.2"]
    assert [ms(value) for value in (0.123, 4.123, 41.23)] == ["0.12 ms", "4.1 ms", "41 ms"]
