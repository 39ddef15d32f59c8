"""Whether a worker is alive, moment by moment; the HTTP service that says so; what `ping` makes of it."""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
import struct
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pgqueue.cli.ping import ask_port, judge
from pgqueue.database.dsn import CONNECT_OPTIONS
from pgqueue.database.patient import ANSWER_PATIENCE
from pgqueue.database.stats import WorkerStats
from pgqueue.errors import ConfigError, WorkerError
from pgqueue.worker import health
from pgqueue.worker.claimer import RENEW
from pgqueue.worker.dispatcher import Dispatcher, Executor, Slot
from pgqueue.worker.health import (
    BEAT_PATIENCE,
    BLIND,
    CLAIM_PATIENCE,
    CONNECTIONS,
    CREW_PATIENCE,
    OUTAGE_PATIENCE,
    READY_PATIENCE,
    REQUEST_LIMIT,
    Health,
    HealthService,
    Report,
    respond,
)
from pgqueue.worker.identity import Identity


@dataclass
class Loop:
    """Stands for the claim loop, and for the maintenance loop."""

    draining: bool = False
    unacked: int = 0
    last_claim: float | None = None
    last_beat: float | None = None
    last_failure: float | None = None
    failing_since: float | None = None


@dataclass
class Case:
    """A worker whose clock and loops are moved by hand. It begins registered, with two executors."""

    now: float = 1000.0
    lease: float = 30.0
    claims: Loop = field(default_factory=lambda: Loop(last_claim=1000.0))
    beats: Loop = field(default_factory=lambda: Loop(last_beat=1000.0))

    def __post_init__(self) -> None:
        self.dispatcher = Dispatcher(max_crashes=3)
        self.health = Health(
            Identity("me"),
            self.dispatcher,
            self.claims,
            self.beats,
            concurrency=2,
            lease=self.lease,
            now=self.now,
        )
        self.set_executors(2)

    def set_executors(self, count: int, *, busy: int = 0) -> None:
        self.dispatcher.executors = {
            number: Executor(number, 100 + number, ready=True) for number in range(count)
        }
        for executor in self.dispatcher.executors.values():
            executor.slots.append(Slot(executor, 0, None))  # type: ignore[arg-type]
        for number in range(busy):
            self.dispatcher.executors[number].slots[0].in_flight[1] = object()  # type: ignore[assignment]

    def pass_time(
        self, seconds: float, *, claiming: bool = True, beating: bool = True, failing: bool = False
    ) -> Report:
        """Let time pass as `_tick` sees it; what the worker says in the end."""
        end = self.now + seconds
        if failing and self.claims.failing_since is None:
            self.claims.failing_since = self.beats.failing_since = self.now
        while self.now < end:
            self.now = min(self.now + 0.5, end)
            if failing:
                self.claims.last_failure = self.beats.last_failure = self.now
            if claiming:
                self.claims.last_claim = self.now
            if beating:
                self.beats.last_beat = self.now
            self.health.watch(self.now)
        return self.health.report(self.now)

    def hang(self, seconds: float) -> Report:
        """No claim succeeds and none fails, while the heartbeat goes on."""
        return self.pass_time(seconds, claiming=False)


@pytest.fixture
def case() -> Case:
    return Case()


class TestLive:
    def test_idle(self, case: Case) -> None:
        report = case.pass_time(3600)
        assert (report.live, report.ready, report.why) == (True, True, [])
        assert (report.worker, report.executors, report.concurrency) == ("me", 2, 2)
        assert (report.up_for, report.last_claim_ago, report.database) == (3600.0, 0.0, "ok")

    def test_a_claim_loop_that_hangs_while_the_heartbeat_goes_on_is_dead(self, case: Case) -> None:
        case.pass_time(10)
        report = case.hang(CLAIM_PATIENCE)
        assert report.live
        assert not report.ready
        report = case.hang(1)
        assert (report.live, report.ready) == (False, False)
        assert report.why == ["a claim is due for 31 s (limit 30 s)"]
        assert report.claim_due_for == 31.0
        assert report.last_beat_ago == 0.0

    def test_a_worker_whose_first_claim_never_comes_back_is_dead(self, case: Case) -> None:
        case.claims.last_claim = None
        report = case.hang(5)
        assert (report.live, report.ready, report.why) == (True, False, ["it has not claimed yet"])
        assert not case.hang(CLAIM_PATIENCE + 1).live

    def test_it_is_not_ready_long_before(self, case: Case) -> None:
        assert case.hang(READY_PATIENCE).ready
        report = case.hang(1)
        assert (report.live, report.ready, report.why) == (True, False, ["a claim is due for 13 s"])

    def test_with_every_executor_busy_no_claim_is_wanted_for_hours(self, case: Case) -> None:
        case.pass_time(10)
        case.set_executors(2, busy=2)
        report = case.hang(5 * 3600)
        assert (report.live, report.ready, report.claim_due_for) == (True, True, 0.0)
        assert report.running == 2
        assert report.last_claim_ago == 5 * 3600

    def test_a_hang_among_long_jobs_shows_once_an_executor_is_free(self, case: Case) -> None:
        case.set_executors(2, busy=2)
        assert case.hang(3600).ready
        case.set_executors(2, busy=1)
        assert case.hang(READY_PATIENCE).ready, "the patience starts when the executor is free, not before"
        assert case.hang(CLAIM_PATIENCE - READY_PATIENCE).live
        assert not case.hang(1).live

    def test_draining_is_live_and_not_ready(self, case: Case) -> None:
        case.claims.draining = True
        report = case.pass_time(3600, claiming=False, beating=False)
        assert (report.live, report.ready, report.why) == (True, False, ["it is draining"])

    def test_a_database_that_is_away_is_no_reason_to_restart(self, case: Case) -> None:
        case.pass_time(10)
        report = case.pass_time(24 * 3600, claiming=False, beating=False, failing=True)
        assert (report.live, report.ready, report.database) == (True, False, "away")
        assert report.database_away_for == 24 * 3600
        assert report.why == ["the database is away for 86400 s"]
        assert report.claim_due_for == 0.0, "each attempt counts"

    def test_a_hang_in_the_middle_of_an_outage_shows_too(self, case: Case) -> None:
        case.pass_time(60, claiming=False, beating=False, failing=True)
        report = case.pass_time(OUTAGE_PATIENCE, claiming=False, beating=False)
        assert report.live
        report = case.pass_time(1, claiming=False, beating=False)
        assert not report.live
        assert len(report.why) == 3, report.why

    def test_an_outage_of_the_maintenance_connection_alone(self, case: Case) -> None:
        case.beats.failing_since = case.now
        report = case.pass_time(1)
        assert (report.live, report.ready, report.database) == (True, False, "away")

    def test_a_claim_connection_nobody_needs_may_be_lost(self, case: Case) -> None:
        case.claims.failing_since = case.now
        case.set_executors(2, busy=2)
        assert case.hang(3600).ready
        case.claims.unacked = 1
        assert not case.pass_time(1, claiming=False).ready

    def test_a_heart_that_stops_is_dead_although_it_claims(self, case: Case) -> None:
        # The others will fence it; from then on its claims succeed and bring nothing.
        assert case.pass_time(BEAT_PATIENCE, beating=False).live
        report = case.pass_time(1, beating=False)
        assert (report.live, report.why) == (False, ["no heartbeat for 61 s (limit 60 s)"])

    def test_its_limit_is_two_leases_where_they_are_longer(self) -> None:
        case = Case(lease=300.0)
        assert case.pass_time(600, beating=False).live
        assert not case.pass_time(1, beating=False).live

    def test_executors_that_die_again_and_again_are_not_ready(self, case: Case) -> None:
        case.set_executors(0)
        for _ in range(1000):
            case.health.executor_gone(case.now)
            report = case.hang(5)
        assert (report.live, report.ready, report.why) == (True, False, ["no executor is up"])

    def test_without_executors_and_nobody_to_start_some_it_is_dead(self, case: Case) -> None:
        case.pass_time(10)
        case.set_executors(0)
        assert case.hang(CREW_PATIENCE).live
        report = case.hang(1)
        assert not report.live
        assert "no executor for 121 s, and none is dying (limit 120 s)" in report.why

    def test_starting_is_live_and_not_ready(self, case: Case) -> None:
        case.beats.last_beat = case.claims.last_claim = None
        case.set_executors(0)
        report = case.pass_time(600, claiming=False, beating=False)
        assert (report.live, report.ready) == (True, False)
        assert report.why == ["it is not registered yet", "no executor is up"]

    def test_a_process_that_was_frozen_is_not_dead_when_it_goes_on(self, case: Case) -> None:
        case.pass_time(10)
        case.now += 3600
        report = case.health.report(case.now)
        assert (report.live, report.ready) == (True, True)
        assert not case.hang(CLAIM_PATIENCE + 1).live, "but it must claim from then on"

    def test_frozen_again_and_again_for_a_moment_is_no_excuse(self, case: Case) -> None:
        for _ in range(10):
            case.now += BLIND
            report = case.health.report(case.now)
        assert not report.live

    def test_it_recovers(self, case: Case) -> None:
        assert not case.hang(CLAIM_PATIENCE + 1).live
        report = case.pass_time(1)
        assert (report.live, report.ready, report.why) == (True, True, [])

    def test_the_log_says_it_once(self, case: Case, caplog: pytest.LogCaptureFixture) -> None:
        case.hang(CLAIM_PATIENCE + 100)
        case.pass_time(100)
        said = [record.getMessage() for record in caplog.records]
        assert [line.split()[0] for line in said] == ["worker_not_live", "worker_live_again"]

    def test_the_heartbeat_publishes_it(self, case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
        case.pass_time(10)
        case.hang(4)
        monkeypatch.setattr(health, "clock", lambda: case.now)
        published = case.health.published()
        assert published == {"last_claim_ago": 4.0, "claim_due_for": 4.0, "executors": 2, "draining": False}
        json.dumps(published)


def test_the_limits_fit_the_timeouts_of_the_connections() -> None:
    silent_server = 10 + ANSWER_PATIENCE  # a claim's statement_timeout, and the watchdog behind it
    assert silent_server + CONNECT_OPTIONS["connect_timeout"] < CLAIM_PATIENCE
    assert 2 * RENEW < READY_PATIENCE
    assert 30 + ANSWER_PATIENCE + CONNECT_OPTIONS["connect_timeout"] < BEAT_PATIENCE


# The HTTP service.

WELL = Case().pass_time(1)
UNREADY = replace(WELL, ready=False, why=["it is draining"])
DEAD = replace(WELL, live=False, ready=False, why=["stuck"])


def said(answer: bytes | None) -> tuple[int, dict[str, str], bytes]:
    """Status, headers and body of an answer."""
    assert answer is not None
    head, _, body = answer.partition(b"\r\n\r\n")
    first, *lines = head.decode().split("\r\n")
    version, status, _ = first.split(" ", 2)
    assert version == "HTTP/1.1"
    return int(status), dict(line.split(": ", 1) for line in lines), body


@pytest.mark.parametrize(
    ("report", "path", "status"),
    [
        (WELL, "/live", 200),
        (WELL, "/ready", 200),
        (UNREADY, "/live", 200),
        (UNREADY, "/ready", 503),
        (DEAD, "/live", 503),
        (DEAD, "/ready", 503),
    ],
)
def test_the_status_says_it_all(report: Report, path: str, status: int) -> None:
    answer = respond(f"GET {path} HTTP/1.1\r\nHost: x\r\n\r\n".encode(), lambda: report)
    found, headers, body = said(answer)
    assert found == status
    document = json.loads(body)
    assert (document["live"], document["ready"], document["why"]) == (report.live, report.ready, report.why)
    assert headers["Content-Length"] == str(len(body))
    assert (headers["Connection"], headers["Content-Type"]) == ("close", "application/json")
    head = respond(f"HEAD {path} HTTP/1.1\r\n\r\n".encode(), lambda: report)
    assert said(head) == (status, headers, b"")


@pytest.mark.parametrize(
    ("request_", "status"),
    [
        (b"GET /live HTTP/1.0\r\n\r\n", 200),
        (b"GET /live?verbose=1 HTTP/1.1\r\n\r\n", 200),
        (b"\r\nGET /live HTTP/1.1\r\n\r\n", 200),
        (b"GET /live HTTP/1.1\n\n", 200),
        (b"GET /live HTTP/1.1\r\nA: b\r\n\r\n and more", 200),
        (b"GET / HTTP/1.1\r\n\r\n", 404),
        (b"GET /live/ HTTP/1.1\r\n\r\n", 404),
        (b"GET /../etc/passwd HTTP/1.1\r\n\r\n", 404),
        (b"HEAD /x HTTP/1.1\r\n\r\n", 404),
        (b"POST /live HTTP/1.1\r\nContent-Length: 5\r\n\r\nhello", 405),
        (b"get /live HTTP/1.1\r\n\r\n", 405),
        (b"GET /live\r\n", 400),
        (b"GET /live HTTP/2.0\r\n\r\n", 400),
        (b"GET  /live HTTP/1.1\r\n\r\n", 400),
        (b"GET /li\x00ve HTTP/1.1\r\n\r\n", 400),
        (b"\x16\x03\x01\x02\x00\x01\n", 400),
        (b"GET /" + b"x" * REQUEST_LIMIT, 431),
        (b"GET /live HTTP/1.1\r\nA: " + b"x" * REQUEST_LIMIT + b"\r\n\r\n", 431),
        (b"\r\n" * REQUEST_LIMIT, 431),
        (b"", None),
        (b"GET /live HTTP/1.1", None),
        (b"GET /live HTTP/1.1\r\nHost: x\r\n", None),
    ],
)
def test_requests_and_their_answers(request_: bytes, status: int | None) -> None:
    answer = respond(request_, lambda: WELL)
    assert (None if answer is None else said(answer)[0]) == status


def test_a_wrong_method_is_told_the_right_ones() -> None:
    assert said(respond(b"PUT /ready HTTP/1.1\r\n\r\n", lambda: WELL))[1]["Allow"] == "GET, HEAD"


@given(st.binary(max_size=200) | st.binary(max_size=60).map(lambda tail: b"GET /live HTTP/1.1\r\n" + tail))
def test_any_bytes_are_answered_or_waited_for(data: bytes) -> None:
    answer = respond(data, lambda: WELL)
    if answer is not None:
        assert said(answer)[0] in (200, 400)
    assert respond(data + b"x" * (REQUEST_LIMIT + 1), lambda: WELL) is not None


@asynccontextmanager
async def serving(look: Callable[[], Report] = lambda: WELL) -> AsyncIterator[int]:
    """A service on a free port."""
    service = HealthService(look)
    port = await service.start("127.0.0.1", 0)
    try:
        yield port
    finally:
        service.close()
        await asyncio.sleep(0.01)


async def fetch(port: int, request: bytes = b"GET /live HTTP/1.1\r\n\r\n") -> bytes:
    """All that comes back until the service closes."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        writer.write(request)
        async with asyncio.timeout(20):
            return await reader.read()
    finally:
        writer.close()


async def ended(reader: asyncio.StreamReader) -> bytes:
    """What is still received until the other side is gone, in whatever way."""
    try:
        async with asyncio.timeout(20):
            return await reader.read()
    except ConnectionResetError:
        return b""


async def dropped(writer: asyncio.StreamWriter, data: bytes, *, pause: float) -> int:
    """Go on sending until the other side does not take it any more; how many bytes it took."""
    sent = 0
    try:
        async with asyncio.timeout(20):
            while True:
                writer.write(data)
                await writer.drain()
                sent += len(data)
                await asyncio.sleep(pause)
    except (ConnectionResetError, BrokenPipeError):
        return sent
    finally:
        writer.close()


class TestService:
    def test_it_answers_and_says_where_it_listens(self, caplog: pytest.LogCaptureFixture) -> None:
        async def body() -> None:
            async with serving() as port:
                assert said(await fetch(port))[0] == 200
                assert f"health_listening host=127.0.0.1 port={port}" in caplog.messages

        caplog.set_level("INFO")
        asyncio.run(body())

    def test_a_request_may_come_byte_by_byte(self) -> None:
        async def body() -> None:
            async with serving() as port:
                reader, writer = await asyncio.open_connection("127.0.0.1", port)
                for byte in b"GET /ready HTTP/1.1\r\nHost: x\r\n\r\n":
                    writer.write(bytes([byte]))
                    await writer.drain()
                    await asyncio.sleep(0)
                assert said(await ended(reader))[0] == 200
                writer.close()

        asyncio.run(body())

    def test_who_dawdles_is_dropped(self) -> None:
        async def body() -> float:
            async with serving() as port:
                reader, writer = await asyncio.open_connection("127.0.0.1", port)
                started = time.monotonic()
                writer.write(b"GET /live HTT")
                assert await ended(reader) == b""
                writer.close()
                return time.monotonic() - started

        assert 1.5 < asyncio.run(body()) < 15

    def test_who_does_not_hang_up_is_dropped(self) -> None:
        async def body() -> None:
            async with serving() as port:
                reader, writer = await asyncio.open_connection("127.0.0.1", port)
                writer.write(b"GET /live HTTP/1.1\r\n\r\n")
                assert said(await ended(reader))[0] == 200
                assert await dropped(writer, b"GET /live HTTP/1.1\r\n\r\n", pause=0.05)

        asyncio.run(body())

    def test_a_flood_after_the_answer_is_dropped(self) -> None:
        async def body() -> None:
            async with serving() as port:
                _, writer = await asyncio.open_connection("127.0.0.1", port)
                sent = await dropped(writer, b"POST /live HTTP/1.1\r\n\r\n" + b"x" * 100_000, pause=0)
                assert sent < 20 << 20, "dropped by its size, not by the clock"
                assert said(await fetch(port))[0] == 200

        asyncio.run(body())

    def test_a_body_does_not_take_the_answer_back(self) -> None:
        async def body() -> None:
            async with serving() as port:
                for _ in range(20):
                    assert said(await fetch(port, b"POST /live HTTP/1.1\r\n\r\n" + b"x" * 600_000))[0] == 405

        asyncio.run(body())

    def test_slow_ones_do_not_keep_a_probe_out(self) -> None:
        async def body() -> None:
            async with serving() as port:
                slow = []
                for _ in range(3 * CONNECTIONS):
                    slow.append(await asyncio.open_connection("127.0.0.1", port))
                    slow[-1][1].write(b"GET /live")
                await asyncio.sleep(0.05)
                for _ in range(5):
                    assert said(await fetch(port))[0] == 200
                for reader, writer in slow:
                    assert await ended(reader) == b""
                    writer.close()

        asyncio.run(body())

    def test_a_thousand_connections(self) -> None:
        async def body() -> None:
            service = HealthService(lambda: WELL)
            port = await service.start("127.0.0.1", 0)
            most = answered = 0

            async def one(number: int) -> None:
                nonlocal most, answered
                # The kernel itself does not take them all at once: some wait long to be connected.
                with contextlib.suppress(OSError, TimeoutError):
                    async with asyncio.timeout(5):
                        reader, writer = await asyncio.open_connection("127.0.0.1", port)
                        most = max(most, len(service._open))
                        data = [b"", b"\x00" * 10, b"GET /live", b"GET /live HTTP/1.1\r\n\r\n"]
                        try:
                            writer.write(data[number % 4])
                            answered += b"200 OK" in await ended(reader)
                        finally:
                            writer.close()

            try:
                await asyncio.gather(*(one(number) for number in range(1000)))
                assert 1 <= most <= CONNECTIONS
                assert answered > 0
                assert said(await fetch(port))[0] == 200
            finally:
                service.close()
            await asyncio.sleep(0.05)
            assert service._open == {}

        asyncio.run(body())

    def test_resets_at_every_moment(self, caplog: pytest.LogCaptureFixture) -> None:
        async def body() -> None:
            async with serving() as port:
                for data in (b"", b"GET", b"GET /live HTTP/1.1\r\n\r\n", b"\r\n", b"x" * 9000):
                    for _ in range(20):
                        with socket.create_connection(("127.0.0.1", port)) as line:
                            line.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                            line.sendall(data)
                        await asyncio.sleep(0)
                assert said(await fetch(port))[0] == 200

        asyncio.run(body())
        assert [record for record in caplog.records if record.levelname in ("WARNING", "ERROR")] == []

    def test_a_port_in_use_is_an_error_that_names_it(self) -> None:
        async def body() -> None:
            async with serving() as port:
                with pytest.raises(
                    WorkerError, match=rf"127\.0\.0\.1 port {port} .*address already in use; "
                ):
                    await HealthService(lambda: WELL).start("127.0.0.1", port)

        asyncio.run(body())

    @pytest.mark.parametrize("host", ["no-such-host.invalid", "192.0.2.1", "a..b", "x" * 70])
    def test_a_host_that_is_not_this_machine(self, host: str) -> None:
        async def body() -> None:
            with pytest.raises(WorkerError, match=r"^cannot listen on .*; choose another"):
                await HealthService(lambda: WELL).start(host, 0)

        asyncio.run(body())

    def test_closed_it_drops_everybody(self) -> None:
        async def body() -> None:
            service = HealthService(lambda: WELL)
            port = await service.start("127.0.0.1", 0)
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            writer.write(b"GET")
            await writer.drain()
            await asyncio.sleep(0.05)
            service.close()
            service.close()
            assert await ended(reader) == b""
            writer.close()
            with pytest.raises(ConnectionRefusedError):
                await asyncio.open_connection("127.0.0.1", port)

        asyncio.run(body())


# What `pgqueue ping` makes of it.

ROW = WorkerStats(
    id="shop:1:aa",
    host="shop",
    pid=1,
    queues=["mail"],
    pool="prefork",
    concurrency=2,
    version="1",
    started_at=datetime(2026, 1, 31, tzinfo=UTC),
    fenced=False,
    running=0,
    beat_ago=1.0,
    seconds=60.0,
    stats={"last_claim_ago": 1.0, "claim_due_for": 0.0, "executors": 2, "draining": False},
)


def row(**changes: Any) -> WorkerStats:
    stats = ROW.stats | changes.pop("said", {})
    return replace(ROW, **({"stats": stats} | changes))


@pytest.mark.parametrize(
    ("worker", "state", "live", "ready"),
    [
        (ROW, "ready", True, True),
        (row(fenced=True), "fenced", False, False),
        (row(beat_ago=31.0), "silent", False, False),
        (row(said={"claim_due_for": 31.0}), "stuck", False, False),
        (row(said={"claim_due_for": 29.0}), "ready", True, True),
        (row(said={"draining": True}), "draining", True, False),
        (row(said={"executors": 0}), "no executors", True, False),
        (row(stats={}), "starting", True, False),
        (row(stats={"succeeded": 3}), "ready", True, True),  # of an older release
        (row(said={"claim_due_for": "x", "executors": None}), "ready", True, True),
        (row(said={"last_claim_ago": 9000.0}), "ready", True, True),  # busy
    ],
)
def test_a_row_says_how_its_worker_is(worker: WorkerStats, state: str, live: bool, ready: bool) -> None:
    seen = judge([worker], max_age=30)
    (document,) = seen.document["workers"]
    assert (document["state"], document["live"], document["ready"]) == (state, live, ready)
    assert (seen.problem is None) == live
    assert (judge([worker], max_age=30, ready=True).problem is None) == ready


@pytest.mark.parametrize(
    ("which", "found"),
    [
        ({}, True),
        ({"queue": "mail"}, True),
        ({"queue": "other"}, False),
        ({"host": "shop"}, True),
        ({"host": "mail"}, False),
        ({"worker_id": "shop:1:aa"}, True),
        ({"worker_id": "shop:1:ab"}, False),
        ({"queue": "mail", "host": "mail"}, False),
    ],
)
def test_only_those_who_are_meant_count(which: dict[str, str], found: bool) -> None:
    assert (judge([ROW], max_age=30, **which).problem is None) == found  # type: ignore[arg-type]


def test_a_worker_without_queues_serves_every_one() -> None:
    assert judge([row(queues=[])], queue="anything", max_age=30).problem is None


@pytest.mark.parametrize(
    ("workers", "which", "line"),
    [
        (
            [],
            {},
            "no worker is registered; start one with `pgqueue -A module:attribute worker`",
        ),
        (
            [ROW],
            {"queue": "low"},
            "no worker that serves queue low among 1 is registered; start one with "
            "`pgqueue -A module:attribute worker` -Q low, or without -Q",
        ),
        (
            [row(beat_ago=44.9), row(fenced=True)],
            {},
            "no worker is live: shop:1:aa is silent for 45 s (limit 30 s), and 1 more; "
            "start it again, or look at its log",
        ),
        (
            [row(said={"claim_due_for": 61.2})],
            {"host": "shop"},
            "no worker on host shop is live: shop:1:aa is stuck, with a claim due for 61 s (limit 30 s); "
            "restart it",
        ),
    ],
)
def test_the_line_says_rule_value_and_way_out(
    workers: list[WorkerStats], which: dict[str, str], line: str
) -> None:
    seen = judge(workers, max_age=30, **which)  # type: ignore[arg-type]
    assert f"{seen.problem}; {seen.way}" == line


@contextmanager
def answering(answer: bytes | None, *, dribble: bool = False) -> Iterator[int]:
    """A port that says this to whoever connects; None: nothing, and the line stays open."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        done = threading.Event()

        def serve() -> None:
            try:
                line, _ = server.accept()
            except OSError:
                return
            with line:
                try:
                    line.recv(4096)
                    if answer is None:
                        done.wait(30)
                    elif not dribble:
                        line.sendall(answer)
                    else:
                        for byte in answer:
                            line.sendall(bytes([byte]))
                            if done.wait(0.3):
                                return
                except OSError:
                    pass

        thread = threading.Thread(target=serve)
        thread.start()
        try:
            yield server.getsockname()[1]
        finally:
            done.set()
            with socket.socket() as last:
                last.connect_ex(server.getsockname())
            thread.join()


def http(status: int, body: object) -> bytes:
    text = json.dumps(body).encode()
    return b"HTTP/1.1 %d X\r\nContent-Length: %d\r\n\r\n%s" % (status, len(text), text)


REPORT = {"worker": "w", "live": True, "ready": False, "why": ["it is draining"]}


@pytest.mark.parametrize(
    ("answer", "problem"),
    [
        (http(200, REPORT), None),
        (http(503, REPORT), "worker w is not live: it is draining"),
        (http(200, {"ok": True}), "is not the health port of a worker"),
        (http(200, []), "is not the health port of a worker"),
        (b"HTTP/1.1 200 OK\r\n\r\n" + b"[" * 100_000, "is not the health port of a worker"),
        (http(200, REPORT)[:-9], "is not the health port of a worker"),
        (b"SSH-2.0-OpenSSH_9.2\r\n", "is not the health port of a worker"),
        (b"", "is not the health port of a worker"),
    ],
)
def test_whoever_is_at_the_port(answer: bytes, problem: str | None) -> None:
    with answering(answer) as port:
        seen = ask_port("127.0.0.1", port, ready=False)
    assert (problem is None) == (seen.problem is None)
    assert problem is None or problem in str(seen.problem)


@pytest.mark.parametrize("dribble", [False, True])
def test_a_port_that_is_silent_or_slow_is_given_up(dribble: bool) -> None:
    with answering(http(200, REPORT) if dribble else None, dribble=dribble) as port:
        started = time.monotonic()
        seen = ask_port("127.0.0.1", port, ready=False)
        took = time.monotonic() - started
    assert seen.problem == f"127.0.0.1 port {port} has not answered within 2 s"
    assert took < 6


def test_nobody_at_the_port() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    seen = ask_port("127.0.0.1", port, ready=False)
    assert seen.problem == f"127.0.0.1 port {port} does not answer: connection refused"
    assert seen.way == f"start the worker with --health-port {port}, or look whether it is frozen"


def test_a_host_nobody_knows() -> None:
    with pytest.raises(ConfigError, match="--host must be"):
        ask_port("no-such-host.invalid", 80, ready=False)
