"""Which job goes to which executor, and how many to claim: the supervisor's memory of what it holds.

A claimed job waits here, not in a child. Long jobs are claimed one per free slot; short ones up to about 100
ms of work ahead, by a moving average. An executor gets a small chunk of sub-millisecond jobs, else one job at
a time, so no job waits behind a long one while another slot is free. When a chunk stalls its rest is taken
back; what waits here for half a second goes back to the database, for whoever has a free slot.

What a crash costs: the one job that was running in a dead executor. Nothing here talks to processes or to the
database; the clock is a parameter.
"""

from __future__ import annotations

import contextlib
from collections import deque
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from itertools import islice
from random import Random

import msgspec

from pgqueue.config import MAX_CONCURRENCY
from pgqueue.database.store import CLAIM_LIMIT, ClaimedJob, Outcome
from pgqueue.errors import TimeLimitExceeded
from pgqueue.job import OWN_HEADER
from pgqueue.retry import Again, Dead, RetryPolicy, crash_delay
from pgqueue.worker.wire import Board, Cancelled, Failed, Job, Skipped, Snoozed, Succeeded, TaskFacts

SHORT = 0.001
"""Seconds: tasks that take less travel in chunks."""
CHUNK_TIME = 0.005
CHUNK_JOBS = 64
PREFETCH_TIME = 0.1
PREFETCH_JOBS = 2 * CLAIM_LIMIT
STALL = 0.02
"""Seconds a job of a chunk may run before the rest of its chunk is taken back."""
CANCEL_GRACE = 10.0
"""Seconds a run that was told of its cancellation has to end."""
STRANDED = 0.5
"""Seconds a claimed job may wait for a slot before it goes back to the database."""


_UNKNOWN = TaskFacts()


class _Own(msgspec.Struct):
    time_limit: float | None = None


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
class Member:
    """One executor, as its supervisor sees it.

    Attributes:
        in_flight: Jobs sent and not reported yet, by number, in order.
        progress: The job number seen on the board last, and since when.
        retiring: Gets no more jobs.
        cancelling: Numbers of jobs that were told to end because somebody wants them cancelled, and since
            when.
        overdue: The number of the job it was killed for, at its hard time limit; 0 for none.
        garbled: A task has written where it should not: what the board says may be wrong too.
    """

    index: int
    pid: int
    board: Board
    in_flight: dict[int, ClaimedJob] = field(default_factory=dict)
    next_number: int = 1
    progress: tuple[int, float] = (0, 0.0)
    ready: bool = False
    retiring: bool = False
    cancelling: dict[int, float] = field(default_factory=dict)
    overdue: int = 0
    garbled: bool = False


class Dispatcher:
    """Holds the claimed jobs of one supervisor until their outcomes are known.

    Args:
        max_crashes: Of tasks that name none.
        max_tasks: Jobs an executor may get in its life; None for any number.

    Attributes:
        outcomes: What became of jobs, waiting to be acked.
        leaving: Executors that get no more jobs.
        slots: Executors that may run jobs at a time; one that leaves counts until its last job has ended.
        spare: Executors that could be started if there were jobs for them.
        stale: How many acks found their job in other hands.
    """

    def __init__(
        self,
        *,
        max_crashes: int,
        max_tasks: int | None = None,
        random: Random | None = None,
    ) -> None:
        self.leaving: list[Member] = []
        self.slots = MAX_CONCURRENCY
        self.spare = 0
        self.members: dict[int, Member] = {}
        self.outcomes: list[Outcome] = []
        self.pace = Pace()
        self.tasks: Mapping[str, TaskFacts] = {}
        self.succeeded = self.failed = self.crashed = self.stale = 0
        self._max_crashes = max_crashes
        self._max_tasks = max_tasks
        self._random = random or Random()
        self._waiting: deque[ClaimedJob] = deque()
        self._waiting_since = 0.0

    @property
    def waiting(self) -> int:
        """Claimed jobs that no executor has."""
        return len(self._waiting)

    @property
    def in_flight(self) -> int:
        """Jobs that executors have."""
        return sum(len(member.in_flight) for member in self.members.values())

    @property
    def holds(self) -> set[str]:
        """Ids of all jobs claimed and not acked yet."""
        ids = {job.id for job in self._waiting}
        ids.update(outcome.id for outcome in self.outcomes)
        for member in self.members.values():
            ids.update(job.id for job in member.in_flight.values())
        return ids

    @property
    def free_slots(self) -> int:
        """Executors that could start a job now."""
        return sum(not member.in_flight for member in self._usable())

    def wanted(self) -> int:
        """How many jobs to claim now."""
        usable = len(self._usable())
        average = self.pace.average
        target = 0
        if average is not None and average < PREFETCH_TIME:
            target = min(int(usable * PREFETCH_TIME / max(average, 1e-6)), PREFETCH_JOBS)
        if target > usable:
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

    def assign(self, now: float) -> list[tuple[Member, list[Job]]]:
        """Jobs to send, by executor. A job without arguments is alone in its list: they must be loaded
        first.
        """
        sendings: list[tuple[Member, list[Job]]] = []
        if not self._waiting:
            return sendings
        # Idle executors first: topping up a busy one must not leave another without work.
        for member in sorted(self._usable(), key=lambda member: len(member.in_flight)):
            if self._is_stuck(member, now):
                continue
            chunk = self._chunk(member)
            if chunk:
                if not member.in_flight:
                    member.progress = (member.board.started, now)
                sendings.append((member, [self._send(member, job) for job in chunk]))
                self._waiting_since = now
            if not self._waiting:
                break
        return sendings

    def finished(self, member: Member, message: Succeeded | Failed | Snoozed | Cancelled) -> None:
        """An executor reports an outcome; one for a job it no longer has is ignored."""
        job = member.in_flight.pop(message.number, None)
        if job is None:
            return
        self.pace.observe(job.task, message.finished - message.started)
        cancelled = member.cancelling.pop(message.number, None) is not None
        if isinstance(message, Succeeded):
            self.succeeded += 1
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
                    history=self._facts(job.task).history,
                )
            )
            return
        if cancelled or isinstance(message, Cancelled):
            self._end(
                job, verb="finish", state="cancelled", started=message.started, finished=message.finished
            )
            return
        if isinstance(message, Snoozed):
            self._end(job, verb="snooze", delay=message.delay)
            return
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

    def skipped(self, member: Member, message: Skipped) -> None:
        """An executor reports that it did not start a job, because the job was taken back."""
        job = member.in_flight.pop(message.number, None)
        if job is not None:
            self._waiting.appendleft(job)

    def retire(self, member: Member) -> None:
        """This executor gets no more jobs."""
        if not member.retiring:
            member.retiring = True
            self.leaving.append(member)

    def has(self, member: Member, number: int) -> bool:
        """Whether this executor is there and still has that job."""
        return self.members.get(member.index) is member and number in member.in_flight

    def unreadable(self, member: Member, number: int, why: str) -> None:
        """The arguments of a job that was to be sent cannot be read from the database."""
        job = member.in_flight.pop(number)
        self._end(
            job,
            verb="bury",
            reason="bad_payload",
            dead_letter_queue=self._facts(job.task).dead_letter_queue,
            error_message=f"the arguments cannot be read: {why}"[:1000],
        )

    def gone(self, member: Member, death: str, *, by_us: bool = False) -> ClaimedJob | None:
        """An executor is dead: its running job has crashed (or, killed `by_us`, goes back unless its task
        must not run twice), its others wait again.

        Returns the job that was running.
        """
        self.members.pop(member.index, None)
        # Outcomes come in order, so what runs is the first, if anything does.
        first = min(member.in_flight, default=0)
        ran = member.garbled or member.board.started >= first
        running = member.in_flight.pop(first, None) if ran else None
        self._waiting.extendleft(reversed(member.in_flight.values()))
        member.in_flight.clear()
        if running is None:
            return None
        facts = self._facts(running.task)
        if first in member.cancelling:
            told = member.cancelling[first]
            self._end(running, verb="finish", state="cancelled", started=told, finished=told)
            return running
        if member.overdue == first:
            self._end_overdue(running, facts)
            return running
        if member.overdue:  # it was killed for the job before, which has ended after all
            by_us, member.overdue = True, 0
        if by_us and not facts.runs_once:
            self._end(running, verb="release", queue=running.queue)
            return running
        self.crashed += 1
        final = running.crashes + 1 >= (facts.max_crashes or self._max_crashes)
        self._end(
            running,
            verb="bury" if final else "retry",
            kind="crashed",
            delay=crash_delay(running.crashes + 1),
            reason="crashed",
            dead_letter_queue=facts.dead_letter_queue,
            error_class="WorkerCrashed",
            error_message=f"{death} while running job {running.id}, attempt {running.attempt}",
        )
        return running

    def cancel(self, ids: Collection[str], now: float) -> list[Member]:
        """Somebody wants these jobs cancelled: what waits ends here; returns the executors to be told."""
        told = []
        for member in self.members.values():
            mine = {number for number, job in member.in_flight.items() if job.id in ids}
            if mine and max(mine) > member.board.started:
                self._recall(member)
            for number in mine & member.in_flight.keys() - member.cancelling.keys():
                member.cancelling[number] = now
                member.board.cancelled = number
                told.append(member)
        for job in [job for job in self._waiting if job.id in ids]:
            self._waiting.remove(job)
            self._end(job, verb="finish", state="cancelled", started=now, finished=now)
        return told

    def kill_overdue(self, now: float) -> list[Member]:
        """The executors to be killed, each once: their job has reached its hard time limit, or was cancelled
        and goes on.
        """
        found = []
        for member in self.members.values():
            job = self._running(member, now)
            if job is None or member.overdue:
                continue
            limit = self.time_limit(job)
            ignores = now - member.cancelling.get(member.board.started, now) >= CANCEL_GRACE
            if ignores or (limit and now - member.progress[1] >= limit):
                member.overdue = member.board.started
                found.append(member)
        return found

    def time_limit(self, job: ClaimedJob) -> float | None:
        """Seconds after which this job is killed: its own limit, or its task's; None or 0 for never."""
        if OWN_HEADER in job.headers:
            with contextlib.suppress(msgspec.DecodeError, RecursionError):
                limit = msgspec.json.decode(job.headers, type=_Headers).pgqueue.time_limit
                if limit is not None:
                    return limit
        return self._facts(job.task).time_limit

    def take_back_stalled(self, now: float) -> None:
        """Take jobs back from executors whose current job runs longer than its chunk should."""
        for member in self.members.values():
            if not member.in_flight:
                continue
            started = member.board.started
            if started != member.progress[0]:
                member.progress = (started, now)
            elif len(member.in_flight) > 1 and self._is_stuck(member, now):
                self._recall(member)
                running = member.in_flight.get(started)
                if running is not None:
                    self.pace.observe(running.task, now - member.progress[1])

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
        for member in self.members.values():
            if member.in_flight:
                self._recall(member)

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
        for member in self.members.values():
            job = self._running(member, now)
            if job is not None and now - member.progress[1] >= seconds:
                found.append(job.id)
        return found

    @staticmethod
    def _running(member: Member, now: float) -> ClaimedJob | None:
        """The job it runs, as the board says."""
        started = member.board.started
        if member.progress[0] != started:
            member.progress = (started, now)
        return member.in_flight.get(started)

    @staticmethod
    def _is_stuck(member: Member, now: float) -> bool:
        """Whether its current job has been running for longer than one of a chunk should."""
        started, since = member.progress
        return bool(member.in_flight) and member.board.started == started and now - since >= STALL

    def _usable(self) -> list[Member]:
        leaving = sum(member.retiring and bool(member.in_flight) for member in self.members.values())
        staying = (member for member in self.members.values() if member.ready and not member.retiring)
        return list(islice(staying, max(self.slots - leaving, 0)))

    def _chunk(self, member: Member) -> list[ClaimedJob]:
        """The next jobs for one executor; empty when it has enough."""
        waiting, expect = self._waiting, self.pace.expect
        room = min(CHUNK_JOBS - len(member.in_flight), max(1, len(waiting) // max(1, len(self.members))))
        if self._max_tasks is not None:
            room = min(room, self._max_tasks + 1 - member.next_number)
        planned = 0.0
        if member.in_flight:
            if room < CHUNK_JOBS // 2:
                return []
            for job in member.in_flight.values():
                expected = expect(job.task)
                if expected is None or expected > SHORT:
                    return []
                planned += expected
        chunk: list[ClaimedJob] = []
        while waiting and len(chunk) < room:
            job = waiting[0]
            expected = expect(job.task)
            if expected is None or expected > SHORT or job.args is None:
                if not chunk and not member.in_flight:
                    chunk.append(waiting.popleft())
                break
            planned += expected
            if chunk and planned > CHUNK_TIME:
                break
            chunk.append(waiting.popleft())
        return chunk

    def _send(self, member: Member, job: ClaimedJob) -> Job:
        number = member.next_number
        member.next_number += 1
        member.in_flight[number] = job
        if self._max_tasks is not None and number >= self._max_tasks:
            self.retire(member)
        return self.message(number, job)

    @staticmethod
    def message(number: int, job: ClaimedJob) -> Job:
        """The job as an executor reads it; one that is too large still lacks its arguments."""
        return Job(
            number,
            job.id,
            job.task,
            job.args or "",
            job.kwargs or "",
            job.headers,
            job.queue,
            job.priority,
            job.attempt,
            job.retries,
            job.max_retries,
            job.crashes,
            job.eta,
            job.worker,
        )

    def _recall(self, member: Member) -> None:
        first = member.board.recall(member.next_number)
        back = [member.in_flight.pop(number) for number in list(member.in_flight) if number >= first]
        self._waiting.extendleft(reversed(back))

    def _facts(self, task: str) -> TaskFacts:
        return self.tasks.get(task, _UNKNOWN)

    def _end(self, job: ClaimedJob, **facts: object) -> None:
        self.outcomes.append(Outcome(job.id, job.attempt, job.worker, **facts))  # type: ignore[arg-type]
