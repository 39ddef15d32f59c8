"""How we connect, whoever of us it is: what a DSN is completed with, and what we say when that fails."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from contextlib import suppress
from random import Random
from typing import Any, Final, TypeVar

from pgqueue.errors import ConfigError, DatabaseUnavailable

CONNECT_OPTIONS: Final[Mapping[str, Any]] = {
    "application_name": "pgqueue",
    "connect_timeout": 10,
    "keepalives": 1,
    "keepalives_idle": 2,
    "keepalives_interval": 1,
    "keepalives_count": 2,
    "tcp_user_timeout": 4000,
}
"""A silent network is noticed within about four seconds, instead of a quarter of an hour."""


SYNC_WAIT: Final = "SyncRepWaitForLSN"
"""The server's function that warns when the wait for synchronous standbys is cut short: the COMMIT then says
OK although no standby may have it. The warning's text comes in many languages, its code has other uses."""

RETRY_FIRST, RETRY_MOST = 0.1, 4.0
"""Seconds between attempts to get a lost connection back."""


def retry_delay(failures: int, random: Random, most: float = RETRY_MOST) -> float:
    """Seconds to wait after so many failures in a row: doubled each time, capped, with jitter."""
    doubled: float = RETRY_FIRST * 2 ** min(failures, 10)
    return min(most, doubled) * random.uniform(0.5, 1.0)


def connect_options(dsn: str, **ours: Any) -> dict[str, Any]:
    """Options to connect with beside the DSN; what it says itself wins.

    Of several hosts the one that takes writes is wanted: after a failover the old primary, or another
    standby, may answer first. The server says what it is while connecting, so this costs no round trip.

    Raises:
        ConfigError: The DSN cannot be read.
    """
    import psycopg
    from psycopg.conninfo import conninfo_to_dict

    try:
        given = conninfo_to_dict(dsn)
    except psycopg.ProgrammingError:
        # Not chained: libpq's text quotes the string, password and all.
        raise ConfigError(
            "dsn must be a PostgreSQL URL (postgresql://user@host/database) or key=value pairs"
        ) from None
    _check_given(dsn, given)
    options = {**CONNECT_OPTIONS, **ours}
    hosts = given.get("hostaddr") or given.get("host") or os.environ.get("PGHOST", "")
    if "," in str(hosts) and "PGTARGETSESSIONATTRS" not in os.environ:
        options["target_session_attrs"] = "read-write"
    return {name: value for name, value in options.items() if name not in given}


def _check_given(dsn: str, given: Mapping[str, Any]) -> None:
    """ConfigError for what would be understood in another way than it is meant.

    A password that holds an unescaped `@`, `/` or `:` ends too early, and its rest is taken for a host, a
    port or a database, which errors name.
    """
    encode = "in a password write %40 for @, %2F for / and %3A for :"
    scheme, url, rest = dsn.partition("://")
    authority, _, path = rest.partition("?")[0].partition("/")
    if url and scheme.strip() in ("postgresql", "postgres") and (authority.count("@") > 1 or "@" in path):
        raise ConfigError(f"dsn must have one '@' before the host; {encode}")
    for port in str(given.get("port") or "").split(","):
        if port and not (port.isascii() and port.isdigit() and 1 <= int(port) <= 65535):
            raise ConfigError(f"dsn must have a whole number from 1 to 65535 as its port; {encode}")
    timeout = str(given.get("connect_timeout", "0"))
    if not re.fullmatch(r"\s*[+-]?\d{1,9}\s*", timeout):
        raise ConfigError("dsn must have a whole number of seconds as its connect_timeout")


U = TypeVar("U", bound=DatabaseUnavailable)


def unreachable(error: BaseException, kind: type[U] = DatabaseUnavailable) -> U:  # type: ignore[assignment]
    """What to raise when a connection cannot be made."""
    return kind(f"cannot reach the database: {one_line(error)}; check the dsn (--dsn, PGQUEUE_DSN)")


def comes_soon(error: BaseException) -> bool:
    """Whether a connection that could not be made is likely to be made in a moment.

    The server is starting or stopping (57P03), or it is read-only and its promotion may be under way. libpq
    tells no code of errors while connecting, so their text decides; a server that speaks another language is
    not understood.
    """
    text = str(error)
    return any(words in text for words in ("the database system is ", "is read-only", "hot standby mode"))


def is_pooled(pid: int, connection: Any) -> bool:
    """Whether there is a pooler in between, by the process id that the server's end of the connection gives.

    The one that a connection is given when it is made is for cancelling, and poolers make up their own.
    """
    return bool(pid != connection.info.backend_pid)


def cut_short(diagnostic: Any) -> bool:
    """Whether this notice says that the wait for synchronous standbys was cut short."""
    return bool(diagnostic.source_function == SYNC_WAIT)


def one_line(error: BaseException) -> str:
    """The driver's message, which may have several lines, as one."""
    lines = "; ".join(line.strip() for line in str(error).splitlines() if line.strip())
    return lines or type(error).__name__


def cut(connection: Any) -> None:
    """Shut a psycopg connection's socket down: whoever waits for it sees the connection lost.

    Closing it instead would leave an event loop waiting for a descriptor that means something else by then.
    """
    import socket

    with suppress(OSError), socket.socket(fileno=os.dup(connection.pgconn.socket)) as line:
        line.shutdown(socket.SHUT_RDWR)
