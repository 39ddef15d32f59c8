"""The store's statements against a model of it: any order of enqueues, claims, acks, fencing and rescue.

After each step the tables hold exactly what the model holds: every job once, in the state and with the counts
that its history gives it. What the workers say is what they would say: tokens of claims, old and new, right
and wrong; where they look for work is planned by the real lanes.
"""

from __future__ import annotations

import json
import os
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from random import Random
from typing import Any, ClassVar
from uuid import uuid4

import psycopg
import pytest
from hypothesis import HealthCheck, seed, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from psycopg.rows import dict_row

from pgqueue import PgQueue, Signature
from pgqueue.database.dead import requeue
from pgqueue.database.link import Call, Row
from pgqueue.database.queries import query
from pgqueue.database.session import Session
from pgqueue.database.store import Outcome, ack_calls, decode_claim
from pgqueue.job import timed_id
from pgqueue.worker.lanes import Cursor, Lanes
from tests.faults.store_model import Job, Model, Stretch, Transaction, WorkerRow, WouldWait

QUEUES = ("a", "b")
PRIORITIES = (9, 5, 0)
TASKS = ("t.one", "t.two")
KEYS = ("k1", "k2")
LETTERS = {"t.two": "graveyard"}
WORKERS = 3
PRODUCERS = 2

pick = st.integers(0, 1 << 20)
"""Chooses from a list of any length, modulo its length."""


VERBS = ["finish", "retry", "snooze", "bury", "release"]
ACKS = st.lists(
    st.tuples(
        pick,
        st.sampled_from(["finish", "finish", "retry", "retry", "snooze", "bury", "release"]),
        st.sampled_from(
            ["right"] * 6 + ["attempt too low", "attempt too high", "other worker", "unknown job"]
        ),
        pick,
    ),
    min_size=1,
    max_size=4,
)
"""Which token, what to say of it, with which mistake, and details."""


class Store:
    """The database, as all parties see it: two producers, the workers' link, an operator, and who looks."""

    def __init__(self, dsn: str, stack: ExitStack) -> None:
        def connect(**options: Any) -> Any:
            connection = stack.enter_context(psycopg.connect(dsn, autocommit=True, **options))
            connection.execute("set synchronous_commit = off")  # nothing here outlives the server
            return connection

        self.link = connect()
        self.look = connect()
        self.operator = Session(connect(row_factory=dict_row), "pgqueue")
        self.producers = [connect() for _ in range(PRODUCERS)]
        self.app = PgQueue("model")

    def run(self, *calls: Call) -> list[list[Row]]:
        """A group of calls as `Link.run` runs it: one transaction with the planner settings of workers."""
        rows = []
        self.link.execute("BEGIN ISOLATION LEVEL READ COMMITTED")
        try:
            timeouts = {"statement_timeout": "10s", "lock_timeout": "2s"}
            self.link.execute(query("begin_work").text, timeouts)
            for call in calls:
                rows.append(self.link.execute(query(call.name).text, dict(call.parameters)).fetchall())
            self.link.execute("COMMIT")
        except BaseException:
            self.link.execute("ROLLBACK")
            raise
        return rows

    def call(self, name: str, **parameters: Any) -> list[Row]:
        return self.run(Call(name, parameters))[0]

    def empty(self) -> None:
        for producer in self.producers:
            producer.execute("ROLLBACK") if producer.info.transaction_status else None
        for table in ("jobs", "finished_jobs", "dead_letters", "failures", "workers", "audit_log"):
            self.look.execute(f"delete from pgqueue.{table}")


class IdsInOrder:
    """Ids that sort in the order in which they were made, also within a millisecond.

    Rules pick jobs by their place among the ids. Drawn by chance it would be another job when Hypothesis
    makes the same steps once more, and that is taken for a flaky test.
    """

    def __init__(self) -> None:
        self._last = 0

    def __call__(self) -> str:
        self._last = max(self._last + 1, time.time_ns() // 1_000_000)
        return timed_id(self._last, os.urandom(10))


new_id = IdsInOrder()


@dataclass
class Worker:
    """One supervisor's memory."""

    id: str
    lanes: Lanes
    etas: Cursor = field(default_factory=Cursor)


@dataclass(frozen=True)
class Token:
    """What a claim gave: who may end which run."""

    job: str
    attempt: int
    worker: str


class StoreMachine(RuleBasedStateMachine):
    store: ClassVar[Store]

    @initialize()
    def start(self) -> None:
        self.store.empty()
        self.model = Model()
        self.base = datetime.now(UTC)
        self.clock = 0.0
        self.random = Random(1)
        self.tokens: list[Token] = []
        self.transactions: list[Transaction | None] = [None] * PRODUCERS
        self.attempts: dict[str, int] = {}
        self.forgotten: set[str] = set()
        self.sound = True
        self.names = 0
        self.workers = [Worker("", Lanes(QUEUES, None, self.random)) for _ in range(WORKERS)]
        for worker in self.workers:
            self.register(worker)
        self.have_a_past()

    def have_a_past(self) -> None:
        """Some of each: jobs that were retried, have ended, run, are ready, or wait for their time."""
        for number in range(6):
            self.enqueue(PRODUCERS, None, number, number, 0, None, None, True)
        self.work(0, 6, "retry", 4)
        self.promote(0, None, 500, True)
        self.compare()
        self.work(0, 3, "finish", 1)
        self.work(0, 3, "bury", 5)
        for when in (0, 1, 2, 4, 5, 6):
            self.enqueue(PRODUCERS, None, when, 0, when, None, None, True)
        self.claim_for(self.workers[0], 1, to_the_end=True)
        self.claim_for(self.workers[1], 1, to_the_end=True)

    def register(self, worker: Worker) -> None:
        self.names += 1
        worker.id = f"host:{self.names}:model"
        self.store.call(
            "register_worker", worker=worker.id, host="host", pid=1, queues=list(QUEUES), pool="prefork",
            concurrency=1, version="0",
        )  # fmt: skip
        self.model.workers[worker.id] = WorkerRow()

    def teardown(self) -> None:
        try:
            if getattr(self, "sound", False):
                self.drain()
        finally:
            for producer in self.store.producers:
                producer.rollback()

    def drain(self) -> None:
        """Nothing that is ready may stay out of a new worker's sight."""
        for number, transaction in enumerate(self.transactions):
            if transaction is not None:
                self.end(number, commits=True)
        worker = Worker("", Lanes(QUEUES, None, self.random))
        self.register(worker)
        while self.claim_for(worker, 3, to_the_end=True):
            pass
        assert self.model.of("ready") == []
        self.compare()

    # Producers.

    def known_ids(self) -> list[str]:
        pending = [job for each in self.model.open for job in each.jobs]
        return sorted({*self.model.jobs, *self.model.finished, *self.model.letters, *pending})

    def transaction_of(self, number: int) -> tuple[psycopg.Connection, Transaction, bool]:
        """A producer's open transaction, or one that is to be committed at once."""
        if number < PRODUCERS and (open_one := self.transactions[number]) is not None:
            return self.store.producers[number], open_one, False
        transaction = Transaction()
        self.model.open.append(transaction)
        self.store.look.execute("BEGIN")
        return self.store.look, transaction, True

    def read_positions(
        self, connection: psycopg.Connection, transaction: Transaction, jobs: Sequence[Job]
    ) -> None:
        found = dict(
            connection.execute(
                "select id::text, position from pgqueue.jobs where id = any(%s::uuid[])",
                [[j.id for j in jobs]],
            ).fetchall()
        )
        assert found.keys() == {job.id for job in jobs}
        for job in jobs:
            self.model.drew(job, found[job.id], transaction)

    def close(self, connection: psycopg.Connection, transaction: Transaction, at_once: bool) -> None:
        if at_once:
            connection.execute("COMMIT")
            self.model.commit(transaction)

    def give_up(self, connection: psycopg.Connection, transaction: Transaction, at_once: bool) -> None:
        if at_once:
            connection.execute("ROLLBACK")
            self.model.roll_back(transaction)

    def new_job(self, job_id: str, task: int, lane: int, when: int, key: str | None = None) -> Job:
        queue, priority = QUEUES[lane % 2], PRIORITIES[lane // 2 % 3]
        hours = (None, None, None, -1.0, 2.0, 1.0, 1.2)[when % 7]
        eta = None if hours is None else self.base + timedelta(hours=hours)
        job = Job(job_id, TASKS[task % 2], queue, priority, unique_key=key, eta=eta)
        job.state = "scheduled" if eta is not None and eta > self.base else "ready"
        return job

    @rule(
        producer=st.integers(0, 3),
        repeat=st.one_of(st.none(), st.none(), pick),
        task=pick,
        lane=pick,
        when=pick,
        expires=st.sampled_from([None, None, -3600.0, 3600.0 * 9]),
        max_retries=st.sampled_from([None, 0, 3]),
        own=st.booleans(),
    )
    def enqueue(
        self, producer: int, repeat: int | None, task: int, lane: int, when: int, expires: float | None,
        max_retries: int | None, own: bool,
    ) -> None:  # fmt: skip
        """By the Python client, with an id of its own, of the caller's, or of a job there is or was."""
        known = self.known_ids()
        job_id = known[repeat % len(known)] if repeat is not None and known else new_id() if own else None
        job = self.new_job(job_id or "", task, lane, when)
        job.expired, job.max_retries = expires is not None and expires < 0, max_retries
        connection, transaction, at_once = self.transaction_of(producer)
        options = dict(
            queue=job.queue, priority=job.priority, eta=job.eta, expires=expires, max_retries=max_retries,
            job_id=job_id,
        )  # fmt: skip
        try:
            if job_id is None:
                job.id = self.send(connection, job, options)
                told, written = self.model.enqueue(job, transaction, given=False)
            else:
                told, written = self.model.enqueue(job, transaction, given=True)
                assert self.send(connection, job, options) == told
        except WouldWait:
            self.give_up(connection, transaction, at_once)
            return
        if written:
            self.read_positions(connection, transaction, [job])
        self.close(connection, transaction, at_once)

    def send(self, connection: psycopg.Connection, job: Job, options: dict[str, Any]) -> str:
        return self.store.app.send_task(job.task, (1,), connection=connection, **options).id

    @rule(producer=st.integers(0, 3), key=st.sampled_from(KEYS), task=pick, lane=pick, when=pick)
    def enqueue_unique(self, producer: int, key: str, task: int, lane: int, when: int) -> None:
        """By the SQL function, with a key that one live job of the task may have."""
        job = self.new_job(new_id(), task, lane, when, key)
        connection, transaction, at_once = self.transaction_of(producer)
        try:
            told, written = self.model.enqueue(job, transaction, given=True)
        except WouldWait:
            self.give_up(connection, transaction, at_once)
            return
        row = connection.execute(
            "select pgqueue.enqueue(%s, queue => %s, priority => %s, eta => %s, job_id => %s,"
            " unique_key => %s)::text",
            [job.task, job.queue, job.priority, job.eta, job.id, key],
        ).fetchone()
        assert row == (told,)
        if written:
            self.read_positions(connection, transaction, [job])
        self.close(connection, transaction, at_once)

    @rule(
        producer=st.integers(0, 3),
        repeats=st.lists(pick, max_size=2),
        count=st.integers(1, 3),
        lane=pick,
        when=pick,
    )
    def enqueue_many(self, producer: int, repeats: list[int], count: int, lane: int, when: int) -> None:
        """By COPY; with ids that are known already, by the SQL function."""
        known = self.known_ids()
        ids = [known[each % len(known)] for each in repeats if known]
        fresh = [new_id() for _ in range(count)] if ids else [""] * count
        jobs = [self.new_job(each, n, lane, when) for n, each in enumerate(ids + fresh)]
        connection, transaction, at_once = self.transaction_of(producer)
        written: list[Job] = []
        try:
            for other in self.model.open:
                if other is not transaction and other.touched_ids & set(ids):
                    raise WouldWait
        except WouldWait:
            self.give_up(connection, transaction, at_once)
            return
        calls = []
        for job in jobs:
            options = dict(queue=job.queue, priority=job.priority, eta=job.eta, job_id=job.id or None)
            calls.append(Signature(job.task, (1,), {}, options))
        told = self.store.app.enqueue_many(calls, connection=connection)
        for job, job_id in zip(jobs, told, strict=True):
            assert job.id in ("", job_id)
            job.id = job_id
            if self.model.enqueue(job, transaction, given=bool(ids))[1]:
                written.append(job)
        for job in written:
            job.enqueued = written[0].enqueued  # at once, as far as their order matters later
        self.read_positions(connection, transaction, written)
        for task in TASKS:
            positions = [job.position for job in written if job.task == task]
            assert positions == sorted(positions, key=lambda each: each or 0)
        self.close(connection, transaction, at_once)

    @precondition(lambda self: self.model.finished or self.model.letters)
    @rule(producer=st.integers(0, 3), which=pick, in_bulk=st.booleans())
    def enqueue_what_has_ended(self, producer: int, which: int, in_bulk: bool) -> None:
        """An id is remembered as long as history is."""
        ended = sorted({*self.model.finished, *self.model.letters})
        repeat = self.known_ids().index(ended[which % len(ended)])
        if in_bulk:
            self.enqueue_many(producer, [repeat], 1, 0, 0)
        else:
            self.enqueue(producer, repeat, 0, 0, 0, None, None, own=True)

    @precondition(lambda self: self.model.letters)
    @rule(which=pick, end=st.sampled_from(["open", "buried", "lost"]))
    def enqueue_swearing_it_is_new(self, which: int, end: str) -> None:
        """A producer is wrong about the id of a dead job: it is live beside its letter, and may die too."""
        ids = sorted(each.job.id for each in self.model.letters.values() if each.job.unique_key is None)
        if not ids or (job_id := ids[which % len(ids)]) in self.model.jobs:
            return
        dead = self.model.letters[job_id].job
        job = Job(job_id, dead.task, dead.queue, dead.priority, max_retries=dead.max_retries)
        connection, transaction, at_once = self.transaction_of(PRODUCERS)
        try:
            told, written = self.model.enqueue(job, transaction, given=True, sworn_new=True)
        except WouldWait:
            self.give_up(connection, transaction, at_once)
            return
        connection.execute(
            "select pgqueue.enqueue(%s, queue => %s, priority => %s, job_id => %s, max_retries => %s,"
            " new_id => true)",
            [job.task, job.queue, job.priority, job_id, job.max_retries],
        )
        assert (told, written) == (job_id, True)
        # It starts anew: attempts of a job whose id was used twice do not go on from the letter's.
        self.attempts.pop(job_id, None)
        self.tokens = [token for token in self.tokens if token.job != job_id]
        self.read_positions(connection, transaction, [job])
        self.close(connection, transaction, at_once)
        if end == "buried":
            self.work(0, 100, "bury", 1)
        elif end == "lost":
            self.claim_for(self.workers[0], 100, to_the_end=True)
            self.fence(0, False, None)
            self.rescue(100, 1, 0, [])

    @rule(number=st.integers(0, PRODUCERS - 1), commits=st.booleans())
    def begin_or_end(self, number: int, commits: bool) -> None:
        if self.transactions[number] is not None:
            self.end(number, commits)
            return
        self.store.producers[number].execute("BEGIN")
        self.transactions[number] = transaction = Transaction()
        self.model.open.append(transaction)

    def end(self, number: int, commits: bool) -> None:
        transaction = self.transactions[number]
        assert transaction is not None
        self.store.producers[number].execute("COMMIT" if commits else "ROLLBACK")
        self.transactions[number] = None
        (self.model.commit if commits else self.model.roll_back)(transaction)

    # Workers.

    @rule(
        number=st.integers(0, WORKERS - 1),
        batch=st.integers(1, 6),
        to_the_end=st.booleans(),
        passed=st.sampled_from([0.0, 0.06, 6.0]),
    )
    def claim(self, number: int, batch: int, to_the_end: bool, passed: float) -> None:
        self.clock += passed
        self.claim_for(self.workers[number], batch, to_the_end=to_the_end)

    def claim_for(self, worker: Worker, batch: int, *, to_the_end: bool) -> int:
        plan = worker.lanes.plan(batch, self.clock, to_the_end=to_the_end)
        stretches = [
            Stretch((each.lane.queue, each.lane.priority), each.after, each.upto, each.most)
            for each in plan.ranges
        ]
        rows = self.store.call("claim_jobs", **plan.parameters(), worker=worker.id)
        claim = decode_claim(rows, worker.id)
        expected = self.model.claim(worker.id, stretches, batch)
        assert sorted(job.id for job in claim.jobs) == sorted(expected)
        for job in claim.jobs:
            known = self.model.jobs[job.id]
            said = (
                job.queue,
                job.priority,
                job.position,
                job.task,
                job.attempt,
                job.retries,
                job.max_retries,
                job.crashes,
            )
            assert said == (
                *known.lane,
                known.position,
                known.task,
                known.attempt,
                known.retries,
                known.max_retries,
                known.crashes,
            )
            assert job.expired == known.expired
            self.tokens.append(Token(job.id, job.attempt, worker.id))
        assert self.model.overtaken(expected) == []
        worker.lanes.absorb(
            plan,
            [(job.queue, job.priority, job.position) for job in claim.jobs],
            claim.xmin,
            claim.xmax,
            self.clock,
            took=claim.took,
            unseen=claim.unseen,
        )
        return len(expected)

    @precondition(lambda self: self.tokens)
    @rule(acks=ACKS, twice=st.booleans())
    def ack(self, acks: list[tuple[int, str, str, int]], twice: bool) -> None:
        """A batch of outcomes: newest claims first, so that most of them count."""
        outcomes = []
        for which, verb, how, detail in acks:
            token = self.tokens[-1 - which % len(self.tokens)]
            if how == "attempt too low":
                token = replace(token, attempt=token.attempt - 1)
            elif how == "attempt too high":
                token = replace(token, attempt=token.attempt + 1)
            elif how == "other worker":
                others = [worker.id for worker in self.workers if worker.id != token.worker]
                token = replace(token, worker=others[detail % len(others)])
            elif how == "unknown job":
                token = replace(token, job=str(uuid4()))
            outcomes.append(self.outcome(token, verb, detail))
        if twice:
            outcomes.append(replace_outcome(outcomes[0]))
        self.settle(outcomes)

    @rule(
        number=st.integers(0, WORKERS - 1),
        batch=st.integers(1, 4),
        verb=st.sampled_from(["finish", "finish", "bury", "retry"]),
        detail=pick,
    )
    def work(self, number: int, batch: int, verb: str, detail: int) -> None:
        """The usual: claim, and end what was claimed."""
        count = self.claim_for(self.workers[number], batch, to_the_end=True)
        if count:
            self.settle([self.outcome(token, verb, detail) for token in self.tokens[-count:]])

    @precondition(lambda self: self.model.of("running"))
    @rule(
        which=pick,
        verb=st.sampled_from(["finish", "retry", "snooze", "bury", "release"]),
        by_other=st.booleans(),
    )
    def ack_what_is_not_ours(self, which: int, verb: str, by_other: bool) -> None:
        """For the right job, but for the run before this one, or for a run of another worker."""
        running = sorted(self.model.of("running"), key=lambda job: job.id)
        job = running[which % len(running)]
        attempt = job.attempt if by_other else job.attempt - 1
        worker = self.workers[which % WORKERS].id if by_other or job.worker is None else job.worker
        self.settle([self.outcome(Token(job.id, attempt, worker), verb, which)])

    @precondition(lambda self: self.model.of("running"))
    @rule(number=st.integers(0, WORKERS - 1), mask=st.sampled_from([0, 255, 255]))
    def lose_worker(self, number: int, mask: int) -> None:
        """It had said what it runs, or nothing; it is fenced, and its jobs are taken back."""
        self.fence(number, False, mask)
        self.rescue(100, 3, 3, [])

    @precondition(lambda self: self.model.of("ready"))
    @rule(number=st.integers(0, WORKERS - 1), verb=st.sampled_from(["finish", "bury", "retry"]), detail=pick)
    def work_off(self, number: int, verb: str, detail: int) -> None:
        """Everything there is: what comes after an end is as interesting as what comes before."""
        self.work(number, 100, verb, detail)

    def settle(self, outcomes: list[Outcome]) -> None:
        """Ack, and see which of them count."""
        now = time.monotonic()
        calls = ack_calls(outcomes, now)
        answers = self.store.run(*[call for call, _ in calls])
        retried: dict[str, float] = {}
        for (_, group), rows in zip(calls, answers, strict=True):
            counted = []
            for outcome in group:
                if self.model.ack(outcome):
                    counted.append(outcome.id)
                    if outcome.verb in ("retry", "snooze"):
                        retried[outcome.id] = outcome.delay
            ((done, done_ids),) = rows
            assert done == len(counted)
            if done < len(group):
                assert sorted(done_ids or ()) == sorted(counted)
        for job_id, delay in retried.items():
            self.learn_eta(job_id, delay)

    def outcome(self, token: Token, verb: str, detail: int) -> Outcome:
        outcome = Outcome(token.job, token.attempt, token.worker, verb)  # type: ignore[arg-type]
        if verb == "finish":
            outcome.state = "expired" if detail % 4 == 0 else "succeeded"
            outcome.result = "[1]" if detail % 3 else None
            outcome.started = outcome.finished = time.monotonic()
        elif verb == "snooze":
            outcome.delay = (0.0, 3600.0)[detail % 2]
        elif verb in ("retry", "bury"):
            outcome.kind = "crashed" if detail % 3 == 0 else "failed"
            outcome.error_message = "message" if detail % 2 else None
            outcome.delay = (0.0, 0.0, 3600.0, 7200.0)[detail % 4]
            outcome.max_retries = 7 if verb == "retry" and detail % 5 == 0 else None
            outcome.reason = "crashed" if outcome.kind == "crashed" else "retries_exhausted"
            outcome.dead_letter_queue = "elsewhere" if verb == "bury" and detail % 2 else None
        return outcome

    def learn_eta(self, job_id: str, delay: float) -> None:
        job = self.model.jobs.get(job_id)
        if job is None or job.state != "scheduled" or job.eta is not None:
            return
        row = self.store.look.execute(
            "select eta, eta - clock_timestamp() from pgqueue.jobs where id = %s", [job_id]
        ).fetchone()
        assert row is not None
        job.eta, ahead = row
        assert delay - 60 < ahead.total_seconds() <= delay

    @rule(number=st.integers(0, WORKERS - 1), mask=pick)
    def beat(self, number: int, mask: int) -> None:
        """A heartbeat, with some of its jobs as running; who finds itself fenced takes a new name."""
        worker = self.workers[number]
        mine = sorted(job.id for job in self.model.of("running") if job.worker == worker.id)
        running = frozenset(job_id for n, job_id in enumerate(mine) if mask >> n & 1)
        rows = self.store.call(
            "beat_heart", worker=worker.id, running="{" + ",".join(running) + "}", stats="{}"
        )
        row = self.model.workers.get(worker.id)
        if row is None or row.fenced:
            assert rows == []
            self.register(worker)
            return
        row.heartbeat, row.running, row.aged = row.heartbeat + 1, running, False
        assert rows == [(row.heartbeat,)]

    @rule(
        number=st.integers(0, WORKERS - 1),
        moved=st.sampled_from([False, False, True]),
        last_words=st.one_of(st.none(), st.integers(0, 7)),
    )
    def fence(self, number: int, moved: bool, last_words: int | None) -> None:
        """Somebody takes a worker for silent, rightly or after its counter has moved."""
        if last_words is not None:
            self.beat(number, last_words)
        worker = self.workers[number].id
        row = self.model.workers.get(worker)
        heartbeat = (row.heartbeat if row else 0) - moved
        rows = self.store.call("fence_worker", worker=worker, heartbeat=heartbeat)
        if row is None or row.fenced or moved:
            assert rows == []
            return
        assert rows == [(worker,)]
        row.fenced = True

    @rule(
        batch=st.sampled_from([1, 2, 100, 100]), max_crashes=st.integers(1, 3), max_rescues=st.integers(0, 3),
        once=st.sampled_from([[], [], ["t.two"]]),
    )  # fmt: skip
    def rescue(self, batch: int, max_crashes: int, max_rescues: int, once: Sequence[str]) -> None:
        lost = {job.id: job.row for job in self.model.lost()}
        letters = '{"t.two": "graveyard"}'
        ((rescued, queues, buried),) = self.store.call(
            "rescue_jobs",
            batch=batch,
            max_crashes=max_crashes,
            max_rescues=max_rescues,
            dead_letter_queues=letters,
            task_max_crashes=json.dumps(dict.fromkeys(once, 1)),
            once=list(once),
        )
        still = {
            str(row[0])
            for row in self.store.look.execute(
                "select id from pgqueue.jobs where state = 'running' and id = any(%s::uuid[])", [list(lost)]
            )
        }
        taken = sorted(lost.keys() - still)
        assert len(taken) == min(batch, len(lost)) == rescued + buried
        again = [
            job_id
            for job_id in taken
            if self.model.rescue(
                job_id, max_crashes=max_crashes, max_rescues=max_rescues, letters=LETTERS, once=once
            )
        ]
        assert (rescued, set(queues)) == (len(again), {self.model.jobs[job_id].queue for job_id in again})

    @precondition(lambda self: self.model.of("scheduled"))
    @rule(
        number=st.integers(0, WORKERS - 1), hours=st.sampled_from([None, 0.0, 0.6, 3.0, 3.0]),
        batch=st.sampled_from([1, 2, 500]), sweep=st.booleans(),
    )  # fmt: skip
    def promote(self, number: int, hours: float | None, batch: int, sweep: bool) -> None:
        """Look for due jobs, at another time of the day."""
        etas = self.workers[number].etas
        after = float("-inf") if sweep else etas.trailer
        moved = None if hours is None else self.base + timedelta(minutes=30, hours=hours)
        if moved is None:
            row = self.store.look.execute("select clock_timestamp()").fetchone()
            assert row is not None
            due = self.model.due(after, row[0])
        else:
            due = self.model.due(after, moved)
        ((promoted, queues, last_eta, xmin, xmax, *_),) = self.store.call(
            "promote_jobs", after=after, upto=None, mark=False, now=moved, batch=batch
        )
        assert promoted == min(batch, len(due))
        # Jobs of the same eta are in no order among themselves.
        certain = [job for job in due if promoted and job.eta < due[promoted - 1].eta]
        possible = [job for job in due if promoted and job.eta == due[promoted - 1].eta]
        ready = {
            str(row[0])
            for row in self.store.look.execute(
                "select id from pgqueue.jobs where state = 'ready' and id = any(%s::uuid[])",
                [[job.id for job in due]],
            )
        }
        assert {job.id for job in certain} <= ready <= {job.id for job in certain + possible}
        assert len(ready) == promoted
        for job_id in ready:
            job = self.model.jobs[job_id]
            job.state, job.position, job.late = "ready", None, False
        assert set(queues) == {self.model.jobs[job_id].queue for job_id in ready}
        if promoted:
            etas.lead(last_eta, xmax)
        if promoted < batch:
            etas.covered(after, float("inf"), xmin)
        if promoted > 1:
            placed = self.store.look.execute(
                "select eta from pgqueue.jobs where id = any(%s::uuid[]) order by position", [list(ready)]
            ).fetchall()
            assert placed == sorted(placed), "not in order of eta"

    @rule(number=st.integers(0, WORKERS - 1))
    def delete_worker(self, number: int) -> None:
        worker = self.workers[number].id
        busy = any(job.worker == worker for job in self.model.of("running"))
        rows = self.store.call("delete_worker", worker=worker)
        if worker not in self.model.workers or busy:
            assert rows == []
            return
        assert rows == [(worker,)]
        del self.model.workers[worker]

    @rule(which=pick)
    def delete_fenced_workers(self, which: int) -> None:
        names = sorted(self.model.workers)
        if names:
            name = names[which % len(names)]
            self.store.look.execute(
                "update pgqueue.workers set heartbeat_at = now() - interval '2 hours' where id = %s", [name]
            )
            self.model.workers[name].aged = True
        busy = {job.worker for job in self.model.of("running")}
        gone = {
            name for name, row in self.model.workers.items() if row.fenced and row.aged and name not in busy
        }
        assert {row[0] for row in self.store.call("delete_fenced_workers")} == gone
        for name in gone:
            del self.model.workers[name]

    @precondition(lambda self: self.model.of("running"))
    @rule(which=pick)
    def lose_owner(self, which: int) -> None:
        """A hand that clears what it should not: the job has no owner until it is rescued."""
        running = sorted(job.id for job in self.model.of("running"))
        job_id = running[which % len(running)]
        self.store.look.execute("update pgqueue.jobs set worker_id = null where id = %s", [job_id])
        self.model.jobs[job_id].worker = None

    # Operators.

    @precondition(lambda self: self.model.letters)
    @rule(which=st.lists(pick, min_size=1, max_size=3))
    def requeue(self, which: list[int]) -> None:
        ids = sorted(self.model.letters)
        wanted = [ids[each % len(ids)] for each in which] + [str(uuid4())]
        turns = {
            job_id: self.model.letters[job_id].job.enqueued
            for job_id in wanted
            if job_id in self.model.letters
        }
        try:
            moved, stay = self.model.requeue(dict.fromkeys(wanted), self.model.waits_for_producer)
        except WouldWait:
            return
        done = requeue(self.store.operator, wanted, by="machine", reason="rule")
        assert sorted(done.ids) == sorted(moved)
        assert sorted(each.id for each in done.refused) == sorted(stay)
        assert done.missing == [wanted[-1]]
        placed = self.store.look.execute(
            "select id::text from pgqueue.jobs where id = any(%s::uuid[]) order by position", [moved]
        ).fetchall()
        assert [turns[row[0]] for row in placed] == sorted(turns[each] for each in moved)

    @precondition(lambda self: self.model.letters)
    @rule(which=pick)
    def prune(self, which: int) -> None:
        """A letter past its retention is forgotten, and its id with it; nothing else is."""
        ids = sorted(self.model.letters)
        job_id = ids[which % len(ids)]
        self.store.look.execute(
            "update pgqueue.dead_letters set died_at = now() - interval '2 days' where id = %s", [job_id]
        )
        assert [str(row[0]) for row in self.store.call("prune_dead_letters", days=1)] == [job_id]
        del self.model.letters[job_id]
        self.forget(job_id)

    def forget(self, job_id: str) -> None:
        if job_id not in self.model.jobs and job_id not in self.model.finished:
            self.attempts.pop(job_id, None)
            self.tokens = [token for token in self.tokens if token.job != job_id]

    # What holds after every step.

    @invariant()
    def compare(self) -> None:
        if not hasattr(self, "model"):
            return
        self.sound = False
        rows = self.store.look.execute(
            "select id::text, position, eta, state, queue, priority, task, unique_key, attempt, retries,"
            " crashes, rescues, max_retries, worker_id from pgqueue.jobs"
        ).fetchall()
        live = {row[0]: row for row in rows}
        model = self.model
        assert {job_id: row[3:] for job_id, row in live.items()} == {j.id: j.row for j in model.jobs.values()}
        top = max((job.position or 0 for job in model.jobs.values()), default=0)
        for job in model.jobs.values():
            position, eta = live[job.id][1:3]
            if job.position is None:
                assert position > top, "made ready again, but not at the end of its lane"
                model.drew(job, position)
            assert position == job.position
            assert job.eta is None or eta == job.eta
            assert job.attempt >= self.attempts.get(job.id, 0), "the attempt fell"
            self.attempts[job.id] = job.attempt
        ended = self.store.look.execute(
            "select id::text, state, queue, priority, task, unique_key, attempt, retries, crashes, rescues,"
            " worker_id, started_at is null from pgqueue.finished_jobs"
        ).fetchall()
        found = Counter((row[0], row[1:11]) for row in ended)
        assert found == Counter((job_id, end) for job_id, ends in model.finished.items() for end in ends)
        assert all((row[1] == "expired") == row[11] for row in ended)
        dead = self.store.look.execute(
            "select id::text, queue, priority, task, unique_key, attempt, retries, crashes, rescues,"
            " max_retries, worker_id, reason, dead_letter_queue from pgqueue.dead_letters"
        ).fetchall()
        assert {row[0]: row[1:] for row in dead} == {
            job_id: each.row for job_id, each in model.letters.items()
        }
        assert len(dead) == len(model.letters)
        places = Counter([*live, *[row[0] for row in ended], *[row[0] for row in dead]])
        assert {job_id for job_id, times in places.items() if times != 1} <= model.ever_twice
        noted = self.store.look.execute("select job_id::text, attempt, kind from pgqueue.failures").fetchall()
        assert Counter(noted) == model.failures
        audited = self.store.look.execute("select job_id::text from pgqueue.audit_log").fetchall()
        assert Counter(row[0] for row in audited) == model.audited
        workers = self.store.look.execute("select id, heartbeat, fenced from pgqueue.workers").fetchall()
        assert {row[0]: row[1:] for row in workers} == {
            n: (w.heartbeat, w.fenced) for n, w in model.workers.items()
        }
        self.sound = True


def replace_outcome(outcome: Outcome) -> Outcome:
    return Outcome(**{name: getattr(outcome, name) for name in outcome.__struct_fields__})


@pytest.fixture
def store(db: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Store]:
    monkeypatch.setattr("pgqueue.request.new_id", new_id)
    with ExitStack() as stack:
        yield Store(db, stack)


def run_machine(store: Store, number: int | None, **profile: Any) -> None:
    machine = type("Machine", (StoreMachine,), {"store": store})
    if number is not None:
        machine = seed(number)(machine)
    run_state_machine_as_test(
        machine,
        settings=settings(
            database=None,
            deadline=None,
            report_multiple_bugs=False,
            print_blob=True,
            suppress_health_check=list(HealthCheck),
            **profile,
        ),
    )


@pytest.mark.timeout(600)  # a failure is made small first
def test_the_store_does_what_the_model_does(store: Store) -> None:
    run_machine(store, None, derandomize=True, max_examples=50, stateful_step_count=40)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_store_does_what_the_model_does_for_long(store: Store) -> None:
    """Another walk each time; PGQUEUE_TEST_SEED repeats one."""
    number = int(os.environ.get("PGQUEUE_TEST_SEED") or time.time_ns() % 1_000_000)
    print(f"PGQUEUE_TEST_SEED={number}")
    run_machine(store, number, max_examples=500, stateful_step_count=60)
