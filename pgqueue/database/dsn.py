"""How we connect, whoever of us it is: what a DSN is completed with, and what we say when that fails."""

from __future__ import annotations

from collections.abc import Mapping
from random import Random
from typing import Any, Final

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


RETRY_FIRST, RETRY_MOST = 0.1, 4.0
"""Seconds between attempts to get a lost connection back."""


def retry_delay(failures: int, random: Random, most: float = RETRY_MOST) -> float:
    """Seconds to wait after so many failures in a row: doubled each time, capped, with jitter."""
    doubled: float = RETRY_FIRST * 2 ** min(failures, 10)
    return min(most, doubled) * random.uniform(0.5, 1.0)


def connect_options(dsn: str, **ours: Any) -> dict[str, Any]:
    """Options to connect with beside the DSN; what it says itself wins.

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
    return {name: value for name, value in {**CONNECT_OPTIONS, **ours}.items() if name not in given}


def unreachable(error: BaseException) -> DatabaseUnavailable:
    """What to raise when a connection cannot be made."""
    return DatabaseUnavailable(
        f"cannot reach the database: {one_line(error)}; check the dsn (--dsn, PGQUEUE_DSN)"
    )


def one_line(error: BaseException) -> str:
    """The driver's message, which may have several lines, as one."""
    lines = "; ".join(line.strip() for line in str(error).splitlines() if line.strip())
    return lines or type(error).__name__
