"""`pgqueue doctor`: everything it may find is provoked for real, and what it says mends it."""

from __future__ import annotations

import contextlib
import io
import json
import os
import pty
import secrets
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit, urlunsplit

import psycopg
import pytest
from psycopg.rows import dict_row

from pgqueue.cli.main import main
from pgqueue.database.doctor.blueprint import blueprint, read_script
from pgqueue.database.doctor.examine import CHECKS
from pgqueue.database.doctor.schema import definition_command
from pgqueue.database.doctor.server import READER, judge_version
from pgqueue.database.migrate import head_revision, upgrade
from pgqueue.worker.signals import STOP_SIGNALS
from tests.acceptance.workers import Gate, Jobs, Workers, eventually
from tests.faults.pgbouncer import pgbouncer
from tests.servers import MAJOR, Server, own_server

Row = dict[str, Any]


@dataclass(frozen=True)
class Report:
    """What the doctor said."""

    status: int
    document: Row
    err: str

    @property
    def checks(self) -> dict[str, Row]:
        return {check["name"]: check for check in self.document["checks"]}

    @property
    def levels(self) -> dict[str, str]:
        """Of the checks that are not ok."""
        return {name: check["level"] for name, check in self.checks.items() if check["level"] != "ok"}

    def findings(self, name: str) -> list[Row]:
        found: list[Row] = self.checks[name]["findings"]
        return found

    def finding(self, name: str, words: str = "") -> Row:
        """The one of this check whose text has these words."""
        found = [each for each in self.findings(name) if words in each["what"]]
        assert len(found) == 1, self.checks[name]
        assert found[0]["means"]
        assert found[0]["mend"]
        return found[0]


@dataclass(frozen=True)
class Doctor:
    """Runs `pgqueue doctor` on one database."""

    dsn: str | None

    def environment(self) -> dict[str, str]:
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("PGQUEUE_", "PG"))}
        for name in ("FORCE_COLOR", "CLICOLOR_FORCE", "TTY_COMPATIBLE", "COLUMNS"):
            kept.pop(name, None)
        kept |= {"TERM": "xterm-256color", "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
        return kept | ({"PGQUEUE_DSN": self.dsn} if self.dsn else {})

    def text(self, *flags: str, before: tuple[str, ...] = (), **environment: str) -> tuple[int, str, str]:
        """Exit status, output and errors."""
        done = subprocess.run(
            [sys.executable, "-m", "pgqueue.cli.main", *before, "doctor", *flags],
            env=self.environment() | environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=60,
        )
        assert "Traceback (most recent call last)" not in done.stderr, done.stderr
        assert "\x1b" not in done.stdout + done.stderr, "escape codes in a pipe"
        return done.returncode, done.stdout, done.stderr

    def __call__(self, *flags: str, before: tuple[str, ...] = (), **environment: str) -> Report:
        """The document, from the entry point in this process: starting another takes ten times as long."""
        out, err = io.StringIO(), io.StringIO()
        handlers = {number: signal.getsignal(number) for number in STOP_SIGNALS}
        with pytest.MonkeyPatch.context() as patch:
            for name in os.environ.keys() - self.environment().keys():
                patch.delenv(name)
            for name, value in (self.environment() | environment).items():
                patch.setenv(name, value)
            patch.setattr(sys, "argv", ["pgqueue", *before, "doctor", "--json", *flags])
            try:
                with redirect_stdout(out), redirect_stderr(err), pytest.raises(SystemExit) as exit:
                    main()
            finally:
                for number, handler in handlers.items():
                    signal.signal(number, handler)
        assert isinstance(exit.value.code, int)
        return report_of(exit.value.code, out.getvalue(), err.getvalue())


def report_of(status: int, out: str, err: str) -> Report:
    document = json.loads(out)
    assert document["ok"] is (status == 0)
    assert err.count("\n") == (status != 0)
    return Report(status, document, err)


def only(*names: str) -> list[str]:
    return [word for name in names for word in ("--only", name)]


@contextlib.contextmanager
def connected(dsn: str, **options: Any) -> Iterator[psycopg.Connection[Row]]:
    with closing(psycopg.connect(dsn, autocommit=True, row_factory=dict_row, **options)) as connection:
        yield connection


def run(dsn: str, *statements: str) -> None:
    with connected(dsn) as connection:
        for statement in statements:
            connection.execute(statement.encode())


def everything(dsn: str) -> list[Row]:
    """Every row and every definition of the schema that a careless examination could change."""
    with connected(dsn) as connection:
        tables = connection.execute(
            "select c.relname as name from pg_class c where c.relnamespace = 'pgqueue'::regnamespace"
            " and c.relkind = 'r' order by 1"
        ).fetchall()
        parts = [
            f"select '{row['name']}' as what, t::text as is from pgqueue.{row['name']} t" for row in tables
        ]
        parts += [
            "select relname, concat(relkind, reloptions, relacl, pg_get_indexdef(oid)) from pg_class"
            " where relnamespace = 'pgqueue'::regnamespace",
            "select proname, prosrc from pg_proc where pronamespace = 'pgqueue'::regnamespace",
        ]
        return connection.execute(f"{' union all '.join(parts)} order by 1, 2".encode()).fetchall()


@pytest.fixture
def broken_dsn(fresh_dsn: str) -> str:
    """A migrated database that the test may spoil."""
    upgrade(fresh_dsn)
    return fresh_dsn


def test_a_healthy_queue(jobs: Jobs, workers: Workers) -> None:
    workers.start("-c", "1")
    jobs.finished(jobs.add("echo", 1))
    status, out, err = Doctor(jobs.dsn).text("--fail-on", "hint")
    lines = out.splitlines()
    assert (status, err) == (0, ""), out
    assert [line.split()[:2] for line in lines[:-2]] == [["ok", name] for name in CHECKS]
    assert lines[-1] == f"{len(CHECKS)} checks: nothing is wrong"
    assert "PostgreSQL" in out
    assert "1 live" in out
    assert lines == [line.rstrip() for line in lines]


def test_the_list_of_checks_needs_no_database() -> None:
    status, out, _ = Doctor(None).text("--list")
    assert status == 0
    assert [line.split()[0] for line in out.splitlines()[1:]] == list(CHECKS)


SPOILT = (
    "drop index pgqueue.jobs_scheduled",
    "alter table pgqueue.jobs alter column args drop not null",
    "alter table pgqueue.jobs drop constraint jobs_priority_range",
    "drop index pgqueue.dead_letters_died_at",
    "create index dead_letters_died_at on pgqueue.dead_letters (task)",
    "alter table pgqueue.dead_letters drop constraint dead_letters_pkey",
    "drop index pgqueue.finished_jobs_id",
    "create index finished_jobs_id on only pgqueue.finished_jobs (id)",
    "create table pgqueue.stray (id integer)",
    "alter table pgqueue.audit_log add column stray text",
    "create index stray_index on pgqueue.jobs (task)",
    "drop function pgqueue.cancel",
    "drop function pgqueue.requeue",
    "create or replace function pgqueue.notify_is_stuck() returns boolean language sql as $$ select true $$",
    "drop view pgqueue.active_jobs",
)
MISSING_OR_DIFFERENT = (
    ("drift", "index jobs_scheduled of jobs is missing"),
    ("drift", "column jobs.args differs"),
    ("drift", "constraint jobs_priority_range of jobs is missing"),
    ("drift", "constraint dead_letters_pkey of dead_letters is missing"),
    ("drift", "index dead_letters_died_at of dead_letters differs"),
    ("drift", "index finished_jobs_id of finished_jobs is missing on"),
    ("functions", "function cancel is missing"),
    ("functions", "function requeue is missing"),
    ("functions", "function notify_is_stuck is not as the migrations made it"),
    ("functions", "view active_jobs is missing"),
)
STRAY = ("table stray", "column audit_log.stray", "index stray_index of jobs")


def test_a_schema_that_is_not_as_the_migrations_made_it(broken_dsn: str) -> None:
    doctor = Doctor(broken_dsn)
    schema = only("drift", "functions")
    with connected(broken_dsn) as connection:
        for statement in SPOILT:
            connection.execute(statement.encode())
        connection.execute("select pgqueue.enqueue('t'), pgqueue.enqueue('t')")
        with pytest.raises(psycopg.errors.UniqueViolation):  # leaves an invalid index behind
            connection.execute("create unique index concurrently half_made on pgqueue.jobs (task)")
    before = everything(broken_dsn)
    report = doctor(*schema)
    assert everything(broken_dsn) == before
    assert report.status == 1
    for check, what in MISSING_OR_DIFFERENT:
        finding = report.finding(check, what)
        assert (finding["level"], finding["fixable"]) == ("error", False)
        assert check != "functions" or finding["mend"].startswith("pgqueue migrate --sql | sed")
    for what in STRAY:
        assert report.finding("drift", what)["level"] == "hint"
    invalid = report.finding("drift", "index half_made of jobs is invalid")
    assert invalid["mend"] == "REINDEX INDEX CONCURRENTLY pgqueue.half_made"
    run(broken_dsn, "drop index pgqueue.half_made")

    for check in ("drift", "functions"):
        for finding in report.findings(check):
            if "half_made" not in finding["what"]:
                mend(broken_dsn, finding["mend"])
    assert doctor(*schema, "--fail-on", "hint").levels == {}, "the mends mend"


@cache
def migrate_sql() -> bytes:
    """What `pgqueue migrate --sql` prints."""
    command = [sys.executable, "-m", "pgqueue.cli.main", "migrate", "--sql"]
    return subprocess.run(command, capture_output=True, check=True).stdout


def mend(dsn: str, command: str) -> None:
    """Do what the doctor says: a statement after the other, or a pipe into psql without psql."""
    with connected(dsn) as connection:
        if command.startswith("pgqueue "):
            command, _, psql = command.partition(" | ")[2].rpartition(" | psql")
            done = subprocess.run(
                ["bash", "-c", command], capture_output=True, check=True, input=migrate_sql()
            )
            connection.execute(done.stdout)
            if "-c " in psql:
                connection.execute(psql.partition("-c ")[2].strip("'").encode())
            return
        for statement in command.partition(" --")[0].split("; "):
            connection.execute(statement.encode())


def test_the_mend_of_every_function_and_view_is_its_definition(dsn: str, tmp_path: Path) -> None:
    made = blueprint("pgqueue", head_revision())
    with connected(dsn) as connection:
        rows = connection.execute(
            "select relname, reloptions from pg_class where relnamespace = 'pgqueue'::regnamespace"
            " and relkind = 'r' and reloptions is not null"
        ).fetchall()
    assert made.options == {
        row["relname"]: dict(each.split("=") for each in row["reloptions"]) for row in rows
    }, "what is taken for the tables' settings is what they are made with"
    script = tmp_path / "migrate.sql"
    script.write_bytes(migrate_sql())

    class Visit:
        schema = "pgqueue"

        def command(self, *words: str) -> str:
            return f"cat {script}"

    names = [("function", name) for name in made.functions] + [("view", name) for name in made.views]
    assert len(names) > 20
    for kind, name in names:
        command = definition_command(Visit(), kind, name).partition(" | psql")[0]  # type: ignore[arg-type]
        text = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=True).stdout
        found = read_script(text, "pgqueue")
        assert found.functions == ({name: made.functions[name]} if kind == "function" else {}), text
        assert found.views == ({name} if kind == "view" else set()), text


def test_storage_settings_and_partitions_are_fixed(broken_dsn: str) -> None:
    doctor = Doctor(broken_dsn)
    storage = only("autovacuum", "partitions", "dead-rows")
    run(
        broken_dsn,
        "alter table pgqueue.jobs reset (autovacuum_vacuum_threshold, vacuum_truncate)",
        "alter table pgqueue.jobs set (fillfactor = 100)",
        "alter table pgqueue.workers set (autovacuum_enabled = off)",
        "do $$ declare day date := (now() at time zone 'UTC')::date; begin"
        " execute format('drop table pgqueue.finished_jobs_p%s', to_char(day, 'YYYYMMDD'));"
        " for n in 5..14 loop"
        " execute format('drop table pgqueue.failures_p%s', to_char(day + n, 'YYYYMMDD'));"
        " end loop; end $$",
        *(
            "insert into pgqueue.finished_jobs (id, state, queue, task, args, kwargs, priority, attempt,"
            " retries,"
            " crashes, rescues, enqueued_at, enqueued_by, headers, finished_at) values (gen_random_uuid(),"
            f" 'succeeded', 'q', 't', '[]', '{{}}', 5, 1, 0, 0, 0, now(), 'me', '{{}}', {at})"
            for at in ("now()", "'2001-01-01'")
        ),
    )
    before = everything(broken_dsn)
    report = doctor(*storage)
    assert everything(broken_dsn) == before
    assert report.status == 1
    jobs = report.finding("autovacuum", "table jobs")
    assert (jobs["level"], jobs["fixable"]) == ("warning", True)
    assert "fillfactor is 100, not 85" in jobs["what"]
    assert jobs["mend"].startswith("ALTER TABLE pgqueue.jobs SET (")
    switched_off = report.finding("autovacuum", "switched off for table workers")
    assert (switched_off["level"], switched_off["fixable"]) == ("error", True)
    today = report.finding("partitions", "finished_jobs has no partition")
    assert (today["level"], today["mend"]) == ("error", "SELECT pgqueue.make_partitions()")
    assert "1 row are" in today["what"] or "1 row" in today["what"]
    coming = report.finding("partitions", "failures has no partition")
    assert coming["level"] == "warning"
    assert len(coming["facts"]["missing"]) == 10
    old = report.finding("partitions", "days before yesterday")
    assert (old["level"], old["fixable"]) == ("hint", False)

    status, text, err = doctor.text(*storage, "--fix")
    assert (status, err) == (0, ""), text
    assert text.count("done:  by --fix, and written to the audit log") == 4
    assert "3 checks: 1 hint, 4 fixed" in text
    with connected(broken_dsn) as connection:
        acts = connection.execute(
            "select actor, action, details from pgqueue.audit_log where action <> 'migrate' order by id"
        ).fetchall()
        moved = connection.execute("select count(*) as n from pgqueue.finished_jobs_default").fetchall()
    assert moved == [{"n": 1}], "the row of today is in its partition"
    assert {(act["actor"], act["action"]) for act in acts} == {(urlsplit(broken_dsn).username, "doctor_fix")}
    assert all(act["details"]["by"].endswith(f"@{socket.gethostname()}") for act in acts)
    assert [act["details"]["check"] for act in acts] == ["autovacuum", "autovacuum", "partitions"]
    assert acts[0]["details"]["before"]["found"] == jobs["what"]
    assert acts[0]["details"]["after"] == {"found": None}


def test_a_fix_that_is_refused_is_reported(broken_dsn: str) -> None:
    doctor = Doctor(broken_dsn)
    run(broken_dsn, "alter table pgqueue.jobs set (fillfactor = 100)")
    with connected(broken_dsn) as other, other.transaction():
        other.execute("lock table pgqueue.jobs in share update exclusive mode")
        report = doctor(*only("autovacuum"), "--fix", "--fail-on", "warning")
    finding = report.finding("autovacuum", "fillfactor")
    assert (report.status, finding["fixed"]) == (1, False)
    assert "lock timeout" in finding["refused"]
    with role(broken_dsn, "GRANT SELECT ON ALL TABLES IN SCHEMA pgqueue TO {role}") as (dsn, _):
        status, text, _ = Doctor(dsn).text(*only("autovacuum"), "--fix")
    assert status == 0
    assert "not done: must be owner of table jobs" in text
    with connected(broken_dsn) as connection:
        assert (
            connection.execute("select from pgqueue.audit_log where action = 'doctor_fix'").fetchall() == []
        )


@contextlib.contextmanager
def role(dsn: str, *grants: str) -> Iterator[tuple[str, str]]:
    """A role that may use the schema and what is granted: the DSN, and its name."""
    name = f"visitor_{secrets.token_hex(4)}"
    parts = urlsplit(dsn)
    with connected(dsn) as connection:
        connection.execute(f"create role {name} login password 'visitor'".encode())
        try:
            for grant in ("GRANT USAGE ON SCHEMA pgqueue TO {role}", *grants) if grants else ():
                connection.execute(grant.format(role=name).encode())
            yield urlunsplit(parts._replace(netloc=f"{name}:visitor@{parts.netloc.rpartition('@')[2]}")), name
        finally:
            connection.execute(f"drop owned by {name}".encode())
            connection.execute(f"drop role {name}".encode())


def test_privileges(broken_dsn: str) -> None:
    with role(broken_dsn) as (dsn, name):
        report = Doctor(dsn)()
        finding = report.finding("privileges")
        assert (report.status, finding["level"]) == (1, "error")
        assert finding["mend"].startswith(f"GRANT USAGE ON SCHEMA pgqueue TO {name}")
        assert report.checks["drift"]["skipped"] == "this role may not look, see privileges"

    web = "GRANT EXECUTE ON FUNCTION pgqueue.enqueue, pgqueue.enqueue_many, pgqueue.replace_job, "
    with role(broken_dsn, f"{web} pgqueue.wake_workers TO {{role}}") as (dsn, name):
        report = Doctor(dsn)(*only("privileges", "workers"))
        assert report.status == 1, "it sees nothing"
        assert report.checks["privileges"]["fact"] == f"role {name} may enqueue"
        assert [each["level"] for each in report.findings("privileges")] == ["hint", "error", "hint", "hint"]
        assert report.checks["workers"]["level"] == "skipped"
    half = "GRANT SELECT ON pgqueue.alembic_version, pgqueue.meta TO {role}"
    with role(broken_dsn, half) as (dsn, name):
        report = Doctor(dsn)(*only("privileges", "workers"))
        assert "it lacks EXECUTE on canvas_fault" in report.finding("privileges", "may not look")["what"]
        blind = report.finding("workers", "permission denied for table workers")
        assert (report.status, blind["level"]) == (0, "warning")
        assert f"TO {name}" in blind["mend"]

    worker = (
        "GRANT SELECT, INSERT, UPDATE, DELETE ON ALL TABLES IN SCHEMA pgqueue TO {role}",
        "GRANT USAGE ON ALL SEQUENCES IN SCHEMA pgqueue TO {role}",
        "GRANT EXECUTE ON ALL FUNCTIONS IN SCHEMA pgqueue TO {role}",
        "REVOKE EXECUTE ON FUNCTION pgqueue.make_partitions FROM {role}",
        "REVOKE INSERT, UPDATE ON pgqueue.wake FROM {role}",
    )
    with role(broken_dsn, *worker) as (dsn, name):
        finding = Doctor(dsn)(*only("privileges")).finding("privileges", "may not work")
        assert finding["level"] == "warning"
        assert "lacks EXECUTE on make_partitions, INSERT on wake, UPDATE on wake" in finding["what"]
        for statement in finding["mend"].split("; "):
            run(broken_dsn, statement)
        report = Doctor(dsn)(*only("privileges"), "--fail-on", "hint")
        may = "enqueue, enqueue canvases, look, operate, work"
        assert report.checks["privileges"]["fact"] == f"role {name} may {may}"


def test_a_check_that_cannot_be_made_stops_no_other(broken_dsn: str) -> None:
    with connected(broken_dsn) as other, other.transaction():
        other.execute("lock table pgqueue.schedules")
        report = Doctor(broken_dsn)(*only("queues", "schedules", "dead-letters"))
    assert report.levels == {"schedules": "error"}
    assert "lock timeout" in report.finding("schedules")["what"]


def test_a_migration_that_has_the_tables_locked(broken_dsn: str) -> None:
    with connected(broken_dsn) as other, other.transaction():
        other.execute("lock table pgqueue.meta")
        report = Doctor(broken_dsn)(*only("clock", "revision", "queues"))
    assert (report.status, report.levels) == (1, {"revision": "error", "queues": "error"})


def test_a_connection_that_breaks(broken_dsn: str) -> None:
    doctor = Doctor(broken_dsn)
    command = [
        sys.executable,
        "-m",
        "pgqueue.cli.main",
        "doctor",
        *only("clock", "queues", "workers"),
        "--json",
    ]
    with connected(broken_dsn) as other, connected(broken_dsn) as watch, other.transaction():
        other.execute("lock table pgqueue.jobs, pgqueue.workers")
        with subprocess.Popen(command, stdout=-1, stderr=-1, text=True, env=doctor.environment()) as process:
            waits = (
                "select pg_terminate_backend(pid) from pg_stat_activity where wait_event_type = 'Lock'"
                " and datname = current_database()"
            )
            eventually(lambda: watch.execute(waits).rowcount, "it waits for the lock")
            out, err = process.communicate(timeout=60)
    report = report_of(process.returncode, out, err)
    assert (report.status, report.checks["clock"]["level"]) == (4, "ok")
    assert report.err == "pgqueue: the connection to the database broke; try again\n"
    assert report.finding("workers", "the connection broke")["level"] == "error"
    assert report.checks["queues"]["skipped"] == "the connection to the database broke"


def test_revisions(fresh_dsn: str) -> None:
    doctor = Doctor(fresh_dsn)
    report = doctor()
    assert report.status == 5
    assert report.err.count("\n") == 1
    assert report.finding("revision")["mend"] == "pgqueue migrate"
    assert report.checks["connection"]["level"] == "ok"
    assert report.checks["queues"]["skipped"]
    assert doctor(*only("connection", "clock")).status == 0
    other = doctor(*only("revision"), before=("--schema", "other"))
    assert (other.status, other.finding("revision")["mend"]) == (5, "pgqueue --schema other migrate")

    upgrade(fresh_dsn, revision="0004")
    report = doctor()
    assert report.status == 0
    assert report.finding("revision")["level"] == "warning"
    assert report.finding("revision")["mend"] == "pgqueue migrate"
    assert "revision 0005" in report.checks["schedules"]["skipped"]
    assert "revision 0011" in report.checks["canvases"]["skipped"]
    assert report.checks["drift"]["level"] == "skipped"
    assert report.checks["partitions"]["level"] == "ok"

    run(
        fresh_dsn,
        "update pgqueue.alembic_version set version_num = '9999'",
        "update pgqueue.meta set oldest_code_revision = '9999'",
    )
    report = doctor()
    assert (report.status, report.finding("revision")["mend"]) == (5, "pip install --upgrade pgqueue")
    run(fresh_dsn, "update pgqueue.meta set oldest_code_revision = '0001'")
    report = doctor(*only("revision", "partitions"))
    assert (report.status, report.levels) == (0, {"revision": "hint"})


def test_a_database_that_cannot_be_reached(db: str) -> None:
    parts = urlsplit(db)
    where = parts.netloc.rpartition("@")[2]
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        port = unused.getsockname()[1]
        down = Doctor(f"postgresql://me:s3cret@127.0.0.1:{port}/shop")
        status, out, err = down.text()
    lines = out.splitlines()
    assert status == 4
    assert lines[0].startswith("error    connection      cannot reach the database: ")
    assert lines[2].startswith(f"    mend:  pg_isready -h 127.0.0.1 -p {port}")
    assert {line.split()[0] for line in lines[3:-2]} == {"skipped"}
    assert err.startswith("pgqueue: cannot reach the database: ")
    assert "s3cret" not in out + err

    wrong = Doctor(urlunsplit(parts._replace(netloc=f"{parts.username}:s3cret@{where}")))(*only("clock"))
    assert wrong.status == 4
    assert "correct the password" in wrong.finding("connection")["mend"]
    nowhere = Doctor(urlunsplit(parts._replace(path="/there_is_none")))(*only("clock"))
    assert (nowhere.status, "createdb" in nowhere.finding("connection")["mend"]) == (4, True)


SLIP = """
import os, time
real, wrong = time.time, float(os.environ["CLOCK_IS_WRONG_BY"])
time.time = lambda: real() + wrong
"""


def test_clocks(db: str, tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text(SLIP)

    def told(seconds: float) -> Report:
        path = os.pathsep.join([str(tmp_path), *filter(None, sys.path)])
        flags = ("--fail-on", "warning", *only("clock"))
        said = Doctor(db).text("--json", *flags, PYTHONPATH=path, CLOCK_IS_WRONG_BY=f"{seconds}")
        return report_of(*said)

    hour = told(3600).finding("clock", "60 min ahead of the database's")
    assert hour["level"] == "warning"
    assert abs(hour["facts"]["skew_seconds"] - 3600) < 2
    days = told(-200_000)
    assert (days.status, days.finding("clock", "2 d behind")["level"]) == (1, "error")


def test_the_oldest_server() -> None:
    assert judge_version(150_000, "15.0") == []
    (finding,) = judge_version(140_012, "14.12")
    assert finding.level == "error"


UNSAFE = {
    "fsync": "off",
    "full_page_writes": "off",
    "synchronous_commit": "off",
    "autovacuum": "off",
    "wal_level": "logical",
    "max_prepared_transactions": "2",
    "max_connections": "12",
    "superuser_reserved_connections": "1",
}
SMALL_QUEUE = {"max_notify_queue_pages": "64"} if MAJOR >= 17 else {}


@pytest.fixture(scope="module")
def unsafe_server() -> Iterator[Server]:
    with own_server(UNSAFE | SMALL_QUEUE) as server:
        yield server


def test_a_server_in_trouble(unsafe_server: Server) -> None:
    dsn = unsafe_server.new_database()
    doctor = Doctor(dsn)
    with contextlib.ExitStack() as stack:
        holder, preparer, deaf, other, *_ = (
            stack.enter_context(connected(dsn, application_name=f"number {number}")) for number in range(8)
        )
        other.execute(
            "insert into pgqueue.jobs (id, task) select gen_random_uuid(), 't' from generate_series(1, 12000)"
        )
        other.execute("select pg_create_logical_replication_slot('forgotten', 'pgoutput')")
        stack.callback(other.execute, "select pg_drop_replication_slot('forgotten')")
        preparer.execute("begin")
        preparer.execute("select pg_current_xact_id()")
        preparer.execute("prepare transaction 'it''s left'")
        stack.callback(other.execute, "rollback prepared 'it''s left'")
        holder.execute("begin isolation level repeatable read")
        holder.execute('select 1 as "a \u0007 bell"')
        other.execute("delete from pgqueue.jobs")
        deaf.execute("listen something")
        deaf.execute("begin")
        deaf.execute("select 'listen'")
        if SMALL_QUEUE:
            with contextlib.suppress(psycopg.errors.ProgramLimitExceeded):
                for number in range(20_000):
                    other.execute("select pg_notify('something', %s)", [f"{number:07000}"])
        counted = "select n_dead_tup from pg_stat_user_tables where relname = 'jobs' and n_dead_tup > 10000"
        other.execute("select pg_stat_force_next_flush()")
        eventually(lambda: other.execute(counted).fetchall(), "the dead rows are counted")
        long = (
            "select from pg_stat_activity where pid = %s and xact_start < now() - make_interval(secs => %s)"
        )
        eventually(
            lambda: other.execute(long, [deaf.info.backend_pid, READER]).rowcount, "it has not read for long"
        )

        report = doctor("--fix", "--older-than", "0")
        levels = {
            name: level for name, level in report.levels.items() if SMALL_QUEUE or name != "notify-queue"
        }
        expected = {
            "settings": "error",
            "max-connections": "warning",
            "snapshots": "error",
            "autovacuum": "error",
            "dead-rows": "warning",
            "workers": "warning",
        }
        assert levels == expected | ({"notify-queue": "error"} if SMALL_QUEUE else {})
        for name in ("fsync", "full_page_writes"):
            assert report.finding("settings", name)["mend"].startswith(f"ALTER SYSTEM SET {name} = on")
        assert report.finding("settings", "synchronous_commit")["level"] == "hint"
        assert report.finding("autovacuum", "autovacuum is off")["level"] == "error"
        assert "9 of 11 connections are used" in report.finding("max-connections")["what"]
        pid = holder.info.backend_pid
        session = report.finding("snapshots", f"session {pid} ")
        assert session["mend"] == f"SELECT pg_terminate_backend({pid})"
        assert session["facts"]["query"].startswith("select 1")
        assert "number 0, idle in transaction" in session["what"]
        assert report.finding("snapshots", "prepared")["mend"].startswith("ROLLBACK PREPARED 'it''s left'")
        slot = report.finding("snapshots", "replication slot forgotten is used by nobody")
        assert slot["mend"].startswith("SELECT pg_drop_replication_slot('forgotten')")
        dead = report.finding("dead-rows", "table jobs has about 12,000 dead rows")
        assert not dead["fixable"]
        assert "VACUUM cannot remove them as long as" in dead["means"]
        if SMALL_QUEUE:
            full = report.finding("notify-queue", "listens and does not read")
            assert full["mend"].startswith(f"SELECT pg_terminate_backend({deaf.info.backend_pid})")

        text = doctor.text(*only("snapshots"), "--older-than", "0")[1]
        assert "\x07" not in text
        assert "\\x07" in text
        assert [*doctor(*only("snapshots"), "--older-than", "1h").levels] == ["snapshots"], "the slot"

        with role(dsn, "GRANT SELECT ON ALL TABLES IN SCHEMA pgqueue TO {role}") as (visitor, name):
            seen = Doctor(visitor)(*only("snapshots", "max-connections"), "--older-than", "0")
        hidden = seen.finding("snapshots", "is hidden")
        assert "10 of 11 connections" in seen.checks["max-connections"]["fact"], "theirs, and 9 of others"
        assert str(pid) in hidden["what"]
        assert hidden["mend"] == f"GRANT pg_read_all_stats TO {name}"
        # Nothing of this was for --fix.
        assert holder.execute("select 1 as still").fetchall() == [{"still": 1}]
        assert other.execute("select from pgqueue.audit_log where action = 'doctor_fix'").fetchall() == []

    with role(dsn, "GRANT SELECT ON ALL TABLES IN SCHEMA pgqueue TO {role}") as (visitor, _):
        refused = Doctor(visitor)(*only("dead-rows"), "--fix").finding("dead-rows")
    assert refused["fixable"]
    assert not refused["fixed"]
    assert "vacuum" in refused["refused"], "permission denied to vacuum, in words that differ by version"
    report = doctor(*only("dead-rows"), "--fix", "--fail-on", "warning")
    assert (report.status, report.finding("dead-rows")["fixed"]) == (0, True)
    with connected(dsn) as connection:
        (act,) = connection.execute(
            "select details from pgqueue.audit_log where action = 'doctor_fix'"
        ).fetchall()
    assert act["details"]["statement"] == "VACUUM (ANALYZE, SKIP_LOCKED) pgqueue.jobs"
    assert act["details"]["before"]["facts"]["dead"] >= 12_000
    run(dsn, "alter database " + urlsplit(dsn).path[1:] + " set default_transaction_read_only = on")
    assert doctor(*only("connection")).finding("connection")["level"] == "error"


def test_commits_that_wait_to_notify(unsafe_server: Server) -> None:
    """A session that is stuck in a COMMIT with a notification stops all others that notify."""
    dsn = unsafe_server.new_database()
    run(dsn, "alter system set synchronous_standby_names = 'nobody'", "select pg_reload_conf()")
    try:
        with (
            connected(dsn, application_name="holder") as holder,
            connected(dsn) as waiter,
            connected(dsn) as watch,
        ):
            pid = holder.info.backend_pid
            setting = "select from pg_settings where name = 'synchronous_standby_names' and setting <> ''"
            eventually(lambda: watch.execute(setting).rowcount, "the setting is there")
            watch.execute("select pg_notification_queue_usage()")  # the test before has filled it
            watch.execute("checkpoint")  # whose process tells the others of the setting
            holder.execute("set synchronous_commit = on")
            holder.execute("begin")
            holder.execute("select pg_logical_emit_message(true, 'holder', '')")
            holder.execute("notify something")
            holder.pgconn.send_query(b"commit")
            waits = "select pid from pg_stat_activity where pid = %s and wait_event = 'SyncRep'"
            eventually(lambda: watch.execute(waits, [pid]).rowcount, "it has the lock")
            waiter.pgconn.send_query(b"notify something")
            long = "select from pg_locks where not granted and waitstart < clock_timestamp() - interval '1 s'"
            eventually(lambda: watch.execute(long).rowcount, "another one has waited for a second")
            report = Doctor(dsn)(*only("notify-queue"))
            holder.cancel_safe()
            for each in (holder, waiter):
                while each.pgconn.get_result() is not None:
                    pass
    finally:
        run(dsn, "alter system reset synchronous_standby_names", "select pg_reload_conf()")
    finding = report.finding("notify-queue", "holds the lock of NOTIFY")
    assert (finding["level"], "SyncRep" in finding["what"]) == ("error", True)
    assert finding["mend"] == f"SELECT pg_terminate_backend({pid})"


def add_worker(jobs: Jobs, name: str, **columns: object) -> None:
    """A row as a worker leaves it; it has just beaten, unless `columns` say otherwise."""
    given = {
        "host": "elsewhere",
        "pid": 4711,
        "queues": ["default"],
        "pool": "prefork",
        "concurrency": 1,
        "version": "1",
        "stats": '{"executors": 1}',
        **columns,
    }
    names = ", ".join(given)
    marks = ", ".join(["%s"] * len(given))
    jobs.sql(f"insert into pgqueue.workers (id, {names}) values (%s, {marks})", name, *given.values())


OLD = "1999-01-01T00:00Z"


def test_workers_in_trouble(jobs: Jobs, workers: Workers, gate: Gate) -> None:
    worker = workers.start("-c", "1")
    jobs.until(jobs.add("gated", gate.path), "running")
    worker.send(signal.SIGSTOP)  # frozen: what is in the tables stays so
    jobs.sql("update pgqueue.workers set heartbeat_at = now() - interval '100 s'")
    add_worker(jobs, "fenced-one", fenced=True)
    jobs.add_row(task="t", state="running", worker_id="fenced-one", claimed_at=OLD)
    jobs.add_row(task="t", state="running", worker_id="gone-one", claimed_at=OLD)
    doctor = Doctor(jobs.dsn)
    report = doctor(*only("workers"))
    silent = report.finding("workers", f"worker {worker.id} (process {worker.pid} on ")
    assert (report.status, silent["level"]) == (1, "error")
    assert "has been silent for 100 s" in silent["what"] or "has been silent for 10" in silent["what"]
    assert report.finding("workers", "no live worker is there")["level"] == "warning"
    for name in ("fenced-one", "gone-one"):
        assert "no live worker" in report.finding("workers", f"1 job of worker {name}")["means"]

    add_worker(jobs, "live-one")
    add_worker(jobs, "stuck-one", stats='{"executors": 1, "claim_due_for": 45}')
    add_worker(jobs, "empty-one", stats='{"executors": 0}')
    report = doctor(*only("workers"))
    assert report.finding("workers", worker.id)["level"] == "warning", "others take over"
    assert report.finding("workers", "a claim has been due for 45 s")["mend"].startswith(
        "ssh elsewhere kill -9 4711"
    )
    assert report.finding("workers", "has no executor")["level"] == "warning"
    assert report.finding("workers", "gone-one")["means"] == "live workers should have taken them back"
    jobs.sql("update pgqueue.jobs set claimed_at = now() where worker_id = 'gone-one'")
    assert "gone-one" not in json.dumps(doctor(*only("workers")).document), "they may still take it back"
    jobs.sql("delete from pgqueue.workers where id like '%%-one'")
    gate.open()
    worker.send(signal.SIGCONT)


def test_work_in_trouble(jobs: Jobs, workers: Workers) -> None:
    """Queues, tasks, schedules and dead letters, with workers that are alive and do nothing."""
    add_worker(jobs, "one", queues=["default", "mixed"], tasks=["known"])
    add_worker(jobs, "two", queues=["mixed"], tasks=["known", "new"])
    jobs.sql(
        "insert into pgqueue.jobs (id, task, queue, enqueued_at)"
        " values (gen_random_uuid(), 'known', 'lonely', %s)",
        OLD,
    )
    jobs.add("a.fresh", queue="lonely_too")
    jobs.add("a.known", queue="asleep")
    jobs.add("a.known", queue="dozing")
    for task, queue in (("known", "default"), ("strange", "default"), ("new", "mixed")):
        jobs.sql("select pgqueue.enqueue(%s, queue => %s)", task, queue)
    jobs.sql("select pgqueue.enqueue('later', eta => now() + interval '1 hour')")
    for queue in ("asleep", "dozing"):
        jobs.sql("select pgqueue.pause_queue(%s, reason => 'the mail server moves', actor => 'ann')", queue)
    jobs.sql(
        "update pgqueue.meta"
        " set paused = jsonb_set(paused, '{dozing,since}', to_jsonb(now() - interval '2 days'))"
    )
    for name, source, cron, tick, held in (
        ("fine", "database", "@daily", "now() + interval '1 hour'", 0),
        ("late", "database", "@daily", "now() - interval '2 minutes'", 0),
        ("orphan", "code", "@daily", "now() + interval '1 hour'", 0),
        ("nonsense", "database", "no cron", "null", 0),
        ("slow one", "database", "@daily", "now() + interval '1 hour'", 12),
    ):
        jobs.sql(
            "insert into pgqueue.schedules (name, source, task, cron, next_tick, held) values"
            f" (%s, %s, 'known', %s, {tick}, array(select now() from generate_series(1, {held})))",
            *(name, source, cron),
        )
    for number in range(3):
        jobs.sql(
            "insert into pgqueue.dead_letters (id, queue, task, args, kwargs, priority, attempt, retries,"
            " crashes, rescues, enqueued_at, enqueued_by, headers, dead_letter_queue, reason, error_class,"
            " died_at) values (gen_random_uuid(), 'q', 'shop.send', '[]', '{}', 5, 1, 0, 0, 0, now(), 'me',"
            " '{}', 'q', 'rejected', 'shop.Lost', now() - make_interval(hours => %s))",
            number // 2 * 2,
        )
    doctor = Doctor(jobs.dsn)
    names = ("queues", "tasks", "schedules", "dead-letters")
    before = everything(jobs.dsn)
    report = doctor(*only(*names))
    assert everything(jobs.dsn) == before
    assert report.levels == {
        "queues": "error",
        "tasks": "error",
        "schedules": "error",
        "dead-letters": "hint",
    }

    lonely = report.finding("queues", "nobody serves queue lonely: 1 ready job")
    assert (lonely["level"], lonely["mend"]) == ("error", "pgqueue -A module:attribute worker -Q lonely")
    assert report.finding("queues", "nobody serves queue lonely_too")["level"] == "warning", (
        "as during a deploy"
    )
    asleep = report.finding("queues", "queue asleep has been paused for")
    assert (asleep["level"], asleep["mend"]) == ("hint", "pgqueue queue resume asleep")
    assert "by ann (the mail server moves)" in asleep["what"]
    assert report.finding("queues", "queue dozing has been paused for 2 d")["level"] == "warning"
    assert len(report.findings("queues")) == 4

    strange = report.finding(
        "tasks", "task strange waits in queue default, and no live worker of that queue knows it"
    )
    assert (strange["level"], strange["mend"][:27]) == ("error", "pgqueue queue pause default")
    assert report.finding("tasks", "task later waits")["level"] == "error"
    mixed = report.finding("tasks", "task new waits in queue mixed, and 1 of its 2 workers do not know it")
    assert (mixed["level"], mixed["facts"]["workers"]) == ("warning", ["one"])
    assert len(report.findings("tasks")) == 3

    assert report.finding("schedules", "schedule late is stuck")["level"] == "error"
    assert report.finding("schedules", "schedule orphan is from code")["level"] == "warning"
    assert report.finding("schedules", "schedule nonsense makes no sense")["level"] == "error"
    slow = report.finding("schedules", "schedule slow one holds 12 ticks")
    assert (slow["level"], slow["mend"]) == ("warning", "pgqueue schedule remove 'slow one'")
    assert len(report.findings("schedules")) == 4

    died = report.finding("dead-letters", "2 jobs died in the last 60 min: 2 of shop.send (shop.Lost)")
    assert died["mend"] == "pgqueue dead list --since 1h"

    status, text, err = doctor.text(*only("dead-letters"), "--fail-on", "hint")
    assert (status, err) == (1, "pgqueue: doctor has found 1 hint\n")
    assert "    mend:  pgqueue dead list --since 1h\n" in text


def test_a_pooler_in_the_way(db: str) -> None:
    pooler = only("pooler", "clock", "revision", "drift")
    with pgbouncer(db) as bouncer:
        report = Doctor(bouncer.dsn)(*pooler)
        finding = report.finding("pooler", "LISTEN hears nothing through it")
        assert (report.status, finding["level"]) == (0, "warning")
        assert "--listen-dsn" in finding["mend"]
        assert report.levels == {"pooler": "warning"}
        good = Doctor(bouncer.dsn)(*only("pooler"), PGQUEUE_LISTEN_DSN=db)
        assert (good.levels, "hears" in good.checks["pooler"]["fact"]) == ({}, True)
        wrong = Doctor(db)(*only("pooler"), PGQUEUE_LISTEN_DSN=bouncer.dsn)
        assert "the listen_dsn hears nothing" in wrong.finding("pooler")["what"]
    with pgbouncer(db, mode="session") as bouncer:
        assert Doctor(bouncer.dsn)(*only("pooler")).levels == {}


def test_on_a_terminal(broken_dsn: str) -> None:
    run(broken_dsn, "alter table pgqueue.jobs set (fillfactor = 100)")
    ours, theirs = pty.openpty()
    with subprocess.Popen(
        [sys.executable, "-m", "pgqueue.cli.main", "doctor", *only("autovacuum", "workers")],
        env=Doctor(broken_dsn).environment() | {"COLUMNS": "60"},
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
    ) as process:
        os.close(theirs)
        shown = b""
        with contextlib.suppress(OSError):  # the other side is closed
            while part := os.read(ours, 65536):
                shown += part
    os.close(ours)
    text = shown.decode()
    assert process.returncode == 0
    assert "looking" in text, "a progress bar"
    assert "\x1b[1;33mwarning" in text
    assert "ALTER TABLE pgqueue.jobs SET (fillfactor = 85)   (--fix does it)" in text, "not wrapped"
