"""What becomes of ticks: caught up, held, skipped, missed; and what `@app.periodic` takes."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import UUID

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pgqueue import ConfigError, PgQueue, TaskContext
from pgqueue.context import Request
from pgqueue.cron import Every
from pgqueue.schedule import (
    CATCH_UP_MOST,
    HELD_MOST,
    CatchUp,
    Decision,
    Overlap,
    Schedule,
    Standing,
    decide,
    tick_id,
    tick_share,
)

MINUTELY = Every(60)
NOON = datetime(2026, 5, 6, 12, tzinfo=UTC)


def minute(number: float) -> datetime:
    return NOON + timedelta(minutes=number)


def after(
    minutes: float,
    *,
    catch_up: CatchUp = "latest",
    overlap: Overlap = "allow",
    held: tuple[datetime, ...] = (),
    busy: bool = False,
) -> Decision:
    """What is decided so many minutes after the last tick, at noon."""
    return decide(MINUTELY, Standing(NOON, held, busy), minute(minutes), catch_up=catch_up, overlap=overlap)


def test_nothing_is_due() -> None:
    assert after(0.5) == Decision((), (), NOON, minute(1), 0, 0)


@pytest.mark.parametrize("catch_up", ["latest", "all", "none"])
def test_one_tick_in_time(catch_up: CatchUp) -> None:
    assert after(1.01, catch_up=catch_up) == Decision((minute(1),), (), minute(1), minute(2), 0, 0)


def test_of_ticks_that_nobody_was_there_for() -> None:
    assert after(3.5).fire == (minute(3),)
    assert after(3.5).missed == 2
    assert after(3.5, catch_up="all").fire == (minute(1), minute(2), minute(3))
    assert after(3.5, catch_up="all").missed == 0
    daily = decide(Every(86_400), Standing(NOON), minute(800), catch_up="none", overlap="allow")
    assert (daily.fire, daily.missed, daily.last_tick) == ((), 1, datetime(2026, 5, 7, tzinfo=UTC))
    late = decide(Every(86_400), Standing(NOON), minute(721), catch_up="none", overlap="allow")
    assert (late.fire, late.missed) == ((datetime(2026, 5, 7, tzinfo=UTC),), 0)


def test_all_has_a_bound() -> None:
    decision = after(10_000, catch_up="all")
    assert len(decision.fire) == CATCH_UP_MOST
    assert decision.fire[-1] == decision.last_tick == minute(10_000)


def test_a_clock_that_was_set_back_brings_no_tick_again() -> None:
    assert after(-90) == Decision((), (), NOON, minute(1), 0, 0)


def test_skip() -> None:
    assert after(1, overlap="skip").fire == (minute(1),)
    busy = after(1, overlap="skip", busy=True)
    assert (busy.fire, busy.held, busy.skipped, busy.last_tick) == ((), (), 1, minute(1))
    many = after(3, overlap="skip", catch_up="all")
    assert (many.fire, many.skipped) == ((minute(3),), 2), "they would overlap each other"


def test_queue() -> None:
    busy = after(1, overlap="queue", busy=True)
    assert (busy.fire, busy.held, busy.skipped) == ((), (minute(1),), 0)
    still = after(1, overlap="queue", busy=True, held=(minute(-1), NOON))
    assert still.held == (minute(-1), NOON, minute(1))
    free = after(0.5, overlap="queue", held=(minute(-1), NOON))
    assert (free.fire, free.held, free.last_tick) == ((minute(-1),), (NOON,), NOON), (
        "one at a time, oldest first"
    )
    full = after(1, overlap="queue", busy=True, held=tuple(minute(-n) for n in range(HELD_MOST, 0, -1)))
    assert (len(full.held), full.skipped, full.held[-1]) == (HELD_MOST, 1, minute(1))


@given(
    st.sampled_from(["latest", "all", "none"]),
    st.sampled_from(["allow", "skip", "queue"]),
    st.lists(st.tuples(st.floats(0, 5), st.booleans()), max_size=30),
)
def test_no_tick_comes_twice_or_is_unaccounted_for(
    catch_up: CatchUp, overlap: Overlap, looks: list[tuple[float, bool]]
) -> None:
    standing, now = Standing(NOON), NOON
    fired: list[datetime] = []
    lost = 0
    for wait, busy in looks:
        now += timedelta(minutes=wait)
        standing = Standing(standing.last_tick, standing.held, busy)
        decision = decide(MINUTELY, standing, now, catch_up=catch_up, overlap=overlap)
        assert decision.next_tick > now
        if busy and overlap != "allow":
            assert decision.fire == ()
        fired += decision.fire
        lost += decision.missed + decision.skipped
        standing = Standing(decision.last_tick, decision.held)
    assert len(set(fired)) == len(fired)
    assert fired == sorted(fired)
    assert len(fired) + len(standing.held) + lost == (now - NOON) // timedelta(minutes=1)
    if catch_up == "all" and overlap != "skip":
        assert lost == 0


def test_the_job_of_a_tick_has_one_id() -> None:
    found = UUID(tick_id("nightly", NOON))
    assert (found.version, found.variant) == (7, "specified in RFC 4122")
    assert found.int >> 80 == NOON.timestamp() * 1000
    assert tick_id("nightly", NOON) == tick_id("nightly", NOON.astimezone())
    assert len({tick_id(name, minute(n)) for name in ("nightly", "hourly") for n in range(50)}) == 100
    shares = [tick_share("nightly", minute(n)) for n in range(200)]
    assert 0 <= min(shares) < 0.1
    assert 0.9 < max(shares) < 1


# The decorator.


def schedules(**options: Any) -> list[Schedule]:
    app = PgQueue("tests")

    @app.task(name="report", queue="reports", priority=7)
    @app.periodic(**options)
    def report(day: int = 1, *, note: str = "") -> None: ...

    return app.schedules.in_code()


def test_what_is_written_down() -> None:
    (found,) = schedules(
        cron="0 9 * * *", timezone="Asia/Seoul", args=(3,), kwargs={"note": "n"}, expires=60, time_limit=5,
        max_retries=2, headers={"tenant": 1}, catch_up="all", overlap="skip", jitter=timedelta(minutes=1),
    )  # fmt: skip
    assert found == Schedule(
        name="report", task="report", cron="0 9 * * *", timezone="Asia/Seoul", args=[3], kwargs={"note": "n"},
        queue="reports", priority=7, max_retries=2, expires_in=60.0, catch_up="all", overlap="skip",
        jitter=60.0, headers={"tenant": 1, "pgqueue": {"time_limit": 5.0}},
    )  # fmt: skip
    (found,) = schedules(every=timedelta(minutes=5), name="often", queue="other", priority=0)
    assert (found.name, found.every, found.cron, found.queue, found.priority) == (
        "often",
        300,
        None,
        "other",
        0,
    )


def test_either_order_and_several() -> None:
    app = PgQueue("tests")

    @app.periodic(every=60, name="minutely")
    @app.task(name="report")
    @app.periodic(cron="@daily")
    @app.periodic(cron="@hourly", name="hourly")
    def report() -> None: ...

    assert [each.name for each in app.schedules.in_code()] == ["hourly", "minutely", "report"]
    assert report() is None


def test_the_settings_stay_open_until_a_worker_asks() -> None:
    app = PgQueue("tests")

    @app.task
    @app.periodic(every=60)
    def report() -> None: ...

    app.configure(queue="elsewhere", task_routes={"*report": {"priority": 9}})
    (found,) = app.schedules.in_code()
    assert (found.queue, found.priority) == ("elsewhere", 9)


def test_a_module_that_is_loaded_again() -> None:
    app = PgQueue("tests")
    for every in (60, 120):
        source = f"@app.task(name='report')\n@app.periodic(every={every})\ndef report(): ..."
        exec(source, {"app": app, "__name__": "pgqueue_tests_reloaded"})  # noqa: S102
    assert [each.every for each in app.schedules.in_code()] == [120]


def test_hooks_are_not_asked_for_headers_that_would_stay() -> None:
    app = PgQueue("tests")
    app.hook("before_enqueue")(lambda event: pytest.fail("it was asked"))

    @app.task
    @app.periodic(every=60)
    def report() -> None: ...

    assert app.schedules.in_code()[0].headers == {}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "give one of cron and every"),
        ({"cron": "@daily", "every": 60}, "give one of cron and every"),
        ({"cron": "61 * * * *"}, "cron must be five fields"),
        ({"cron": "@daily", "timezone": "Mars"}, "timezone must be a name"),
        ({"every": "1h"}, "every must be a timedelta or a number of seconds, got '1h'"),
        ({"every": 0.2}, "every must be a whole number of seconds"),
        ({"every": 60, "catch_up": "some"}, "catch_up must be 'latest', 'all', 'none', got 'some'"),
        ({"every": 60, "overlap": 1}, "overlap must be 'allow', 'skip', 'queue', got 1"),
        ({"every": 60, "jitter": -1}, "jitter must be from 0 to 86400 seconds, got -1"),
        ({"every": 60, "jitter": "1m"}, "jitter must be a timedelta or a number of seconds"),
        ({"every": 60, "name": ""}, "a schedule's name is 1 to 255 printable characters, got ''"),
        ({"every": 60, "name": "a\nb"}, "a schedule's name is 1 to 255 printable characters"),
        ({"every": 60, "args": "ab"}, "args must be a list or tuple, got 'ab'"),
        ({"every": 60, "args": (1, 2)}, "too many positional arguments"),
        ({"every": 60, "args": ("x",)}, "day"),
        ({"every": 60, "kwargs": {"nite": 1}}, "nite"),
        ({"every": 60, "queue": "a b"}, "a queue name is"),
        ({"every": 60, "priority": 10}, "priority must be"),
        ({"every": 60, "expires": NOON}, "expires must be a number of seconds, for each job anew"),
        ({"every": 60, "countdown": 5}, "unknown option 'countdown'"),
        ({"every": 60, "catchup": "all"}, r"unknown option 'catchup' \(did you mean catch_up\?\)"),
        ({"every": 60, "time_limit": 1, "soft_time_limit": 2}, "soft_time_limit must be less"),
    ],
)
def test_wrong_options_are_refused_where_they_are_written(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=f"^@app.periodic.*: .*{message}"):
        schedules(**options)


def test_all_mistakes_at_once() -> None:
    with pytest.raises(
        ConfigError, match=r"unknown option 'x'.*; give one of cron and every, got None and None; c"
    ):
        schedules(x=1, catch_up="y")


def test_a_function_that_is_no_task() -> None:
    app = PgQueue("tests")
    app.periodic(every=60)(test_skip)
    with pytest.raises(ConfigError, match=r"needs a task: write @app.task above it \(test_skip\)"):
        app.schedules.in_code()
    with pytest.raises(ConfigError, match=r"@app.periodic decorates a task, got 5"):
        app.periodic(every=60)(5)  # type: ignore[type-var]


def test_two_of_one_name() -> None:
    app = PgQueue("tests")
    with pytest.raises(ConfigError, match="two of its schedules are called 'report'; give one another name="):

        @app.task(name="report")
        @app.periodic(every=60)
        @app.periodic(every=120)
        def report() -> None: ...

    app = PgQueue("tests")
    app.periodic(every=60)(app.task(name="one")(test_skip))
    with pytest.raises(ConfigError, match="one of one is called 'one'; give one another name="):
        app.periodic(every=60, name="one")(app.task(name="two")(test_queue))


def test_the_tick_in_the_job() -> None:
    request = Request(id="x", task="t", headers={"schedule": "nightly", "tick": "2026-05-06T12:00:00Z"})
    assert request.tick == NOON
    assert Request(id="x", task="t", headers={"tick": "2026-05-06T12:00:00Z"}).tick is None
    assert Request(id="x", task="t").tick is None


def test_called_directly_there_is_no_tick() -> None:
    app = PgQueue("tests")

    @app.task(bind=True)
    @app.periodic(every=60)
    def report(self: TaskContext) -> bool:
        return self.request.tick is None

    assert report() is True
