"""Settings: where they come from, what they must be, and that passwords stay hidden."""

from __future__ import annotations

import dataclasses
import math
import os
import re
from typing import Any

import pytest

from pgqueue.config import Config, PoolSize
from pgqueue.errors import ConfigError


def test_the_defaults_are_the_documented_ones() -> None:
    config = Config.load({})
    assert config == Config()
    assert (config.dsn, config.schema, config.queue, config.priority) == (None, "pgqueue", "default", 5)
    assert (config.heartbeat, config.lease, config.shutdown_timeout) == (5, 30, 25)
    assert (config.poll_every(hears=True), config.poll_every(hears=False)) == (5, 0.5)
    assert (config.listen, config.listen_dsn) == (True, None)
    assert (config.max_crashes, config.log_level) == (3, "INFO")
    assert config.size().most == config.size().least == len(os.sched_getaffinity(0))
    assert (config.health_port, config.health_host) == (None, "127.0.0.1")
    retentions = (config.retention_finished, config.retention_failures)
    assert (*retentions, config.retention_dead_letters, config.retention_audit) == (7, 30, 90, 365)


def test_arguments_beat_the_environment_beats_the_defaults() -> None:
    environ = {
        "PGQUEUE_DSN": "postgresql://env",
        "PGQUEUE_LEASE": "60",
        "PGQUEUE_CONCURRENCY": "7",
        "PATH": "x",
    }
    config = Config.load(environ, dsn="postgresql://arg", lease=None)
    assert (config.dsn, config.lease, config.concurrency, config.heartbeat) == ("postgresql://arg", 60, 7, 5)


def test_every_field_has_a_variable() -> None:
    values = {
        "dsn": "postgresql://h/d",
        "schema": "jobs",
        "listen": "False",
        "listen_dsn": "postgresql://direct/d",
        "poll_interval": "1.5",
        "heartbeat": "2",
        "lease": "9",
        "shutdown_timeout": "0",
        "pool": "prefork",
        "concurrency": "3",
        "processes": "1",
        "autoscale": "8, 2",
        "task_pools": "threads:20, asyncio:200",
        "max_tasks_per_child": "100",
        "max_memory_per_child": "200000",
        "soft_time_limit": "50",
        "time_limit": "60.5",
        "max_crashes": "4",
        "health_port": "8080",
        "health_host": "127.0.0.2",
        "retention_finished": "0.5",
        "retention_failures": "2",
        "retention_dead_letters": "3",
        "retention_audit": "4",
        "log_level": "debug",
        "queue": "high",
        "priority": "9",
    }
    assert values.keys() == {field.name for field in dataclasses.fields(Config)}
    config = Config.load({f"PGQUEUE_{name.upper()}": text for name, text in values.items()})
    found = {name: getattr(config, name) for name in values}
    assert found == {
        "dsn": "postgresql://h/d",
        "schema": "jobs",
        "listen": False,
        "listen_dsn": "postgresql://direct/d",
        "poll_interval": 1.5,
        "heartbeat": 2.0,
        "lease": 9.0,
        "shutdown_timeout": 0.0,
        "pool": "prefork",
        "concurrency": 3,
        "processes": 1,
        "autoscale": (8, 2),
        "task_pools": "threads:20,asyncio:200",
        "max_tasks_per_child": 100,
        "max_memory_per_child": 200000,
        "soft_time_limit": 50.0,
        "time_limit": 60.5,
        "max_crashes": 4,
        "health_port": 8080,
        "health_host": "127.0.0.2",
        "retention_finished": 0.5,
        "retention_failures": 2.0,
        "retention_dead_letters": 3.0,
        "retention_audit": 4.0,
        "log_level": "DEBUG",
        "queue": "high",
        "priority": 9,
    }


@pytest.mark.parametrize(
    ("settings", "executors", "slots"),
    [
        ({"concurrency": 3}, 3, 1),
        ({"pool": "threads"}, 1, 10),
        ({"pool": "threads", "processes": 2, "concurrency": 4}, 2, 4),
        ({"pool": "asyncio"}, 1, 100),
        ({"pool": "solo"}, 1, 1),
        ({"pool": "solo", "concurrency": 4, "autoscale": (8, 2)}, 1, 1),
    ],
)
def test_a_pool_has_executors_and_slots(settings: dict[str, Any], executors: int, slots: int) -> None:
    config = Config(**settings)
    assert config.size() == PoolSize(executors, executors, slots)
    assert config.size().jobs == executors * slots


@pytest.mark.parametrize(
    ("settings", "complaint"),
    [
        ({"pool": "gevent"}, "pool must be one of prefork, threads, asyncio, solo, got 'gevent'"),
        ({"processes": 2}, "processes is for the pools threads and asyncio"),
        ({"pool": "threads", "autoscale": (4, 2)}, "autoscale is for pool prefork"),
        ({"pool": "threads", "processes": 65}, "processes must be a whole number from 1 to 64, got 65"),
    ],
)
def test_a_pool_that_does_not_fit_is_refused(settings: dict[str, Any], complaint: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(complaint)):
        Config.load({}, **settings)


def test_a_poll_interval_that_is_given_holds_with_and_without_notifications() -> None:
    config = Config(poll_interval=2)
    assert (config.poll_every(hears=True), config.poll_every(hears=False)) == (2, 2)


@pytest.mark.parametrize(
    ("value", "expected"), [("1", True), ("on", True), ("0", False), ("No", False), (True, True)]
)
def test_a_flag_is_read(value: object, expected: bool) -> None:
    assert Config(listen=value).listen is expected  # type: ignore[arg-type]


def test_the_password_of_listen_dsn_stays_hidden_too() -> None:
    assert "secret" not in repr(Config(listen_dsn="postgresql://user:secret@host/db"))


def test_an_empty_variable_counts_as_unset() -> None:
    assert Config.load({"PGQUEUE_DSN": "", "PGQUEUE_LEASE": ""}) == Config()


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("dsn", 5),
        ("dsn", " "),
        ("schema", "PgQueue"),
        ("schema", "pg_queue"),
        ("schema", "1a"),
        ("schema", 'a"b'),
        ("schema", "a\n"),
        ("schema", "a" * 49),
        ("poll_interval", 0),
        ("poll_interval", math.nan),
        ("heartbeat", "5"),
        ("heartbeat", True),
        ("lease", math.inf),
        ("lease", 10**400),
        ("shutdown_timeout", -1),
        ("shutdown_timeout", False),
        ("concurrency", 0),
        ("concurrency", 1.5),
        ("max_crashes", 0),
        ("listen", "maybe"),
        ("listen", None),
        ("listen_dsn", " "),
        ("health_port", -1),
        ("health_port", 65536),
        ("health_port", True),
        ("health_port", "http"),
        ("health_host", " "),
        ("health_host", None),
        ("retention_finished", 0),
        ("retention_failures", -1),
        ("retention_dead_letters", None),
        ("retention_audit", "1y"),
        ("log_level", "LOUD"),
        ("log_level", 10),
        ("queue", "a b"),
        ("priority", 10),
        ("priority", -1),
    ],
)
def test_a_wrong_value_is_refused_by_name(name: str, value: object) -> None:
    with pytest.raises(ConfigError, match=f"^{name} "):
        Config(**{name: value})


def test_the_limits_themselves_are_fine() -> None:
    Config(schema="a" * 48, lease=15, heartbeat=5, shutdown_timeout=0, concurrency=1, priority=0)
    Config(schema="_x9", priority=9)


def test_lease_must_be_three_heartbeats() -> None:
    with pytest.raises(ConfigError, match=r"^lease must be at least 3 times heartbeat \(11 s\), got 30$"):
        Config.load({"PGQUEUE_HEARTBEAT": "11"})
    with pytest.raises(ConfigError, match=r"got 14\.9"):
        Config(lease=14.9)


def test_all_errors_are_reported_together_with_names_meant() -> None:
    environ = {
        "PGQUEUE_LEASE": "long",
        "PGQUEUE_HEARTBEAT": "20",
        "PGQUEUE_POL_INTERVAL": "3",
        "PGQUEUE_TEST_DSN": "elsewhere",
    }
    with pytest.raises(ConfigError) as caught:
        Config.load(environ, priority=11, shcema="x", frobnicate=1)
    lines = str(caught.value).split("; ")
    assert "unknown variable PGQUEUE_POL_INTERVAL, did you mean PGQUEUE_POLL_INTERVAL?" in lines
    assert "unknown option 'shcema', did you mean 'schema'?" in lines
    assert "unknown option 'frobnicate'" in lines
    assert "PGQUEUE_LEASE must be a number above 0 and at most 1e+09, got 'long'" in lines
    assert "priority must be a whole number from 0 to 9, got 11" in lines
    assert "TEST_DSN" not in str(caught.value)
    assert "times heartbeat" not in str(caught.value)


def test_replace_checks_again() -> None:
    config = Config(dsn="postgresql://h/d")
    assert config.replace(dsn=None, priority=1) == Config(priority=1)
    with pytest.raises(ConfigError, match="lease"):
        config.replace(lease=1.0)
    with pytest.raises(ConfigError, match=r"unknown option 'prioritty', did you mean 'priority'\?"):
        config.replace(prioritty=1)


def test_it_is_frozen() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        Config().dsn = "x"  # type: ignore[misc]


SECRET = "s3cr3t"


@pytest.mark.parametrize(
    "dsn",
    [
        f"postgresql://bob:{SECRET}@host:5432/db?sslmode=require",
        f"postgresql+psycopg://bob:{SECRET}@/db",
        f"postgres://bob:{SECRET}@a@b/{SECRET}#?@host/db",
        f"postgres://:{SECRET}@host/db",
        f"postgresql://host/db?user=bob&password={SECRET}&sslmode=require",
        f"postgresql://host/db?sslPassword={SECRET}",
        f"host=h password={SECRET} dbname=db",
        f"host=h password = '{SECRET} \\' {SECRET}' dbname=db",
        f"host=h PASSWORD=a\\ {SECRET} dbname=db",
        f"password='un {SECRET} terminated",
    ],
)
def test_a_password_is_never_shown(dsn: str) -> None:
    config = Config(dsn=dsn)
    assert config.masked_dsn is not None
    assert SECRET not in config.masked_dsn
    assert SECRET not in repr(config)
    assert "***" in repr(config)


def test_a_dsn_without_a_password_is_shown_as_it_is() -> None:
    for dsn in ("postgresql://bob@host:5432/db", "postgresql:///db", "host=h dbname=db"):
        assert Config(dsn=dsn).masked_dsn == dsn
    assert Config().masked_dsn is None
    assert "dsn=None" in repr(Config())
    assert Config(dsn="postgresql://bob:x@host/db").masked_dsn == "postgresql://bob:***@host/db"
    assert Config(dsn="host=h password=x dbname=db").masked_dsn == "host=h password=*** dbname=db"


def test_pools_that_tasks_ask_for_have_sizes_of_their_own() -> None:
    config = Config(concurrency=3, task_pools="threads:20,prefork:2")
    assert config.size("prefork") == PoolSize(3, 3, 1), "the worker's own is -c"
    assert config.size("threads") == PoolSize(1, 1, 20)
    assert config.size("asyncio") == PoolSize(1, 1, 100)
    beside = Config(pool="asyncio", concurrency=200, processes=2, task_pools="prefork:2")
    assert (beside.size(), beside.size("prefork")) == (PoolSize(2, 2, 200), PoolSize(2, 2, 1))


@pytest.mark.parametrize(
    "sizes", ["", "threads", "threads:0", "threads:x", "solo:1", "threads:1,threads:2", "threads:1,", 5]
)
def test_sizes_that_are_none(sizes: object) -> None:
    with pytest.raises(ConfigError, match="task_pools must be pools with their jobs at a time, as in"):
        Config(task_pools=sizes)  # type: ignore[arg-type]
