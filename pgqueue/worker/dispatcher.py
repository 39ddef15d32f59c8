"""Which job goes to which executor, and how many to claim: the supervisor's memory of what it holds.

A slot runs one job at a time; an executor has one slot or, where it runs threads or coroutines, several.

A claimed job waits here, not in a child. Long jobs are claimed one per free slot; short ones up to about 100
ms of work ahead, by a moving average. A slot gets a small chunk of sub-millisecond jobs, else one job at
a time, so no job waits behind a long one while another slot is free. When a chunk stalls its rest is taken
back; what waits here for half a second goes back to the database, for whoever has a free slot.

What a crash costs: the jobs that were running in a dead executor, one per slot. Nothing here talks to
processes or to the database; the clock is a parameter.
"""

from __future__ import annotations

import contextlib
from collections import deque
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from random import Random
from typing import Any

import msgspec

from pgqueue.config import MAX_CONCURRENCY
from pgqueue.database.store import CLAIM_LIMIT, Outcome
from pgqueue.errors import TimeLimitExceeded
from pgqueue.job import CANVAS, OWN_HEADER, ClaimedJob, Progress
from pgqueue.retry import Again, Dead, RetryPolicy, crash_delay
from pgqueue.worker.wire import (
    Board,
    Cancelled,
    Ended,
    Released,
    Skipped,
    Snoozed,
    Stale,
    Succeeded,
    TaskFacts,
)

SHORT = 0.001
"""Seconds: tasks that take less travel in chunks."""
CHUNK_TIME = 0.005
CHUNK_JOBS = 128
LOAD_JOBS = 8
"""Jobs whose arguments are loaded together, at most."""
WORTH_SHARING = 0.0002
"""Seconds of work that one executor gets alone: waking another up for half of it takes longer."""
PREFETCH_TIME = 0.1
PREFETCH_JOBS = 2 * CLAIM_LIMIT
STALL = 0.02
"""Seconds a job of a chunk may run before the rest of its chunk is taken back."""
DEAF = 0.5
"""Seconds a job on its own may wait in an executor before it is taken back. Not less: a thread that waits for
the interpreter would find its job gone each time."""
DEAF_TO_LARGE = 10.0
"""The same for one whose arguments were sent on their own: megabytes take a while to be written and read."""
OTHERS_GRACE = 5.0
"""Seconds that the other jobs of an executor have to end when one of them has reached its hard limit."""
CANCEL_GRACE = 10.0
"""Seconds a run that was told of its cancellation has to end."""
STRANDED = 0.4
"""Seconds a claimed job may wait for a slot before it goes back to the database."""


_UNKNOWN = TaskFacts()


class _Own(msgspec.Struct):
    time_limit: float | None = None
    canvas: Any = None


class _Headers(msgspec.Struct):
    pgqueue: _Own


class Pace:
    """Moving averages of how long jobs take: per task, and over all."""

    def __init__(self) -> None:
        self._tasks: dict[str, float] = {}
        self.average: float | None = None

    def observe(self, task: str, seconds: float) -> None:
        """A job of `task` took this long, or has taken it so far."""
        known = self._tasks.get(task)
        if known is None and len(self._tasks) >= 10_000:
            self._tasks.clear()  # names come from the database: do not grow for ever
        # A slower run counts at once: guessing short for a long task makes others wait, the reverse costs
        # little.
        weight = 0.5 if known is not None and seconds > 4 * known else 0.1
        self._tasks[task] = seconds if known is None else known + weight * (seconds - known)
        self.average = seconds if self.average is None else self.average + 0.05 * (seconds - self.average)

    def expect(self, task: str) -> float | None:
        """Seconds a job of `task` is likely to take; None before the first one."""
        return self._tasks.get(task)


@dataclass(slots=True, eq=False)
class Executor:
    """One child process, as its supervisor sees it.

    Attributes:
        slots: What it runs jobs in.
        retiring: Gets no more jobs.
        sent: Jobs it has got in its life.
        ends_at: It is killed then at the latest, because one of its jobs has reached its hard time limit.
        garbled: A task has written where it should not: what the boards say may be wrong too.
    """

    index: int
    pool: str = "prefork"
    pid: int = 0
    ready: bool = False
    retiring: bool = False
    sent: int = 0
    ends_at: float | None = None
    garbled: bool = False
    slots: list[Slot] = field(default_factory=list)

    @property
    def busy(self) -> bool:
        """Whether it has a job."""
        return any(slot.in_flight for slot in self.slots)


@dataclass(slots=True, eq=False)
class Slot:
    """Where an executor runs one job after another.

    Attributes:
        number: Which of its executor's slots it is, from 0.
        in_flight: Jobs sent and not reported yet, by number, in order.
        progress: The job number seen on the board last, and since when.
        cancelling: Numbers of jobs that were told to end because somebody wants them cancelled, and since
            when.
        loading: The first number of the jobs whose arguments are loaded before they are sent; 0 for none.
        overdue: The number of the job that has reached its hard time limit; 0 for none.
        stuck: At the last look its job had been running for longer than one of a chunk should.
        deaf: It has not started what it was sent, and gets nothing until it is heard of: its process is
            frozen, or has no processor.
    """

    executor: Executor
    number: int
    board: Board
    in_flight: dict[int, ClaimedJob] = field(default_factory=dict)
    next_number: int = 1
    progress: tuple[int, float] = (0, 0.0)
    cancelling: dict[int, float] = field(default_factory=dict)
    loading: int = 0
    overdue: int = 0
    stuck: bool = False
    deaf: bool = False


class Dispatcher:
    """Holds the claimed jobs of one supervisor until their outcomes are known.

    Args:
        max_crashes: Of tasks that name none.
        max_tasks: Jobs an executor may get in its life; None for any number.
        limited: Whether jobs are killed that go on for too long.

    Attributes:
        outcomes: What became of jobs, waiting to be acked.
        ended_nodes: Ids of jobs of canvases whose end is committed, and not passed on.
        leaving: Executors that get no more jobs.
        most: Slots that may run jobs at a time; those of an executor that leaves count until their job has
            ended.
        spare: Slots that could be started if there were jobs for them.
        stale: How many acks found their job in other hands.
    """

    def __init__(
        self,
        *,
        max_crashes: int,
        max_tasks: int | None = None,
        limited: bool = True,
        random: Random | None = None,
    ) -> None:
        self.leaving: list[Executor] = []
        self.most = MAX_CONCURRENCY
        self.spare = 0
        self.executors: dict[int, Executor] = {}
        self.outcomes: list[Outcome] = []
        self.ended_nodes: list[str] = []
        self.pace = Pace()
        self.tasks: Mapping[str, TaskFacts] = {}
        self.succeeded = self.failed = self.crashed = self.stale = 0
        self._max_crashes = max_crashes
        self._max_tasks = max_tasks
        self._limited = limited
        self._random = random or Random()
        self._waiting: deque[ClaimedJob] = deque()
        self._waiting_since = 0.0
        self._condemned: list[Executor] = []
        self._load_at_once = LOAD_JOBS

    @property
    def slots(self) -> Iterator[Slot]:
        """The slots of all executors."""
        for executor in self.executors.values():
            yield from executor.slots

    @property
    def waiting(self) -> int:
        """Claimed jobs that no executor has."""
        return len(self._waiting)

    @property
    def ready_slots(self) -> int:
        """Of the executors that are up."""
        return sum(len(each.slots) for each in self.executors.values() if each.ready)

    def counts(self) -> dict[str, int]:
        """What became of jobs."""
        return {
            "succeeded": self.succeeded,
            "failed": self.failed,
            "crashed": self.crashed,
            "stale_acks": self.stale,
        }

    @property
    def is_crowded(self) -> bool:
        """Whether a slot has, or will have, more than the job that it runs."""
        return bool(self._waiting) or self.in_flight > self.most

    @property
    def is_idle(self) -> bool:
        """Whether it has no job, and no executor that is to end."""
        return not (self._waiting or self._condemned or self.leaving or self.in_flight)

    @property
    def in_flight(self) -> int:
        """Jobs that executors have."""
        return sum(len(slot.in_flight) for slot in self.slots)

    @property
    def holds(self) -> set[str]:
        """Ids of all jobs claimed and not acked yet."""
        return self.in_hand | {outcome.id for outcome in self.outcomes}

    @property
    def in_hand(self) -> set[str]:
        """Ids of the jobs that wait here or that executors have."""
        ids = {job.id for job in self._waiting}
        for slot in self.slots:
            ids.update(job.id for job in slot.in_flight.values())
        return ids

    @property
    def free_slots(self) -> int:
        """Slots that could start a job now."""
        return sum(not slot.in_flight for slot in self._usable())

    def wanted(self) -> int:
        """How many jobs to claim now."""
        usable = self._usable()
        average = self.pace.average
        target = 0
        if average is not None and average < PREFETCH_TIME:
            # Slots whose jobs turned out long need nothing ahead, whatever was expected of them.
            flowing = sum(not slot.stuck for slot in usable)
            target = min(int(flowing * PREFETCH_TIME / max(average, 1e-6)), PREFETCH_JOBS)
        if target > len(usable):
            # Half a buffer of slack makes claims large instead of frequent.
            return min(target - self.waiting, CLAIM_LIMIT) if self.waiting <= target // 2 else 0
        return max(self.free_slots + self.spare - self.waiting, 0)

    def add(self, jobs: Iterable[ClaimedJob], now: float) -> None:
        """Take in claimed jobs, already in the order they are to be served; expired ones end here."""
        if not self._waiting:
            self._waiting_since = now
        for job in jobs:
            if job.expired or job.cancelled:
                state = "cancelled" if job.cancelled else "expired"
                self._end(job, verb="finish", state=state, started=now, finished=now)
            else:
                self._waiting.append(job)

    def assign(self, now: float) -> list[tuple[Slot, list[ClaimedJob]]]:
        """Jobs to send, by executor. All of a list have their arguments, or none has: they must be loaded
        first.
        """
        sendings: list[tuple[Slot, list[ClaimedJob]]] = []
        if not self._waiting:
            return sendings
        # Idle executors first: topping up a busy one must not leave another without work.
        for slot in sorted(self._usable(), key=lambda slot: len(slot.in_flight)):
            if slot.executor.retiring or slot.loading in slot.in_flight or self._is_stuck(slot, now):
                continue
            chunk = self._chunk(slot)
            if chunk:
                if not slot.in_flight:
                    slot.progress = (slot.board.started, now)
                for job in chunk:
                    self._send(slot, job)
                if chunk[0].args is None:
                    slot.loading = chunk[0].number
                sendings.append((slot, chunk))
                self._waiting_since = now
            if not self._waiting:
                break
        return sendings

    def finished(self, slot: Slot, message: Ended) -> ClaimedJob | None:
        """An executor reports an outcome; one for a job it no longer has is ignored.

        Returns the job, if its run is no longer the job's.
        """
        job = slot.in_flight.pop(message.number, None)
        slot.deaf = False
        if job is None:
            return None
        slot.stuck = False
        cancelled = slot.cancelling.pop(message.number, None) is not None
        if isinstance(message, Succeeded):
            self.pace.observe(job.task, message.finished - message.started)
            self._succeeded(job, message)
            return None
        if isinstance(message, Stale):
            self.stale += 1
            return job
        if isinstance(message, Released):
            self._end(job, verb="release", queue=job.queue, uncertain=message.uncertain)
            return None
        self.pace.observe(job.task, message.finished - message.started)
        if cancelled or isinstance(message, Cancelled):
            self._end(
                job, verb="finish", state="cancelled", started=message.started, finished=message.finished
            )
            return None
        if isinstance(message, Snoozed):
            self._end(job, verb="snooze", delay=message.delay)
            return None
        if message.reason == "crashed":
            self._crash(job, message.error_class, message.error_message, message.traceback)
            return None
        self.failed += 1
        self._end(
            job,
            verb="bury" if message.delay is None else "retry",
            delay=message.delay or 0.0,
            max_retries=message.max_retries,
            reason=message.reason or "not_retryable",
            dead_letter_queue=message.dead_letter_queue,
            error_class=message.error_class,
            error_message=message.error_message,
            traceback=message.traceback,
        )
        return None

    def _succeeded(self, job: ClaimedJob, message: Succeeded) -> None:
        self.succeeded += 1
        canvas = _is_of_canvas(job)
        if not message.acked:
            self.outcomes.append(
                Outcome(
                    job.id,
                    job.attempt,
                    job.worker,
                    "finish",
                    result=message.result,
                    result_error=message.result_error,
                    started=message.started,
                    finished=message.finished,
                    history=canvas or self._facts(job.task).history,
                    canvas=canvas,
                )
            )
        elif canvas:
            self.ended_nodes.append(job.id)

    def skipped(self, slot: Slot, message: Skipped) -> None:
        """An executor reports that it did not start a job, because the job was taken back."""
        slot.deaf = False
        job = slot.in_flight.pop(message.number, None)
        if job is not None:
            self._waiting.appendleft(job)

    def retire(self, executor: Executor) -> None:
        """This executor gets no more jobs."""
        if not executor.retiring:
            executor.retiring = True
            self.leaving.append(executor)

    def loading(self, slot: Slot, numbers: Iterable[int]) -> list[ClaimedJob]:
        """Those of the jobs that are loaded for this slot that it is still to get."""
        if self.executors.get(slot.executor.index) is not slot.executor:
            return []
        return [slot.in_flight[number] for number in numbers if number in slot.in_flight]

    def loaded(self, slot: Slot, now: float) -> None:
        """The arguments of jobs that were to be sent are there: they are sent now."""
        slot.loading = 0
        slot.progress = (slot.board.started, now)
        self._load_at_once = min(2 * self._load_at_once, LOAD_JOBS)

    def load_less(self) -> None:
        """So many jobs cannot be loaded together."""
        self._load_at_once = 1

    def put_back(self, slot: Slot, numbers: Sequence[int], now: float) -> None:
        """Some of the jobs that were to be sent wait again, those that the slot is still to get."""
        if not self._waiting:
            self._waiting_since = now
        for job in reversed(self.loading(slot, numbers)):
            self._waiting.appendleft(slot.in_flight.pop(job.number))
            slot.executor.sent -= 1

    def forget(self, slot: Slot, number: int) -> None:
        """A job that was to be sent is no longer ours."""
        del slot.in_flight[number]

    def unreadable(self, slot: Slot, number: int, why: str) -> None:
        """The arguments of a job that was to be sent cannot be read from the database."""
        job = slot.in_flight.pop(number)
        self._end(
            job,
            verb="bury",
            reason="bad_payload",
            dead_letter_queue=self._facts(job.task).dead_letter_queue,
            error_message=f"the arguments cannot be read: {why}"[:1000],
        )

    def gone(self, executor: Executor, death: str, *, by_us: bool = False) -> list[tuple[Slot, ClaimedJob]]:
        """An executor is dead: its running jobs have crashed (or, killed `by_us`, go back unless their tasks
        must not run twice), its others wait again.

        Returns the jobs that were running, and where.
        """
        self.executors.pop(executor.index, None)
        if executor in self._condemned:
            self._condemned.remove(executor)
        ended = ((slot, self._slot_gone(slot, death, by_us)) for slot in executor.slots)
        return [(slot, job) for slot, job in ended if job is not None]

    def _slot_gone(self, slot: Slot, death: str, by_us: bool) -> ClaimedJob | None:
        # Outcomes come in order, so what runs is the first, if anything does.
        first = min(slot.in_flight, default=0)
        ran = slot.executor.garbled or slot.board.started >= first
        running = slot.in_flight.pop(first, None) if ran else None
        self._waiting.extendleft(reversed(slot.in_flight.values()))
        slot.in_flight.clear()
        if running is None:
            return None
        facts = self._facts(running.task)
        if first in slot.cancelling:
            told = slot.cancelling[first]
            self._end(running, verb="finish", state="cancelled", started=told, finished=told)
            return running
        if slot.overdue == first:
            self._end_overdue(running, facts)
            return running
        if slot.executor.ends_at is not None:  # it was killed for another job
            by_us, slot.overdue = True, 0
        if by_us and not facts.runs_once:
            self._end(running, verb="release", queue=running.queue)
            return running
        how = f"{death} while running job {running.id}, attempt {running.attempt}"
        self._crash(running, "WorkerCrashed", how)
        return running

    def _crash(
        self, job: ClaimedJob, error_class: str, error_message: str, traceback: str | None = None
    ) -> None:
        """A run was cut off: once too often for the job, or it runs again."""
        facts = self._facts(job.task)
        self.crashed += 1
        final = job.crashes + 1 >= (facts.max_crashes or self._max_crashes)
        self._end(
            job,
            verb="bury" if final else "retry",
            kind="crashed",
            delay=crash_delay(job.crashes + 1),
            reason="crashed",
            dead_letter_queue=facts.dead_letter_queue,
            error_class=error_class,
            error_message=error_message,
            traceback=traceback,
        )

    def cancel(self, ids: Collection[str], now: float) -> list[Executor]:
        """Somebody wants these jobs cancelled: what waits ends here; returns the executors to be told."""
        told: list[Executor] = []
        for slot in self.slots:
            mine = {number for number, job in slot.in_flight.items() if job.id in ids}
            if mine and max(mine) > slot.board.started:
                self._recall(slot)
            for number in mine & slot.in_flight.keys() - slot.cancelling.keys():
                slot.cancelling[number] = now
                slot.board.cancelled = number
                if slot.executor not in told:
                    told.append(slot.executor)
        for job in [job for job in self._waiting if job.id in ids]:
            self._waiting.remove(job)
            self._end(job, verb="finish", state="cancelled", started=now, finished=now)
        return told

    def kill_overdue(self, now: float) -> list[Executor]:
        """The executors to be killed, each once: a job of theirs has reached its hard time limit, or was
        cancelled and goes on.

        Such an executor gets no more jobs, and the others that it runs have a few seconds to end.
        """
        for slot in self.slots:
            job = self._running(slot, now)
            if job is None or slot.overdue:
                continue
            limit = self.time_limit(job)
            ignores = self._limited and now - slot.cancelling.get(slot.board.started, now) >= CANCEL_GRACE
            if ignores or (limit and now - slot.progress[1] >= limit):
                slot.overdue = slot.board.started
                self._condemn(slot.executor, now)
        found = [executor for executor in self._condemned if self._must_end(executor, now)]
        for executor in found:
            self._condemned.remove(executor)
        return found

    def _condemn(self, executor: Executor, now: float) -> None:
        if executor.ends_at is not None:
            return
        executor.ends_at = now + OTHERS_GRACE
        self._condemned.append(executor)
        if len(executor.slots) > 1:
            self.retire(executor)
            for slot in executor.slots:
                self._recall(slot)

    @staticmethod
    def _must_end(executor: Executor, now: float) -> bool:
        others = any(slot.in_flight and not slot.overdue for slot in executor.slots)
        return not others or (executor.ends_at is not None and now >= executor.ends_at)

    def time_limit(self, job: ClaimedJob) -> float | None:
        """Seconds after which this job is killed: its own limit, or its task's; None or 0 for never."""
        if not self._limited:
            return None
        limit = _own(job).time_limit
        if limit is not None:
            return limit
        return self._facts(job.task).time_limit

    def take_back_stalled(self, now: float) -> None:
        """Take jobs back from executors whose current job runs longer than its chunk should."""
        for slot in self.slots:
            if not slot.in_flight:
                continue
            started = slot.board.started
            slot.stuck = self._is_stuck(slot, now)
            if started != slot.progress[0]:
                slot.progress = (started, now)
                continue
            if slot.loading in slot.in_flight:
                continue  # it waits for us
            if now - slot.progress[1] >= self._patience(slot, started):
                slot.deaf = started < min(slot.in_flight)
                self._recall(slot)
                running = slot.in_flight.get(started)
                if running is not None:
                    self.pace.observe(running.task, now - slot.progress[1])

    @staticmethod
    def _patience(slot: Slot, started: int) -> float:
        """Seconds from the last start, or the sending, after which what has not started is taken back."""
        first = min(slot.in_flight)
        if started < first and slot.in_flight[first].args is None:
            return DEAF_TO_LARGE
        if len(slot.in_flight) > 1:
            return STALL
        return DEAF if started < first else float("inf")

    def _end_overdue(self, job: ClaimedJob, facts: TaskFacts) -> None:
        """A job was killed at its hard time limit: dead, unless its task's policy says otherwise."""
        self.failed += 1
        decision: Again | Dead = Dead("time_limit")
        if facts.time_limit_policy is not None:
            policy = RetryPolicy(autoretry_for=(TimeLimitExceeded,), **facts.time_limit_policy)
            decision = policy.decide(
                TimeLimitExceeded(), retries=job.retries, max_retries=job.max_retries, random=self._random
            )
        self._end(
            job,
            verb="bury" if isinstance(decision, Dead) else "retry",
            delay=0.0 if isinstance(decision, Dead) else decision.delay,
            reason=decision.reason if isinstance(decision, Dead) else "time_limit",
            dead_letter_queue=facts.dead_letter_queue,
            error_class="TimeLimitExceeded",
            error_message=f"killed at its time_limit of {self.time_limit(job):g} s",
        )

    def take_back_all(self) -> None:
        """Take back all that has not started: the drain."""
        for slot in self.slots:
            if slot.in_flight:
                self._recall(slot)

    def drop_waiting(self, worker: str) -> None:
        """Forget what waits here under a name that was fenced: others take it back."""
        self._waiting = deque(job for job in self._waiting if job.worker != worker)

    def release_waiting(self) -> None:
        """Give everything that waits here back to the database."""
        while self._waiting:
            job = self._waiting.popleft()
            self._end(job, verb="release", queue=job.queue)

    def release_stranded(self, now: float) -> bool:
        """Give what waits here back when no slot has become free for a while; returns whether it did."""
        if not self._waiting or now - self._waiting_since < STRANDED:
            return False
        self.release_waiting()
        return True

    def running_for(self, seconds: float, now: float) -> list[str]:
        """Ids of the jobs known to have been running for so long."""
        found: list[str] = []
        for slot in self.slots:
            job = self._running(slot, now)
            if job is not None and now - slot.progress[1] >= seconds:
                found.append(job.id)
        return found

    def progress(self) -> dict[str, Progress]:
        """How far running jobs say they are, by id."""
        found: dict[str, Progress] = {}
        for slot in self.slots:
            said = slot.board.progress if slot.in_flight else None
            if said is not None and said[0] == slot.board.started and said[0] in slot.in_flight:
                found[slot.in_flight[said[0]].id] = said[1]
        return found

    @staticmethod
    def _running(slot: Slot, now: float) -> ClaimedJob | None:
        """The job it runs, as the board says."""
        started = slot.board.started
        if slot.progress[0] != started:
            slot.progress = (started, now)
        return slot.in_flight.get(started)

    @staticmethod
    def _is_stuck(slot: Slot, now: float) -> bool:
        """Whether its current job has been running for longer than one of a chunk should."""
        started, since = slot.progress
        return bool(slot.in_flight) and slot.board.started == started and now - since >= STALL

    def _usable(self) -> list[Slot]:
        leaving = sum(bool(slot.in_flight) for executor in self.leaving for slot in executor.slots)
        staying = (
            slot
            for executor in self.executors.values()
            if executor.ready and not executor.retiring
            for slot in executor.slots
            if not slot.deaf
        )
        return list(islice(staying, max(self.most - leaving, 0)))

    def _chunk(self, slot: Slot) -> list[ClaimedJob]:
        """The next jobs for one executor; empty when it has enough."""
        waiting, expect = self._waiting, self.pace.expect
        slots = sum(len(executor.slots) for executor in self.executors.values())
        share = max(1, len(waiting) // slots)
        room = CHUNK_JOBS - len(slot.in_flight)
        if self._max_tasks is not None:
            room = min(room, self._max_tasks - slot.executor.sent)
        planned = 0.0
        if slot.in_flight:
            if min(room, share) < CHUNK_JOBS // 2:
                return []
            for job in slot.in_flight.values():
                expected = expect(job.task)
                if expected is None or expected > SHORT:
                    return []
                planned += expected
        chunk: list[ClaimedJob] = []
        while waiting and len(chunk) < room and (len(chunk) < share or planned < WORTH_SHARING):
            job = waiting[0]
            expected = expect(job.task)
            large = job.args is None
            if chunk and large is not (chunk[0].args is None):
                break
            crowded = large and (slot.in_flight or len(chunk) >= self._load_at_once)
            if expected is None or expected > SHORT or crowded:
                if not chunk and not slot.in_flight:
                    chunk.append(waiting.popleft())
                break
            planned += expected
            if chunk and planned > CHUNK_TIME:
                break
            chunk.append(waiting.popleft())
        return chunk

    def _send(self, slot: Slot, job: ClaimedJob) -> None:
        job.number = slot.next_number
        slot.next_number += 1
        slot.in_flight[job.number] = job
        executor = slot.executor
        executor.sent += 1
        if self._max_tasks is not None and executor.sent >= self._max_tasks:
            self.retire(executor)

    def _recall(self, slot: Slot) -> None:
        first = slot.board.recall(slot.next_number)
        back = [slot.in_flight.pop(number) for number in list(slot.in_flight) if number >= first]
        self._waiting.extendleft(reversed(back))

    def _facts(self, task: str) -> TaskFacts:
        return self.tasks.get(task, _UNKNOWN)

    def _end(self, job: ClaimedJob, **facts: object) -> None:
        canvas = _is_of_canvas(job)
        self.outcomes.append(
            Outcome(job.id, job.attempt, job.worker, canvas=canvas, **facts)  # type: ignore[arg-type]
        )


_NOTHING = _Own()


def _own(job: ClaimedJob) -> _Own:
    """What travels with the job for us; nothing if it cannot be read."""
    if OWN_HEADER in job.headers:
        with contextlib.suppress(msgspec.DecodeError, RecursionError):
            return msgspec.json.decode(job.headers, type=_Headers).pgqueue
    return _NOTHING


def _is_of_canvas(job: ClaimedJob) -> bool:
    return CANVAS in job.headers and _own(job).canvas is not None
