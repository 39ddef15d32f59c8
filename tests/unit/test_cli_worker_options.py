"""`pgqueue worker`: what -Q means, and that wrong flags are told before anything starts."""

from __future__ import annotations

from typing import Any

import pytest
from click.testing import CliRunner

from pgqueue.cli.main import cli
from pgqueue.cli.worker import parse_queues
from pgqueue.errors import ConfigError
from pgqueue.worker import run


@pytest.mark.parametrize(
    ("text", "queues", "weights"),
    [
        (None, [], None),
        ("high", ["high"], None),
        ("high,normal", ["high", "normal"], None),
        (" high , normal ", ["high", "normal"], None),
        ("high:3,normal:1", ["high", "normal"], {"high": 3.0, "normal": 1.0}),
        ("high:0.5", ["high"], {"high": 0.5}),
        ("a:b", ["a:b"], None),
        ("a:b:2", ["a:b"], {"a:b": 2.0}),
        ("a.b_c-d", ["a.b_c-d"], None),
    ],
)
def test_queues_are_read(text: str | None, queues: list[str], weights: dict[str, float] | None) -> None:
    assert parse_queues(text) == (queues, weights)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "a queue name is 1 to 63"),
        ("a,,b", "a queue name is 1 to 63"),
        ("a b", "a queue name is 1 to 63"),
        ("x" * 64, "a queue name is 1 to 63"),
        (":3", "a queue name is 1 to 63"),
        ("a,b,a", "queue 'a' is named twice"),
        ("a:1,a:2", "queue 'a' is named twice"),
        ("a:0", r"a weight must be above 0 and at most"),
        ("a:3,b", "without one: b"),
        ("a,b:3,c", "without one: a, c"),
    ],
)
def test_wrong_queues_are_refused(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse_queues(text)


class Started:
    """Stands for the worker: what it was started with."""

    def __init__(self, finished: bool = True) -> None:
        self.finished = finished
        self.target: str | None = None
        self.given: dict[str, Any] = {}

    def __call__(self, target: str, **given: Any) -> bool:
        self.target, self.given = target, given
        return self.finished


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> Started:
    started = Started()
    monkeypatch.setattr(run, "run_worker", started)
    for name in ("PGQUEUE_APP", "PGQUEUE_DSN"):
        monkeypatch.delenv(name, raising=False)
    return started


def invoke(*arguments: str) -> tuple[Any, str]:
    result = CliRunner().invoke(cli, arguments, standalone_mode=False)
    return result.exception or result.return_value, result.output


def test_flags_reach_the_worker(started: Started) -> None:
    status, _ = invoke(
        *("-A", "shop.app:app", "--dsn", "postgresql://x/y", "--schema", "jobs"),
        *("worker", "-Q", "high:3,normal:1", "-c", "4", "-l", "debug", "--heartbeat", "1", "--lease", "9"),
        *("--poll-interval", "2", "--shutdown-timeout", "0", "--max-crashes", "5"),
        *("--listen-dsn", "postgresql://direct/y", "--no-listen"),
    )
    assert status == 0
    assert started.target == "shop.app:app"
    assert started.given["queues"] == ["high", "normal"]
    assert started.given["weights"] == {"high": 3.0, "normal": 1.0}
    flags = started.given["flags"]
    assert flags["log_level"] == "DEBUG"
    expected = {
        "dsn": "postgresql://x/y",
        "schema": "jobs",
        "concurrency": 4,
        "heartbeat": 1.0,
        "lease": 9.0,
        "poll_interval": 2.0,
        "listen_dsn": "postgresql://direct/y",
        "listen": False,
        "shutdown_timeout": 0.0,
        "max_crashes": 5,
    }
    assert {name: flags[name] for name in expected} == expected


def test_flags_that_were_not_given_are_left_to_the_application(started: Started) -> None:
    invoke("-A", "shop.app:app", "worker")
    assert {value for value in started.given["flags"].values() if value is not None} == set()
    assert (started.given["queues"], started.given["weights"]) == ([], None)


def test_a_worker_that_killed_jobs_exits_with_3(started: Started) -> None:
    started.finished = False
    assert invoke("-A", "shop.app:app", "worker")[0] == 3


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["worker"], "a worker needs an application"),
        (["-A", "a:b", "worker", "-Q", "a b"], "a queue name is 1 to 63"),
        (["-A", "a:b", "worker", "-Q", "a,a"], "named twice"),
        (["-A", "a:b", "worker", "-c", "0"], "0 is not in the range"),
        (["-A", "a:b", "worker", "-l", "loud"], "'loud' is not one of"),
    ],
)
def test_wrong_usage_starts_nothing(started: Started, arguments: list[str], message: str) -> None:
    error, _ = invoke(*arguments)
    assert message in error.format_message()
    assert error.exit_code == 2
    assert started.target is None


def test_settings_that_do_not_fit_together_start_nothing(started: Started) -> None:
    error, _ = invoke("-A", "a:b", "worker", "--heartbeat", "10", "--lease", "20")
    assert isinstance(error, ConfigError)
    assert "lease must be at least 3 times heartbeat" in str(error)
    assert started.target is None
