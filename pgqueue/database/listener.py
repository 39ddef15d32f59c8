"""The connection that only listens. NOTIFY is a hint: whoever owns a listener polls as well.

Behind a pooler that hands its connections out by the transaction, LISTEN succeeds and nothing is ever heard.
So where a pooler is in between, or the listening connection has a DSN of its own, it is tried out: a
notification is sent through the queue's DSN, on a channel that nobody else knows, and must arrive.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import secrets
from collections.abc import AsyncIterator, Callable, Iterator
from random import Random
from typing import LiteralString

import psycopg
from psycopg import sql

from pgqueue.database.dsn import connect_options, cut, is_pooled, one_line, retry_delay

log = logging.getLogger("pgqueue.worker")

ANSWER_WITHIN = 10.0
"""Seconds until a server that accepted a connection and does not answer is given up."""
HEAR_WITHIN = 1.0
"""Seconds a notification of our own may take before it counts as lost."""
TRY_AGAIN = 60.0
"""Seconds until a connection that heard nothing is tried again: pools are reconfigured, failovers end."""


class Listener:
    """Hears notifications on a channel and survives lost connections.

    Args:
        dsn: Where to listen.
        notify_dsn: What the queue is otherwise reached by; nearly always the same.
        on_notify: Called with the payload of each notification.
        on_control: The same for the channel of that name with `_control` behind it: what people ask for.
        on_listen: Called whenever LISTEN has been confirmed: what was notified before is missed, so look for
            yourself.
        on_deaf: Called when notifications do not arrive here, or the connection is lost, until `on_listen` is
            called.
    """

    def __init__(
        self,
        dsn: str,
        channel: str,
        *,
        notify_dsn: str,
        on_notify: Callable[[str], None],
        on_control: Callable[[str], None],
        on_listen: Callable[[], None],
        on_deaf: Callable[[], None],
        random: Random,
    ) -> None:
        self._dsn = dsn
        self._notify_dsn = notify_dsn
        self._channel = channel
        self._probe = f"{channel}_{secrets.token_hex(6)}"
        self._on_notify = on_notify
        self._on_control = on_control
        self._on_listen = on_listen
        self._on_deaf = on_deaf
        self._random = random

    async def run(self) -> None:
        """Listen until cancelled."""
        failures = 0
        told = False
        while True:
            try:
                async with self._connect(self._dsn) as connection:
                    with _answering(connection):
                        listens = await self._hears(connection)
                        if listens:
                            connection.add_notify_handler(self._hear)
                            await connection.execute(_on_channel("LISTEN {}", f"{self._channel}_control"))
                            await connection.execute(_on_channel("LISTEN {}", self._channel))
                    failures = 0
                    if listens:
                        told = False
                        self._on_listen()
                        await _read_for_ever(connection)
                self._on_deaf()
                if not told:
                    told = True
                    log.warning("pooler_found error=%s", self._what_to_do())
                await asyncio.sleep(TRY_AGAIN * self._random.uniform(0.8, 1.0))
            except psycopg.Error as error:
                failures += 1
                if failures == 1:
                    self._on_deaf()
                    log.warning("database_unavailable connection=listen error=%s", one_line(error))
                await asyncio.sleep(retry_delay(failures, self._random))

    def _hear(self, notification: psycopg.Notify) -> None:
        is_work = notification.channel == self._channel
        (self._on_notify if is_work else self._on_control)(notification.payload)

    def _what_to_do(self) -> str:
        if self._dsn == self._notify_dsn:
            return (
                "LISTEN hears nothing through this pooler, so the worker polls; give a direct connection "
                "with --listen-dsn (PGQUEUE_LISTEN_DSN), or say --no-listen"
            )
        return (
            "the listen_dsn hears nothing of what is notified through the dsn, so the worker polls; it must "
            "lead to the same database, and not through a pooler"
        )

    async def _hears(self, connection: psycopg.AsyncConnection) -> bool:
        """Whether notifications sent through the queue's DSN arrive on this connection."""
        row = await (await connection.execute("SELECT pg_backend_pid()", prepare=False)).fetchone()
        assert row is not None  # noqa: S101
        if not is_pooled(row[0], connection) and self._dsn == self._notify_dsn:
            return True
        connection.prepare_threshold = None
        await connection.execute(_on_channel("LISTEN {}", self._probe))
        async with self._connect(self._notify_dsn) as other:
            with _answering(other):
                await other.execute("SELECT pg_notify(%s, '')", [self._probe], prepare=False)
        heard = False
        async for _ in connection.notifies(timeout=HEAR_WITHIN, stop_after=1):
            heard = True
        # Behind a pooler it may reach another session: what stays there is a channel of no use to anybody.
        await connection.execute(_on_channel("UNLISTEN {}", self._probe))
        return heard

    @contextlib.asynccontextmanager
    async def _connect(self, dsn: str) -> AsyncIterator[psycopg.AsyncConnection]:
        connection = await psycopg.AsyncConnection.connect(
            dsn, autocommit=True, **connect_options(dsn, application_name="pgqueue listen")
        )
        try:
            yield connection
        finally:
            await connection.close()


async def _read_for_ever(connection: psycopg.AsyncConnection) -> None:
    """Pass on what is notified, in the event loop's callback itself: a job waits for it."""
    pgconn, loop = connection.pgconn, asyncio.get_running_loop()
    descriptor = pgconn.socket
    broken: asyncio.Future[None] = loop.create_future()

    def hear() -> None:
        try:
            pgconn.consume_input()
            while (found := pgconn.notifies()) is not None:
                if pgconn.notify_handler is not None:
                    pgconn.notify_handler(found)
        except Exception as error:
            loop.remove_reader(descriptor)
            if not broken.done():
                broken.set_exception(error)

    loop.add_reader(descriptor, hear)
    hear()  # what came with the answers to LISTEN
    try:
        await broken
    finally:
        loop.remove_reader(descriptor)


def _on_channel(command: LiteralString, channel: str) -> sql.Composed:
    return sql.SQL(command).format(sql.Identifier(channel))


@contextlib.contextmanager
def _answering(connection: psycopg.AsyncConnection) -> Iterator[None]:
    """Give a server up that does not answer in this block."""
    watchdog = asyncio.get_running_loop().call_later(ANSWER_WITHIN, cut, connection)
    try:
        yield
    finally:
        watchdog.cancel()
