"""Silence is an unchanged counter seen through a whole lease of successful reads."""

from __future__ import annotations

from pgqueue.worker.maintenance import Watch


def watch() -> Watch:
    return Watch(lease=30.0, patience=15.0)


def test_an_unchanged_counter_for_a_whole_lease_is_silence() -> None:
    observer = watch()
    for now in range(0, 30, 5):
        assert observer.observe([("w", 7)], float(now)) == []
    assert observer.observe([("w", 7)], 30.0) == [("w", 7)]


def test_a_moving_counter_is_life_however_slow() -> None:
    observer = watch()
    for step in range(100):
        assert observer.observe([("w", step // 5)], step * 5.0) == []


def test_a_gap_in_the_observers_own_reads_starts_the_watch_anew() -> None:
    """A database outage or a stopped observer: everybody looks silent, nobody is fenced."""
    observer = watch()
    observer.observe([("w", 7)], 0.0)
    assert observer.observe([("w", 7)], 200.0) == []
    for now in range(205, 230, 5):
        assert observer.observe([("w", 7)], float(now)) == []
    assert observer.observe([("w", 7)], 230.0) == [("w", 7)]


def test_a_counter_that_starts_again_is_life() -> None:
    observer = watch()
    for now in range(0, 30, 5):
        observer.observe([("w", 7)], float(now))
    assert observer.observe([("w", 3)], 30.0) == []


def test_a_worker_that_came_later_has_a_whole_lease_of_its_own() -> None:
    observer = watch()
    observer.observe([("old", 1)], 0.0)
    for now in range(5, 35, 5):
        observer.observe([("old", 1), ("new", 1)], float(now))
    assert observer.observe([("old", 1), ("new", 1)], 34.0) == [("old", 1)]
