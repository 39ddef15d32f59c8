"""Fixtures of the tests that run the real command; what they are made of is in `workers`."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from pgqueue.database.migrate import upgrade
from tests.acceptance.workers import APPS, Gate, Jobs, Ledger, Worker, Workers
from tests.servers import Server, own_server


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


@contextmanager
def own_queue(postgres: Any, folder: Path, apps: Path = APPS) -> Iterator[tuple[Jobs, Workers]]:
    """An empty queue in a database of its own, for all tests of a module."""
    database = postgres.create_database()
    try:
        upgrade(database.dsn)
        with closing(Jobs(database.dsn)) as jobs, Workers(database.dsn, folder, apps) as workers:
            yield jobs, workers
    finally:
        postgres.drop_database(database)


@pytest.fixture(scope="module")
def shared(postgres: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Shared]:
    """A worker on a database of its own, for tests that leave it as it is."""
    with own_queue(postgres, tmp_path_factory.mktemp("shared")) as (jobs, workers):
        worker = workers.start("-c", "2")
        jobs.finished(jobs.add("echo", "warm"))
        yield Shared(jobs, workers, worker)


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    """A server that the tests of a module may stop and kill."""
    with own_server() as server:
        yield server


@dataclass(frozen=True)
class Place:
    """A queue on a server that comes and goes."""

    server: Server
    jobs: Jobs
    workers: Workers

    @property
    def ledger(self) -> Ledger:
        return self.workers.ledger


@pytest.fixture
def place(server: Server, tmp_path: Path) -> Iterator[Place]:
    """An empty queue on that server, which is up again when the workers are stopped."""
    server.start()
    dsn = server.new_database()
    with closing(Jobs(dsn)) as jobs, Workers(dsn, tmp_path) as workers:
        yield Place(server, jobs, workers)
        server.start()
