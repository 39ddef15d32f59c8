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

While the worker sleeps, all that comes every few seconds goes in one transaction with the heartbeat, and all
housekeeping in another. When the database refuses one of those, every act is on its own for a minute, as it
is while there is work: one that fails, or takes long, never stops heartbeats. When the answer is lost, all of
it is sent again, as each would be.
"""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from random import Random
from typing import Protocol

from pgqueue.config import Config
from pgqueue.database.dsn import RETRY_MOST, retry_delay
from pgqueue.database.link import LOCK_NOT_AVAILABLE, QUERY_CANCELED, Call, GroupFailed, Link, Row
from pgqueue.errors import DatabaseUnavailable
from pgqueue.failpoints import failpoint
from pgqueue.job import Progress
from pgqueue.worker.identity import Identity
from pgqueue.worker.lanes import PACE
from pgqueue.worker.promotion import Promoted, Promotion
from pgqueue.worker.wire import TaskFacts, clock

log = logging.getLogger("pgqueue.worker")

MAX_RESCUES = 10
EXCLUSIVE_MARGIN = 0.2
"""Of a lease: exclusive jobs are killed so much earlier than others may take them."""
RESCUE_BATCH = 10_000
"""More than a worker ever has in hand: what is dead in the index is walked over once, not with each batch."""
PROMOTE_INTERVAL = 0.1
"""Seconds between looks for due jobs while there is work; asleep, the next eta decides."""
DISCOVER_INTERVAL = 1.0
"""Seconds between looks for queues nobody knew, unless a notification tells of them."""
DISCOVER_PAUSE = 0.1
"""Seconds between looks that notifications ask for: somebody else may have been quicker, again and again."""
IDLE_INTERVAL = 6.0
"""Seconds between such looks, and those for due jobs, while asleep: they come with the heartbeat, every
five."""
APART = 60.0
"""Seconds for which acts go each on their own after the database has refused them together."""
RUNNING_INTERVAL = 0.8
"""Seconds at least between heartbeats that tell of running jobs: what they say is seen within a second."""
RUNNING_AFTER = 1.0
SHARE_INTERVAL = 0.1
NOTIFY_WITHIN = 0.2
"""Seconds that telling others of work may wait for the server's lock of NOTIFY: whoever commits slowly holds
it. They look by themselves, and the heartbeat has the same connection."""
NOTIFY_AGAIN = 5.0
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
    def in_hand(self) -> set[str]: ...
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
        told_of_queues: Whether the first job in a queue that nobody knew is notified, where notifications
            arrive.
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
        told_of_queues: Callable[[], bool] = lambda: False,
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
        self._told_of_queues = told_of_queues
        self._random = random
        self._event = asyncio.Event()
        self._watch = Watch(config.lease, patience=3 * config.heartbeat)
        self._due = Promotion()
        self._next_due: float | None = None
        self._heartbeat = _Timer()
        self._rescue = _Timer()
        self._promotion = _Timer()
        self._discovery = _Timer()
        self._notify_queue = _Timer()
        self._cancellations = _Timer(float("inf"))
        self._housekeeping = _Timer()
        self._walk = _Timer(float("inf"))
        self._partitions = _Timer()
        self._canvases = _Timer()
        self._unsettled: str | None = None
        self._share_at = _Timer(float("inf"))
        self._to_share: set[str] = set()
        self._last_share = float("-inf")
        self._looked_at = float("-inf")
        self._tell_at = float("-inf")
        self._last_promotion = float("-inf")
        self._last_discovery = float("-inf")
        self._apart_until: dict[str, float] = {}
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

    def look_for_queues(self) -> None:
        """There may be a job in a queue that nobody here knows."""
        self._discovery.pull(max(clock(), self._last_discovery + DISCOVER_PAUSE))
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
            await self._tell(Call("notify_workers", {"queues": queues}))

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
        asleep = self._asleep()
        if not asleep:
            self._discovery.pull(now + DISCOVER_INTERVAL)
        if asleep and now >= self._heartbeat.at and now >= self._apart_until.get("beat", now):
            await self.beat_with_the_rest(now)
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
            await self.find_queues(self._discover, now)
        if now >= self._notify_queue.at:
            self._notify_queue_read(now, await self._link.call("drain_notify_queue"))
        if now >= self._housekeeping.at:
            self._housekeeping.at = now + HOUSEKEEPING_INTERVAL * self._random.uniform(0.9, 1.1)
            await self.keep_house(now)
        if now >= self._walk.at:
            await self.walk_history()

    async def beat_with_the_rest(self, now: float) -> None:
        """The heartbeat and what else comes every few seconds, in one transaction: for a worker without
        work. Refused, it has done nothing, and all of it is due as before.

        The looks for due jobs come first: their transaction must not have an id before their snapshot.
        Canvases come before the rescue, because ends are passed on in a transaction after theirs. The
        heartbeat comes last, so that the worker's row is locked for a moment only.
        """
        self._about_to_beat(now)
        looks = [group[-1] for group in self._about_to_promote(now)]
        calls = [
            *looks,
            Call("settle_canvases", {"ids": self._unsettled}),
            *([Call("rescue_jobs", self._rescue_parameters())] if now >= self._rescue.at else []),
            Call("drain_notify_queue"),
            Call("list_heartbeats"),
            Call("beat_heart", self._heartbeat_parameters()),
        ]
        if self._discover is not None:
            self._about_to_discover(now)
            calls.insert(len(looks), Call("find_queues", {"known": sorted(self._queues())}))
        rows: list[list[Row]] | None = None
        try:
            rows = await self._together("beat", now, calls)
        finally:
            if rows is None:
                self._promotion.at = self._discovery.at = now
        if rows is None:
            return
        answers = {call.name: answer for call, answer in zip(calls, rows, strict=True)}
        found = self._due.absorb(now, [[answer] for answer in rows[: len(looks)]])
        # First what is only noted down, then what may fail.
        beaten = bool(answers["beat_heart"])
        self._beaten(now, beaten)
        self._notify_queue_read(now, answers["drain_notify_queue"])
        if self._discover is not None and self._queues_found(self._discover, answers["find_queues"]):
            self.look_for_queues()
        self._unsettled = None
        self._canvases_settled(now, answers["settle_canvases"])
        ((rescued, rescued_in, buried),) = answers.get("rescue_jobs", [(0, [], 0)])
        if buried:
            self._canvases.at = now
        self._promoted(now, found)
        if found.count or rescued:
            self._wake()
        if not beaten:
            await self._renew_identity()
        fenced = await self._fence(answers["list_heartbeats"])
        if rescued or buried:
            await self._tell_rescued(rescued, rescued_in, buried)
        if found.count:
            await self.became_ready(found.queues)
        if fenced or rescued + buried >= RESCUE_BATCH:
            await self.rescue()

    async def _together(self, what: str, now: float, calls: Sequence[Call]) -> list[list[Row]] | None:
        """Their answers in one transaction; None if the database refuses one of them, or did lately."""
        if now < self._apart_until.get(what, now):
            return None
        config = self._config
        # All of them take less than what is left of a lease after a heartbeat: then this one comes in time.
        most = f"{max((config.lease - config.heartbeat) / 2 / len(calls), 0.001) * 1000:.0f}ms"
        timeouts = Call("set_timeouts", {"statement_timeout": most, "lock_timeout": most})
        try:
            (answers,) = await self._link.run([timeouts, *calls])
        except GroupFailed as error:
            log.debug("maintenance_apart what=%s seconds=%g error=%s", what, APART, error)
            self._apart_until[what] = now + APART
            return None
        return answers[1:]

    async def beat(self, now: float) -> None:
        """Heartbeat, then fence the silent and rescue what they held."""
        self._about_to_beat(now)
        answers = await self._link.run(
            [Call("beat_heart", self._heartbeat_parameters())], [Call("list_heartbeats")]
        )
        beaten = bool(answers[0][0])
        self._beaten(now, beaten)
        if not beaten:
            await self._renew_identity()
        if await self._fence(answers[1][0]) or clock() >= self._rescue.at:
            await self.rescue()

    def _about_to_beat(self, now: float) -> None:
        failpoint("heartbeat_before")
        self._last_running = self._work.running_for(RUNNING_AFTER, now)
        self._last_progress = self._work.progress()

    def _beaten(self, now: float, counts: bool) -> None:
        self._heartbeat.at = now + self._config.heartbeat
        self.last_beat = now
        if counts:
            self._prove(now)

    async def _fence(self, heartbeats: Iterable[tuple[str, int]]) -> bool:
        """Fence whoever has been silent for too long; returns whether there was anybody."""
        fenced = False
        for worker, counter in self._watch.observe(heartbeats, clock()):
            if await self._link.call("fence_worker", worker=worker, heartbeat=counter):
                log.warning("worker_fenced id=%s heartbeat=%d", worker, counter)
                fenced = True
        return fenced

    def _prove(self, sent: float) -> None:
        """A heartbeat sent at that time has counted: others take our jobs a lease after they have seen it at
        the earliest, which was later.
        """
        self._proven(sent + (1 - EXCLUSIVE_MARGIN) * self._config.lease)

    async def rescue(self) -> int:
        """Take back every running job whose worker is fenced or missing; returns how many.

        Where the entries of all that lost workers have run are still in the index, it walks over them: the
        longer it takes, the longer is the pause after it, and it leaves time for heartbeats.
        """
        parameters = self._rescue_parameters()
        most = f"{self._config.lease / 3 * 1000:.0f}ms"
        timeouts = Call("set_timeouts", {"statement_timeout": most, "lock_timeout": "2s"})
        total = 0
        while True:
            began = clock()
            try:
                answers = await self._link.run([timeouts, Call("rescue_jobs", parameters)])
            except GroupFailed as error:
                if error.sqlstate != QUERY_CANCELED:
                    raise
                log.warning("rescue_gave_up error=%s", error)
                self._rescue.at = clock() + PACE * (clock() - began)
                return total
            ((rescued, queues, buried),) = answers[0][1]
            if rescued or buried:
                await self._tell_rescued(rescued, queues, buried)
            taken = int(rescued + buried)
            total += taken
            if taken < RESCUE_BATCH:
                if not taken:
                    self._rescue.at = clock() + PACE * (clock() - began)
                return total

    def _rescue_parameters(self) -> dict[str, object]:
        tasks = self._work.tasks
        letters = {name: facts.dead_letter_queue for name, facts in tasks.items() if facts.dead_letter_queue}
        crashes = {name: facts.max_crashes for name, facts in tasks.items() if facts.max_crashes}
        return {
            "batch": RESCUE_BATCH,
            "max_crashes": self._config.max_crashes,
            "max_rescues": MAX_RESCUES,
            "dead_letter_queues": json.dumps(letters),
            "task_max_crashes": json.dumps(crashes),
            "once": [name for name, facts in tasks.items() if facts.runs_once],
        }

    async def _tell_rescued(self, rescued: int, queues: list[str], buried: int) -> None:
        log.warning("jobs_rescued count=%d buried=%d", rescued, buried)
        await self.became_ready(queues)

    async def settle_canvases(self, now: float) -> None:
        """Pass on ends that nobody has passed on: of jobs that were cancelled, deleted or rescued, or whose
        worker was killed after its ack.
        """
        self._canvases.at = now + self._config.heartbeat
        ids, self._unsettled = self._unsettled, None
        try:
            rows = await self._link.call("settle_canvases", ids=ids)
        except GroupFailed as error:
            if error.sqlstate != _NOT_THERE:
                log.warning("canvas_not_settled nodes=all error=%s", error)
            return
        self._canvases_settled(now, rows)

    def _canvases_settled(self, now: float, rows: list[Row]) -> None:
        ((released, left_over, more),) = rows
        self._canvases.at = now + self._config.heartbeat
        if released:
            self._wake()
        # A step at a time: heartbeats come in between.
        self._unsettled = left_over
        if left_over is not None or more:
            self._canvases.at = now

    async def find_cancelled(self, now: float) -> None:
        """Hand on which of the jobs in hand somebody wants cancelled."""
        self._cancellations.at, self._looked_at = float("inf"), now
        ids = "{" + ",".join(self._work.in_hand()) + "}"
        found = await self._link.call("find_cancelled", worker=self._identity.id, ids=ids)
        if found:
            self._cancel([job_id for job_id, _ in found])

    async def promote(self, now: float) -> int:
        """Make due jobs ready; returns how many."""
        groups = self._about_to_promote(now)
        try:
            answers = await self._link.run(*groups)
        except GroupFailed as error:
            self._promotion.at = now
            if error.sqlstate != QUERY_CANCELED:
                raise
            log.debug("promotion_gave_up look=%d error=%s", error.group, error)
            self._due.gave_up(now, error.group)
            if not error.rows:
                return 0
            answers = error.rows
        except BaseException:
            self._promotion.at = now
            raise
        found = self._due.absorb(now, answers)
        self._promoted(now, found)
        if found.count:  # last: a notification that is refused must not cost the next look
            await self.became_ready(found.queues)
        return found.count

    def _about_to_promote(self, now: float) -> list[list[Call]]:
        self._last_promotion = now
        # Whoever asks from here on may mean a job that this look does not see.
        self._promotion.at = float("inf")
        return self._due.groups(now)

    def _promoted(self, now: float, found: Promoted) -> None:
        done = clock()
        self._next_due = None if found.next_in is None else done + max(found.next_in, 0.0)
        patience = IDLE_INTERVAL if self._asleep() else PROMOTE_INTERVAL
        self._promotion.pull(
            min(
                done + patience,
                max(self._due.at, now + PROMOTE_INTERVAL),
                self._next_due if self._next_due is not None else float("inf"),
            )
        )
        if found.more:
            self._promotion.pull(done)

    async def find_queues(self, discover: Callable[[str], None], now: float) -> None:
        """Hand queues that have appeared to `discover`."""
        self._about_to_discover(now)
        found = True
        while found:
            rows = await self._link.call("find_queues", known=sorted(self._queues()))
            found = self._queues_found(discover, rows)

    def _about_to_discover(self, now: float) -> None:
        is_told = self._asleep() and self._told_of_queues()
        self._last_discovery = now
        self._discovery.at = now + (IDLE_INTERVAL if is_told else DISCOVER_INTERVAL)

    @staticmethod
    def _queues_found(discover: Callable[[str], None], rows: list[Row]) -> bool:
        for (queue,) in rows:
            log.info("queue_found queue=%s", queue)
            discover(queue)
        return bool(rows)

    def _notify_queue_read(self, now: float, rows: list[Row]) -> None:
        self._notify_queue.at = now + NOTIFY_QUEUE_INTERVAL
        ((usage,),) = rows
        if usage > 0.5:
            log.warning("notify_queue_filling usage=%.2f", usage)

    async def keep_house(self, now: float) -> None:
        """Partitions, retention, the rows of workers long gone; what fails does not stop the rest."""
        config = self._config
        if now >= self._partitions.at and await self._tidy(Call("make_partitions")) is not None:
            self._partitions.at = now + PARTITIONS_INTERVAL
        ages = {"finished_days": config.retention_finished}
        acts = [
            Call("delete_fenced_workers"),
            Call("prune_dead_letters_by_rules", {"days": config.retention_dead_letters}),
            Call("prune_audit_log", {"days": config.retention_audit}),
            Call("prune_canvases", {**ages, "dead_letters_days": config.retention_dead_letters}),
            *([] if self._walk.at < float("inf") else self._steps()),
            # Last, because it locks whole tables when there is something to drop.
            Call("drop_partitions", {**ages, "failures_days": config.retention_failures}),
        ]
        answers: list[list[Row] | None] = list(await self._together("house", now, acts) or [])
        if not answers:
            answers = [await self._tidy(act) for act in acts]
        for act, rows in zip(acts, answers, strict=True):
            if rows is not None:
                log.debug("housekeeping act=%s rows=%d", act.name, len(rows))
            if rows and act.name == "prune_history":
                self._walk.at = clock() + WALK_PAUSE

    async def walk_history(self) -> None:
        """The next step over a day of history of which only some rows are past their retention. It may end
        with a lock on the whole day, so each is on its own.
        """
        more = [await self._tidy(step) for step in self._steps()]
        self._walk.at = clock() + WALK_PAUSE if any(more) else float("inf")

    def _steps(self) -> list[Call]:
        ages = {"failures": self._config.retention_failures, "finished": self._config.retention_finished}
        return [Call("prune_history", {"what": what, "days": days}) for what, days in ages.items()]

    async def _tidy(self, act: Call) -> list[Row] | None:
        """Run one statement of housekeeping; its answer, None if the database refused it."""
        try:
            return (await self._link.run([act]))[0][0]
        except GroupFailed as error:
            if error.sqlstate != _NOT_THERE:
                log.warning("housekeeping_failed act=%s error=%s", act.name, error)
            elif act.name in _OLDER:
                return await self._tidy(Call(_OLDER[act.name], act.parameters))
            return None

    async def became_ready(self, queues: list[str]) -> None:
        """Jobs have become ready without an enqueue: tell ourselves, and whoever sleeps."""
        self._wake()
        if queues:
            await self._tell(Call("wake_workers", {"queues": queues, "eta": None}))

    async def _tell(self, call: Call) -> None:
        """Notify others, unless it takes long: then for a while nobody is told."""
        now = clock()
        if now < self._tell_at:
            return
        within = f"{NOTIFY_WITHIN:g}s"
        timeouts = Call("set_timeouts", {"statement_timeout": "1s", "lock_timeout": within})
        try:
            await self._link.run([timeouts, call])
        except GroupFailed as error:
            if error.sqlstate not in (LOCK_NOT_AVAILABLE, QUERY_CANCELED):
                raise
            self._tell_at = now + NOTIFY_AGAIN
            log.debug("notify_gave_up error=%s", error)

    def _running_changed(self, now: float) -> bool:
        """Whether the jobs known to be running, or how far they are, differ from what the last heartbeat
        said; at most once in `RUNNING_INTERVAL`.
        """
        if now < self._heartbeat.at - self._config.heartbeat + RUNNING_INTERVAL:
            return False
        running = self._work.running_for(RUNNING_AFTER, now)
        return running != self._last_running or self._work.progress() != self._last_progress

    def _heartbeat_parameters(self) -> dict[str, object]:
        progress = {id: [each.done, each.total, each.note] for id, each in self._last_progress.items()}
        stats = {
            **({"progress": progress} if progress else {}),
            **self._work.counts(),
            **self._health(),
        }
        return {
            "worker": self._identity.id,
            "running": "{" + ",".join(self._last_running) + "}",
            "stats": json.dumps(stats),
        }

    async def _renew_identity(self) -> None:
        """This worker was fenced: its old claims are others' now, its next ones need a fresh name."""
        old = self._identity.id
        new = self._identity.renew()
        self._work.drop_waiting(old)
        log.warning("worker_was_fenced id=%s new=%s", old, new)
        now = clock()
        await self._link.run(self._registration(new))
        self._prove(now)
