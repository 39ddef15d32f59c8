"""The loop that claims jobs and acks their outcomes, and decides when to sleep.

Acks and the next claim share a round trip, never a transaction. Outcomes stay in memory until the database
has confirmed them: when it is away the work goes on and nothing is thrown away. On a new connection the loop
looks at what runs under its name, because a claim whose answer was lost may have been committed, and sweeps
every lane from the beginning.

Going to sleep, in this order: arm the wake hint and commit, look once more, wait. A producer that commits
later sees the hint and notifies; one that read "nobody sleeps" and commits within t is found by the polls,
2 ms after the hint was armed, then 4, 8 …, so about t later. As long as it stays armed, jobs that come change
nothing about that: a lone job costs a claim, and an ack that looks for more. A worker that keeps up with more
than two hundred jobs a second disarms the hint instead: with it every producer would pay for a NOTIFY, and
polling every few milliseconds is cheaper for both.

Asleep, it renews the hint in the transaction of each look, after the look: the hint still holds meanwhile, so
only the first arming has to be committed before. (Renewed before it, the transaction would have its id before
the claim's snapshot, and what the lanes conclude from that id would be wrong.) When such a transaction is
refused, the next look arms on its own, as at first.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from operator import attrgetter
from random import Random

import msgspec

from pgqueue.database.dsn import retry_delay
from pgqueue.database.link import QUERY_CANCELED, Call, GroupFailed, Link, Row
from pgqueue.database.store import CLAIM_LIMIT, Claim, decode_claim, decode_claimed
from pgqueue.errors import DatabaseUnavailable
from pgqueue.job import ClaimedJob
from pgqueue.worker.acker import Acker
from pgqueue.worker.dispatcher import Dispatcher
from pgqueue.worker.identity import Identity
from pgqueue.worker.lanes import Lanes, Plan
from pgqueue.worker.wire import clock

log = logging.getLogger("pgqueue.worker")

_POSITION = attrgetter("position")
_LANE = attrgetter("queue", "priority")
_PLACE = attrgetter("queue", "priority", "position")
_SWEEP_TIMEOUTS = Call("set_timeouts", {"statement_timeout": "1s", "lock_timeout": "1s"})

FLUSH_AFTER = 0.005
FIRST_PAUSE = 0.002
HINT_HOLDS = 10.0
"""Seconds, as `arm_wake` says it."""
RENEW = 5.0
"""Seconds until a sleeper renews its hint at the latest: one renewal may fail, it is tried again within a
second or two."""
RENEW_FROM = 3.0
"""Seconds from which on it does so with a look that it takes anyhow."""
RUSH = 200
"""Jobs a second above which a worker that keeps up polls instead of asking to be woken. Counted in jobs, not
in claims: producers that wait for each other's NOTIFY are slow, and few claims would seem to find work."""
RUSH_PAUSE = 0.003
GATHER = 1e-9
"""Seconds, times the square of the jobs of the last second, that jobs and outcomes gather before a round in a
rush: nothing for the steps of a chain, 350 a second, 1 ms at a thousand jobs a second. Rounds of a hundred at
five thousand leave producers on the same CPUs a twentieth more of them than rounds of fifty."""
GATHER_MOST = 0.02
DISARM_INTERVAL = 1.0
PASSING_COST = 10
"""Of the time that an empty look at jobs of some tasks took: the pause before the next."""
EVERY_QUEUE = "*"
"""What no queue is called: the hint of a worker that serves every queue, for those that it does not know."""
STRAYS_INTERVAL = 30.0
STRAYS_MOST = 900.0
"""Seconds between looks for jobs that run under our name without our knowing. A claim whose answer was lost
may be committed long after we have a new connection: its process was frozen, or waited for a standby. Each
pause is twice the last: the look walks over what is left in the index of every job this worker has run."""


@dataclass(frozen=True, slots=True)
class TaskFilter:
    """Which tasks a claimer claims jobs of: where a worker has several pools each has a claimer of its own.

    Attributes:
        names: The tasks; None for all there are.
        but: All except those.
    """

    names: frozenset[str] | None = None
    but: bool = False

    def __bool__(self) -> bool:
        return self.names is not None

    @property
    def takes_the_rest(self) -> bool:
        """Whether jobs of tasks that nobody knows are its own."""
        return self.names is None or self.but

    def has(self, task: str) -> bool:
        """Whether jobs of this task are its own."""
        return self.names is None or (task in self.names) != self.but

    def parameters(self) -> dict[str, object]:
        """Of `claim_jobs`."""
        return {"tasks": None if self.names is None else sorted(self.names), "but": self.but}


@dataclass(slots=True)
class _Look:
    """A round's claim, and what goes with it.

    Attributes:
        hint: Arms the wake hint (True), disarms it (False), or leaves it (None).
        out_of_date: Which hint it was that is armed.
        hint_goes_along: In the claim's transaction, not in one of its own before.
        held: What we knew to be ours when it asked what runs under our name; None when it does not ask.
    """

    worker: str
    now: float
    plan: Plan
    hint: bool | None
    out_of_date: int
    groups: list[list[Call]]
    hint_goes_along: bool = False
    held: set[str] | None = None


class Claimer:
    """Claims for `lanes`, hands jobs to `dispatcher`, and records its outcomes.

    Args:
        dispatch: Called after jobs have been claimed: send them out.
        next_eta: Seconds until the next scheduled job that this worker knows of, None for none.
        share: Called with the queues of a claim that came back full, or of jobs given back: somebody who
            sleeps may help.
        retried: Called when the database has confirmed retries, with the seconds until the first is due.
        tasks: Those whose jobs are its own.
        everything: Ask to be woken for queues, too, that nobody knows yet.
    """

    def __init__(
        self,
        link: Link,
        lanes: Lanes,
        dispatcher: Dispatcher,
        identity: Identity,
        *,
        dispatch: Callable[[], None],
        next_eta: Callable[[], float | None],
        share: Callable[[list[str]], None],
        retried: Callable[[float], None],
        poll_interval: float,
        random: Random,
        tasks: TaskFilter | None = None,
        everything: bool = False,
    ) -> None:
        self._link = link
        self._tasks = tasks or TaskFilter()
        self._everything = everything
        self._lanes = lanes
        self._dispatcher = dispatcher
        self._identity = identity
        self._dispatch = dispatch
        self._next_eta = next_eta
        self._share = share
        self._poll_interval = poll_interval
        self._random = random
        self._event = asyncio.Event()
        self._acker = Acker(link, dispatcher, share=share, retried=retried, wake=self.wake)
        self._bare = False
        self._first_outcome: float | None = None
        self._opened = 0
        self._strays_at = 0.0
        self._strays_pause = STRAYS_INTERVAL
        self._looking = False
        self._wake_now = False
        self._pause = FIRST_PAUSE
        self._look_again_at = 0.0
        self._poll_at = 0.0
        self._early = False
        self._armed_at: float | None = None
        self._out_of_date = 0
        self._disarmed_at = float("-inf")
        self._finds: deque[tuple[float, int]] = deque()
        self._found = 0
        self._failures = 0
        self._finishing = False
        self.hears = False
        """Whether notifications are known to reach this worker. If not, it asks for none, and polls."""
        self.draining = False
        self.last_claim: float | None = None
        """When a claim last succeeded: a worker's liveness."""
        self.last_failure: float | None = None
        self.failing_since: float | None = None

    @property
    def asleep(self) -> bool:
        """There is no work as far as this worker knows, and whoever makes some will say so."""
        return self._looking and self._armed_at is not None

    @property
    def unacked(self) -> int:
        """Outcomes that the database has not confirmed, or not passed on."""
        return self._acker.unacked

    def finish(self) -> None:
        """Let `run` end after the round it is in."""
        self._finishing = True
        self._event.set()

    def serve(self, queue: str) -> None:
        """Serve one more queue, and ask to be woken for it too."""
        self._lanes.add(queue)
        self._arm_anew()
        self.wake()

    def hear(self, hears: bool, poll_interval: float) -> None:
        """Notifications reach this worker from now on, or do not; look for jobs in either case."""
        self.hears = hears
        self._poll_interval = poll_interval
        self._arm_anew()
        self.wake()

    def _arm_anew(self) -> None:
        """The hint says too little: also one that is on its way."""
        self._armed_at = None
        self._out_of_date += 1

    def wake(self, queue: str | None = None) -> None:
        """Look for jobs now: somebody said there are some, in this queue."""
        if queue is not None:
            self._lanes.first(queue)
        self._wake_now = True
        self._event.set()

    def poke(self) -> None:
        """Something happened to the jobs in hand: see whether there is anything to do."""
        dispatcher = self._dispatcher
        if dispatcher.outcomes and self._first_outcome is None:
            self._first_outcome = clock()
            self._event.set()  # whoever waits knows of no ack that is soon due
        if self._due(clock()) or (not self._looking and not self.draining and dispatcher.wanted()):
            self._event.set()

    async def run(self) -> None:
        """Claim and ack until told to finish."""
        while not self._finishing:
            try:
                await self.run_once()
                if self._failures:
                    log.info("database_back connection=claim failures=%d", self._failures)
                self._failures = 0
                self.failing_since = None
            except (DatabaseUnavailable, GroupFailed) as error:
                await self._back_off(str(error))

    async def run_once(self) -> None:
        """One round: wait until there is something to do, then do it in one round trip."""
        await self._wait()
        now = clock()
        wanted = 0 if self.draining else self._dispatcher.wanted()
        claim = wanted > 0 and (
            not self._looking or self._wake_now or now >= self._look_again_at or self._acker.has_outcomes
        )
        if self._wake_now and not wanted:
            self._looking = False  # there is work, but no slot yet: look again as soon as there is one
        self._wake_now = False
        if self._link.opened != self._opened or not await self._alive():
            await self._reconcile()
        elif now >= self._strays_at and not (claim and self._has_nothing):
            await self._adopt_strays()
        if claim and not (self._looking and self._lanes.sweeps_along(now)):
            await self._sweep(wanted, now)
            wanted = self._dispatcher.wanted()
        await self._round(wanted if claim else 0, now)

    async def flush(self) -> None:
        """Ack everything there is, without claiming, for as long as it takes."""
        self._acker.try_aside_again()
        while self.unacked:
            try:
                await self._round(0, clock())
            except (DatabaseUnavailable, GroupFailed) as error:
                await self._back_off(str(error))

    @property
    def _has_nothing(self) -> bool:
        """Asleep, with no ack to come: what is due can share the transaction of the next look."""
        return self.asleep and not self.unacked and not self._acker.has_aside

    def _due(self, now: float) -> bool:
        """Whether the outcomes should go now: many, or old, or nothing else would come."""
        outcomes = self._dispatcher.outcomes
        if self._acker.is_behind:
            return True
        if not outcomes:
            return False
        dispatcher = self._dispatcher
        return (
            len(outcomes) >= CLAIM_LIMIT
            or (self._first_outcome is not None and now >= self._flush_at(now))
            or (not dispatcher.in_flight and not dispatcher.waiting and not self._rushing(now))
        )

    def _flush_at(self, now: float) -> float:
        """When the outcomes in hand are to go at the latest."""
        assert self._first_outcome is not None  # noqa: S101
        return self._first_outcome + (self._gathering() if self._rushing(now) else FLUSH_AFTER)

    def _gathering(self) -> float:
        return min(GATHER * self._found**2, GATHER_MOST)

    async def _wait(self) -> None:
        while True:
            now = clock()
            if self._wake_now or self._finishing or self._due(now):
                break
            wanted = not self.draining and self._dispatcher.wanted()
            if wanted and (not self._looking or now >= self._look_again_at):
                break
            deadline = self._look_again_at if wanted else now + 1.0
            if self._first_outcome is not None:
                deadline = min(deadline, self._flush_at(now))
            self._event.clear()
            alarm = asyncio.get_running_loop().call_later(max(deadline - now, 0.0005), self._event.set)
            try:
                await self._event.wait()
            finally:
                alarm.cancel()
        self._event.clear()

    async def _alive(self) -> bool:
        """Make sure there is a connection; False when it is a new one."""
        before = self._link.opened
        await self._link.connect()
        return self._link.opened == before

    async def _reconcile(self) -> None:
        """On a new connection: adopt what runs under our name without our knowing, and sweep."""
        self._strays_pause = STRAYS_INTERVAL
        await self._adopt_strays()
        self._opened = self._link.opened
        self._armed_at = None
        self._looking = False
        self._lanes.forget_sweeps()

    async def _adopt_strays(self) -> None:
        """Where the look takes too long, it waits for the next time, and the claims go on."""
        self._put_off_strays()
        self._acker.try_aside_again()
        try:
            self._tell_adopted(await self._adopt(self._identity.id))
        except GroupFailed as error:
            if error.sqlstate != QUERY_CANCELED:
                raise
            log.warning("claim_not_reconciled error=%s", error)

    def _put_off_strays(self) -> None:
        self._strays_at = clock() + self._strays_pause
        # What was set aside is not to wait longer each time.
        self._strays_pause = (
            STRAYS_INTERVAL if self._acker.has_aside else min(2 * self._strays_pause, STRAYS_MOST)
        )

    @staticmethod
    def _tell_adopted(jobs: int) -> None:
        if jobs:
            log.warning("claim_adopted jobs=%d", jobs)

    async def _round(self, wanted: int, now: float) -> None:
        """Acks, the wake hint and a claim, as far as each is due, in one round trip."""
        acks = self._acker.next_batch()
        self._first_outcome = None
        look = self._next_look(wanted, now) if wanted else None
        groups = acks.groups + look.groups if look else acks.groups
        if not groups:
            return
        try:
            answers = await self._link.run(*groups)
        except (DatabaseUnavailable, asyncio.CancelledError):
            acks.uncertain()
            raise
        except GroupFailed as error:
            if error.group < len(acks.groups):
                await self._acker.refused(acks, error)
                return
            self._acker.recorded(acks, error.rows)
            if look is not None:
                await self._look_failed(look, error)
            raise
        self._acker.recorded(acks, answers)
        if look is not None:
            await self._looked(look, answers[len(acks.groups) :])

    def _next_look(self, wanted: int, now: float) -> _Look:
        worker = self._identity.id
        plan = self._lanes.plan(wanted, now, to_the_end=self._looking)
        parameters = {**plan.parameters(), **self._tasks.parameters(), "worker": worker}
        claim = [Call("claim_jobs", {**parameters, "bare": self._bare})]
        look = _Look(worker, now, plan, self._hint(now), self._out_of_date, [claim])
        if look.hint is not None:
            armed = self._armed_at
            look.hint_goes_along = look.hint and armed is not None and now - armed < HINT_HOLDS - 1
            if look.hint_goes_along:
                claim.append(self._hint_call(look.hint))
            else:
                look.groups.insert(0, [self._hint_call(look.hint)])
        if now >= self._strays_at and self._has_nothing:
            look.held = self._dispatcher.holds
            claim.insert(0, Call("list_claimed", {"worker": worker}))
        return look

    async def _looked(self, look: _Look, answers: list[list[list[Row]]]) -> None:
        hint = look.hint
        if hint is not None:
            self._armed_at = look.now if hint and look.out_of_date == self._out_of_date else None
            self._disarmed_at = self._disarmed_at if hint else look.now
            if not look.hint_goes_along:
                self._pause = FIRST_PAUSE
        rows = answers[-1]
        if look.held is not None:
            self._put_off_strays()
            self._tell_adopted(self._take_over(rows.pop(0), look.worker, look.held))
        await self._claimed(look.plan, rows[0], look.worker, look.now)

    async def _look_failed(self, look: _Look, error: GroupFailed) -> None:
        # Arguments of a few bytes may be a gigabyte as text: then claim without printing any.
        self._bare = error.blames_the_row or error.sqlstate == QUERY_CANCELED
        if look.hint_goes_along or look.held is not None:
            self._armed_at = None  # each on its own next time
        if error.sqlstate == QUERY_CANCELED:
            # Perhaps there is too much to walk over, and always will be.
            ((position, xid),) = await self._link.call("last_position")
            self._lanes.go_in_steps(position, xid)

    async def _sweep(self, wanted: int, now: float) -> None:
        """Look at a stretch of what lies behind the cursors, if it is time for one."""
        plan = self._lanes.sweep(wanted, now)
        if plan is None:
            return
        worker = self._identity.id
        parameters = {**plan.parameters(), **self._tasks.parameters(), "worker": worker, "bare": True}
        try:
            _, rows = (await self._link.run([_SWEEP_TIMEOUTS, Call("claim_jobs", parameters)]))[0]
        except GroupFailed as error:
            if error.sqlstate != QUERY_CANCELED:
                raise
            log.debug("sweep_gave_up error=%s", error)
            self._lanes.sweep_failed(now)
            return
        claim = await self._read(plan, rows, worker, now)
        if claim is not None and claim[0].jobs:
            self._looking = False

    def _hint(self, now: float) -> bool | None:
        """Arm the wake hint (True), disarm it (False), or leave it (None)."""
        rushing = self._rushing(now)
        if rushing or not self._looking:
            if self._armed_at is not None and rushing and now - self._disarmed_at >= DISARM_INTERVAL:
                return False
            return None
        if self.hears and (self._armed_at is None or now - self._armed_at >= RENEW_FROM):
            return True
        return None

    def _hint_call(self, arm: bool) -> Call:
        queues = sorted(self._lanes.queues)
        if arm:
            asked = [EVERY_QUEUE, *queues] if self._everything else queues
            return Call("arm_wake", {"queues": asked, "next_eta": self._next_eta()})
        # Not for the queues that nobody knows: their first job pays for its NOTIFY.
        return Call("disarm_wake", {"queues": queues})

    async def _claimed(self, plan: Plan, rows: list[Row], worker: str, now: float) -> None:
        self.last_claim = now
        self._bare = False
        read = await self._read(plan, rows, worker, now)
        if read is None:
            return
        claim, more = read
        if more:
            self._looking = False
        elif claim.jobs or not plan.to_the_end or not plan.complete:
            # Look to the end, with the hint armed, before going to sleep; in a rush let some jobs gather.
            self._looking = True
            rest = max(RUSH_PAUSE, self._gathering()) if self._rushing(now) else 0.0
            if not claim.jobs:
                rest = max(rest, plan.pause)
            elif self._armed_at is not None:
                rest = max(rest, FIRST_PAUSE)  # nobody is unheard: the ack of a short job can go along
            self._look_again_at = now + rest
        else:
            self._found_nothing(now)
            if self._tasks:
                # It may have walked over many jobs of other tasks: not all the time.
                walked = clock() - now
                self._look_again_at = max(self._look_again_at, clock() + PASSING_COST * walked)

    async def _read(self, plan: Plan, rows: list[Row], worker: str, now: float) -> tuple[Claim, bool] | None:
        """Take the jobs of an answer in hand; returns it and whether there may be more, None if it was not
        readable.
        """
        try:
            claim = decode_claim(rows, worker)
        except (msgspec.DecodeError, RecursionError) as error:
            log.error("claim_undecodable error=%s", error)
            await self._adopt(worker)
            return None
        more = self._lanes.absorb(
            plan,
            list(map(_PLACE, claim.jobs)),
            claim.xmin,
            claim.xmax,
            now,
            took=claim.took,
            unseen=claim.unseen,
        )
        if claim.jobs:
            self._finds.append((now, len(claim.jobs)))
            self._found += len(claim.jobs)
            if self._armed_at is None:
                self._pause = FIRST_PAUSE
            self._take(self._in_order(plan, claim))
            if more and not self._dispatcher.free_slots:
                self._share(sorted({job.queue for job in claim.jobs}))
        return claim, more

    def _rushing(self, now: float) -> bool:
        """Whether the last second brought so much work that being woken for each job would cost too much."""
        while self._finds and now - self._finds[0][0] >= 1.0:
            self._found -= self._finds.popleft()[1]
        return self._found >= RUSH

    def _found_nothing(self, now: float) -> None:
        if self._rushing(now):
            self._look_again_at = clock() + max(RUSH_PAUSE, self._gathering())
            return
        if not self._early or clock() >= self._poll_at:
            pause = min(self._pause, self._poll_interval * self._random.uniform(0.9, 1.0))
            self._poll_at = clock() + pause
            if self._armed_at is not None:
                self._poll_at = min(self._poll_at, self._armed_at + RENEW)
            self._pause = min(self._pause * 2, self._poll_interval)
        # A sweep that goes on in between makes the pauses no longer.
        sweep_at = self._lanes.sweep_at
        self._early = sweep_at is not None and sweep_at < self._poll_at
        self._look_again_at = (
            max(sweep_at, clock()) if sweep_at is not None and self._early else self._poll_at
        )

    @staticmethod
    def _in_order(plan: Plan, claim: Claim) -> list[ClaimedJob]:
        """The rows as the lanes are served: they come back in any order."""
        jobs = sorted(claim.jobs, key=_POSITION)
        if len(set(map(_LANE, jobs))) > 1:
            rank = {(stretch.lane.queue, stretch.lane.priority): n for n, stretch in enumerate(plan.ranges)}
            jobs.sort(key=lambda job: rank[job.queue, job.priority])
        return jobs

    def _take(self, jobs: list[ClaimedJob]) -> None:
        self._dispatcher.add(jobs, clock())
        if self._dispatcher.outcomes and self._first_outcome is None:
            self._first_outcome = clock()
        if self._dispatcher.free_slots:
            self._dispatch()
        else:  # the next round goes out first, so that the server has work while this is done
            asyncio.get_running_loop().call_soon(self._dispatch)

    async def _adopt(self, worker: str) -> int:
        """Take over, row by row, the jobs that run under our name without our knowing; returns how many."""
        held = self._dispatcher.holds  # a transactional run may end by itself while we ask
        return self._take_over(await self._link.call("list_claimed", worker=worker), worker, held)

    def _take_over(self, rows: list[Row], worker: str, held: set[str]) -> int:
        """Of these, which run under our name, those we do not know; `held`: what we had when we asked."""
        jobs, unreadable = decode_claimed(rows, worker)
        held |= self._dispatcher.holds
        # By attempt: a job we gave back may have been claimed again in the round trip whose answer was lost.
        ended = self._acker.ended()
        unknown = [
            job
            for job in jobs
            if self._tasks.has(job.task) and job.id not in held and (job.id, job.attempt) not in ended
        ]
        self._dispatcher.outcomes += [
            outcome
            for outcome in unreadable
            if self._tasks.takes_the_rest
            and outcome.id not in held
            and (outcome.id, outcome.attempt) not in ended
        ]
        self._take(unknown)
        return len(unknown)

    async def _back_off(self, why: str) -> None:
        """Wait before trying again, longer each time; one line in the log for an outage, not one per try."""
        self._failures += 1
        self.last_failure = clock()
        if self._failures == 1:
            self.failing_since = self.last_failure
            log.warning("database_unavailable connection=claim error=%s", why)
        await asyncio.sleep(retry_delay(self._failures, self._random))
