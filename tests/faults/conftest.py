"""Fixtures of the fault suite.

What it is made of: `scene` (load, fault, verdict), `oracle` (the judge), `report` (the table in the docs),
`producer.py` and `apps/` (what runs).
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.acceptance.conftest import gate, jobs, ledger, workers
from tests.faults.report import HEAD, Report
from tests.faults.scene import Scene, own_scene

__all__ = ["gate", "jobs", "ledger", "workers"]  # fixtures of the acceptance tests, here too

REPORT = pytest.StashKey[Report]()


@pytest.fixture(scope="session")
def report(pytestconfig: pytest.Config) -> Report:
    """Collects the verdicts of this run."""
    return pytestconfig.stash.setdefault(REPORT, Report())


@pytest.fixture
def scene(fresh_dsn: str, tmp_path: Path, report: Report) -> Iterator[Scene]:
    """A queue in a database of its own, on the run's server."""
    with own_scene(fresh_dsn, tmp_path, report) as scene:
        yield scene


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    lines = config.stash[REPORT].lines() if REPORT in config.stash else []
    if lines:
        terminalreporter.section("what each fault cost")
        for line in [*HEAD, *lines]:
            terminalreporter.write_line(line)


def pytest_sessionfinish(session: pytest.Session) -> None:
    """With PGQUEUE_WRITE_DOCS=1 the table goes into docs/reliability.md."""
    if os.environ.get("PGQUEUE_WRITE_DOCS") and REPORT in session.config.stash:
        session.config.stash[REPORT].write()
