"""A database, or a schema in somebody else's database, that is made for a run of tests and dropped after it.

What was there before is neither read nor changed: a new database has a name that nobody has, a new schema
too, and a schema that exists already is refused.
"""

from __future__ import annotations

import contextlib
import secrets
from collections.abc import Iterator
from typing import Any, Final
from urllib.parse import quote, urlencode

import psycopg
from psycopg.conninfo import conninfo_to_dict
from psycopg.sql import SQL, Identifier

from pgqueue.database.dsn import connect_options, one_line
from pgqueue.database.migrate import upgrade
from pgqueue.errors import DatabaseError, DatabaseUnavailable, PermissionDenied

PREFIX: Final = "pgqueue_test_"
"""Of the names of databases and schemas that are made here."""


def url_of(dsn: str, **changes: str) -> str:
    """A DSN as a URL, with these of its parts changed."""
    given = {**conninfo_to_dict(dsn), **changes}
    parts: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
    user, password = (quote(str(parts.pop(name, "")), safe="") for name in ("user", "password"))
    host, port = str(parts.get("host", "")), str(parts.get("port", ""))
    address = ""
    if host and not any(mark in host + port for mark in ",/"):
        del parts["host"]
        parts.pop("port", None)
        address = (f"[{host}]" if ":" in host else host) + (f":{port}" if port else "")
    database = quote(str(parts.pop("dbname", "")), safe="")
    who = user + (f":{password}" if password else "")
    rest = f"?{urlencode(parts, quote_via=quote)}" if parts else ""
    return f"postgresql://{who}{'@' if who else ''}{address}/{database}{rest}"


@contextlib.contextmanager
def temporary_database(server: str) -> Iterator[str]:
    """The URL of a new, empty database on the server of this DSN, which is dropped at the end.

    Raises:
        DatabaseUnavailable: The server cannot be reached.
        PermissionDenied: The role may not create databases.
    """
    name = f"{PREFIX}{secrets.token_hex(6)}"
    with _connected(server) as connection:
        try:
            # Not from template1, which fails while anybody is connected to that.
            connection.execute(SQL("CREATE DATABASE {} TEMPLATE template0").format(Identifier(name)))
        except psycopg.errors.InsufficientPrivilege as error:
            raise PermissionDenied(
                f"role {connection.info.user!r} may not create a database for the tests: {one_line(error)}; "
                "grant it CREATEDB, or put the queue into a database of yours with a fixture pgqueue_dsn"
            ) from error
    try:
        yield url_of(server, dbname=name)
    finally:
        with _connected(server) as connection:
            connection.execute(SQL("DROP DATABASE IF EXISTS {} WITH (FORCE)").format(Identifier(name)))


@contextlib.contextmanager
def temporary_schema(dsn: str) -> Iterator[str]:
    """The name of a new, migrated schema in this database, which is dropped at the end.

    Raises:
        DatabaseUnavailable: The database cannot be reached.
        PermissionDenied: The role may not create a schema there.
    """
    name = f"{PREFIX}{secrets.token_hex(6)}"
    with _connected(dsn) as connection:
        ((allowed,),) = connection.execute("SELECT has_database_privilege(current_database(), 'CREATE')")
        if not allowed:
            raise PermissionDenied(
                f"role {connection.info.user!r} may not create a schema for the tests in database "
                f"{connection.info.dbname!r}; grant it CREATE on the database"
            )
    try:
        upgrade(dsn, schema=name)
        yield name
    finally:
        with _connected(dsn) as connection:
            connection.execute("SET lock_timeout = '10s'")
            try:
                connection.execute(SQL("DROP SCHEMA IF EXISTS {} CASCADE").format(Identifier(name)))
            except psycopg.errors.LockNotAvailable as error:
                raise DatabaseError(
                    f"the tests' schema {name} cannot be dropped: a session still uses it; close what the "
                    f"tests have opened, and DROP SCHEMA {name} CASCADE"
                ) from error


@contextlib.contextmanager
def _connected(dsn: str) -> Iterator[psycopg.Connection]:
    try:
        connection = psycopg.connect(dsn, autocommit=True, **connect_options(dsn))
    except psycopg.OperationalError as error:
        raise DatabaseUnavailable(
            f"cannot reach the tests' Postgres: {one_line(error)}; check $PGQUEUE_TEST_DSN, "
            "--pgqueue-test-dsn and pgqueue_test_dsn, which name a server, or a fixture pgqueue_dsn of yours"
        ) from error
    try:
        yield connection
    finally:
        connection.close()
