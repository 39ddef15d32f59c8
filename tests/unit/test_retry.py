"""The retry policy: what runs again, and after how long."""

from __future__ import annotations

import math
from dataclasses import replace
from random import Random
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pgqueue.errors import (
    ConfigError,
    Reject,
    Retry,
    Snooze,
    SoftTimeLimitExceeded,
    TimeLimitExceeded,
)
from pgqueue.retry import MAX_DELAY, Again, Dead, RetryPolicy, crash_delay

ERROR = OSError("no route")
POLICY = RetryPolicy(autoretry_for=(OSError,))


def decide(
    policy: RetryPolicy, error: BaseException = ERROR, retries: int = 0, max_retries: int | None = None
) -> Again | Dead:
    return policy.decide(error, retries=retries, max_retries=max_retries, random=Random(1))


def test_a_named_exception_runs_again_and_any_other_is_dead() -> None:
    assert decide(POLICY) == Again(180.0)
    assert decide(POLICY, ConnectionError()) == Again(180.0)  # a subclass
    assert decide(POLICY, ValueError()) == Dead("not_retryable")
    assert decide(RetryPolicy(), ERROR) == Dead("not_retryable")


def test_dont_autoretry_for_takes_a_subclass_out() -> None:
    policy = RetryPolicy(autoretry_for=(OSError,), dont_autoretry_for=(ConnectionError,))
    assert decide(policy, ConnectionError()) == Dead("not_retryable")
    assert decide(policy, OSError()) == Again(180.0)


def test_max_retries_three_makes_four_runs() -> None:
    answers = [decide(POLICY, retries=retries) for retries in range(5)]
    assert [type(answer) for answer in answers] == [Again, Again, Again, Dead, Dead]
    assert answers[3] == Dead("retries_exhausted")


@pytest.mark.parametrize(
    ("policys", "jobs", "signals", "limit"),
    [(3, None, None, 3), (3, 5, None, 5), (3, 5, 7, 7), (3, 0, None, 0), (0, 5, None, 5), (9, 5, 1, 1)],
)
def test_the_signals_limit_beats_the_jobs_beats_the_policys(
    policys: int, jobs: int | None, signals: int | None, limit: int
) -> None:
    policy = RetryPolicy(max_retries=policys)
    error = Retry(delay=1.0, max_retries=signals)
    assert decide(policy, error, limit, jobs) == Dead("retries_exhausted")
    if limit:
        assert decide(policy, error, limit - 1, jobs) == Again(1.0)


def test_none_in_the_options_is_for_ever() -> None:
    policy = RetryPolicy.from_options({"autoretry_for": OSError, "max_retries": None})
    assert isinstance(decide(policy, retries=10**9), Again)
    policy = RetryPolicy.from_options({"autoretry_for": OSError, "retry_kwargs": {"max_retries": None}})
    assert isinstance(decide(policy, retries=10**9), Again)


def test_a_snooze_burns_no_retry_and_knows_no_limit() -> None:
    assert decide(POLICY, Snooze(5), retries=10**9) == Again(5.0, burned=False)
    assert decide(RetryPolicy(max_retries=0), Snooze(0)) == Again(0.0, burned=False)
    assert decide(POLICY, Snooze(9e9)) == Again(MAX_DELAY, burned=False)


def test_a_rejected_job_is_dead_whatever_is_retried() -> None:
    policy = RetryPolicy(autoretry_for=(BaseException,), max_retries=-1)
    assert decide(policy, Reject("no such order")) == Dead("rejected")


def test_the_hard_time_limit_is_retried_only_by_name() -> None:
    assert decide(RetryPolicy(autoretry_for=(Exception,)), TimeLimitExceeded()) == Dead("time_limit")
    named = RetryPolicy(autoretry_for=(TimeLimitExceeded,), max_retries=1)
    assert isinstance(decide(named, TimeLimitExceeded()), Again)
    assert decide(named, TimeLimitExceeded(), retries=1) == Dead("retries_exhausted")
    taken_out = replace(named, dont_autoretry_for=(TimeLimitExceeded,))
    assert decide(taken_out, TimeLimitExceeded()) == Dead("time_limit")


def test_an_uncaught_soft_limit_goes_to_the_policy_and_must_be_named() -> None:
    assert decide(RetryPolicy(autoretry_for=(Exception,)), SoftTimeLimitExceeded()) == Dead("not_retryable")
    assert isinstance(
        decide(RetryPolicy(autoretry_for=(SoftTimeLimitExceeded,)), SoftTimeLimitExceeded()), Again
    )


@pytest.mark.parametrize("bad", [-1, "5", None, True, float("nan"), float("inf")])
def test_a_snooze_takes_seconds(bad: Any) -> None:
    with pytest.raises(ValueError, match="Snooze takes seconds, at least 0, got"):
        Snooze(bad)


@pytest.mark.parametrize("retries", [0, 10, 10**9])
def test_minus_one_is_for_ever_wherever_it_stands(retries: int) -> None:
    assert isinstance(decide(RetryPolicy(autoretry_for=(OSError,), max_retries=-1), retries=retries), Again)
    assert isinstance(decide(POLICY, retries=retries, max_retries=-1), Again)
    assert decide(RetryPolicy(), Retry(delay=2.0, max_retries=-1), retries, 3) == Again(2.0)


def test_the_delay_is_the_signals_then_backoff_then_countdown_then_the_default() -> None:
    def policy(delay: float | None = None, backoff: float | None = None) -> RetryPolicy:
        return RetryPolicy((OSError,), retry_delay=delay, retry_backoff=backoff, retry_jitter=False)

    assert decide(policy(60.0, 3.0), Retry(delay=7.0)) == Again(7.0)
    assert decide(policy(60.0, 3.0)) == Again(3.0)
    assert decide(policy(60.0)) == Again(60.0)
    assert decide(policy(0.0)) == Again(0.0)
    assert decide(policy()) == Again(180.0)
    assert decide(policy(60.0), Retry()) == Again(60.0)
    assert decide(policy(60.0, 3.0), Retry()) == Again(3.0)
    assert decide(policy(60.0), Retry(delay=math.nan)) == Again(60.0)


def test_backoff_doubles_up_to_its_maximum() -> None:
    policy = RetryPolicy(
        (OSError,), max_retries=-1, retry_backoff=2.0, retry_backoff_max=50.0, retry_jitter=False
    )
    delays = [decide(policy, retries=n) for n in (0, 1, 2, 3, 4, 5, 5000, 10**30)]
    assert delays == [Again(d) for d in (2.0, 4.0, 8.0, 16.0, 32.0, 50.0, 50.0, 50.0)]


def test_jitter_spreads_a_backoff_evenly_from_zero_and_leaves_fixed_delays_alone() -> None:
    policy = RetryPolicy((OSError,), retry_backoff=8.0)
    random = Random(1)
    delays = []
    for _ in range(2000):
        answer = policy.decide(ERROR, retries=0, max_retries=None, random=random)
        assert isinstance(answer, Again)
        delays.append(answer.delay)
    assert 0 <= min(delays) < 0.1
    assert 7.9 < max(delays) <= 8
    assert 3.7 < sum(delays) / len(delays) < 4.3
    assert decide(RetryPolicy((OSError,), retry_delay=60.0)) == Again(60.0)


@given(
    retries=st.integers(0, 10**20),
    delay=st.none() | st.floats(),
    countdown=st.none() | st.floats(),
    backoff=st.none() | st.floats(),
    maximum=st.floats(),
    jitter=st.booleans(),
)
def test_every_delay_is_a_number_from_zero_to_the_maximum(
    retries: int,
    delay: float | None,
    countdown: float | None,
    backoff: float | None,
    maximum: float,
    jitter: bool,
) -> None:
    policy = RetryPolicy(
        retry_delay=countdown, retry_backoff=backoff, retry_backoff_max=maximum, retry_jitter=jitter
    )
    answer = decide(policy, Retry(delay=delay), retries, -1)
    assert isinstance(answer, Again)
    assert math.isfinite(answer.delay)
    assert 0 <= answer.delay <= MAX_DELAY


def test_options_become_a_policy() -> None:
    policy = RetryPolicy.from_options(
        {
            "autoretry_for": OSError,
            "retry_kwargs": {"max_retries": 5, "countdown": 60},
            "max_retries": 9,
            "default_retry_delay": 10,
            "retry_backoff": True,
            "retry_backoff_max": 30,
            "retry_jitter": False,
        }
    )
    assert policy == RetryPolicy((OSError,), 5, 10.0, 60.0, 1.0, 30.0, False)
    assert RetryPolicy.from_options({}) == RetryPolicy()


@pytest.mark.parametrize(
    ("option", "factor"), [(True, 1.0), (False, None), (None, None), (0, None), (5, 5.0)]
)
def test_retry_backoff_is_a_switch_or_a_factor(option: object, factor: float | None) -> None:
    assert RetryPolicy.from_options({"retry_backoff": option}).retry_backoff == factor


def test_options_start_from_the_defaults_given() -> None:
    defaults = RetryPolicy(max_retries=8, retry_backoff=2.0)
    assert RetryPolicy.from_options({"retry_backoff": False}, defaults) == RetryPolicy(max_retries=8)


def test_every_wrong_option_is_reported_at_once() -> None:
    with pytest.raises(ConfigError) as caught:
        RetryPolicy.from_options(
            {
                "autoretry_fro": (OSError,),
                "max_retries": -2,
                "retry_jitter": "yes",
                "retry_kwargs": {"max_retries": 1.5, "coutdown": 3, "countdown": -1},
            }
        )
    message = str(caught.value)
    assert "unknown retry option 'autoretry_fro', did you mean 'autoretry_for'?" in message
    assert "max_retries must be a whole number from 0 to 2147483647, or None for ever, got -2" in message
    assert "retry_jitter must be True or False, got 'yes'" in message
    assert "retry_kwargs takes max_retries and countdown only, got 'coutdown'" in message
    assert "retry_kwargs['max_retries'] must be a whole number from 0 to 2147483647, or None" in message
    assert "retry_kwargs['countdown'] must be seconds" in message


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("autoretry_for", "OSError"),
        ("autoretry_for", (OSError, int)),
        ("autoretry_for", Retry),
        ("max_retries", True),
        ("default_retry_delay", math.nan),
        ("default_retry_delay", math.inf),
        ("retry_backoff", "1"),
        ("retry_backoff_max", -1),
        ("retry_kwargs", [("countdown", 1)]),
        ("frobnicate", 1),
    ],
)
def test_a_wrong_option_is_named(name: str, value: object) -> None:
    with pytest.raises(ConfigError, match=name):
        RetryPolicy.from_options({name: value})


def test_crashes_back_off_from_a_second_to_a_minute() -> None:
    assert [crash_delay(n) for n in (1, 2, 3, 6, 7, 8, 10**6)] == [1.0, 2.0, 4.0, 32.0, 60.0, 60.0, 60.0]
    assert crash_delay(0) == 1.0
