"""What the store must hold, said a second time and small: tables as dicts, each statement as a method.

What only the server can know (a position, the exact time of a retry) is None until it has been read.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime

from pgqueue.database.store import Outcome

Lane = tuple[str, int]
Counts = tuple[int, int, int, int]
"""attempt, retries, crashes, rescues"""


@dataclass
class Job:
    """A row of `jobs`.

    Attributes:
        late: When it was committed, somebody else had already drawn a later position in its lane.
        enqueued: Its turn among all enqueues.
        expired: Its time was over when it was enqueued.
    """

    id: str
    task: str
    queue: str
    priority: int
    unique_key: str | None = None
    state: str = "ready"
    position: int | None = None
    eta: datetime | None = None
    attempt: int = 0
    retries: int = 0
    max_retries: int | None = None
    crashes: int = 0
    rescues: int = 0
    worker: str | None = None
    late: bool = False
    enqueued: int = 0
    expired: bool = False

    @property
    def lane(self) -> Lane:
        return self.queue, self.priority

    @property
    def counts(self) -> Counts:
        return self.attempt, self.retries, self.crashes, self.rescues

    @property
    def row(self) -> tuple[object, ...]:
        return (
            self.state,
            *self.lane,
            self.task,
            self.unique_key,
            *self.counts,
            self.max_retries,
            self.worker,
        )


@dataclass(frozen=True)
class Letter:
    """A row of `dead_letters`."""

    job: Job
    reason: str
    dead_letter_queue: str

    @property
    def row(self) -> tuple[object, ...]:
        job = self.job
        said = (*job.lane, job.task, job.unique_key, *job.counts, job.max_retries, job.worker)
        return (*said, self.reason, self.dead_letter_queue)


@dataclass
class WorkerRow:
    """A row of `workers`."""

    heartbeat: int = 0
    fenced: bool = False
    running: frozenset[str] = frozenset()
    aged: bool = False


@dataclass(eq=False)
class Transaction:
    """Enqueues that nobody sees yet, and what others would wait for."""

    jobs: dict[str, Job] = field(default_factory=dict)
    touched_ids: set[str] = field(default_factory=set)
    touched_keys: set[tuple[str, str]] = field(default_factory=set)


class WouldWait(Exception):
    """The server would wait for another open transaction."""


@dataclass(frozen=True)
class Stretch:
    """What a claim looks through in one lane: positions in (after, upto], at most `most` rows."""

    lane: Lane
    after: float
    upto: float
    most: int


class Model:
    """The store as it should be."""

    def __init__(self) -> None:
        self.jobs: dict[str, Job] = {}
        self.finished: dict[str, list[tuple[object, ...]]] = {}
        self.letters: dict[str, Letter] = {}
        self.failures: Counter[tuple[str, int, str]] = Counter()
        self.audited: Counter[str] = Counter()
        self.workers: dict[str, WorkerRow] = {}
        self.open: list[Transaction] = []
        self.ever_twice: set[str] = set()
        """Ids that a producer swore were new, and were not."""
        self._draws: dict[Lane, list[tuple[int, Transaction | None]]] = {}
        self._turn = 0

    def of(self, state: str) -> list[Job]:
        return [job for job in self.jobs.values() if job.state == state]

    def drew(self, job: Job, position: int, transaction: Transaction | None = None) -> None:
        """The server has given the job a position; it becomes visible when the transaction commits."""
        job.position = position
        self._draws.setdefault(job.lane, []).append((position, transaction))

    # Producers.

    def enqueue(
        self, job: Job, transaction: Transaction, *, given: bool, sworn_new: bool = False
    ) -> tuple[str, bool]:
        """The id that the caller is told, and whether a row was written."""
        key = None if job.unique_key is None else (job.task, job.unique_key)
        for other in self.open:
            if other is not transaction and (job.id in other.touched_ids or key in other.touched_keys):
                raise WouldWait
        there = {**self.jobs, **transaction.jobs}
        if job.id in there:
            return job.id, False
        if key is not None:
            for other_job in there.values():
                if (other_job.task, other_job.unique_key) == key:
                    return other_job.id, False
        transaction.touched_ids.add(job.id)
        if key is not None:
            transaction.touched_keys.add(key)
        if given and (job.id in self.finished or job.id in self.letters):
            if not sworn_new:
                return job.id, False
            self.ever_twice.add(job.id)
        self._turn += 1
        job.enqueued = self._turn
        transaction.jobs[job.id] = job
        return job.id, True

    def commit(self, transaction: Transaction) -> None:
        for job in transaction.jobs.values():
            assert job.position is not None
            draws = self._draws.get(job.lane, [])
            job.late = any(top > job.position and owner is not transaction for top, owner in draws)
            self.jobs[job.id] = job
        self.open.remove(transaction)

    def roll_back(self, transaction: Transaction) -> None:
        self.open.remove(transaction)

    # Workers.

    def claim(self, worker: str, stretches: Iterable[Stretch], batch: int) -> list[str]:
        """The ids of a claim, lane by lane."""
        row = self.workers.get(worker)
        if row is None or row.fenced:
            return []
        taken: list[str] = []
        for stretch in stretches:
            ready = [
                job
                for job in self.of("ready")
                if job.lane == stretch.lane
                and job.id not in taken
                and job.position is not None
                and stretch.after < job.position <= stretch.upto
            ]
            ready.sort(key=lambda job: job.position or 0)
            taken += [job.id for job in ready[: stretch.most]]
        del taken[batch:]
        for job_id in taken:
            job = self.jobs[job_id]
            job.state, job.worker = "running", worker
            job.attempt += 1
        return taken

    def overtaken(self, taken: Sequence[str]) -> list[tuple[str, str]]:
        """Pairs of a job that still waits and one, ready later in the same lane, that was just claimed."""
        return [
            (left.id, job_id)
            for left in self.of("ready")
            for job_id in taken
            if left.lane == self.jobs[job_id].lane
            and not left.late
            and (left.position or 0) < (self.jobs[job_id].position or 0)
        ]

    def ack(self, outcome: Outcome) -> bool:
        """Whether the outcome counts; if so, it has taken effect."""
        job = self.jobs.get(outcome.id)
        if job is None or (job.state, job.attempt, job.worker) != (
            "running",
            outcome.attempt,
            outcome.worker,
        ):
            return False
        if outcome.verb == "finish":
            del self.jobs[job.id]
            end = (outcome.state, *job.lane, job.task, job.unique_key, *job.counts, job.worker)
            self.finished.setdefault(job.id, []).append(end)
        elif outcome.verb == "release":
            job.state, job.worker, job.position, job.late = "ready", None, None, False
        elif outcome.verb == "snooze":
            job.state, job.worker, job.eta = "scheduled", None, None
        elif outcome.verb == "retry":
            self.failures[job.id, job.attempt, outcome.kind] += 1
            job.state, job.worker, job.eta = "scheduled", None, None
            job.retries += outcome.kind == "failed"
            job.crashes += outcome.kind == "crashed"
            job.max_retries = job.max_retries if outcome.max_retries is None else outcome.max_retries
        else:
            self.failures[job.id, job.attempt, outcome.kind] += 1
            job.crashes += outcome.kind == "crashed"
            self._bury(job, outcome.reason, outcome.dead_letter_queue or job.queue)
        return True

    def _bury(self, job: Job, reason: str, queue: str) -> None:
        del self.jobs[job.id]
        older = self.letters.get(job.id)  # of a job whose id was sworn to be new
        enqueued = job.enqueued if older is None else older.job.enqueued
        self.letters[job.id] = Letter(replace(job, enqueued=enqueued), reason, queue)

    def lost(self) -> list[Job]:
        """Running jobs whose worker is fenced, missing or not named."""
        alive = {worker for worker, row in self.workers.items() if not row.fenced}
        return [job for job in self.of("running") if job.worker not in alive]

    def rescue(
        self,
        job_id: str,
        *,
        max_crashes: int,
        max_rescues: int,
        letters: Mapping[str, str],
        once: Iterable[str],
    ) -> bool:
        """Take a lost job back; whether it became ready again. Tasks of `once` must not run twice."""
        job = self.jobs[job_id]
        row = self.workers.get(job.worker or "")
        crashed = (row is not None and job_id in row.running) or job.task in once
        max_crashes = 1 if job.task in once else max_crashes
        if crashed:
            self.failures[job.id, job.attempt, "crashed"] += 1
            again = job.crashes + 1 < max_crashes
            job.crashes += 1
        else:
            again = job.rescues < max_rescues
            job.rescues += again
        if again:
            job.state, job.worker, job.position, job.late = "ready", None, None, False
        else:
            self._bury(job, "crashed", letters.get(job.task, job.queue))
        return again

    def due(self, after: float, now: datetime) -> list[Job]:
        """Scheduled jobs to promote, in order of eta."""
        found = [
            job
            for job in self.of("scheduled")
            if job.eta is not None and after <= job.eta.timestamp() and job.eta <= now
        ]
        return sorted(found, key=lambda job: job.eta or now)

    # Operators.

    def requeue(self, ids: Iterable[str], waits: Callable[[Letter], bool]) -> tuple[list[str], list[str]]:
        """Ids of letters that became jobs again, and of those that must stay."""
        moved: list[str] = []
        stay: list[str] = []
        letters = [self.letters[each] for each in ids if each in self.letters]
        if any(waits(letter) for letter in letters):
            raise WouldWait
        for letter in sorted(
            letters, key=lambda letter: (letter.job.task, letter.job.unique_key or "~", letter.job.id)
        ):
            old = letter.job
            key_taken = old.unique_key is not None and any(
                (job.task, job.unique_key) == (old.task, old.unique_key) for job in self.jobs.values()
            )
            if old.id in self.jobs or key_taken:
                stay.append(old.id)
                continue
            del self.letters[old.id]
            self.audited[old.id] += 1
            self.jobs[old.id] = replace(
                old, state="ready", position=None, eta=None, retries=0, crashes=0, rescues=0, worker=None,
                late=False, expired=False,
            )  # fmt: skip
            moved.append(old.id)
        return moved, stay

    def waits_for_producer(self, letter: Letter) -> bool:
        """Whether moving the letter would wait for an open transaction."""
        key = (letter.job.task, letter.job.unique_key)
        return any(letter.job.id in each.touched_ids or key in each.touched_keys for each in self.open)
