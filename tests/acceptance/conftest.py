"""Fixtures of the tests that run the real command; what they are made of is in `workers`."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from pgqueue.database.migrate import upgrade
from tests.acceptance.workers import Gate, Jobs, Ledger, Worker, Workers


@pytest.fixture
def jobs(db: str) -> Iterator[Jobs]:
    """The empty queue of this test."""
    with closing(Jobs(db)) as jobs:
        yield jobs


@pytest.fixture
def workers(db: str, tmp_path: Path) -> Iterator[Workers]:
    """Starts workers on the queue of this test."""
    with Workers(db, tmp_path) as workers:
        yield workers


@pytest.fixture
def ledger(workers: Workers) -> Ledger:
    """What the task bodies of these workers did."""
    return workers.ledger


@pytest.fixture
def gate(tmp_path: Path) -> Iterator[Gate]:
    """Opened at the latest when the test ends, before its workers are stopped."""
    gate = Gate(tmp_path)
    yield gate
    gate.open()


@dataclass(frozen=True)
class Shared:
    """One worker with two executors, and the queue it serves, for all tests of a module."""

    jobs: Jobs
    workers: Workers
    worker: Worker

    @property
    def ledger(self) -> Ledger:
        return self.workers.ledger


@pytest.fixture(scope="module")
def shared(postgres: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Shared]:
    """A worker on a database of its own, for tests that leave it as it is."""
    database = postgres.create_database()
    try:
        upgrade(database.dsn)
        folder = tmp_path_factory.mktemp("shared")
        with closing(Jobs(database.dsn)) as jobs, Workers(database.dsn, folder) as workers:
            worker = workers.start("-c", "2")
            jobs.finished(jobs.add("echo", "warm"))
            yield Shared(jobs, workers, worker)
    finally:
        postgres.drop_database(database)
