"""Outcomes of jobs, from the dispatcher until the database has confirmed them.

Until then they stay in memory: when the database is away nothing is thrown away. One whose COMMIT may have
happened is sent again, and may then find nothing. A batch that is refused is halved until the one job at
fault stands alone; what it wanted to store is replaced, and when nothing is left to blame it is set aside, so
that it does not hold up the others.

Ended nodes of canvases are passed on behind the acks, in a transaction of their own.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass

from pgqueue.database.link import Call, GroupFailed, Link, Row
from pgqueue.database.store import CLAIM_LIMIT, Outcome, ack_calls
from pgqueue.errors import DatabaseUnavailable
from pgqueue.failpoints import failpoint
from pgqueue.worker.dispatcher import Dispatcher
from pgqueue.worker.wire import clock

log = logging.getLogger("pgqueue.worker")


@dataclass(frozen=True, slots=True)
class Batch:
    """What is recorded together: outcomes, and the ended nodes of canvases.

    Attributes:
        acks: The calls, each with the outcomes it is about.
        groups: Of calls, as `Link.run` takes them: the acks, if any, and passing on the nodes, if any.
    """

    outcomes: list[Outcome]
    acks: list[tuple[Call, list[Outcome]]]
    nodes: list[str]
    groups: list[list[Call]]

    @classmethod
    def of(cls, outcomes: list[Outcome], nodes: list[str]) -> Batch:
        """Of so many outcomes, and these nodes with those that the outcomes end."""
        acks = ack_calls(outcomes, clock())
        nodes = nodes + [outcome.id for outcome in outcomes if outcome.settles]
        groups = [[call for call, _ in acks]] if acks else []
        if nodes:
            groups.append([Call("settle_canvases", {"ids": "{" + ",".join(nodes) + "}"})])
        return cls(outcomes, acks, nodes, groups)

    def uncertain(self) -> None:
        """The answer was lost: they may be recorded."""
        for outcome in self.outcomes:
            outcome.uncertain = True


class Acker:
    """Has the outcomes of `dispatcher` recorded.

    Args:
        share: Called with the queues of jobs given back: somebody who sleeps may help.
        retried: Called when the database has confirmed retries, with the seconds until the first is due.
        wake: Called when canvases have released jobs.
    """

    def __init__(
        self,
        link: Link,
        dispatcher: Dispatcher,
        *,
        share: Callable[[list[str]], None],
        retried: Callable[[float], None],
        wake: Callable[[], None],
    ) -> None:
        self._link = link
        self._dispatcher = dispatcher
        self._share = share
        self._retried = retried
        self._wake = wake
        self._unconfirmed: list[Outcome] = []
        self._aside: list[Outcome] = []

    @property
    def unacked(self) -> int:
        """Outcomes that the database has not confirmed, or not passed on."""
        return len(self._unconfirmed) + len(self._dispatcher.outcomes) + len(self._dispatcher.ended_nodes)

    @property
    def has_aside(self) -> bool:
        """Whether there are outcomes that the database does not take."""
        return bool(self._aside)

    @property
    def is_behind(self) -> bool:
        """Whether something was to be recorded before, and was not."""
        return bool(self._unconfirmed or self._dispatcher.ended_nodes)

    @property
    def has_outcomes(self) -> bool:
        """Whether there are any to record."""
        return bool(self._unconfirmed or self._dispatcher.outcomes)

    def ended(self) -> set[tuple[str, int]]:
        """Id and attempt of the runs that have ended here, whatever the database knows of it."""
        return {(outcome.id, outcome.attempt) for outcome in self._unconfirmed + self._aside}

    def try_aside_again(self) -> None:
        """Outcomes that the database did not take, perhaps it does now."""
        self._dispatcher.outcomes += self._aside
        self._aside = []

    def next_batch(self) -> Batch:
        """What is to be recorded next, perhaps nothing."""
        dispatcher = self._dispatcher
        self._unconfirmed += dispatcher.outcomes
        dispatcher.outcomes = []
        return Batch.of(self._unconfirmed[: 2 * CLAIM_LIMIT], dispatcher.ended_nodes[:CLAIM_LIMIT])

    def recorded(self, batch: Batch, answers: list[list[list[Row]]]) -> None:
        """The database has recorded a batch; `answers` begin with what it said."""
        if batch.acks:
            failpoint("ack_after_commit")
            self._confirm(batch, answers[0])
        if batch.nodes:
            self._settled(batch.nodes, answers[bool(batch.acks)][0])

    async def refused(self, batch: Batch, error: GroupFailed) -> None:
        """The database has refused the acks, or only to pass the nodes on.

        Raises:
            GroupFailed: No outcome is to blame.
            DatabaseUnavailable: It has gone.
        """
        if error.group < bool(batch.acks):
            await self._split(batch.outcomes, error)
            return
        # Not for ever: maintenance passes them on, and the claims must go on.
        log.warning("canvas_not_settled nodes=%d error=%s", len(batch.nodes), error)
        self._forget_nodes(batch.nodes)
        if batch.acks:
            self._confirm(batch, error.rows[0])

    def _settled(self, nodes: list[str], rows: list[Row]) -> None:
        """Forget what has been passed on; what it has released may be ours to claim."""
        ((released, left_over, _more),) = rows
        self._forget_nodes(nodes)
        if left_over is not None:
            self._dispatcher.ended_nodes += left_over.strip("{}").split(",")
        if released:
            self._wake()

    def _forget_nodes(self, nodes: list[str]) -> None:
        if self._dispatcher.ended_nodes:
            done = set(nodes)
            self._dispatcher.ended_nodes = [node for node in self._dispatcher.ended_nodes if node not in done]

    def _confirm(self, batch: Batch, answers: list[list[Row]]) -> None:
        """Forget what the database has confirmed; report what it found in other hands."""
        self._unconfirmed = self._unconfirmed[len(batch.outcomes) :]
        delays = [outcome.delay for outcome in batch.outcomes if outcome.verb in ("retry", "snooze")]
        if delays:
            self._retried(min(delays))
        released = {outcome.queue for outcome in batch.outcomes if outcome.verb == "release"}
        if released:
            self._share(sorted(released))  # others have looked through the lanes that these were taken from
        for (_, outcomes), answer in zip(batch.acks, answers, strict=True):
            done, done_ids = answer[0]
            if done == len(outcomes):
                continue
            confirmed = set(done_ids or ())
            stale = [o.id for o in outcomes if o.id not in confirmed and not o.uncertain]
            if stale:
                self._dispatcher.stale += len(stale)
                first = outcomes[0]
                log.warning(
                    "ack_stale count=%d verb=%s attempt=%d worker=%s jobs=%s",
                    len(stale),
                    first.verb,
                    first.attempt,
                    first.worker,
                    ",".join(stale[:3]) + (",…" if len(stale) > 3 else ""),
                )

    async def _split(self, outcomes: list[Outcome], why: GroupFailed) -> None:
        """An ack was refused: halve the batch until the one job at fault stands alone, and replace what it
        stores.
        """
        if not why.blames_the_row:
            raise why
        if len(outcomes) > 1:
            middle = len(outcomes) // 2
            for half in (outcomes[:middle], outcomes[middle:]):
                await self._ack_alone(half)
            return
        outcome = outcomes[0]
        log.error("ack_refused job=%s attempt=%d error=%s", outcome.id, outcome.attempt, why)
        if outcome.verb == "finish" and outcome.result_error is None:
            outcome.result, outcome.result_error = None, f"the database refused the result: {why}"[:1000]
        elif outcome.verb in ("retry", "bury") and outcome.traceback is not None:
            outcome.error_message, outcome.traceback = "(the database refused the error's text)", None
        else:  # nothing of it is left to blame: it must not hold up the others
            self._unconfirmed = [other for other in self._unconfirmed if other is not outcome]
            self._aside.append(outcome)
            return
        await self._ack_alone([outcome])

    async def _ack_alone(self, outcomes: list[Outcome]) -> None:
        batch = Batch.of(outcomes, [])
        try:
            answers = await self._link.run(batch.groups[0])
        except GroupFailed as error:
            await self._split(outcomes, error)
            return
        except DatabaseUnavailable:
            batch.uncertain()
            raise
        kept = {id(outcome) for outcome in outcomes}
        self._dispatcher.ended_nodes += batch.nodes
        self._unconfirmed = [outcome for outcome in self._unconfirmed if id(outcome) in kept] + [
            outcome for outcome in self._unconfirmed if id(outcome) not in kept
        ]
        self._confirm(batch, answers[0])
