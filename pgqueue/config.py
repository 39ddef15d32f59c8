"""pgqueue's settings: one frozen object, from defaults, then `PGQUEUE_*` variables, then arguments."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace
from typing import Any, Final

from pgqueue.errors import ConfigError, nearest, shown
from pgqueue.job import DEFAULT_PRIORITY, DEFAULT_QUEUE, check_priority, check_queue

PREFIX: Final = "PGQUEUE_"
HEARTBEATS_PER_LEASE: Final = 3
"""A worker may miss two heartbeats before it counts as silent."""

MAX_CONCURRENCY: Final = 1024
"""Executors of one worker, or slots of one executor."""
MAX_PROCESSES: Final = 64
POOLS: Final = ("prefork", "threads", "asyncio", "solo")
SLOTS: Final = {"threads": 10, "asyncio": 100}
"""The pools whose executors run several jobs, and how many by default."""

LOG_LEVELS: Final = ("DEBUG", "INFO", "WARNING", "ERROR", "CRITICAL")

_POLL: Final = 5.0
_POLL_DEAF: Final = 0.5
_HEARTBEAT: Final = 5.0
_LEASE: Final = 30.0
_MOST: Final = 1e9
LOG_FORMAT: Final = "%(asctime)s %(levelname)s %(name)s %(message)s"

_SCHEMA = re.compile(r"[a-z_][a-z0-9_]{0,47}")
_MASK = "***"
# From the first colon after `//` to the last `@`: a password may itself hold an unescaped `@` or `/`.
_URL_PASSWORD = re.compile(r"^([\w+.\-]+://[^:@/?]*:).*@", re.DOTALL)
_NAMED_PASSWORD = re.compile(
    r"(password\s*=\s*)('(?:[^'\\]|\\.)*(?:'|$)|(?:\\.|[^\s&])+)", re.IGNORECASE | re.DOTALL
)


def usable_cpus() -> int:
    """CPUs this process may run on, which in a container is fewer than the machine has."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


@dataclass(frozen=True, slots=True)
class PoolSize:
    """How many executors a worker has in one pool, and how many jobs each runs at a time."""

    most: int
    least: int
    slots: int

    @property
    def jobs(self) -> int:
        """At a time, of all of them."""
        return self.most * self.slots


@dataclass(frozen=True, slots=True, repr=False)
class Config:
    """Every setting of one application, checked.

    Times are in seconds, retentions in days.

    Attributes:
        dsn: Where the queue's database is: a URL or `key=value` pairs. None in a process that enqueues only
            on connections of its own.
        listen: Whether a worker listens for notifications. Without, it polls.
        listen_dsn: A direct connection for a worker to listen on, where `dsn` leads through a pooler that
            hands its connections out by the transaction. None for `dsn`.
        schema: The Postgres schema that holds the queue.
        poll_interval: How often an idle worker looks for jobs when no notification comes. None for 5 seconds,
            and half a second in a worker that cannot hear any.
        heartbeat: How often a worker writes that it is alive.
        lease: How long a worker may be silent before its jobs are taken back.
        shutdown_timeout: How long a worker that was asked to stop lets running jobs finish.
        pool: What a worker runs jobs in: "prefork", "threads", "asyncio" or "solo".
        concurrency: Jobs a worker runs at a time, or where an executor runs several each of its executors.
            None for one per usable CPU, 10 threads, 100 coroutines.
        processes: Executors, where each runs several jobs.
        autoscale: Instead of `concurrency`: the most and the least executors, by how many jobs there are.
        task_pools: Jobs at a time in the pools that tasks ask for, as in "threads:20,asyncio:200".
        max_tasks_per_child: Jobs after which an executor is replaced.
        max_memory_per_child: KiB of resident memory above which an executor is replaced, after the job that
            brought it there.
        soft_time_limit: Of tasks that name none.
        time_limit: Of tasks that name none.
        max_crashes: Process deaths after which a job is buried.
        health_port: Where a worker answers /live and /ready over HTTP; 0 for any free port, None for nowhere.
        health_host: The address it does so on.
        retention_finished: How long history is kept, and with it the memory of used job ids.
        queue: Where a job goes that names no queue.
        priority: Of a job that names none; 0 to 9, larger runs first.

    Raises:
        ConfigError: Settings are wrong; the message lists them all.
    """

    dsn: str | None = None
    schema: str = "pgqueue"
    listen: bool = True
    listen_dsn: str | None = None
    poll_interval: float | None = None
    heartbeat: float = _HEARTBEAT
    lease: float = _LEASE
    shutdown_timeout: float = 25.0
    pool: str = "prefork"
    concurrency: int | None = None
    processes: int = 1
    autoscale: tuple[int, int] | None = None
    task_pools: str | None = None
    max_tasks_per_child: int | None = None
    max_memory_per_child: int | None = None
    soft_time_limit: float | None = None
    time_limit: float | None = None
    max_crashes: int = 3
    health_port: int | None = None
    health_host: str = "127.0.0.1"
    retention_finished: float = 7.0
    retention_failures: float = 30.0
    retention_dead_letters: float = 90.0
    retention_audit: float = 365.0
    log_level: str = "INFO"
    queue: str = DEFAULT_QUEUE
    priority: int = DEFAULT_PRIORITY

    def __post_init__(self) -> None:
        values = {name: getattr(self, name) for name in _RULES}
        checked, errors = _check(values, {name: name for name in values})
        if errors:
            raise ConfigError("; ".join(errors))
        for name, value in checked.items():
            object.__setattr__(self, name, value)

    @classmethod
    def load(cls, environ: Mapping[str, str], **arguments: Any) -> Config:
        """Defaults, then `PGQUEUE_<NAME>` from `environ`, then the arguments that are not None.

        Raises:
            ConfigError: Settings are wrong, or a name looks misspelt; the message lists them all.
        """
        values, sources, errors = _from_environ(environ)
        for name, value in arguments.items():
            if name not in _RULES:
                errors.append(f"unknown option {name!r}{_meant(name)}")
            elif value is not None:
                values[name], sources[name] = value, name
        checked, wrong = _check(values, sources)
        if errors or wrong:
            raise ConfigError("; ".join(errors + wrong))
        return cls(**checked)

    def replace(self, **changes: Any) -> Config:
        """A copy with these settings; unlike for `load`, None is a value."""
        if unknown := [f"unknown option {name!r}{_meant(name)}" for name in changes if name not in _RULES]:
            raise ConfigError("; ".join(unknown))
        return replace(self, **changes)

    def size(self, pool: str | None = None) -> PoolSize:
        """Of the worker's own pool, or of one that tasks ask for."""
        own = pool is None or pool == self.pool
        pool = self.pool if pool is None else pool
        asked = self.concurrency if own else _sizes(self.task_pools).get(pool)
        if pool == "solo":
            return PoolSize(1, 1, 1)
        if pool in SLOTS:
            processes = self.processes if own else 1
            return PoolSize(processes, processes, asked or SLOTS[pool])
        if own and self.autoscale is not None:
            return PoolSize(*self.autoscale, 1)
        count = asked or usable_cpus()
        return PoolSize(count, count, 1)

    @property
    def limited(self) -> bool:
        """Whether time limits hold: not where somebody may be looking at a debugger's prompt."""
        return self.pool != "solo"

    @property
    def masked_dsn(self) -> str | None:
        """The DSN without its password, for logs and messages."""
        return _masked(self.dsn)

    def poll_every(self, *, hears: bool) -> float:
        """Seconds between an idle worker's looks; `hears`: notifications reach it."""
        return self.poll_interval or (_POLL if hears else _POLL_DEAF)

    def shown(self) -> dict[str, Any]:
        """The settings by name, without passwords."""
        values = {each.name: getattr(self, each.name) for each in fields(self)}
        return values | {"dsn": self.masked_dsn, "listen_dsn": _masked(self.listen_dsn)}

    def __repr__(self) -> str:
        return f"Config({', '.join(f'{name}={value!r}' for name, value in self.shown().items())})"


def _masked(dsn: str | None) -> str | None:
    if dsn is None:
        return None
    return _NAMED_PASSWORD.sub(rf"\g<1>{_MASK}", _URL_PASSWORD.sub(rf"\g<1>{_MASK}@", dsn))


def _from_environ(environ: Mapping[str, str]) -> tuple[dict[str, Any], dict[str, str], list[str]]:
    """Values, the variable each came from, and complaints about variables that look misspelt.

    Other `PGQUEUE_*` variables are left alone: `PGQUEUE_TEST_DSN`, or a newer version's.
    """
    values: dict[str, Any] = {}
    sources: dict[str, str] = {}
    errors = []
    for variable, text in environ.items():
        name = variable.removeprefix(PREFIX).lower()
        if not variable.startswith(PREFIX) or not text:
            continue
        if name in _RULES:
            values[name], sources[name] = _number(text) if name in _NUMBERS else text, variable
        elif close := nearest(name, _RULES, cutoff=0.8):
            errors.append(f"unknown variable {variable}, did you mean {PREFIX}{close.upper()}?")
    return values, sources, errors


def _number(text: str) -> int | float | str:
    for read in (int, float):
        try:
            return read(text)
        except ValueError:
            continue
    return text


def _check(values: Mapping[str, Any], sources: Mapping[str, str]) -> tuple[dict[str, Any], list[str]]:
    """The values that hold, and one line for each that does not, under the name its source gave it."""
    checked: dict[str, Any] = {}
    errors = []
    for name, value in values.items():
        try:
            checked[name] = _RULES[name](value)
        except ValueError as error:
            errors.append(f"{sources[name]} {error}")
    if not {"lease", "heartbeat"} & (values.keys() - checked.keys()):
        errors += _check_lease(checked.get("lease", _LEASE), checked.get("heartbeat", _HEARTBEAT))
    soft, hard = checked.get("soft_time_limit"), checked.get("time_limit")
    if soft and hard and soft >= hard:
        errors.append(f"soft_time_limit must be less than time_limit ({hard:g} s), got {soft:g}")
    return checked, errors + _check_pool(checked)


def _check_pool(checked: Mapping[str, Any]) -> list[str]:
    """What does not go together; the pool for debuggers takes any settings, and one job at a time."""
    pool, errors = checked.get("pool", "prefork"), []
    if pool == "prefork" and checked.get("processes", 1) != 1:
        errors.append(
            f"processes is for the pools {' and '.join(SLOTS)}, whose executors run several jobs each; "
            "prefork has as many executors as concurrency"
        )
    if pool in SLOTS and checked.get("autoscale") is not None:
        errors.append(f"autoscale is for pool prefork; pool {pool} keeps its executors")
    return errors


def _check_lease(lease: float, heartbeat: float) -> list[str]:
    if lease >= HEARTBEATS_PER_LEASE * heartbeat:
        return []
    return [f"lease must be at least {HEARTBEATS_PER_LEASE} times heartbeat ({heartbeat:g} s), got {lease:g}"]


def _meant(name: str) -> str:
    close = nearest(name, _RULES)
    return f", did you mean {close!r}?" if close else f"; known are {', '.join(_RULES)}"


def _positive(value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value <= _MOST:
        raise ValueError(f"must be a number above 0 and at most {_MOST:g}, got {shown(value)}")
    return float(value)


def _positive_or_none(value: object) -> float | None:
    return None if value is None else _positive(value)


def _from_zero(value: object) -> float:
    return 0.0 if value == 0 and not isinstance(value, bool) else _positive(value)


def _count(value: object, most: int = int(_MOST)) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= most:
        raise ValueError(f"must be a whole number from 1 to {most}, got {shown(value)}")
    return value


def _concurrency(value: object) -> int:
    return _count(value, most=MAX_CONCURRENCY)


def _concurrency_or_none(value: object) -> int | None:
    return None if value is None else _concurrency(value)


def _processes(value: object) -> int:
    return _count(value, most=MAX_PROCESSES)


def _pool(value: object) -> str:
    if value not in POOLS:
        raise ValueError(f"must be one of {', '.join(POOLS)}, got {shown(value)}")
    return str(value)


def _count_or_none(value: object) -> int | None:
    return None if value is None else _count(value)


def _autoscale(value: object) -> tuple[int, int] | None:
    """`8,2`, or a pair."""
    if value is None:
        return None
    parts = value.split(",") if isinstance(value, str) else value
    try:
        most, least = [int(part) if isinstance(part, str) else part for part in parts]  # type: ignore[attr-defined]
        if _concurrency(most) >= _concurrency(least):
            return most, least
    except (TypeError, ValueError):
        pass
    raise ValueError(
        f"must be the most and the least executors, 1 to {MAX_CONCURRENCY}, as in 8,2, got {shown(value)}"
    )


def _sizes(text: str | None) -> dict[str, int]:
    parts = [part.partition(":") for part in (text or "").split(",") if part]
    return {name: int(size) for name, _, size in parts}


def _task_pools(value: object) -> str | None:
    """`threads:20,asyncio:200`."""
    if value is None:
        return None
    parts = [part.strip() for part in value.split(",")] if isinstance(value, str) else []
    names = [part.partition(":")[0] for part in parts]
    try:
        if not parts or len(set(names)) < len(names) or not set(names) <= set(POOLS[:-1]):
            raise ValueError
        for size in _sizes(",".join(parts)).values():
            _concurrency(size)
    except ValueError:
        raise ValueError(
            f"must be pools with their jobs at a time, as in threads:20,asyncio:200, got {shown(value)}"
        ) from None
    return ",".join(parts)


def _port(value: object) -> int | None:
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value <= 65535:
        raise ValueError(f"must be a whole number from 0 to 65535, got {shown(value)}")
    return value


def _host(value: object) -> str:
    if not isinstance(value, str) or not value.strip():
        raise ValueError(f"must be an address or a name of this machine, got {shown(value)}")
    return value.strip()


def _dsn(value: object) -> str | None:
    if value is None:
        return None
    if not isinstance(value, str) or not value.strip():  # never printed: it may hold a password
        kind = "an empty text" if isinstance(value, str) else type(value).__name__
        raise ValueError(f"must be a URL or 'key=value' pairs, got {kind}")
    if "\0" in value or any("\ud800" <= letter <= "\udfff" for letter in value):
        raise ValueError("must be text in UTF-8 without NUL")
    return value


def _flag(value: object) -> bool:
    word = value.lower() if isinstance(value, str) else value
    if word in (True, "1", "true", "yes", "on"):
        return True
    if word in (False, "0", "false", "no", "off"):
        return False
    raise ValueError(f"must be true or false, got {shown(value)}")


def _schema(value: object) -> str:
    if not isinstance(value, str) or not _SCHEMA.fullmatch(value) or value.startswith("pg_"):
        raise ValueError(
            f"must be 1 to 48 lower-case letters, digits or '_', not starting with a digit "
            f"or 'pg_', got {shown(value)}"
        )
    return value


def _log_level(value: object) -> str:
    level = value.upper() if isinstance(value, str) else value
    if level not in LOG_LEVELS:
        raise ValueError(f"must be one of {', '.join(LOG_LEVELS)}, got {shown(value)}")
    return str(level)


def _queue(value: object) -> str:
    try:
        return check_queue(value)
    except ValueError as error:
        raise ValueError(f"is wrong: {error}") from None


def _priority(value: object) -> int:
    try:
        return check_priority(value)
    except ValueError:
        raise ValueError(f"must be a whole number from 0 to 9, got {shown(value)}") from None


_RULES: Final[dict[str, Callable[[object], Any]]] = {
    "dsn": _dsn,
    "schema": _schema,
    "listen": _flag,
    "listen_dsn": _dsn,
    "poll_interval": _positive_or_none,
    "heartbeat": _positive,
    "lease": _positive,
    "shutdown_timeout": _from_zero,
    "pool": _pool,
    "concurrency": _concurrency_or_none,
    "processes": _processes,
    "autoscale": _autoscale,
    "task_pools": _task_pools,
    "max_tasks_per_child": _count_or_none,
    "max_memory_per_child": _count_or_none,
    "soft_time_limit": _positive_or_none,
    "time_limit": _positive_or_none,
    "max_crashes": _count,
    "health_port": _port,
    "health_host": _host,
    "retention_finished": _positive,
    "retention_failures": _positive,
    "retention_dead_letters": _positive,
    "retention_audit": _positive,
    "log_level": _log_level,
    "queue": _queue,
    "priority": _priority,
}
_NUMBERS: Final = frozenset(_RULES) - {
    *("dsn", "listen", "listen_dsn", "schema", "log_level", "queue", "health_host", "autoscale"),
    *("pool", "task_pools"),
}
