"""Places where a test lets a process die, freeze, fail, wait or lose its connection. Off in production:
nothing happens unless the variable PGQUEUE_FAILPOINTS is set when pgqueue is imported.

    PGQUEUE_FAILPOINTS="claim_after_commit=kill@3,body_after=sleep:0.5~0.01"

is a list of `name=action`, an action being `kill` (SIGKILL to this process), `stop` (SIGSTOP), `raise`
(FailpointReached), `sleep:SECONDS` (blocking), or `drop_connection` (its socket is shut down). `@N` limits it
to the N-th time that this process comes by, `~P` draws with probability P each time.
With PGQUEUE_FAILPOINTS_ONCE naming a folder, each entry of the list acts only once in all processes that
share the folder.
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Final

from pgqueue.errors import ConfigError

FAILPOINTS: Final = {
    "enqueue_before_commit": "the job's row is written, its transaction is open",
    "enqueue_after_commit": "the enqueue is committed, the caller does not know yet; own connections only",
    "claim_before_commit": "jobs are marked as running, the transaction is open",
    "claim_after_commit": "the claim is committed, the supervisor has not looked at its answer",
    "job_received": "an executor has read a job and not marked it as started",
    "body_before": "a job is marked as started, its body is not",
    "body_after": "the body has returned, nobody knows",
    "transaction_before_commit": "a transactional run has recorded its end, its transaction is open",
    "transaction_after_commit": "a transactional run is committed, its supervisor does not know",
    "ack_sent": "an ack is committed, its answer is on the way",
    "ack_after_commit": "the supervisor has read an ack's answer and not acted on it",
    "settle_before_commit": "what waits for jobs of a canvas is released, the transaction is open",
    "settle_after_commit": "what waits for jobs of a canvas is released, the worker does not know",
    "rescue_mid_batch": "jobs of a fenced worker are ready again, the transaction is open",
    "heartbeat_before": "a heartbeat is due",
    "promote_mid_batch": "due jobs are ready, the transaction is open",
    "tick_before_commit": "a schedule's tick is decided and its job is written, the transaction is open",
    "tick_after_commit": "a schedule's tick is committed, the worker that did it does not know",
}
"""All there are: name, and the moment it stands for."""

_HOLDING_CONNECTION: Final = frozenset(
    (
        "enqueue_before_commit",
        "claim_before_commit",
        "claim_after_commit",
        "transaction_before_commit",
        "transaction_after_commit",
        "ack_sent",
        "settle_before_commit",
        "settle_after_commit",
        "rescue_mid_batch",
        "promote_mid_batch",
        "tick_before_commit",
        "tick_after_commit",
    )
)
_ACTIONS: Final = ("kill", "stop", "raise", "sleep", "drop_connection")
_ENTRY: Final = re.compile(r"(\w+)=(\w+)(?::(\d+(?:\.\d+)?))?(?:@(\d+))?(?:~(0?\.\d+|1))?")


class FailpointReached(RuntimeError):
    """What the action `raise` raises."""


@dataclass
class _Failpoint:
    """One entry of the list."""

    name: str
    action: str
    seconds: float
    nth: int | None
    probability: float
    once: str | None
    hits: int = 0

    def hit(self, drop: Callable[[], None]) -> None:
        import random  # here: nearly every process that imports this has no failpoint
        import signal

        self.hits += 1
        if self.nth is not None and self.hits != self.nth:
            return
        if random.random() >= self.probability or not self._first():
            return
        if self.action == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        elif self.action == "stop":
            os.kill(os.getpid(), signal.SIGSTOP)
        elif self.action == "sleep":
            time.sleep(self.seconds)
        elif self.action == "drop_connection":
            drop()
        else:
            raise FailpointReached(f"failpoint {self.name}")

    def _first(self) -> bool:
        if self.once is None:
            return True
        with suppress(FileExistsError), open(self.once, "x"):
            return True
        return False


def read_failpoints(text: str, once: str | None = None) -> dict[str, _Failpoint]:
    """What a list of failpoints says, by name; ConfigError when it cannot be read."""
    points: dict[str, _Failpoint] = {}
    for entry in filter(None, (part.strip() for part in text.split(","))):
        match = _ENTRY.fullmatch(entry)
        if match is None or match[2] not in _ACTIONS or (match[2] == "sleep") != (match[3] is not None):
            raise ConfigError(
                f"a failpoint is name=action[:seconds][@nth][~probability], the action one of "
                f"{', '.join(_ACTIONS)} (only sleep has seconds), got {entry!r}"
            )
        name, action = match[1], match[2]
        if name not in FAILPOINTS:
            raise ConfigError(f"unknown failpoint {name!r}; known are {', '.join(FAILPOINTS)}")
        if action == "drop_connection" and name not in _HOLDING_CONNECTION:
            raise ConfigError(f"failpoint {name} has no connection to drop")
        points[name] = _Failpoint(
            name,
            action,
            float(match[3] or 0),
            int(match[4]) if match[4] else None,
            float(match[5]) if match[5] else 1.0,
            os.path.join(once, f"{name}-{action}") if once else None,
        )
    return points


_points = read_failpoints(os.environ.get("PGQUEUE_FAILPOINTS", ""), os.environ.get("PGQUEUE_FAILPOINTS_ONCE"))
armed: Final = bool(_points)
"""Whether there is any: spares the busy paths a call."""


def failpoint(name: str, drop: Callable[[], None] = lambda: None) -> None:
    """Do what PGQUEUE_FAILPOINTS says of this place: usually nothing.

    Args:
        drop: Shuts down the connection in use here.
    """
    if armed and name in _points:
        _points[name].hit(drop)
