"""Tasks: what a call checks, what a running task sees, what its options mean."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from datetime import UTC, date, datetime, timedelta, timezone
from decimal import Decimal
from typing import Any
from uuid import UUID, uuid4

import pytest

from pgqueue import ConfigError, PayloadError, PgQueue, Request, Retry, Signature, Task, TaskContext
from pgqueue.job import JobRequest, new_id
from pgqueue.worker.interrupts import Alarm

NOON = datetime(2030, 6, 1, 12, tzinfo=timezone(timedelta(hours=9)))


@pytest.fixture
def app(monkeypatch: pytest.MonkeyPatch) -> PgQueue:
    for name in ("PGQUEUE_DSN", "PGQUEUE_QUEUE", "PGQUEUE_PRIORITY"):
        monkeypatch.delenv(name, raising=False)
    return PgQueue("tests")


@pytest.fixture
def note(app: PgQueue) -> Task[..., Any]:
    @app.task(name="tests.note")
    def note(number: int, text: str = "") -> str:
        """Notes."""
        return f"{number}{text}"

    return note


def request_for(task: Any, *args: object, **options: Any) -> JobRequest:
    request = task.request_for(args, {}, options)
    assert isinstance(request, JobRequest)
    return request


class TestCall:
    def test_it_runs_the_function(self, note: Any) -> None:
        assert note(1, text="x") == "1x"
        assert (note.__name__, note.__doc__) == ("note", "Notes.")

    def test_a_bound_one_knows_that_it_was_called_directly(self, app: PgQueue) -> None:
        @app.task(bind=True, queue="q", priority=3)
        def look(self: TaskContext, number: int, *, text: str) -> Request:
            assert self.task is app.tasks[self.name]
            assert self.app is app
            return self.request

        request = look(1, text="x")
        assert (request.called_directly, request.args, request.kwargs) == (True, (1,), {"text": "x"})
        assert (request.task, request.queue, request.priority) == (look.name, "q", 3)
        assert (request.retries, request.attempt, request.worker) == (0, 1, None)
        assert UUID(request.id).version == 7

    def test_an_async_one_is_awaited(self, app: PgQueue) -> None:
        @app.task
        async def double(number: int) -> int:
            await asyncio.sleep(0)
            return 2 * number

        assert asyncio.run(double(2)) == 4


class TestRun:
    def test_it_gives_the_request_to_a_bound_task(self, app: PgQueue) -> None:
        @app.task(bind=True)
        def look(self: TaskContext, number: int, text: str = "") -> tuple[Request, int, str]:
            return self.request, number, text

        request = Request(new_id(), look.name, (1,), {"text": "x"}, retries=2, attempt=3, worker="w")
        assert look.run(request, Alarm()) == (request, 1, "x")

    def test_a_request_cannot_be_changed(self) -> None:
        with pytest.raises(AttributeError):
            Request(id="1", task="t").retries = 1  # type: ignore[misc]


class TestProgress:
    def test_called_directly_it_does_nothing(self) -> None:
        TestRetry.context(directly=True).progress(1, 2, "note")

    @pytest.mark.parametrize(
        ("arguments", "error", "complaint"),
        [
            (("1",), TypeError, "done must be a number, got '1'"),
            ((True,), TypeError, "done must be a number, got True"),
            ((-1,), ValueError, "done must be a number from 0 on, got -1"),
            ((float("nan"),), ValueError, "done must be a number from 0 on, got nan"),
            ((10**400,), ValueError, "done must be a number from 0 on, got 1000"),
            ((1, "2"), TypeError, "total must be a number, got '2'"),
            ((1, 2, 3), TypeError, "note must be text, got 3"),
        ],
    )
    def test_what_is_wrong_is_said(
        self, arguments: tuple[Any, ...], error: type[Exception], complaint: str
    ) -> None:
        with pytest.raises(error, match=complaint):
            TestRetry.context().progress(*arguments)


class TestRetry:
    @staticmethod
    def context(directly: bool = False) -> TaskContext:
        task = PgQueue("tests").task(name="t")(lambda: None)
        return TaskContext(task, Request(id=new_id(), task="t", called_directly=directly))

    def test_it_carries_what_it_was_given(self) -> None:
        error = OSError("gone")
        with pytest.raises(Retry) as caught:
            self.context().retry(countdown=7, exc=error, max_retries=2)
        assert (caught.value.delay, caught.value.cause, caught.value.max_retries) == (7.0, error, 2)
        assert caught.value.__cause__ is error

    def test_the_exception_being_handled_is_the_cause(self) -> None:
        try:
            raise OSError("gone")
        except OSError:
            with pytest.raises(Retry) as caught:
                self.context().retry()
        assert isinstance(caught.value.cause, OSError)
        assert (caught.value.delay, caught.value.max_retries) == (None, None)

    def test_an_eta_is_a_delay_from_now(self) -> None:
        with pytest.raises(Retry) as caught:
            self.context().retry(eta=datetime.now(UTC) + timedelta(minutes=1))
        assert caught.value.delay == pytest.approx(60, abs=1)
        with pytest.raises(Retry) as caught:
            self.context().retry(eta=datetime.now(UTC) - timedelta(minutes=1))
        assert caught.value.delay == 0

    def test_except_exception_does_not_catch_it(self) -> None:
        def careless() -> None:
            try:
                self.context().retry()
            except Exception:
                pytest.fail("swallowed")

        with pytest.raises(Retry):
            careless()

    def test_called_directly_the_error_itself_is_raised(self) -> None:
        with pytest.raises(OSError, match="gone"):
            self.context(directly=True).retry(exc=OSError("gone"))
        try:
            raise KeyError(1)
        except KeyError:
            with pytest.raises(KeyError):
                self.context(directly=True).retry()
        with pytest.raises(Retry):
            self.context(directly=True).retry()

    @pytest.mark.parametrize(
        ("options", "error", "message"),
        [
            ({"countdown": 1, "eta": NOON}, ValueError, "countdown and eta exclude each other"),
            ({"eta": datetime(2030, 1, 1)}, ValueError, "eta must have a timezone"),
            ({"countdown": "1"}, TypeError, "countdown must be a number of seconds"),
            ({"max_retries": -2}, ValueError, "max_retries must be from 0 to 2147483647, or -1"),
        ],
    )
    def test_wrong_values(self, options: dict[str, Any], error: type[Exception], message: str) -> None:
        with pytest.raises(error, match=message):
            self.context().retry(**options)


class TestRequestOfACall:
    def test_nothing_but_arguments(self, note: Any) -> None:
        request = request_for(note, 1, "x")
        assert (request.task, request.args, request.kwargs) == ("tests.note", '[1,"x"]', "{}")
        assert (request.queue, request.priority, request.max_retries) == ("default", 5, None)
        assert (request.eta, request.countdown, request.expires_at, request.expires_in) == (None,) * 4
        assert (request.headers, request.given_id) == ("{}", False)
        assert UUID(request.id).version == 7

    def test_every_option(self, note: Any) -> None:
        mine = uuid4()
        options = {
            "eta": NOON, "expires": NOON, "priority": 0, "queue": "q", "max_retries": -1, "job_id": mine,
            "headers": {"a": [1]},
        }  # fmt: skip
        request = request_for(note, 1, **options)
        assert request.eta == request.expires_at == NOON
        assert (request.priority, request.queue, request.max_retries) == (0, "q", -1)
        assert (request.id, request.given_id, request.headers) == (str(mine), True, '{"a":[1]}')
        assert request_for(note, 1, countdown=2, expires=3).countdown == 2.0
        assert request_for(note, 1, countdown=2, expires=3).expires_in == 3.0

    def test_none_is_no_option(self, note: Any) -> None:
        names = ("countdown", "eta", "expires", "priority", "queue", "max_retries", "job_id", "headers")
        request = request_for(note, 1, **dict.fromkeys(names))
        plain = request_for(note, 1)
        assert {
            name: getattr(request, name) for name in ("queue", "priority", "eta", "headers", "given_id")
        } == {name: getattr(plain, name) for name in ("queue", "priority", "eta", "headers", "given_id")}

    @pytest.mark.parametrize(
        ("options", "error", "message"),
        [
            (
                {"eta": datetime(2030, 1, 2)},
                ValueError,
                "eta must have a timezone, got datetime.datetime(2030, 1, 2, 0, 0); "
                "for UTC use eta.replace(tzinfo=timezone.utc)",
            ),
            (
                {"eta": date(2030, 1, 2)},
                TypeError,
                "eta must be a datetime with a timezone, got datetime.date(2030",
            ),
            ({"eta": 60}, TypeError, "eta must be a datetime with a timezone, got 60"),
            ({"eta": datetime.max.replace(tzinfo=UTC)}, ValueError, "eta must be before the year 9999"),
            (
                {"eta": datetime.max.replace(tzinfo=timezone(timedelta(hours=-9)))},
                ValueError,
                "eta must be before the year 9999",
            ),
            (
                {"eta": NOON, "countdown": 1},
                ValueError,
                "countdown and eta exclude each other: give one of them",
            ),
            ({"countdown": NOON}, TypeError, "countdown must be a number of seconds, got"),
            ({"countdown": True}, TypeError, "countdown must be a number of seconds, got True"),
            ({"countdown": float("nan")}, ValueError, "countdown must be a finite number of seconds"),
            (
                {"countdown": 1e12},
                ValueError,
                "countdown must be a finite number of seconds before the year 9999",
            ),
            ({"expires": datetime(2030, 1, 2)}, ValueError, "expires must have a timezone"),
            ({"expires": "1h"}, TypeError, "expires must be a number of seconds or a datetime, got '1h'"),
            (
                {"priority": 10},
                ValueError,
                "priority must be a whole number from 0 to 9 (larger runs first), got 10",
            ),
            ({"priority": True}, ValueError, "priority must be a whole number from 0 to 9"),
            (
                {"queue": "my queue"},
                ValueError,
                "a queue name is 1 to 63 letters, digits or '_.:-', got 'my queue'",
            ),
            ({"queue": ""}, ValueError, "a queue name is 1 to 63 letters"),
            ({"max_retries": -2}, ValueError, "max_retries must be from 0 to 2147483647, or -1"),
            ({"max_retries": 2**31}, ValueError, "max_retries must be from 0 to 2147483647"),
            ({"max_retries": 1.5}, TypeError, "max_retries must be a whole number, got 1.5"),
            (
                {"job_id": "mine"},
                ValueError,
                "job_id must be a UUID, got 'mine'; a key of your own is unique_key",
            ),
            ({"headers": [1]}, TypeError, "headers must be a mapping, got [1]"),
            ({"headers": {"a": Decimal(1)}}, PayloadError, "headers"),
        ],
    )
    def test_wrong_values(
        self, note: Any, options: dict[str, Any], error: type[Exception], message: str
    ) -> None:
        with pytest.raises(error) as caught:
            note.apply_async((1,), **options)
        assert message in str(caught.value)

    @pytest.mark.parametrize(
        ("name", "hint"),
        [
            ("task_id", "'task_id' (it is called job_id here)"),
            ("routing_key", "'routing_key' (it is called queue here)"),
            ("exchange", "'exchange' (it is called queue here)"),
            ("retry", "'retry' (a lost connection is repeated by itself)"),
            ("ignore_result", "'ignore_result' (it is an option of the task)"),
            ("countdwon", "'countdwon' (did you mean countdown?)"),
            (
                "zzz",
                "'zzz' (known are correlation_id, countdown, eta, expires, headers, job_id, link, link_error,"
                " max_retries, on_conflict, priority, queue, soft_time_limit, tags, time_limit, unique_key,"
                " unique_until)",
            ),
        ],
    )
    def test_unknown_options(self, app: PgQueue, note: Any, name: str, hint: str) -> None:
        calls: Mapping[str, Any] = {
            "apply_async": lambda options: note.apply_async((1,), **options),
            "aapply_async": lambda options: asyncio.run(note.aapply_async((1,), **options)),
            "set": lambda options: note.s(1).set(**options),
            "send_task": lambda options: app.send_task("tests.note", **options),
            "asend_task": lambda options: asyncio.run(app.asend_task("tests.note", **options)),
        }
        for call, make in calls.items():
            with pytest.raises(TypeError) as caught:
                make({name: 1})
            assert str(caught.value) == f"{call}() got an unknown option {hint}"

    def test_all_unknown_options_are_named(self, note: Any) -> None:
        with pytest.raises(TypeError, match=r"'task_id' .*, 'exchange' "):
            note.apply_async((1,), task_id=1, exchange=2)

    def test_arguments_are_checked_at_the_call(self, note: Any) -> None:
        with pytest.raises(TypeError, match="missing a required argument"):
            note.delay()
        with pytest.raises(PayloadError, match="number is None"):
            note.delay(None)
        with pytest.raises(TypeError, match="args must be a list or tuple"):
            note.apply_async("1")


class TestSignature:
    def test_it_is_compared_by_what_it_says(self, note: Any) -> None:
        one = note.s(1, text="x")
        assert one == Signature("tests.note", (1,), {"text": "x"})
        assert one != note.s(1, text="y")
        assert one != note.si(1, text="x")
        assert repr(one) == "tests.note(1, text='x')"

    def test_set_changes_it_as_in_celery(self, note: Any) -> None:
        one = note.s(1)
        assert one.set(queue="q").set(priority=1) is one
        assert one.options == {"queue": "q", "priority": 1}

    def test_a_clone_is_another_one(self, note: Any) -> None:
        one = note.s(2, text="x").set(queue="q").link(note.si(3))
        other = one.clone((1,), {"text": "y"}).set(queue="r")
        assert other.args == (1, 2)
        assert other.kwargs == {"text": "y"}
        assert one.options == {"queue": "q"}
        assert other.links == one.links == (note.si(3),)


class TestOptions:
    def test_defaults(self, note: Any) -> None:
        assert (note.queue, note.priority, note.expires, note.dead_letter_queue) == ("default", 5, None, None)
        assert note.policy.max_retries == 3
        assert (note.bound, note.is_async, note.module) == (False, False, __name__)

    def test_call_beats_route_beats_task_beats_application(self) -> None:
        app = PgQueue(
            "tests",
            task_defaults={
                "queue": "from_app",
                "priority": 1,
                "dead_letter_queue": "dead_app",
                "max_retries": 9,
            },
            task_routes={"routed": {"queue": "from_route", "priority": 0, "dead_letter_queue": "dead_route"}},
        )
        plain = app.task(name="plain")(lambda: None)
        own = app.task(
            name="own", queue="from_task", priority=2, dead_letter_queue="dead_task", max_retries=1
        )(lambda: None)
        routed = app.task(name="routed", queue="from_task", priority=2, dead_letter_queue="dead_task")(
            lambda: None
        )
        found = [(task.queue, task.priority, task.dead_letter_queue) for task in (plain, own, routed)]
        assert found == [
            ("from_app", 1, "dead_app"), ("from_task", 2, "dead_task"), ("from_route", 0, "dead_route"),
        ]  # fmt: skip
        assert [task.policy.max_retries for task in (plain, own, routed)] == [9, 1, 9]
        called = request_for(routed, queue="from_call", priority=9)
        assert (called.queue, called.priority) == ("from_call", 9)

    def test_expires_of_the_task_and_of_the_call(self, app: PgQueue) -> None:
        task = app.task(name="t", expires=60)(lambda: None)
        assert request_for(task).expires_in == 60
        assert request_for(task, expires=5).expires_in == 5
        assert request_for(task, expires=NOON).expires_in is None

    def test_all_that_is_wrong_is_said_at_once(self, app: PgQueue) -> None:
        with pytest.raises(ConfigError) as caught:
            app.task(
                name="two words",
                bind=1,  # type: ignore[call-overload]
                qeue="x",
                acks_late=True,
                priority=11,
                expires=-1,
                dead_letter_queue="a b",
                max_retries=-2,
                autoretry_for=(1,),
            )(lambda: None)
        message = str(caught.value)
        for part in (
            "task two words: ",
            "unknown option 'qeue' (did you mean queue?)",
            "unknown option 'acks_late' (a job is acknowledged after it ran, always)",
            "a task name is 1 to 255 characters without blanks, got 'two words'",
            "bind must be True or False, got 1",
            "priority must be a whole number from 0 to 9",
            "expires must be greater than 0 seconds, got -1",
            "a queue name is 1 to 63 letters, digits or '_.:-', got 'a b'",
            "max_retries must be a whole number from 0 to 2147483647, or None for ever, got -2",
            "autoretry_for must be exception classes, got 1",
        ):
            assert part in message
        assert app.tasks == {}

    def test_a_bound_task_needs_a_place_for_its_context(self, app: PgQueue) -> None:
        with pytest.raises(ConfigError, match="takes the task context first"):
            app.task(name="t", bind=True)(lambda: None)  # type: ignore[arg-type,misc]


def test_an_option_of_task_defaults_is_checked_too() -> None:
    with pytest.raises(ConfigError, match=r"task_defaults: unknown option 'name'"):
        PgQueue("tests", task_defaults={"name": "x"})
