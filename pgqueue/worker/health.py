"""Whether this worker is alive, and the small HTTP service that says so.

Live: restarting it would mend nothing. Not "the process exists", not "the heartbeat beats", but "a claim
succeeded lately, unless none was wanted":

- No claim is wanted while every executor is busy, while there is none, and while draining. Then nothing is
  sent to the database just to be seen: such a worker is healthy by definition, and when its claim loop hangs
  all the same, that shows as soon as the first executor is free. Idle, the claim loop asks every five
  seconds.
- A claim that the database refused, or that found it away, counts as an attempt: the loop goes on, and a
  restart does not bring a database back.
- The heartbeat is judged likewise: a worker whose maintenance loop hangs is soon fenced by the others, and
  claims nothing from then on, successfully.
- With no executor ready for two minutes and none dying either, nobody replaces them.

Ready: live, registered, a claim has succeeded, an executor is up, the database answers, and it is not
draining.

The time in which the process itself was stopped, or its machine asleep, counts for nothing: whoever was
frozen has not been looking. A frozen process does not answer at all, which is what a probe sees.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import re
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Final, Protocol, cast

from pgqueue.errors import WorkerError
from pgqueue.worker.identity import Identity
from pgqueue.worker.wire import clock

log = logging.getLogger("pgqueue.worker")

CLAIM_PATIENCE: Final = 30.0
"""Seconds for which a claim may be due. More than it takes to give up a silent server (15 s) and to fail to
reach it again (10 s): an outage must not look like a hang."""
READY_PATIENCE: Final = 12.0
"""Seconds for which a claim may be due in a worker that calls itself ready. An idle one looks every five: one
look may be missing."""
BEAT_PATIENCE: Final = 60.0
"""Seconds without a heartbeat, or two leases if that is more. Housekeeping may take 30 s a statement."""
OUTAGE_PATIENCE: Final = 300.0
"""Seconds between two attempts while the database is away: one takes up to ten for each of its addresses."""
CREW_PATIENCE: Final = 120.0
"""Seconds without an executor, and without news of any: importing an application may take a minute."""
BLIND: Final = 5.0
"""Seconds between two looks after which we were not looking."""


class Work(Protocol):
    """The worker's executors and jobs."""

    @property
    def ready_slots(self) -> int: ...
    @property
    def in_flight(self) -> int: ...
    def wanted(self) -> int: ...


class Claims(Protocol):
    """What is asked of the claim loop."""

    @property
    def draining(self) -> bool: ...
    @property
    def last_claim(self) -> float | None: ...
    @property
    def last_failure(self) -> float | None: ...
    @property
    def failing_since(self) -> float | None: ...
    @property
    def unacked(self) -> int:
        """Outcomes that the database has not confirmed."""


class Beats(Protocol):
    """What is asked of the maintenance loop."""

    last_beat: float | None
    last_failure: float | None
    failing_since: float | None


@dataclass(frozen=True, slots=True)
class Report:
    """How a worker is. Times are seconds, `…_ago` and `…_for` from now back.

    Attributes:
        live: False: restart it.
        ready: It takes jobs.
        why: What keeps it from being ready, or live.
        claim_due_for: Since when a claim is wanted and has not succeeded; 0 when none is wanted.
        executors: How many jobs those that are up can run at a time, of `concurrency`.
        running: Jobs that executors have.
        database: `ok`, or `away`: it refuses, or cannot be reached.
    """

    live: bool
    ready: bool
    why: list[str]
    worker: str
    up_for: float
    last_claim_ago: float | None
    claim_due_for: float
    last_beat_ago: float | None
    executors: int
    concurrency: int
    running: int
    draining: bool
    database: str
    database_away_for: float | None


class Health:
    """Watches one worker; `observe` must be called every second or so.

    Args:
        lease: Seconds, as the setting.
    """

    def __init__(
        self,
        identity: Identity,
        work: Work,
        claims: Claims,
        beats: Beats,
        *,
        concurrency: int,
        lease: float,
        now: float | None = None,
    ) -> None:
        self._identity = identity
        self._work = work
        self._claims = claims
        self._beats = beats
        self._concurrency = concurrency
        self._beat_patience = max(BEAT_PATIENCE, 2 * lease)
        now = clock() if now is None else now
        self._started = self._looked = now
        # When all was well last, or could not be judged.
        self._claim_well = self._beat_well = self._crew_well = now
        self._was_live = True

    def observe(self, now: float) -> None:
        """Take in how things are."""
        if now - self._looked > BLIND:
            self._claim_well = self._beat_well = self._crew_well = now
        self._looked = now
        claims, beats = self._claims, self._beats
        if claims.draining or self._work.wanted() <= 0:
            self._claim_well = now
        else:
            self._claim_well = _latest(self._claim_well, claims.last_claim, claims.last_failure)
        self._beat_well = _latest(self._beat_well, beats.last_beat, beats.last_failure)
        if self._work.ready_slots:
            self._crew_well = now

    def executor_gone(self, now: float) -> None:
        """One has died: somebody is there to see it, and to start another."""
        self._crew_well = now

    def watch(self, now: float) -> None:
        """Observe, and say in the log when the worker stops or begins to be live."""
        self.observe(now)
        dead = self._dead(now)
        if bool(dead) == self._was_live:
            self._was_live = not dead
            if dead:
                log.error("worker_not_live why=%s", "; ".join(dead))
            else:
                log.warning("worker_live_again")

    def report(self, now: float | None = None) -> Report:
        """How the worker is."""
        now = clock() if now is None else now
        self.observe(now)
        claims, beats = self._claims, self._beats
        dead = self._dead(now)
        away = self._away_since()
        waiting = [
            *(["it is draining"] if claims.draining else []),
            *_first_steps(beats.last_beat, claims.last_claim),
            *(["no executor is up"] if not self._work.ready_slots else []),
            *([f"the database is away for {now - away:.0f} s"] if away is not None else []),
        ]
        due = now - self._claim_well
        if not dead and away is None and due > READY_PATIENCE:
            waiting.append(f"a claim is due for {due:.0f} s")
        return Report(
            live=not dead,
            ready=not dead and not waiting,
            why=dead + waiting,
            worker=self._identity.id,
            up_for=round(now - self._started, 1),
            last_claim_ago=_ago(now, claims.last_claim),
            claim_due_for=round(due, 1),
            last_beat_ago=_ago(now, beats.last_beat),
            executors=self._work.ready_slots,
            concurrency=self._concurrency,
            running=self._work.in_flight,
            draining=claims.draining,
            database="ok" if away is None else "away",
            database_away_for=_ago(now, away),
        )

    def published(self) -> dict[str, object]:
        """What the heartbeat tells everybody: `pgqueue ping` judges by it."""
        report = self.report()
        names = ("last_claim_ago", "claim_due_for", "executors", "draining")
        return {name: getattr(report, name) for name in names}

    def _away_since(self) -> float | None:
        """Since when the database fails us, as far as we need it."""
        claims = self._claims
        needed = self._work.wanted() > 0 or claims.unacked > 0
        since = [claims.failing_since if needed else None, self._beats.failing_since]
        return min((each for each in since if each is not None), default=None)

    def _dead(self, now: float) -> list[str]:
        """Reasons for a restart."""
        claims, beats = self._claims, self._beats
        if claims.draining:
            return []  # it ends by itself, after shutdown_timeout
        found = []
        failing = claims.failing_since is not None
        limit = OUTAGE_PATIENCE if failing else CLAIM_PATIENCE
        if now - self._claim_well > limit:
            what = "the claim loop has not tried to reach the database" if failing else "a claim is due"
            found.append(f"{what} for {now - self._claim_well:.0f} s (limit {limit:.0f} s)")
        failing = beats.failing_since is not None
        limit = max(OUTAGE_PATIENCE, self._beat_patience) if failing else self._beat_patience
        if beats.last_beat is not None and now - self._beat_well > limit:
            found.append(f"no heartbeat for {now - self._beat_well:.0f} s (limit {limit:.0f} s)")
        if beats.last_beat is not None and now - self._crew_well > CREW_PATIENCE:
            found.append(
                f"no executor for {now - self._crew_well:.0f} s, and none is dying "
                f"(limit {CREW_PATIENCE:.0f} s)"
            )
        return found


def _first_steps(last_beat: float | None, last_claim: float | None) -> list[str]:
    if last_beat is None:
        return ["it is not registered yet"]
    return ["it has not claimed yet"] if last_claim is None else []


def _latest(*moments: float | None) -> float:
    return max(moment for moment in moments if moment is not None)


def _ago(now: float, moment: float | None) -> float | None:
    return None if moment is None else round(max(now - moment, 0.0), 1)


REQUEST_LIMIT: Final = 4096
"""Bytes of a request, with its headers."""
DISCARD_LIMIT: Final = 1 << 20
"""Bytes read and thrown away after the answer; without reading them the answer might be lost."""
CONNECTION_TIMEOUT: Final = 2.0
"""Seconds for a connection, from first to last byte."""
CONNECTIONS: Final = 20
"""Open at a time. One more makes the oldest one leave, so that a probe gets through whoever dawdles."""

_REQUEST_LINE = re.compile(rb"([!-~]{1,32}) ([!-~]+) HTTP/1\.\d")
_REASONS = {
    200: "OK",
    400: "Bad Request",
    404: "Not Found",
    405: "Method Not Allowed",
    431: "Request Header Fields Too Large",
    503: "Service Unavailable",
}


def respond(request: bytes, look: Callable[[], Report]) -> bytes | None:
    """The answer to what has been received so far; None when it takes more to tell."""
    too_long = len(request) > REQUEST_LIMIT
    request = request[:REQUEST_LIMIT].lstrip(b"\r\n")
    line, newline, rest = request.partition(b"\n")
    match = _REQUEST_LINE.fullmatch(line.rstrip(b"\r"))
    if newline and match is None:
        return _answer(400, {"error": "this is no HTTP/1 request"})
    # The headers end with an empty line.
    if (
        match is None
        or not newline
        or not (rest.startswith((b"\r\n", b"\n")) or b"\n\r\n" in rest or b"\n\n" in rest)
    ):
        if too_long:
            return _answer(431, {"error": f"a request has at most {REQUEST_LIMIT} bytes"})
        return None
    method, path = match[1], match[2].partition(b"?")[0]
    head = method == b"HEAD"
    if path not in (b"/live", b"/ready"):
        return _answer(404, {"error": "there is /live and /ready"}, head=head)
    if method not in (b"GET", b"HEAD"):
        return _answer(405, {"error": "GET and HEAD only"}, "Allow: GET, HEAD\r\n")
    report = look()
    well = report.live if path == b"/live" else report.ready
    return _answer(200 if well else 503, asdict(report), head=head)


def _answer(status: int, document: dict[str, object], headers: str = "", *, head: bool = False) -> bytes:
    body = json.dumps(document).encode() + b"\n"
    start = (
        f"HTTP/1.1 {status} {_REASONS[status]}\r\nContent-Type: application/json\r\n"
        f"Content-Length: {len(body)}\r\nCache-Control: no-store\r\nConnection: close\r\n{headers}\r\n"
    )
    return start.encode() + (b"" if head else body)


class HealthService:
    """Answers GET /live and GET /ready: 200 or 503, and a Report as JSON. Never blocks the loop."""

    def __init__(self, look: Callable[[], Report]) -> None:
        self.look = look
        self._server: asyncio.Server | None = None
        self._open: dict[_Connection, None] = {}

    async def start(self, host: str, port: int) -> int:
        """Listen; returns the port, which matters when 0 was asked for.

        Raises:
            WorkerError: The address cannot be had.
        """
        loop = asyncio.get_running_loop()
        try:
            self._server = await loop.create_server(lambda: _Connection(self), host, port)
        except (OSError, UnicodeError) as error:
            number = getattr(error, "errno", None)
            reason = os.strerror(number).lower() if number and number > 0 else str(error)
            raise WorkerError(
                f"cannot listen on {host} port {port} for health checks: {reason}; choose another "
                f"--health-port, or 0 for any free one, and a --health-host of this machine"
            ) from error
        found: int = self._server.sockets[0].getsockname()[1]
        log.info("health_listening host=%s port=%d", host, found)
        return found

    def close(self) -> None:
        """Stop listening, and drop whoever is connected."""
        server, self._server = self._server, None
        if server is not None:
            server.close()
        for connection in list(self._open):
            connection.drop()

    def admit(self, connection: _Connection) -> None:
        """One more; too many, and the oldest leaves."""
        if len(self._open) >= CONNECTIONS:
            next(iter(self._open)).drop()
        self._open[connection] = None

    def forget(self, connection: _Connection) -> None:
        """It is gone."""
        self._open.pop(connection, None)


class _Connection(asyncio.Protocol):
    """One request, one answer."""

    def __init__(self, service: HealthService) -> None:
        self._service = service
        self._received = bytearray()
        self._answered = False
        self._discarded = 0
        self._transport: asyncio.Transport
        self._timer: asyncio.TimerHandle

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        self._timer = asyncio.get_running_loop().call_later(CONNECTION_TIMEOUT, self.drop)
        self._service.admit(self)

    def data_received(self, data: bytes) -> None:
        if self._answered:
            self._discarded += len(data)
            if self._discarded > DISCARD_LIMIT:
                self.drop()
            return
        self._received += data
        answer = respond(bytes(self._received), self._service.look)
        if answer is None:
            return
        self._answered = True
        self._transport.write(answer)
        # The other side closes first: closing with unread bytes would take the answer back.
        self._transport.write_eof()

    def connection_lost(self, error: Exception | None) -> None:
        self._timer.cancel()
        self._service.forget(self)

    def drop(self) -> None:
        """Close at once."""
        self._service.forget(self)
        self._transport.abort()
