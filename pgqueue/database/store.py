"""What a worker reads and records: the answer of a claim, and the statements that record how jobs ended.

Every statement here is safe to send again: acks are fenced, so a repeat finds nothing; a claim whose answer
was lost leaves jobs running under the worker's name, which `list_claimed` finds. Clock skew cannot matter:
only the database's clock is compared or stored.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from operator import attrgetter
from typing import Any, Literal

import msgspec

from pgqueue.database.link import Call, Row
from pgqueue.job import ClaimedJob, DeadReason

CLAIM_LIMIT = 500
"""Jobs per claim and per ack statement: with values printed up to 8 kB, a claim's answer stays under 8
MiB."""


@dataclass(frozen=True, slots=True)
class Claim:
    """A claim's answer: the jobs in no particular order, the horizon of the snapshot that found them, the
    seconds it took, and the queues that were left out.
    """

    jobs: list[ClaimedJob]
    xmin: int
    xmax: int
    took: float
    unseen: list[str]


_CLAIM_DECODER = msgspec.json.Decoder(list[ClaimedJob])
_JOB_DECODER = msgspec.json.Decoder(ClaimedJob)


def decode_claim(rows: list[Row], worker: str) -> Claim:
    """Read the answer of `claim_jobs`; msgspec.DecodeError when the document is not readable."""
    document, xmin, xmax, took, unseen = rows[0]
    jobs = _CLAIM_DECODER.decode(document)
    for job in jobs:
        job.worker = worker
    return Claim(jobs, xmin, xmax, took, unseen)


def decode_claimed(rows: list[Row], worker: str) -> tuple[list[ClaimedJob], list[Outcome]]:
    """Read the answer of `list_claimed` row by row: the jobs, and the burial of each row that is not
    readable.
    """
    jobs: list[ClaimedJob] = []
    unreadable: list[Outcome] = []
    for job_id, attempt, document in rows:
        try:
            job = _JOB_DECODER.decode(document)
        except (msgspec.DecodeError, RecursionError) as error:
            why = f"the row cannot be read: {error}"
            unreadable.append(
                Outcome(job_id, attempt, worker, "bury", reason="bad_payload", error_message=why)
            )
        else:
            job.worker = worker
            jobs.append(job)
    return jobs, unreadable


Verb = Literal["finish", "retry", "snooze", "bury", "release"]


class Outcome(msgspec.Struct, gc=False):
    """What became of one attempt, waiting to be acked.

    Attributes:
        verb: `finish` → finished_jobs, `retry` and `snooze` → scheduled, `bury` → dead_letters, `release` →
            ready.
        state: For `finish`.
        kind: For `retry` and `bury`: what the failures row says.
        started, finished: Seconds on the caller's monotonic clock, for `finish`.
        uncertain: It was sent before and the answer was lost; finding nothing is no news then.
        queue: For `release`: who sleeps on it is to be told.
        history: For `finish`: False → nowhere.
        canvas: The job belongs to a canvas: what waits for it is to be told of its end.
    """

    id: str
    attempt: int
    worker: str
    verb: Verb
    state: Literal["succeeded", "expired", "cancelled"] = "succeeded"
    kind: Literal["failed", "crashed"] = "failed"
    result: str | None = None
    result_error: str | None = None
    started: float = 0.0
    finished: float = 0.0
    delay: float = 0.0
    max_retries: int | None = None
    reason: DeadReason = "not_retryable"
    dead_letter_queue: str | None = None
    error_class: str | None = None
    error_message: str | None = None
    traceback: str | None = None
    uncertain: bool = False
    queue: str = ""
    history: bool = True
    canvas: bool = False

    @property
    def settles(self) -> bool:
        """Whether something may be waiting for this."""
        return self.canvas and self.verb in ("finish", "bury")


_ID = attrgetter("id")
_KIND = attrgetter("verb", "worker", "attempt", "state", "kind", "history")


def ack_calls(outcomes: Iterable[Outcome], now: float) -> list[tuple[Call, list[Outcome]]]:
    """The statements that record these outcomes, each with the outcomes it carries.

    One statement per verb, worker and attempt number (nearly always one in all): joining ids with attempts
    would cost four times as much in the server. `now` is on the clock of `Outcome.started`.
    """
    groups: dict[tuple[object, ...], list[Outcome]] = {}
    for outcome in sorted(outcomes, key=_ID):  # the statements find an id's place among them by halving
        groups.setdefault(_KIND(outcome), []).append(outcome)
    return [(_ack_call(group, now), group) for group in groups.values()]


def _ack_call(group: list[Outcome], now: float) -> Call:
    first = group[0]
    # Array literals: the driver sends text of unknown type, the cast in the statement makes it a uuid[]
    # parameter.
    parameters: dict[str, Any] = {
        "ids": "{" + ",".join([outcome.id for outcome in group]) + "}",
        "attempt": first.attempt,
        "worker": first.worker,
    }
    if first.verb == "finish" and first.state == "succeeded" and not first.history:
        return Call("ack_forgotten", parameters)
    if first.verb == "finish":
        parameters |= {
            "state": first.state,
            "started_ago": [now - outcome.started for outcome in group],
            "finished_ago": [now - outcome.finished for outcome in group],
            "results": _column(o.result for o in group),
            "result_errors": _column(o.result_error for o in group),
        }
        return Call("ack_finished", parameters)
    if first.verb == "release":
        return Call("release_jobs", parameters)
    delays = [outcome.delay for outcome in group]
    if first.verb == "snooze":
        return Call("ack_snoozed", parameters | {"delays": delays})
    parameters |= {
        "kind": first.kind,
        "error_classes": _column(o.error_class for o in group),
        "error_messages": _column(o.error_message for o in group),
        "tracebacks": _column(o.traceback for o in group),
    }
    if first.verb == "retry":
        parameters |= {"delays": delays, "max_retries": _column(o.max_retries for o in group)}
        return Call("ack_retried", parameters)
    parameters |= {
        "reasons": [o.reason for o in group],
        "dead_letter_queues": _column(o.dead_letter_queue for o in group),
    }
    return Call("ack_dead", parameters)


def _column(values: Iterable[Any]) -> list[Any] | None:
    """The values as an array parameter; None when there is not one among them, which costs nothing to
    send.
    """
    column = list(values)
    return column if any(value is not None for value in column) else None
