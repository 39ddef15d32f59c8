"""Job ids, and the checks of names and numbers."""

from __future__ import annotations

import time
import uuid
from unittest import mock

import pytest

from pgqueue.job import check_id, check_priority, check_queue, check_task_name, new_id, new_ids


def test_a_new_id_is_a_version_7_uuid_with_the_time_in_front() -> None:
    before = time.time_ns() // 1_000_000
    text = new_id()
    after = time.time_ns() // 1_000_000
    value = uuid.UUID(text)
    assert str(value) == text
    assert (value.version, value.variant) == (7, uuid.RFC_4122)
    assert before <= value.int >> 80 <= after


def test_version_and_variant_hold_whatever_the_random_bits() -> None:
    for noise in (b"\x00" * 10, b"\xff" * 10):
        with mock.patch("os.urandom", return_value=noise):
            value = uuid.UUID(new_id())
        assert (value.version, value.variant) == (7, uuid.RFC_4122)
        random_bits = value.int & ((1 << 76) - 1) & ~(0x3 << 62)
        assert random_bits.bit_count() == (0 if noise[0] == 0 else 74)


def test_ids_sort_by_the_time_they_were_made() -> None:
    ids = []
    for millisecond in (1, 2, 255, 256, 1_763_900_000_000, 1_763_900_000_001):
        with mock.patch("time.time_ns", return_value=millisecond * 1_000_000):
            ids.append(new_id())
    assert ids == sorted(ids)


def test_ids_do_not_repeat() -> None:
    assert len({new_id() for _ in range(10_000)}) == 10_000
    assert len(set(new_ids(10_000))) == 10_000


def test_many_ids_are_like_one() -> None:
    before = time.time_ns() // 1_000_000
    ids = new_ids(300)
    after = time.time_ns() // 1_000_000
    for text in ids:
        value = uuid.UUID(text)
        assert str(value) == text
        assert (value.version, value.variant) == (7, uuid.RFC_4122)
        assert before <= value.int >> 80 <= after
    every_bit = [uuid.UUID(text).int for text in ids]
    free = ((1 << 76) - 1) & ~(0x3 << 62)
    assert all(any(value >> bit & 1 for value in every_bit) for bit in range(76) if free >> bit & 1)
    assert new_ids(0) == []


def test_an_id_is_taken_in_any_spelling_and_given_back_in_one() -> None:
    value = uuid.UUID("0192a000-0000-7000-8000-00000000000a")
    for spelling in (value, str(value), str(value).upper(), value.hex, f"{{{value}}}"):
        assert check_id(spelling) == str(value)


@pytest.mark.parametrize("bad", ["order-17", "", 5, None])
def test_what_is_no_uuid_is_sent_to_unique_key(bad: object) -> None:
    with pytest.raises(
        ValueError,
        match=r"job_id must be a UUID, got .*; a key of your own is unique_key",
    ):
        check_id(bad)


@pytest.mark.parametrize("name", ["a", "default", "a.b:c-d_e", "9", "Q" * 63])
def test_good_queue_names(name: str) -> None:
    assert check_queue(name) == name


@pytest.mark.parametrize("name", ["", "a b", "a\n", "ü", "q" * 64, "a/b", None, 5, b"a"])
def test_bad_queue_names(name: object) -> None:
    with pytest.raises(ValueError, match=r"a queue name is 1 to 63 letters, digits or '_\.:-', got"):
        check_queue(name)


@pytest.mark.parametrize("name", ["shop.tasks.send_email", "größe", "t" * 255])
def test_good_task_names(name: str) -> None:
    assert check_task_name(name) == name


@pytest.mark.parametrize("name", ["", "a b", "a\0", "a\n", "t" * 256, None, 5])
def test_bad_task_names(name: object) -> None:
    with pytest.raises(ValueError, match="a task name is 1 to 255 characters without blanks, got"):
        check_task_name(name)


def test_priorities_are_whole_numbers_from_zero_to_nine() -> None:
    assert [check_priority(n) for n in range(10)] == list(range(10))
    for bad in (-1, 10, 5.0, "5", True, None):
        with pytest.raises(
            ValueError, match=r"priority must be a whole number from 0 to 9 \(larger runs first\)"
        ):
            check_priority(bad)
