"""The connection that only listens. NOTIFY is a hint: whoever owns a listener polls as well."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from random import Random

import psycopg
from psycopg import sql

from pgqueue.database.dsn import connect_options, one_line, retry_delay
from pgqueue.errors import DatabaseUnavailable

log = logging.getLogger("pgqueue.worker")


class Listener:
    """Hears notifications on a channel and survives lost connections.

    Args:
        on_notify: Called with the payload of each notification.
        on_listen: Called whenever LISTEN has been confirmed: what was notified before is missed, so look for
            yourself.
    """

    def __init__(
        self,
        dsn: str,
        channel: str,
        *,
        on_notify: Callable[[str], None],
        on_listen: Callable[[], None],
        random: Random,
    ) -> None:
        self._dsn = dsn
        self._channel = channel
        self._on_notify = on_notify
        self._on_listen = on_listen
        self._random = random

    async def run(self) -> None:
        """Listen until cancelled."""
        failures = 0
        while True:
            try:
                connection = await psycopg.AsyncConnection.connect(
                    self._dsn,
                    autocommit=True,
                    **connect_options(self._dsn, application_name="pgqueue listen"),
                )
                async with connection:
                    await connection.execute(sql.SQL("LISTEN {}").format(sql.Identifier(self._channel)))
                    failures = 0
                    self._on_listen()
                    async for notification in connection.notifies():
                        self._on_notify(notification.payload)
                raise DatabaseUnavailable("the listening connection ended")
            except (psycopg.Error, DatabaseUnavailable) as error:
                failures += 1
                if failures == 1:
                    log.warning("database_unavailable connection=listen error=%s", one_line(error))
                await asyncio.sleep(retry_delay(failures, self._random))
