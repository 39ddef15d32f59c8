"""The pytest plugin of pgqueue: the fixture `pgqueue_app` and what it is made from, see docs/testing.md.

pytest imports this in every run where pgqueue is installed, so it imports pgqueue only when a fixture is
used: that is why it is no part of the package.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Generator, Iterator
from contextlib import ExitStack, contextmanager, suppress
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from pgqueue import PgQueue
    from pgqueue.testing import QueueDatabase, QueueTester, Workbench


def pytest_addoption(parser: pytest.Parser) -> None:
    """The settings: which application, which server."""
    server = (
        "the Postgres server on which a database is made for the run (default: $PGQUEUE_TEST_DSN, a "
        "container, or the server of pgqueue[embedded])"
    )
    parser.addini("pgqueue_app", "the application under test, as module:attribute")
    parser.addini("pgqueue_test_dsn", server)
    group = parser.getgroup("pgqueue")
    group.addoption("--pgqueue-test-dsn", metavar="DSN", default=None, help=server)


@pytest.hookimpl(hookwrapper=True)  # the older kind: this must load with whatever pytest is there
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Generator[None, Any, None]:
    """Beside a failure: what the test has run, and what is enqueued."""
    report = (yield).get_result()
    if call.when == "call" and report.failed:
        tester = getattr(item, "funcargs", {}).get("pgqueue_app")
        if tester is not None:
            with suppress(Exception):  # the failure itself is what matters
                report.sections.append(("pgqueue", str(tester)))


@pytest.fixture(scope="session")
def pgqueue_target(pytestconfig: pytest.Config) -> Any:
    """Which application is tested: override it to return your `PgQueue`, or its `module:attribute`.

    By default what `pgqueue_app` says in pytest's configuration, else the only one that is installed.
    """
    return pytestconfig.getini("pgqueue_app") or None


@pytest.fixture(scope="session")
def pgqueue_dsn() -> str | None:
    """The database that the queue is put into, in a schema of its own: override it to return that of your
    tests. By default None: a database is made for the run.
    """
    return None


@pytest.fixture(scope="session")
def pgqueue_database(pytestconfig: pytest.Config, pgqueue_dsn: str | None) -> Iterator[QueueDatabase]:
    """The database of this run, where tables of your own may go too: `dsn`, `sqlalchemy_url`."""
    from pgqueue.testing import open_database

    server = pytestconfig.getoption("pgqueue_test_dsn")
    if not server and not os.environ.get("PGQUEUE_TEST_DSN"):
        server = pytestconfig.getini("pgqueue_test_dsn")
    with ExitStack() as stack:
        with _told():
            database = stack.enter_context(open_database(pgqueue_dsn, server=server or None))
        yield database


@pytest.fixture(scope="session")
def _pgqueue_workbenches(pgqueue_database: QueueDatabase) -> Iterator[Callable[[PgQueue], Workbench]]:
    """One for each application, made when it is first tested."""
    from pgqueue.testing import open_workbench

    known: dict[PgQueue, Workbench] = {}
    with ExitStack() as stack:

        def workbench_for(app: PgQueue) -> Workbench:
            if app not in known:
                known[app] = stack.enter_context(open_workbench(app, pgqueue_database))
            return known[app]

        yield workbench_for


@pytest.fixture
def pgqueue_app(
    pytestconfig: pytest.Config,
    pgqueue_target: Any,
    _pgqueue_workbenches: Callable[[PgQueue], Workbench],
) -> Iterator[QueueTester]:
    """The application's queue in this test, empty at its start; see `pgqueue.testing.QueueTester`."""
    with ExitStack() as stack:
        with _told():
            app = _application(pgqueue_target, pytestconfig)
            tester = stack.enter_context(_pgqueue_workbenches(app).test())
        yield tester


def _application(target: object, config: pytest.Config) -> PgQueue:
    from pgqueue import ConfigError, PgQueue
    from pgqueue.discovery import find_target
    from pgqueue.loading import load_app

    if isinstance(target, PgQueue):
        return target
    if not isinstance(target, str | None):
        raise ConfigError(
            f"the fixture pgqueue_target must return a PgQueue or its module:attribute, got {target!r}"
        )
    found = find_target(target)
    if found is None:
        raise ConfigError(
            "no application to test: say pgqueue_app = module:attribute in pytest's configuration, or write "
            "a fixture pgqueue_target that returns it"
        )
    if str(config.rootpath) not in sys.path:
        sys.path.append(str(config.rootpath))
    return load_app(found)


@contextmanager
def _told() -> Iterator[None]:
    """Errors that say by themselves what is wrong come without a traceback."""
    from pgqueue import PgQueueError

    try:
        yield
    except PgQueueError as error:
        raise pytest.fail.Exception(f"pgqueue: {error}", pytrace=False) from None
