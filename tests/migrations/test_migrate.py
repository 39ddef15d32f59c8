"""`pgqueue migrate`: once, twice, two at once, on paper, and down again."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import psycopg
import pytest

from pgqueue.cli.status import ExitStatus
from pgqueue.database import migrate
from pgqueue.errors import DatabaseError

HEAD = migrate.head_revision()
RANGE = f"{migrate.OLDEST_REVISION} to {HEAD}"
TABLES = {"jobs", "finished_jobs", "failures", "dead_letters", "workers", "wake", "audit_log", "meta"}


def start(dsn: str | None, *arguments: str, cwd: Path | None = None) -> subprocess.Popen[str]:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PGQUEUE_")}
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, sys.path))
    if dsn is not None:
        environment["PGQUEUE_DSN"] = dsn
    return subprocess.Popen(
        [sys.executable, "-m", "pgqueue.cli.main", *arguments],
        env=environment,
        cwd=cwd,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def pgqueue(dsn: str | None, *arguments: str, cwd: Path | None = None) -> tuple[int, str, str]:
    """Exit status, output and errors of one command."""
    with start(dsn, *arguments, cwd=cwd) as process:
        out, err = process.communicate(timeout=90)
    return process.returncode, out, err


def schema_of(dsn: str, schema: str = "pgqueue") -> dict[str, str]:
    """Everything in the schema, with its definition, under the name `pgqueue` whatever it is called."""
    queries = {
        "column": "select table_name || '.' || column_name, concat_ws(' ', data_type, is_nullable,"
        " column_default, collation_name, is_identity) from information_schema.columns"
        " where table_schema = %(schema)s",
        "index": "select indexname, indexdef from pg_indexes where schemaname = %(schema)s",
        "constraint": "select conrelid::regclass || '.' || conname, pg_get_constraintdef(oid)"
        " from pg_constraint where connamespace = %(schema)s::regnamespace",
        "function": "select oid::regprocedure::text, pg_get_functiondef(oid) || coalesce(proacl::text, '')"
        " || coalesce(obj_description(oid), '') from pg_proc where pronamespace = %(schema)s::regnamespace",
        "view": "select viewname, definition from pg_views where schemaname = %(schema)s",
        "options": "select oid::regclass::text, concat_ws(' ', relkind, reloptions, relispartition)"
        " from pg_class where relnamespace = %(schema)s::regnamespace and relkind in ('r', 'p', 'S', 'v')",
    }
    with psycopg.connect(dsn, autocommit=True) as connection:
        found = {
            f"{kind} {name}": str(definition)
            for kind, text in queries.items()
            for name, definition in connection.execute(text.encode(), {"schema": schema})
        }
    return {
        name.replace(schema, "pgqueue"): value.replace(schema, "pgqueue") for name, value in found.items()
    }


def revision(dsn: str) -> str | None:
    return migrate.current_revision(dsn)


def test_migrating_twice_changes_nothing_the_second_time(fresh_dsn: str) -> None:
    assert pgqueue(fresh_dsn, "migrate") == (0, f"schema pgqueue is at revision {HEAD} now, was empty\n", "")
    first = schema_of(fresh_dsn)
    assert {name.removeprefix("options ") for name in first} >= {f"pgqueue.{table}" for table in TABLES}
    with psycopg.connect(fresh_dsn, autocommit=True) as connection:
        install = connection.execute("select install_id from pgqueue.meta").fetchall()
        connection.execute("select pgqueue.enqueue('t')")
    assert pgqueue(fresh_dsn, "migrate") == (0, f"schema pgqueue is at revision {HEAD} already\n", "")
    assert schema_of(fresh_dsn) == first
    with psycopg.connect(fresh_dsn, autocommit=True) as connection:
        assert connection.execute("select install_id from pgqueue.meta").fetchall() == install
        assert connection.execute("select count(*) from pgqueue.jobs").fetchone() == (1,)
    migrate.check_drift(fresh_dsn)


def test_two_at_once_migrate_once(fresh_dsn: str) -> None:
    waiting = (
        "select count(*) from pg_locks l join pg_database d on d.oid = l.database"
        " where d.datname = current_database() and locktype = 'advisory' and not granted"
    )
    with psycopg.connect(fresh_dsn, autocommit=True) as third:
        third.execute("select pg_advisory_lock(%s)", [migrate._LOCK_KEY])
        with start(fresh_dsn, "migrate") as one, start(fresh_dsn, "migrate") as other:
            try:
                deadline = time.monotonic() + 60
                while third.execute(waiting.encode()).fetchone() != (2,):
                    assert one.poll() is None, one.communicate()
                    assert other.poll() is None, other.communicate()
                    assert time.monotonic() < deadline, "both should wait for the lock"
                    time.sleep(0.02)
                found = third.execute("select to_regnamespace('pgqueue')").fetchone()
                assert found == (None,), "nobody may begin without the lock"
            finally:
                third.execute("select pg_advisory_unlock_all()")
            said = [process.communicate(timeout=90) for process in (one, other)]
    assert [process.returncode for process in (one, other)] == [0, 0], said
    assert sorted(out for out, _ in said) == [
        f"schema pgqueue is at revision {HEAD} already\n",
        f"schema pgqueue is at revision {HEAD} now, was empty\n",
    ]
    migrate.check_drift(fresh_dsn)


def test_the_script_on_paper_makes_the_same_schema(fresh_dsn: str, database: object) -> None:
    status, script, err = pgqueue(None, "migrate", "--sql")
    assert (status, err) == (0, "")
    with psycopg.connect(fresh_dsn, autocommit=True) as connection:
        connection.execute(script.encode())
    assert revision(fresh_dsn) == HEAD
    on_paper = schema_of(fresh_dsn)
    migrate.check_drift(fresh_dsn)
    assert pgqueue(fresh_dsn, "migrate")[:2] == (0, f"schema pgqueue is at revision {HEAD} already\n")
    assert on_paper == schema_of(database.dsn)  # type: ignore[attr-defined]


def test_another_schema_is_the_same_but_for_its_name(fresh_dsn: str, database: object) -> None:
    status, out, _ = pgqueue(fresh_dsn, "--schema", "jobs_of_shop", "migrate")
    assert (status, out) == (0, f"schema jobs_of_shop is at revision {HEAD} now, was empty\n")
    assert schema_of(fresh_dsn, "jobs_of_shop") == schema_of(database.dsn)  # type: ignore[attr-defined]
    assert revision(fresh_dsn) is None
    assert pgqueue(fresh_dsn, "--schema", "jobs_of_shop", "enqueue", "t")[0] == 0
    status, out, _ = pgqueue(fresh_dsn, "--schema", "jobs_of_shop", "inspect", "queues")
    assert (status, out.splitlines()[1].split()[:2]) == (0, ["default", "1"])


def test_down_to_nothing_and_up_again(fresh_dsn: str) -> None:
    migrate.upgrade(fresh_dsn)
    before = schema_of(fresh_dsn)
    with psycopg.connect(fresh_dsn, autocommit=True) as connection:
        connection.execute("select pgqueue.enqueue('t')")
    assert migrate.downgrade(fresh_dsn, "base") == HEAD
    left = {name for name in schema_of(fresh_dsn) if "alembic_version" not in name}
    assert left == set()
    assert revision(fresh_dsn) is None
    assert pgqueue(fresh_dsn, "inspect", "queues")[0] == ExitStatus.SCHEMA
    assert pgqueue(fresh_dsn, "migrate")[0] == 0
    assert schema_of(fresh_dsn) == before
    migrate.check_drift(fresh_dsn)


def test_a_failed_migration_leaves_nothing_behind(fresh_dsn: str) -> None:
    with psycopg.connect(fresh_dsn, autocommit=True) as connection:
        connection.execute("create schema pgqueue")
        connection.execute("create table pgqueue.audit_log ()")  # in the way of the migration's own
    before = schema_of(fresh_dsn)
    status, out, err = pgqueue(fresh_dsn, "migrate")
    assert (status, out) == (1, "")
    assert err.startswith("pgqueue: cannot migrate: ")
    assert err.count("\n") == 1
    assert "audit_log" in err
    assert schema_of(fresh_dsn) == before


@pytest.mark.parametrize(
    ("found", "message"),
    [
        ("0000", f"database is at revision 0000, this pgqueue works with {RANGE}; run `pgqueue migrate`"),
        (
            "9999",
            f"database is at revision 9999 and needs a pgqueue of 9998 or newer, this one is of {HEAD};"
            " upgrade pgqueue",
        ),
        (None, "the database has no schema 'pgqueue' of pgqueue; run `pgqueue migrate`"),
    ],
)
@pytest.mark.parametrize("command", [["inspect", "queues"], ["-A", "shop:app", "worker", "-c", "1"]], ids=str)
def test_on_another_revision_commands_and_workers_name_the_way_out(
    fresh_dsn: str, tmp_path: Path, found: str | None, message: str, command: list[str]
) -> None:
    (tmp_path / "shop.py").write_text("from pgqueue import PgQueue\napp = PgQueue('shop')\n")
    if found is not None:
        migrate.upgrade(fresh_dsn)
        with psycopg.connect(fresh_dsn, autocommit=True) as connection:
            connection.execute("update pgqueue.alembic_version set version_num = %s", [found])
            connection.execute("update pgqueue.meta set oldest_code_revision = '9998'")
    status, out, err = pgqueue(fresh_dsn, *command, cwd=tmp_path)
    assert (status, out) == (ExitStatus.SCHEMA, "")
    assert err.splitlines()[-1] == f"pgqueue: {message}"


def test_a_name_that_would_need_quoting_is_refused(fresh_dsn: str) -> None:
    for name in ("Jobs", "a b", "pg_jobs", 'x"; drop table y; --'):
        status, _, err = pgqueue(fresh_dsn, "--schema", name, "migrate")
        assert status == ExitStatus.USAGE
        assert err.startswith("pgqueue: schema must be ")
        with pytest.raises((DatabaseError, ValueError)):
            migrate.upgrade(fresh_dsn, schema=name)


def test_without_a_server_it_is_one_line(tmp_path: Path) -> None:
    status, out, err = pgqueue("postgresql://me:s3cret@127.0.0.1:1/x", "migrate")
    assert (status, out) == (ExitStatus.UNREACHABLE, "")
    assert err.startswith("pgqueue: cannot ")
    assert err.count("\n") == 1
    assert "s3cret" not in err


def test_a_large_day_is_not_indexed_and_the_index_is_whole_when_it_is_gone(fresh_dsn: str) -> None:
    """An index on it would hold up acks for as long as it takes to build."""
    migrate.upgrade(fresh_dsn, revision="0008")
    with psycopg.connect(fresh_dsn, autocommit=True) as connection:
        connection.execute("set timezone = 'UTC'")
        connection.execute(
            "insert into pgqueue.finished_jobs (id, state, queue, task, args, kwargs, priority, attempt,"
            " retries, crashes, rescues, enqueued_at, enqueued_by, headers, finished_at)"
            " select pgqueue.uuid7(), 'succeeded', 'q', 't', jsonb_build_array(repeat('x', 200)), '{}', 5, 1,"
            " 0, 0, 0, now(), 'me', '{}', current_date - interval '1 hour' from generate_series(1, 40000)"
        )
        migrate.upgrade(fresh_dsn)

        def missing() -> list[str]:
            rows = connection.execute(
                "select c.relname from pg_inherits i join pg_class c on c.oid = i.inhrelid"
                " where i.inhparent = 'pgqueue.finished_jobs'::regclass and not exists (select from"
                " pg_indexes x where x.tablename = c.relname and x.indexdef like '%correlation_id%')"
            )
            return [row[0] for row in rows]

        def valid() -> set[bool]:
            rows = connection.execute(
                "select indisvalid from pg_index where indrelid = 'pgqueue.finished_jobs'::regclass"
                " and indpred is not null"
            )
            return {row[0] for row in rows}

        assert len(missing()) == 1
        assert valid() == {False}
        migrate.check_drift(fresh_dsn)
        assert connection.execute("select pgqueue.make_partitions(16)").fetchone() == (4,)
        assert len(missing()) == 1, "new days have it"
        connection.execute("select pgqueue.drop_partitions(interval '0', interval '30 days')")
        assert missing() == []
        assert valid() == {True}
        migrate.check_drift(fresh_dsn)
