"""Which job goes where, what a death costs, and how many to claim: no process, no database, no clock."""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Iterator

import pytest

from pgqueue.database.store import CLAIM_LIMIT
from pgqueue.job import ClaimedJob
from pgqueue.retry import RetryPolicy
from pgqueue.worker.dispatcher import (
    CHUNK_JOBS,
    DEAF_TO_LARGE,
    LOAD_JOBS,
    OTHERS_GRACE,
    PREFETCH_JOBS,
    STALL,
    STRANDED,
    Dispatcher,
    Executor,
    Pace,
    Slot,
)
from pgqueue.worker.wire import Board, Failed, Skipped, Snoozed, Succeeded, TaskFacts

_numbers = itertools.count(1)


def claimed(
    task: str = "task",
    *,
    crashes: int = 0,
    expired: bool = False,
    cancelled: bool = False,
    args: str | None = "[]",
) -> ClaimedJob:
    number = next(_numbers)
    return ClaimedJob(
        f"job-{number}",
        "default",
        5,
        number,
        task,
        args,
        "{}",
        "{}",
        1,
        0,
        None,
        crashes,
        None,
        expired,
        cancelled,
        "worker",
    )


@pytest.fixture
def make() -> Iterator[Callable[..., Dispatcher]]:
    """Makes dispatchers with ready executors."""
    boards: list[Board] = []

    def dispatcher(executors: int = 2, max_crashes: int = 3, slots: int = 1) -> Dispatcher:
        made = Dispatcher(max_crashes=max_crashes)
        for index in range(1, executors + 1):
            descriptor = Board.create(slots)
            boards.extend(Board.map(descriptor, slots))
            os.close(descriptor)
            executor = made.executors[index] = Executor(index, 1000 + index, ready=True)
            executor.slots = [Slot(executor, number, boards[number - slots]) for number in range(slots)]
        return made

    yield dispatcher
    for board in boards:
        board.close()


def sent(dispatcher: Dispatcher, now: float = 0.0) -> dict[int, list[str]]:
    return {slot.executor.index: [job.id for job in jobs] for slot, jobs in dispatcher.assign(now)}


def succeed(dispatcher: Dispatcher, slot: Slot, number: int, seconds: float) -> None:
    slot.board.start(number)
    dispatcher.finished(slot, Succeeded(number, 10.0, 10.0 + seconds))


def teach(dispatcher: Dispatcher, task: str, seconds: float) -> None:
    for _ in range(200):
        dispatcher.pace.observe(task, seconds)


def test_unknown_tasks_go_out_one_at_a_time_to_every_free_slot(make: Callable[..., Dispatcher]) -> None:
    dispatcher = make(2)
    jobs = [claimed() for _ in range(5)]
    dispatcher.add(jobs, 0.0)
    assert sent(dispatcher) == {1: [jobs[0].id], 2: [jobs[1].id]}
    assert dispatcher.waiting == 3
    assert sent(dispatcher) == {}


def test_exactly_the_free_slots_are_claimed_for_long_jobs(make: Callable[..., Dispatcher]) -> None:
    dispatcher = make(4)
    teach(dispatcher, "task", 30.0)
    assert dispatcher.wanted() == 4
    dispatcher.add([claimed()], 0.0)
    assert dispatcher.wanted() == 3
    sent(dispatcher)
    assert dispatcher.wanted() == 3


def test_short_jobs_are_claimed_ahead_about_100_ms_and_within_bounds(make: Callable[..., Dispatcher]) -> None:
    dispatcher = make(2)
    teach(dispatcher, "task", 0.01)
    assert dispatcher.wanted() == pytest.approx(20, abs=1)
    teach(dispatcher, "task", 0.00001)
    assert dispatcher.wanted() == CLAIM_LIMIT
    dispatcher.add([claimed() for _ in range(PREFETCH_JOBS)], 0.0)
    assert dispatcher.wanted() == 0


def test_sub_millisecond_jobs_travel_in_chunks_shared_among_the_executors(
    make: Callable[..., Dispatcher],
) -> None:
    dispatcher = make(2)
    teach(dispatcher, "fast", 0.00002)
    dispatcher.add([claimed("fast") for _ in range(100)], 0.0)
    chunks = sent(dispatcher)
    assert [len(chunk) for chunk in chunks.values()] == [50, 25]
    dispatcher.add([claimed("fast") for _ in range(1000)], 0.0)
    assert all(len(slot.in_flight) <= CHUNK_JOBS for slot in dispatcher.slots)


def test_a_long_job_is_never_put_behind_others_nor_others_behind_it(make: Callable[..., Dispatcher]) -> None:
    dispatcher = make(1)
    teach(dispatcher, "fast", 0.00002)
    teach(dispatcher, "long", 5.0)
    jobs = [claimed("fast"), claimed("long"), claimed("fast"), claimed("fast")]
    dispatcher.add(jobs, 0.0)
    assert sent(dispatcher) == {1: [jobs[0].id]}
    succeed(dispatcher, dispatcher.executors[1].slots[0], 1, 0.00002)
    assert sent(dispatcher) == {1: [jobs[1].id]}
    assert sent(dispatcher) == {}


def test_a_stalled_chunk_gives_its_rest_back_in_order(make: Callable[..., Dispatcher]) -> None:
    dispatcher = make(1)
    teach(dispatcher, "fast", 0.00002)
    jobs = [claimed("fast") for _ in range(10)]
    dispatcher.add(jobs, 0.0)
    sent(dispatcher)
    slot = dispatcher.executors[1].slots[0]
    slot.board.start(1)
    dispatcher.take_back_stalled(1.0)
    assert len(slot.in_flight) == 10, "progress since the last look: not stalled"
    dispatcher.take_back_stalled(1.0 + STALL)
    assert [job.id for job in slot.in_flight.values()] == [jobs[0].id]
    assert dispatcher.waiting == 9
    assert not slot.board.start(2)
    assert dispatcher.pace.expect("fast") > 0.001  # type: ignore[operator]


def test_a_skipped_job_waits_again_and_a_late_report_of_a_recalled_one_is_ignored(
    make: Callable[..., Dispatcher],
) -> None:
    dispatcher = make(1)
    job = claimed()
    dispatcher.add([job], 0.0)
    sent(dispatcher)
    slot = dispatcher.executors[1].slots[0]
    dispatcher.skipped(slot, Skipped(1))
    assert dispatcher.waiting == 1
    dispatcher.finished(slot, Succeeded(1, 0.0, 1.0))
    assert dispatcher.outcomes == []


def test_a_death_costs_only_the_running_job(make: Callable[..., Dispatcher]) -> None:
    dispatcher = make(1)
    dispatcher.tasks = {"fast": TaskFacts("letters")}
    teach(dispatcher, "fast", 0.00002)
    jobs = [claimed("fast") for _ in range(5)]
    dispatcher.add(jobs, 0.0)
    sent(dispatcher)
    slot = dispatcher.executors[1].slots[0]
    succeed(dispatcher, slot, 1, 0.00002)
    slot.board.start(2)
    assert dispatcher.gone(slot.executor, "executor 7 was killed by SIGKILL") == [(slot, jobs[1])]
    verbs = [(outcome.id, outcome.verb, outcome.kind) for outcome in dispatcher.outcomes]
    assert verbs == [(jobs[0].id, "finish", "failed"), (jobs[1].id, "retry", "crashed")]
    assert "killed by SIGKILL while running job" in str(dispatcher.outcomes[1].error_message)
    assert dispatcher.waiting == 3
    assert dispatcher.executors == {}


def test_a_death_between_jobs_costs_nothing(make: Callable[..., Dispatcher]) -> None:
    dispatcher = make(1)
    dispatcher.add([claimed()], 0.0)
    sent(dispatcher)
    assert dispatcher.gone(dispatcher.executors[1], "exited") == []
    assert (dispatcher.outcomes, dispatcher.waiting) == ([], 1)


def test_the_third_crash_buries_under_the_tasks_dead_letter_queue(make: Callable[..., Dispatcher]) -> None:
    dispatcher = make(1)
    dispatcher.tasks = {"task": TaskFacts("letters")}
    dispatcher.add([claimed(crashes=2)], 0.0)
    sent(dispatcher)
    slot = dispatcher.executors[1].slots[0]
    slot.board.start(1)
    dispatcher.gone(slot.executor, "executor 7 was killed by SIGSEGV")
    (outcome,) = dispatcher.outcomes
    assert (outcome.verb, outcome.reason, outcome.dead_letter_queue) == ("bury", "crashed", "letters")


def test_a_job_killed_by_the_supervisor_goes_back_without_a_crash(make: Callable[..., Dispatcher]) -> None:
    dispatcher = make(1)
    dispatcher.add([claimed()], 0.0)
    sent(dispatcher)
    slot = dispatcher.executors[1].slots[0]
    slot.board.start(1)
    dispatcher.gone(slot.executor, "killed", by_us=True)
    assert [outcome.verb for outcome in dispatcher.outcomes] == ["release"]
    assert dispatcher.crashed == 0


def test_expired_jobs_end_without_running(make: Callable[..., Dispatcher]) -> None:
    dispatcher = make(1)
    dispatcher.add([claimed(expired=True)], 0.0)
    assert sent(dispatcher) == {}
    assert [(outcome.verb, outcome.state) for outcome in dispatcher.outcomes] == [("finish", "expired")]


def test_jobs_that_wait_without_a_slot_go_back_to_the_database(make: Callable[..., Dispatcher]) -> None:
    dispatcher = make(1)
    dispatcher.add([claimed(), claimed()], 0.0)
    sent(dispatcher, 0.0)
    assert not dispatcher.release_stranded(STRANDED / 2)
    assert dispatcher.release_stranded(STRANDED)
    assert [outcome.verb for outcome in dispatcher.outcomes] == ["release"]


def test_a_failure_is_a_retry_or_a_burial_as_the_executor_decided(make: Callable[..., Dispatcher]) -> None:
    dispatcher = make(2)
    dispatcher.add([claimed(), claimed()], 0.0)
    sent(dispatcher)
    again = Failed(1, 0.0, 1.0, "E", "m", "t", delay=2.0)
    dead = Failed(1, 0.0, 1.0, "E", "m", "t", reason="retries_exhausted", dead_letter_queue="letters")
    dispatcher.finished(dispatcher.executors[1].slots[0], again)
    dispatcher.finished(dispatcher.executors[2].slots[0], dead)
    first, second = dispatcher.outcomes
    assert (first.verb, first.delay) == ("retry", 2.0)
    assert (second.verb, second.reason, second.dead_letter_queue) == ("bury", "retries_exhausted", "letters")


def test_a_large_job_is_sent_alone(make: Callable[..., Dispatcher]) -> None:
    dispatcher = make(1)
    teach(dispatcher, "fast", 0.00002)
    jobs = [claimed("fast", args=None), claimed("fast")]
    dispatcher.add(jobs, 0.0)
    assert sent(dispatcher) == {1: [jobs[0].id]}


def test_large_jobs_of_a_short_task_are_loaded_together(make: Callable[..., Dispatcher]) -> None:
    dispatcher = make(2)
    teach(dispatcher, "task", 0.0001)
    large, small = [claimed(args=None) for _ in range(LOAD_JOBS + 1)], claimed()
    dispatcher.add([*large, small, claimed(args=None)], 0.0)
    first = next(dispatcher.slots)
    (_, chunk), (_, rest) = dispatcher.assign(0.0)
    assert [job.id for job in chunk] == [job.id for job in large[: len(chunk)]]
    assert [job.id for job in rest] == [job.id for job in large[len(chunk) :]][: len(rest)]
    assert 1 < len(chunk) <= LOAD_JOBS
    assert dispatcher.assign(0.1) == [], "nothing goes ahead of what is loaded"

    numbers = [job.number for job in chunk]
    assert dispatcher.loading(first, numbers) == chunk
    dispatcher.put_back(first, [*numbers[1:], 99], 0.1)
    assert dispatcher.loading(first, numbers) == chunk[:1]
    assert first.executor.sent == 1
    dispatcher.load_less()
    succeed(dispatcher, first, 1, 0.0001)
    assert sent(dispatcher, 0.2) == {1: [chunk[1].id]}, "one at a time"
    dispatcher.loaded(first, 0.3)
    succeed(dispatcher, first, first.next_number - 1, 0.0001)
    assert sent(dispatcher, 0.3) == {1: [job.id for job in chunk[2:4]]}, "and more again"


def test_only_jobs_running_for_long_are_reported_as_running(make: Callable[..., Dispatcher]) -> None:
    dispatcher = make(2)
    jobs = [claimed(), claimed()]
    dispatcher.add(jobs, 0.0)
    sent(dispatcher)
    dispatcher.executors[1].slots[0].board.start(1)
    assert dispatcher.running_for(1.0, 5.0) == []
    assert dispatcher.running_for(1.0, 6.0) == [jobs[0].id]


def test_a_slower_run_counts_at_once_and_a_faster_one_slowly() -> None:
    pace = Pace()
    pace.observe("task", 0.001)
    pace.observe("task", 10.0)
    assert pace.expect("task") > 1.0  # type: ignore[operator]
    pace.observe("task", 0.001)
    assert pace.expect("task") > 1.0  # type: ignore[operator]


def test_a_stuck_executor_is_not_topped_up(make: Callable[..., Dispatcher]) -> None:
    dispatcher = make(1)
    teach(dispatcher, "fast", 0.00002)
    dispatcher.add([claimed("fast") for _ in range(10)], 0.0)
    sent(dispatcher, 0.0)
    slot = dispatcher.executors[1].slots[0]
    slot.board.start(1)
    dispatcher.take_back_stalled(1.0)
    dispatcher.take_back_stalled(1.0 + STALL)
    teach(dispatcher, "fast", 0.00002)
    dispatcher.add([claimed("fast") for _ in range(200)], 1.0)
    assert sent(dispatcher, 1.0 + 2 * STALL) == {}


def test_what_waits_under_a_fenced_name_is_dropped(make: Callable[..., Dispatcher]) -> None:
    dispatcher = make(0)
    mine, old = claimed(), claimed()
    old.worker = "former"
    dispatcher.add([old, mine], 0.0)
    dispatcher.drop_waiting("former")
    assert dispatcher.holds == {mine.id}


class TestTimeLimit:
    def test_a_job_at_its_limit_is_dead_and_the_rest_of_its_chunk_waits(
        self, make: Callable[..., Dispatcher]
    ) -> None:
        dispatcher = make(1)
        dispatcher.tasks = {"task": TaskFacts(dead_letter_queue="late", time_limit=5.0)}
        teach(dispatcher, "task", 0.00002)
        dispatcher.add([claimed(), claimed()], 0.0)
        sent(dispatcher)
        slot = dispatcher.executors[1].slots[0]
        slot.board.start(1)
        assert dispatcher.kill_overdue(10.0) == []
        assert dispatcher.kill_overdue(14.9) == []
        assert dispatcher.kill_overdue(15.0) == [slot.executor]
        assert dispatcher.kill_overdue(16.0) == [], "killed once"
        dispatcher.gone(slot.executor, "was killed")
        (outcome,) = dispatcher.outcomes
        assert (outcome.verb, outcome.reason, outcome.kind) == ("bury", "time_limit", "failed")
        assert (outcome.dead_letter_queue, dispatcher.crashed, dispatcher.waiting) == ("late", 0, 1)

    def test_one_that_ended_after_all_costs_the_next_one_nothing(
        self, make: Callable[..., Dispatcher]
    ) -> None:
        dispatcher = make(1)
        dispatcher.tasks = {"task": TaskFacts(time_limit=5.0)}
        teach(dispatcher, "task", 0.00002)
        dispatcher.add([claimed(), claimed()], 0.0)
        sent(dispatcher)
        slot = dispatcher.executors[1].slots[0]
        slot.board.start(1)
        dispatcher.kill_overdue(0.0)
        dispatcher.kill_overdue(5.0)
        dispatcher.finished(slot, Succeeded(1, 0.0, 5.0))
        slot.board.start(2)
        dispatcher.gone(slot.executor, "was killed")
        assert [outcome.verb for outcome in dispatcher.outcomes] == ["finish", "release"]

    def test_a_policy_that_names_it_is_asked(self, make: Callable[..., Dispatcher]) -> None:
        numbers = RetryPolicy(max_retries=1, default_retry_delay=7.0).numbers()
        for retries, verb in ((0, "retry"), (1, "bury")):
            dispatcher = make(1)
            dispatcher.tasks = {"task": TaskFacts(time_limit=5.0, time_limit_policy=numbers)}
            job = claimed()
            job.retries = retries
            dispatcher.add([job], 0.0)
            sent(dispatcher)
            slot = dispatcher.executors[1].slots[0]
            slot.board.start(1)
            dispatcher.kill_overdue(0.0)
            dispatcher.kill_overdue(5.0)
            dispatcher.gone(slot.executor, "was killed")
            (outcome,) = dispatcher.outcomes
            assert outcome.verb == verb
            assert outcome.delay == (7.0 if verb == "retry" else 0.0)

    @pytest.mark.parametrize(
        ("headers", "limit"),
        [
            ("{}", 5.0),
            ('{"pgqueue": {"time_limit": 9}}', 9.0),
            ('{"pgqueue": {"time_limit": 0}}', 0.0),
            ('{"pgqueue": {"soft_time_limit": 1}}', 5.0),
            ('{"pgqueue": "nonsense"}', 5.0),
            ('{"about": "pgqueue"}', 5.0),
        ],
    )
    def test_a_jobs_own_beats_the_tasks(
        self, make: Callable[..., Dispatcher], headers: str, limit: float
    ) -> None:
        dispatcher = make(1)
        dispatcher.tasks = {"task": TaskFacts(time_limit=5.0)}
        job = claimed()
        job.headers = headers
        assert dispatcher.time_limit(job) == limit


class TestCrashes:
    @pytest.mark.parametrize(
        ("facts", "crashes", "by_us", "verb"),
        [
            (TaskFacts(), 1, False, "retry"),
            (TaskFacts(), 2, False, "bury"),
            (TaskFacts(max_crashes=1), 0, False, "bury"),
            (TaskFacts(max_crashes=9), 7, False, "retry"),
            (TaskFacts(), 2, True, "release"),
            (TaskFacts(max_crashes=1, runs_once=True), 0, True, "bury"),
        ],
    )
    def test_what_a_death_means(
        self, make: Callable[..., Dispatcher], facts: TaskFacts, crashes: int, by_us: bool, verb: str
    ) -> None:
        dispatcher = make(1)
        dispatcher.tasks = {"task": facts}
        dispatcher.add([claimed(crashes=crashes)], 0.0)
        sent(dispatcher)
        dispatcher.executors[1].slots[0].board.start(1)
        dispatcher.gone(dispatcher.executors[1], "was killed", by_us=by_us)
        assert [outcome.verb for outcome in dispatcher.outcomes] == [verb]


def test_a_snoozed_job_waits_and_nothing_has_failed(make: Callable[..., Dispatcher]) -> None:
    dispatcher = make(1)
    dispatcher.add([claimed()], 0.0)
    sent(dispatcher)
    dispatcher.finished(dispatcher.executors[1].slots[0], Snoozed(1, 0.0, 1.0, 30.0))
    (outcome,) = dispatcher.outcomes
    assert (outcome.verb, outcome.delay, dispatcher.failed) == ("snooze", 30.0, 0)


class TestSeveralSlots:
    def overdue(self, make: Callable[..., Dispatcher]) -> tuple[Dispatcher, list[Slot]]:
        """An executor with three slots: one job at its limit, one that goes on, one recalled in time."""
        dispatcher = make(executors=1, slots=3)
        dispatcher.tasks = {"task": TaskFacts(), "slow": TaskFacts(time_limit=5.0)}
        dispatcher.add([claimed("slow"), claimed("task"), claimed("task")], now=0.0)
        sent(dispatcher)
        slots = dispatcher.executors[1].slots
        for slot in slots[:2]:
            slot.board.start(1)
        assert dispatcher.kill_overdue(1.0) == []
        return dispatcher, slots

    def test_the_other_jobs_get_time_to_end_and_nothing_new_comes(
        self, make: Callable[..., Dispatcher]
    ) -> None:
        dispatcher, slots = self.overdue(make)
        assert dispatcher.kill_overdue(6.0) == []
        assert dispatcher.leaving == [dispatcher.executors[1]]
        assert dispatcher.waiting == 1, "what had not started waits for another executor"
        assert sent(dispatcher, 6.0) == {}
        succeed(dispatcher, slots[1], 1, 0.1)
        assert dispatcher.kill_overdue(6.1) == [dispatcher.executors[1]]
        assert dispatcher.kill_overdue(6.2) == [], "once"

    def test_those_that_do_not_end_go_back_without_a_crash(self, make: Callable[..., Dispatcher]) -> None:
        dispatcher, _ = self.overdue(make)
        dispatcher.kill_overdue(6.0)
        assert dispatcher.kill_overdue(6.0 + OTHERS_GRACE) == [dispatcher.executors[1]]
        dispatcher.gone(dispatcher.executors[1], "was killed")
        buried, released = dispatcher.outcomes
        assert (buried.verb, buried.reason, released.verb) == ("bury", "time_limit", "release")
        assert dispatcher.crashed == 0

    def test_a_crash_is_one_of_every_job_that_ran(self, make: Callable[..., Dispatcher]) -> None:
        dispatcher, slots = self.overdue(make)
        gone = dispatcher.gone(dispatcher.executors[1], "died")
        assert [slot for slot, _ in gone] == slots[:2]
        assert (dispatcher.crashed, dispatcher.waiting) == (2, 1)


def test_nothing_is_claimed_ahead_for_slots_whose_jobs_turned_out_long(
    make: Callable[..., Dispatcher],
) -> None:
    dispatcher = make(2)
    teach(dispatcher, "fast", 0.001)
    assert dispatcher.wanted() > 2
    dispatcher.add([claimed("fast"), claimed("fast")], 0.0)
    sent(dispatcher)
    for slot in dispatcher.slots:
        slot.board.start(1)
    dispatcher.take_back_stalled(0.0)
    dispatcher.take_back_stalled(STALL)
    assert dispatcher.wanted() == 0
    first = next(dispatcher.slots)
    succeed(dispatcher, first, 1, 10.0)
    assert dispatcher.wanted() > 0


class TestFrozen:
    """An executor that is stopped between two jobs: it has told all that it did, and starts nothing."""

    def test_it_gets_nothing_more_until_it_is_heard_of(self, make: Callable[..., Dispatcher]) -> None:
        dispatcher = make(2)
        teach(dispatcher, "fast", 0.00002)
        frozen, other = dispatcher.slots
        jobs = [claimed("fast") for _ in range(3)]
        dispatcher.add(jobs, 0.0)
        assert sent(dispatcher, 0.0) == {1: [job.id for job in jobs]}, "so few go to one"
        dispatcher.take_back_stalled(0.0)
        dispatcher.take_back_stalled(STALL + 0.01)
        assert sent(dispatcher, 0.05) == {2: [job.id for job in jobs]}
        assert dispatcher.free_slots == 0
        number = next(iter(other.in_flight))
        dispatcher.skipped(frozen, Skipped(1))
        succeed(dispatcher, other, number, 0.00002)
        dispatcher.add([claimed("fast")], 0.1)
        assert list(sent(dispatcher, 0.1)) == [1], "it is awake"

    def test_a_job_on_its_own_is_taken_back_too(self, make: Callable[..., Dispatcher]) -> None:
        dispatcher = make(2)
        job = claimed()
        dispatcher.add([job], 0.0)
        assert sent(dispatcher, 0.0) == {1: [job.id]}
        dispatcher.take_back_stalled(0.4)
        assert sent(dispatcher, 0.4) == {}
        dispatcher.take_back_stalled(0.6)
        assert sent(dispatcher, 0.6) == {2: [job.id]}

    def test_one_that_runs_stays_where_it_is(self, make: Callable[..., Dispatcher]) -> None:
        dispatcher = make(2)
        job = claimed()
        dispatcher.add([job], 0.0)
        sent(dispatcher, 0.0)
        (running, _) = dispatcher.slots
        running.board.start(1)
        for now in (0.1, 1.0, 10.0):
            dispatcher.take_back_stalled(now)
        assert list(running.in_flight.values()) == [job]
        assert not running.deaf

    def test_arguments_may_take_any_time_to_load(self, make: Callable[..., Dispatcher]) -> None:
        dispatcher = make(2)
        job = claimed(args=None)
        dispatcher.add([job], 0.0)
        assert sent(dispatcher, 0.0) == {1: [job.id]}
        for now in (0.6, 60.0):
            dispatcher.take_back_stalled(now)
            assert dispatcher.waiting == 0
        assert dispatcher.free_slots == 1
        (loading, _) = dispatcher.slots
        dispatcher.loaded(loading, 60.0)
        dispatcher.take_back_stalled(60.0 + DEAF_TO_LARGE - 0.1)
        assert dispatcher.waiting == 0
        dispatcher.take_back_stalled(60.0 + DEAF_TO_LARGE)
        assert sent(dispatcher, 60.0 + DEAF_TO_LARGE) == {2: [job.id]}, "but not to start"

    def test_a_chunk_of_large_jobs_has_time_to_arrive(self, make: Callable[..., Dispatcher]) -> None:
        dispatcher = make(1)
        teach(dispatcher, "task", 0.0001)
        dispatcher.add([claimed(args=None) for _ in range(3)], 0.0)
        ((slot, chunk),) = dispatcher.assign(0.0)
        assert len(chunk) > 1
        dispatcher.loaded(slot, 1.0)
        dispatcher.take_back_stalled(1.0 + DEAF_TO_LARGE - 0.1)
        assert (slot.deaf, list(slot.in_flight.values())) == (False, chunk)
        slot.board.start(1)
        dispatcher.take_back_stalled(11.0)
        dispatcher.take_back_stalled(11.0 + 2 * STALL)
        assert list(slot.in_flight.values()) == chunk[:1], "the first goes on for longer than it should"
        assert not slot.deaf
