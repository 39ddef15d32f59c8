"""Where the Postgres of a run of tests comes from, and what is made on it.

In this order: a DSN; a container, where a Docker engine answers and testcontainers is installed; the server
of the wheel that `pgqueue[embedded]` brings. The last two are private to this process, do not wait for the
disk, and are gone with it.
"""

from __future__ import annotations

import contextlib
import os
import warnings
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Final

from pgqueue.database.migrate import upgrade
from pgqueue.database.temporary import temporary_database, temporary_schema, url_of
from pgqueue.errors import ConfigError

VARIABLE: Final = "PGQUEUE_TEST_DSN"
OPTION: Final = "--pgqueue-test-dsn"
SETTING: Final = "pgqueue_test_dsn"

IMAGE: Final = "postgres:18"
_CARELESS: Final = {
    "fsync": "off",
    "full_page_writes": "off",
    "synchronous_commit": "off",
    "max_wal_size": "256MB",
    "shared_buffers": "32MB",
}
"""Nobody needs the data after a crash."""


class QueueDatabase:
    """The database of a run of tests, and the schemas with a queue in it.

    Attributes:
        dsn: Its URL. Tables of your own may go there too.
    """

    def __init__(self, dsn: str, *, own: bool, stack: ExitStack) -> None:
        self.dsn = dsn
        self._own = own
        self._stack = stack
        self._schemas: dict[str, str] = {}

    @property
    def sqlalchemy_url(self) -> str:
        """The same for SQLAlchemy's `create_engine` and `create_async_engine`, on psycopg."""
        return url_of(self.dsn).replace("postgresql://", "postgresql+psycopg://", 1)

    def schema_for(self, name: str) -> str:
        """The schema in which an application finds its queue that has it in one of this name.

        The same in a database of our own; in another one it is made under a name that nobody has.
        """
        if name not in self._schemas:
            if self._own:
                upgrade(self.dsn, schema=name)
                self._schemas[name] = name
            else:
                self._schemas[name] = self._stack.enter_context(temporary_schema(self.dsn))
        return self._schemas[name]


@contextlib.contextmanager
def open_database(dsn: str | None = None, *, server: str | None = None) -> Iterator[QueueDatabase]:
    """A database for a run of tests; what was made for it is dropped at the end.

    Args:
        dsn: A database of yours, in which the queue gets a schema of its own; None for a new database.
        server: The DSN of the server to make that on; None for $PGQUEUE_TEST_DSN, a container, or the
            wheel's.

    Raises:
        ConfigError: There is no Postgres to be had; the message says what was tried.
        DatabaseUnavailable: The one that was named cannot be reached.
        PermissionDenied: The role may not create a database, or a schema.
    """
    with ExitStack() as stack:
        own = dsn is None
        if dsn is None:
            dsn = stack.enter_context(temporary_database(server or _find_server(stack)))
        yield QueueDatabase(url_of(dsn), own=own, stack=stack)


def _find_server(stack: ExitStack) -> str:
    """The DSN of a server that may create databases, started if need be; it ends with the stack."""
    if given := os.environ.get(VARIABLE):
        return given
    if docker_answers():
        with contextlib.suppress(ImportError):
            return stack.enter_context(_container())
    from pgqueue.database.embedded import EmbeddedPostgres

    try:
        return stack.enter_context(EmbeddedPostgres(settings=_CARELESS)).dsn
    except ConfigError as error:
        raise ConfigError(
            f"no Postgres for the tests: set {VARIABLE}, {OPTION} or {SETTING} to a server that may be used, "
            "or pip install 'pgqueue[embedded]', or start Docker and pip install testcontainers "
            f"(Docker: {'answers' if docker_answers() else 'no engine answers'}; {error})"
        ) from error


@contextlib.contextmanager
def _container() -> Iterator[str]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from testcontainers.postgres import PostgresContainer

        options = " ".join(f"-c {name}={value}" for name, value in _CARELESS.items())
        container = PostgresContainer(IMAGE, driver=None).with_command(f"postgres {options}")
        container.start()
    try:
        yield str(container.get_connection_url())
    finally:
        container.stop()


def docker_answers() -> bool:
    """Whether a Docker engine is really there; a client or a socket file alone is not."""
    if not os.environ.get("DOCKER_HOST") and not Path("/var/run/docker.sock").exists():
        return False
    try:
        import docker  # type: ignore[import-untyped]

        client = docker.from_env(timeout=3)
        try:
            return bool(client.ping())
        finally:
            client.close()
    except Exception:  # whatever it is, there is another way
        return False
