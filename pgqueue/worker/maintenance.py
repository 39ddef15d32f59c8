"""What keeps a queue alive besides claiming: heartbeats, rescue, promotion, new queues, partitions,
retention.

Every worker does all of it. Each act is idempotent and safe for any number of workers at once, so there is no
leader.

Liveness is judged by silence, not by time stamps: a worker is silent when this observer has read the same
heartbeat counter for the whole lease on its own boot clock, while its own reads kept succeeding. When the
database was away, or the observer was stopped, everybody looks silent, so the watch starts anew. Rescue never
asks how long a job has run.

Crash between any two statements: nothing is half done, each is one transaction; the next pass of any worker
goes on.
"""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from random import Random
from typing import Protocol

from pgqueue.config import Config
from pgqueue.database.dsn import RETRY_MOST, retry_delay
from pgqueue.database.link import Call, GroupFailed, Link
from pgqueue.errors import DatabaseUnavailable
from pgqueue.failpoints import failpoint
from pgqueue.job import Progress
from pgqueue.worker.claimer import RENEW
from pgqueue.worker.identity import Identity
from pgqueue.worker.lanes import Cursor
from pgqueue.worker.wire import TaskFacts, clock

log = logging.getLogger("pgqueue.worker")

MAX_RESCUES = 10
EXCLUSIVE_MARGIN = 0.2
"""Of a lease: exclusive jobs are killed so much earlier than others may take them."""
RESCUE_BATCH = 100
PROMOTE_BATCH = 500
PROMOTE_INTERVAL = 0.1
"""Seconds between looks for due jobs while there is work; asleep, the next eta decides."""
PROMOTE_SWEEP = 5.0
DISCOVER_INTERVAL = 1.0
RUNNING_INTERVAL = 0.8
"""Seconds at least between heartbeats that tell of running jobs: what they say is seen within a second."""
RUNNING_AFTER = 1.0
SHARE_INTERVAL = 0.1
CANCEL_INTERVAL = 1.0
"""Seconds between looks for cancelled jobs among those that run; a notification is quicker."""
NOTIFY_QUEUE_INTERVAL = 10.0
HOUSEKEEPING_INTERVAL = 60.0
PARTITIONS_INTERVAL = 3600.0
WALK_PAUSE = 0.5
"""Seconds between steps over a day of history that goes in part: heartbeats come in between."""
_NOT_THERE = "42883"
"""The SQLSTATE of a function that the schema's revision does not have yet."""
_OLDER = {"prune_dead_letters_by_rules": "prune_dead_letters"}
"""What does instead on such a revision, which has no rules."""


class Watch:
    """Who has been silent for a whole lease, in the eyes of one observer."""

    def __init__(self, lease: float, patience: float) -> None:
        self._lease = lease
        self._patience = patience
        self._seen: dict[str, tuple[int, float]] = {}
        self._last_read = float("-inf")

    def observe(self, heartbeats: Iterable[tuple[str, int]], now: float) -> list[tuple[str, int]]:
        """Take in a successful read of all counters; returns the silent workers with their counters.

        Args:
            heartbeats: Worker ids and counters.
            now: The observer's boot clock.
        """
        if now - self._last_read > self._patience:
            self._seen.clear()  # our own eyes were shut
        self._last_read = now
        before, self._seen = self._seen, {}
        silent: list[tuple[str, int]] = []
        for worker, counter in heartbeats:
            known = before.get(worker)
            since = known[1] if known is not None and known[0] == counter else now
            self._seen[worker] = (counter, since)
            if now - since >= self._lease:
                silent.append((worker, counter))
        return silent


@dataclass(slots=True)
class _Timer:
    """When something is due next; `pull` only ever brings it forward."""

    at: float = float("-inf")

    def pull(self, at: float) -> None:
        self.at = min(self.at, at)


class Work(Protocol):
    """What the worker has in hand."""

    @property
    def in_flight(self) -> int: ...
    @property
    def tasks(self) -> Mapping[str, TaskFacts]: ...
    def running_for(self, seconds: float, now: float) -> list[str]: ...
    def progress(self) -> dict[str, Progress]: ...
    def drop_waiting(self, worker: str) -> None: ...
    def counts(self) -> dict[str, int]: ...


class Maintenance:
    """The maintenance loop of one supervisor, on a connection of its own.

    Args:
        queues: The queues served now.
        discover: None, or what to do with the name of a queue nobody knew.
        asleep: Whether the claimer knows of no work.
        wake: Jobs have become ready: look for them.
        health: What the heartbeat is to say of this worker beside its counts.
        cancel: Called with the ids of jobs in hand that somebody wants cancelled.
        proven: Called with the time, on `clock()`, until when no other worker takes this one's jobs.
    """

    def __init__(
        self,
        link: Link,
        identity: Identity,
        work: Work,
        config: Config,
        *,
        registration: Callable[[str], list[Call]],
        queues: Callable[[], list[str]],
        discover: Callable[[str], None] | None,
        asleep: Callable[[], bool],
        wake: Callable[[], None],
        health: Callable[[], Mapping[str, object]] = dict,
        cancel: Callable[[list[str]], None] = lambda _: None,
        proven: Callable[[float], None] = lambda _: None,
        random: Random,
    ) -> None:
        self._link = link
        self._identity = identity
        self._work = work
        self._config = config
        self._registration = registration
        self._queues = queues
        self._discover = discover
        self._asleep = asleep
        self._wake = wake
        self._health = health
        self._proven = proven
        self._cancel = cancel
        self._random = random
        self._event = asyncio.Event()
        self._watch = Watch(config.lease, patience=3 * config.heartbeat)
        self._etas = Cursor()
        self._next_due: float | None = None
        self._heartbeat = _Timer()
        self._promotion = _Timer()
        self._promotion_sweep = _Timer()
        self._discovery = _Timer()
        self._notify_queue = _Timer()
        self._cancellations = _Timer(float("inf"))
        self._housekeeping = _Timer()
        self._walk = _Timer()
        self._partitions = _Timer()
        self._canvases = _Timer()
        self._unsettled: str | None = None
        self._share_at = _Timer(float("inf"))
        self._to_share: set[str] = set()
        self._last_share = float("-inf")
        self._looked_at = float("-inf")
        self._last_promotion = float("-inf")
        self._last_running: list[str] = []
        self._last_progress: dict[str, Progress] = {}
        self._failures = 0
        self.last_beat: float | None = None
        """When this worker last registered or beat, as the database has confirmed."""
        self.last_failure: float | None = None
        self.failing_since: float | None = None

    def next_eta(self) -> float | None:
        """Seconds until the next scheduled job this worker knows of."""
        return None if self._next_due is None else max(self._next_due - clock(), 0.0)

    def look_for_due_jobs(self, seconds: float = 0.0) -> None:
        """A job may be due in so many seconds: be there, but not more often than every 100 ms."""
        self._promotion.pull(max(clock() + seconds, self._last_promotion + PROMOTE_INTERVAL))
        self._event.set()

    def look_for_cancellations(self) -> None:
        """Somebody has said that a job in hand is to be cancelled."""
        self._cancellations.pull(clock())
        self._event.set()

    def share(self, queues: list[str]) -> None:
        """There is more work in these queues than we take: wake somebody, at most every 100 ms."""
        self._to_share.update(queues)
        self._share_at.pull(max(clock(), self._last_share + SHARE_INTERVAL))
        self._event.set()

    async def wake_others(self) -> None:
        """Wake whoever serves the queues that `share` was called with."""
        queues, self._to_share = sorted(self._to_share), set()
        self._share_at.at, self._last_share = float("inf"), clock()
        if queues:
            await self._link.call("notify_workers", queues=queues)

    async def register(self) -> None:
        """Put this worker on the list, before its first claim."""
        now = clock()
        await self._link.run(self._registration(self._identity.id))
        self._prove(now)
        self.last_beat = clock()
        self._heartbeat.at = self.last_beat + self._config.heartbeat

    async def deregister(self) -> None:
        """Take this worker off the list, after draining: rescue treats a missing worker row as dead."""
        for worker in [self._identity.id, *self._identity.former]:
            await self._link.call("delete_worker", worker=worker)

    async def run(self) -> None:
        """Do whatever is due, until cancelled."""
        while True:
            try:
                await self.run_once()
                self._failures = 0
                self.failing_since = None
            except (DatabaseUnavailable, GroupFailed) as error:
                self._failures += 1
                self.last_failure = clock()
                if self._failures == 1:
                    self.failing_since = self.last_failure
                    log.warning("database_unavailable connection=maintenance error=%s", error)
                # Within a heartbeat: whoever is back first must not take the others for silent.
                most = min(RETRY_MOST, self._config.heartbeat)
                await asyncio.sleep(retry_delay(self._failures, self._random, most))
                continue
            self._event.clear()
            due = min(
                self._heartbeat.at,
                self._promotion.at,
                self._discovery.at if self._discover is not None else float("inf"),
                self._notify_queue.at,
                self._housekeeping.at,
                self._walk.at,
                self._canvases.at,
                self._share_at.at,
                self._cancellations.at,
                clock() + RUNNING_INTERVAL if self._work.in_flight else float("inf"),
            )
            try:
                async with asyncio.timeout(max(due - clock(), 0.001)):
                    await self._event.wait()
            except TimeoutError:
                pass

    async def run_once(self) -> None:
        """Everything that is due now."""
        now = clock()
        if now >= self._heartbeat.at or self._running_changed(now):
            await self.beat(now)
        if now >= self._share_at.at:
            await self.wake_others()
        if now >= self._canvases.at:
            await self.settle_canvases(now)
        if self._work.in_flight:
            self._cancellations.pull(self._looked_at + CANCEL_INTERVAL)
        if now >= self._cancellations.at:
            await self.find_cancelled(now)
        if now >= self._promotion.at:
            await self.promote(now)
        if self._discover is not None and now >= self._discovery.at:
            self._discovery.at = now + DISCOVER_INTERVAL
            await self.find_queues(self._discover)
        if now >= self._notify_queue.at:
            self._notify_queue.at = now + NOTIFY_QUEUE_INTERVAL
            ((usage,),) = await self._link.call("drain_notify_queue")
            if usage > 0.5:
                log.warning("notify_queue_filling usage=%.2f", usage)
        if now >= self._housekeeping.at:
            self._housekeeping.at = now + HOUSEKEEPING_INTERVAL * self._random.uniform(0.9, 1.1)
            await self.keep_house(now)
        if now >= self._walk.at:
            await self.walk_history(now)

    async def beat(self, now: float) -> None:
        """Heartbeat, then fence the silent and rescue what they held."""
        failpoint("heartbeat_before")
        self._last_running = self._work.running_for(RUNNING_AFTER, now)
        self._last_progress = self._work.progress()
        answers = await self._link.run([self._heartbeat_call()], [Call("list_heartbeats")])
        self._heartbeat.at = now + self._config.heartbeat
        self.last_beat = now
        if answers[0][0]:
            self._prove(now)
        else:
            await self._renew_identity()
        for worker, counter in self._watch.observe(answers[1][0], clock()):
            if await self._link.call("fence_worker", worker=worker, heartbeat=counter):
                log.warning("worker_fenced id=%s heartbeat=%d", worker, counter)
        await self.rescue()

    def _prove(self, sent: float) -> None:
        """A heartbeat sent at that time has counted: others take our jobs a lease after they have seen it at
        the earliest, which was later.
        """
        self._proven(sent + (1 - EXCLUSIVE_MARGIN) * self._config.lease)

    async def rescue(self) -> int:
        """Take back every running job whose worker is fenced or missing; returns how many."""
        tasks = self._work.tasks
        letters = {name: facts.dead_letter_queue for name, facts in tasks.items() if facts.dead_letter_queue}
        crashes = {name: facts.max_crashes for name, facts in tasks.items() if facts.max_crashes}
        once = [name for name, facts in tasks.items() if facts.runs_once]
        total = 0
        while True:
            ((rescued, queues, buried),) = await self._link.call(
                "rescue_jobs",
                batch=RESCUE_BATCH,
                max_crashes=self._config.max_crashes,
                max_rescues=MAX_RESCUES,
                dead_letter_queues=json.dumps(letters),
                task_max_crashes=json.dumps(crashes),
                once=once,
            )
            if rescued or buried:
                log.warning("jobs_rescued count=%d buried=%d", rescued, buried)
                await self.became_ready(queues)
            taken = int(rescued + buried)
            total += taken
            if taken < RESCUE_BATCH:
                return total

    async def settle_canvases(self, now: float) -> None:
        """Pass on ends that nobody has passed on: of jobs that were cancelled, deleted or rescued, or whose
        worker was killed after its ack.
        """
        self._canvases.at = now + self._config.heartbeat
        ids, self._unsettled = self._unsettled, None
        try:
            ((released, left_over, more),) = await self._link.call("settle_canvases", ids=ids)
        except GroupFailed as error:
            if error.sqlstate != _NOT_THERE:
                log.warning("canvas_not_settled nodes=all error=%s", error)
            return
        if released:
            self._wake()
        # A step at a time: heartbeats come in between.
        self._unsettled = left_over
        if left_over is not None or more:
            self._canvases.at = now

    async def find_cancelled(self, now: float) -> None:
        """Hand on which of the jobs in hand somebody wants cancelled."""
        self._cancellations.at, self._looked_at = float("inf"), now
        found = await self._link.call("find_cancelled", worker=self._identity.id)
        if found:
            self._cancel([job_id for job_id, _ in found])

    async def promote(self, now: float) -> int:
        """Make due jobs ready; returns how many."""
        self._last_promotion = now
        sweep = now >= self._promotion_sweep.at
        after = float("-inf") if sweep else self._etas.trailer
        # Whoever asks from here on may mean a job that this look does not see.
        self._promotion.at = float("inf")
        try:
            answers = await self._link.run(
                [Call("promote_jobs", {"after": after, "now": None, "batch": PROMOTE_BATCH})],
                [Call("next_eta", {"after": after})],
            )
        except BaseException:
            self._promotion.at = now
            raise
        promoted, queues, last_eta, xmin, xmax = answers[0][0][0]
        if promoted:
            self._etas.lead(last_eta, xmax)
        if promoted < PROMOTE_BATCH:
            self._etas.covered(after, float("inf"), xmin)
            if sweep:
                self._promotion_sweep.at = now + PROMOTE_SWEEP
        seconds = answers[1][0][0][0] if answers[1][0] else None
        done = clock()
        self._next_due = None if seconds is None else done + max(seconds, 0.0)
        patience = RENEW if self._asleep() else PROMOTE_INTERVAL
        self._promotion.pull(
            min(done + patience, self._next_due if self._next_due is not None else float("inf"))
        )
        if promoted >= PROMOTE_BATCH:
            self._promotion.pull(done)
        if promoted:  # last: a notification that is refused must not cost the next look
            await self.became_ready(queues)
        return int(promoted)

    async def find_queues(self, discover: Callable[[str], None]) -> None:
        """Hand queues that have appeared to `discover`."""
        while True:
            found = await self._link.call("find_queues", known=sorted(self._queues()))
            for (queue,) in found:
                log.info("queue_found queue=%s", queue)
                discover(queue)
            if not found:
                return

    async def keep_house(self, now: float) -> None:
        """Partitions, retention, the rows of workers long gone; what fails does not stop the rest."""
        config = self._config
        if now >= self._partitions.at and await self._tidy("make_partitions") is not None:
            self._partitions.at = now + PARTITIONS_INTERVAL
        await self._tidy(
            "drop_partitions",
            finished_days=config.retention_finished,
            failures_days=config.retention_failures,
        )
        await self._tidy("delete_fenced_workers")
        await self._tidy("prune_dead_letters_by_rules", days=config.retention_dead_letters)
        await self._tidy("prune_audit_log", days=config.retention_audit)
        await self._tidy(
            "prune_canvases",
            finished_days=config.retention_finished,
            dead_letters_days=config.retention_dead_letters,
        )

    async def walk_history(self, now: float) -> None:
        """A step over a day of history of which only some rows are past their retention, if there is one."""
        config = self._config
        self._walk.at = now + HOUSEKEEPING_INTERVAL * self._random.uniform(0.9, 1.1)
        for what, days in (("finished", config.retention_finished), ("failures", config.retention_failures)):
            if await self._tidy("prune_history", what=what, days=days):
                self._walk.at = clock() + WALK_PAUSE

    async def _tidy(self, name: str, **parameters: object) -> int | None:
        """Run one statement of housekeeping; how many rows it answered, None if the database refused it."""
        try:
            rows = await self._link.call(name, **parameters)
        except GroupFailed as error:
            if error.sqlstate != _NOT_THERE:
                log.warning("housekeeping_failed act=%s error=%s", name, error)
            elif name in _OLDER:
                return await self._tidy(_OLDER[name], **parameters)
            return None
        log.debug("housekeeping act=%s rows=%d", name, len(rows))
        return len(rows)

    async def became_ready(self, queues: list[str]) -> None:
        """Jobs have become ready without an enqueue: tell ourselves, and whoever sleeps."""
        self._wake()
        if queues:
            await self._link.call("wake_workers", queues=queues, eta=None)

    def _running_changed(self, now: float) -> bool:
        """Whether the jobs known to be running, or how far they are, differ from what the last heartbeat
        said; at most once in `RUNNING_INTERVAL`.
        """
        if now < self._heartbeat.at - self._config.heartbeat + RUNNING_INTERVAL:
            return False
        running = self._work.running_for(RUNNING_AFTER, now)
        return running != self._last_running or self._work.progress() != self._last_progress

    def _heartbeat_call(self) -> Call:
        progress = {id: [each.done, each.total, each.note] for id, each in self._last_progress.items()}
        stats = {
            **({"progress": progress} if progress else {}),
            **self._work.counts(),
            **self._health(),
        }
        return Call(
            "beat_heart",
            {
                "worker": self._identity.id,
                "running": "{" + ",".join(self._last_running) + "}",
                "stats": json.dumps(stats),
            },
        )

    async def _renew_identity(self) -> None:
        """This worker was fenced: its old claims are others' now, its next ones need a fresh name."""
        old = self._identity.id
        new = self._identity.renew()
        self._work.drop_waiting(old)
        log.warning("worker_was_fenced id=%s new=%s", old, new)
        now = clock()
        await self._link.run(self._registration(new))
        self._prove(now)
