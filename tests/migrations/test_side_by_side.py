"""Old and new releases, old and new revisions, and migrations of a queue that is at work."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import psycopg
import pytest
from alembic.script import ScriptDirectory

from pgqueue.cli.status import ExitStatus
from pgqueue.database import migrate
from pgqueue.errors import ConfigError, DatabaseError, SchemaMismatch
from tests.acceptance.workers import APPS, Jobs, Workers, eventually
from tests.migrations.test_migrate import pgqueue, schema_of

FIRST, HEAD = migrate.revisions()[0], migrate.head_revision()
NEXT = f"{int(HEAD) + 1:04}"
NEW = ["schedules", "tasks", "conf"]  # columns of the workers' table
HELD_UP = 0.05
"""Seconds by which a migration may hold up an enqueue, at the 99th percentile."""

NEXT_REVISION = '''"""A column and an index more.

Revision ID: {next}
Revises: {head}
"""

from alembic import context, op

revision = "{next}"
down_revision = "{head}"
branch_labels = None
depends_on = None


def run(text):
    text = text.replace("SCHEMA", context.config.attributes["schema"])
    op.get_bind().execution_options(no_parameters=True).exec_driver_sql(text)


def upgrade():
    run("ALTER TABLE SCHEMA.jobs ADD COLUMN note text")
    run("CREATE INDEX jobs_note ON SCHEMA.jobs (note) WHERE note IS NOT NULL")
    run("{more}")


def downgrade():
    run("ALTER TABLE SCHEMA.jobs DROP COLUMN note")
'''
HARMLESS = "SELECT 1"
DEMANDING = f"UPDATE SCHEMA.meta SET oldest_code_revision = '{NEXT}'"
ENDLESS = "SELECT pg_sleep(600)"


class Release:
    """The next release: this one with one revision more, in a folder of its own."""

    def __init__(self, folder: Path, more: str) -> None:
        self.root = folder / "next"
        ignored = shutil.ignore_patterns("__pycache__")
        shutil.copytree(Path(migrate.__file__).parents[1], self.root / "pgqueue", ignore=ignored)
        shutil.copytree(
            migrate.migrations_folder(), self.root / "migrations", ignore=ignored, dirs_exist_ok=True
        )
        text = NEXT_REVISION.format(next=NEXT, head=HEAD, more=more)
        (self.root / "migrations" / "versions" / f"{NEXT}_next.py").write_text(text)

    def start(self, dsn: str, *arguments: str) -> subprocess.Popen[str]:
        environment = {name: value for name, value in os.environ.items() if not name.startswith("PGQUEUE_")}
        path = os.pathsep.join([str(self.root), *filter(None, [os.environ.get("PYTHONPATH")])])
        return subprocess.Popen(
            [sys.executable, "-m", "pgqueue.cli.main", *arguments],
            env={**environment, "PGQUEUE_DSN": dsn, "PYTHONPATH": path},
            cwd=self.root,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def run(self, dsn: str, *arguments: str) -> tuple[int, str, str]:
        with self.start(dsn, *arguments) as process:
            out, err = process.communicate(timeout=90)
        return process.returncode, out, err


class Producer:
    """Enqueues one job after another from a thread, and takes the time of each."""

    def __init__(self, dsn: str) -> None:
        self._dsn = dsn
        self.ids: list[str] = []
        self.seconds: list[float] = []
        self._end = threading.Event()
        self._failure: BaseException | None = None
        self._thread = threading.Thread(target=self._run)

    def __enter__(self) -> Producer:
        self._thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._end.set()
        self._thread.join()
        if self._failure is not None:
            raise self._failure

    def more(self, count: int) -> int:
        """Wait for so many further enqueues; how many there are then."""
        wanted = len(self.ids) + count
        eventually(lambda: len(self.ids) >= wanted or self._failure, "enqueues go on")
        return len(self.ids)

    def _run(self) -> None:
        try:
            with closing(Jobs(self._dsn)) as jobs:
                while not self._end.wait(0.005):
                    before = time.monotonic()
                    job = jobs.add("mark")
                    self.seconds.append(time.monotonic() - before)
                    self.ids.append(job)
        except BaseException as error:
            self._failure = error


def p99(seconds: list[float]) -> float:
    return sorted(seconds)[int(0.99 * (len(seconds) - 1))]


@contextmanager
def reading(dsn: str, table: str = "jobs") -> Iterator[psycopg.Connection]:
    """An open transaction that has read the table, such as a report or a forgotten BEGIN."""
    with psycopg.connect(dsn, application_name="long report") as connection:
        connection.execute(f"select count(*) from pgqueue.{table}".encode())
        yield connection


@contextmanager
def ending() -> Iterator[list[subprocess.Popen[str]]]:
    """Whatever becomes of the test: its migrations end with it."""
    started: list[subprocess.Popen[str]] = []
    try:
        yield started
    finally:
        for process in started:
            process.kill()
            process.communicate()


def contents(dsn: str) -> dict[str, list[Any]]:
    """Every row of the tables that there were at first, but meta's, as text, without columns that are new,
    and but for the notes of migrations.
    """
    tables = ["jobs", "finished_jobs", "failures", "dead_letters", "workers", "wake", "audit_log"]
    with psycopg.connect(dsn, autocommit=True) as connection:
        return {
            table: connection.execute(
                f"select (to_jsonb(t) - %s::text[])::text from pgqueue.{table} t"
                " where to_jsonb(t) ->> 'action' is distinct from 'migrate' order by 1".encode(),
                [NEW],
            ).fetchall()
            for table in tables
        }


def oldest_code(dsn: str) -> str | None:
    with psycopg.connect(dsn, autocommit=True) as connection:
        row = connection.execute(
            "select to_jsonb(m) ->> 'oldest_code_revision' from pgqueue.meta m"
        ).fetchone()
    assert row is not None
    return None if row[0] is None else str(row[0])


class TestRevisions:
    def test_there_is_one_line_of_them(self) -> None:
        script = ScriptDirectory(str(migrate.migrations_folder()))
        assert script.get_heads() == [HEAD]
        line = [each.revision for each in script.walk_revisions()]
        assert tuple(reversed(line)) == migrate.revisions()
        assert migrate.OLDEST_REVISION in migrate.revisions()

    def test_up_down_and_up_again(self, fresh_dsn: str) -> None:
        seen = {}
        for revision in migrate.revisions():
            migrate.upgrade(fresh_dsn, revision=revision)
            seen[revision] = schema_of(fresh_dsn)
        migrate.check_drift(fresh_dsn)
        for revision in reversed(migrate.revisions()):
            migrate.downgrade(fresh_dsn, revision)
            assert schema_of(fresh_dsn) == seen[revision]
        assert pgqueue(fresh_dsn, "migrate")[:2] == (
            0,
            f"schema pgqueue is at revision {HEAD} now, was {FIRST}\n",
        )
        assert schema_of(fresh_dsn) == seen[HEAD]
        migrate.check_drift(fresh_dsn)

    @pytest.mark.slow
    def test_the_command_goes_both_ways(self, fresh_dsn: str) -> None:
        assert pgqueue(fresh_dsn, "migrate", "--to", FIRST)[1].endswith(f"{FIRST} now, was empty\n")
        assert pgqueue(fresh_dsn, "migrate")[1].endswith(f"{HEAD} now, was {FIRST}\n")
        assert pgqueue(fresh_dsn, "migrate", "--to", FIRST)[1].endswith(f"{FIRST} now, was {HEAD}\n")
        assert pgqueue(fresh_dsn, "migrate", "--to", FIRST)[1].endswith(f"{FIRST} already\n")
        for wrong in ("base", "9999", "1", "-1"):
            status, out, err = pgqueue(fresh_dsn, "migrate", f"--to={wrong}")
            assert (status, out) == (ExitStatus.USAGE, "")
            assert err == f"pgqueue: this pgqueue knows the revisions {FIRST} to {HEAD}, got {wrong!r}\n"
        assert migrate.current_revision(fresh_dsn) == FIRST

    def test_the_script_from_an_older_revision_makes_the_same_schema(self, fresh_dsn: str) -> None:
        migrate.upgrade(fresh_dsn)
        wanted = schema_of(fresh_dsn)
        migrate.downgrade(fresh_dsn, FIRST)
        status, script, err = pgqueue(None, "migrate", "--sql", "--from", FIRST)
        assert (status, err) == (0, "")
        with psycopg.connect(fresh_dsn, autocommit=True) as connection:
            connection.execute(script.encode())
        assert schema_of(fresh_dsn) == wanted
        assert migrate.current_revision(fresh_dsn) == HEAD
        with pytest.raises(ConfigError, match="got '9999'"):
            migrate.upgrade_sql(since="9999")

    def test_rows_in_every_state_stay_as_they_are(self, fresh_dsn: str) -> None:
        migrate.upgrade(fresh_dsn, revision=FIRST)
        with closing(Jobs(fresh_dsn)) as jobs:
            ready, running = jobs.add("mark", queue="a"), jobs.add("mark", "x", queue="b", priority=9)
            jobs.add("mark", countdown=3600)
            jobs.sql(
                "update pgqueue.jobs set state = 'running', worker_id = 'w', attempt = 2, claimed_at = now()"
                " where id = %s",
                running,
            )
            jobs.sql(
                "insert into pgqueue.finished_jobs (id, state, queue, task, args, kwargs, priority, attempt,"
                " retries, crashes, rescues, enqueued_at, enqueued_by, headers) values"
                " (pgqueue.uuid7(), 'succeeded', 'q', 't', '[]', '{}', 5, 1, 0, 0, 0, now(), 'me', '{}')"
            )
            jobs.sql(
                "insert into pgqueue.dead_letters (id, queue, task, args, kwargs, priority, attempt, retries,"
                " crashes, rescues, enqueued_at, enqueued_by, headers, dead_letter_queue, reason) values"
                " (pgqueue.uuid7(), 'q', 't', '[]', '{}', 5, 1, 0, 0, 0, now(), 'me', '{}', 'q', 'crashed')"
            )
            jobs.sql(
                "insert into pgqueue.failures (job_id, attempt, task, queue, kind)"
                " values (%s, 1, 't', 'q', 'failed')",
                ready,
            )
            jobs.sql(
                "insert into pgqueue.workers (id, host, pid, queues, pool, concurrency, version)"
                " values ('w', 'h', 1, '{b}', 'prefork', 1, '0')"
            )
            jobs.sql("insert into pgqueue.wake (queue, wake_until) values ('a', now())")
            jobs.sql("insert into pgqueue.audit_log (action) values ('requeue')")
        before = contents(fresh_dsn)
        assert all(before.values())
        migrate.upgrade(fresh_dsn)
        assert contents(fresh_dsn) == before
        migrate.downgrade(fresh_dsn, FIRST)
        assert contents(fresh_dsn) == before


class TestWhoMayWorkOnWhat:
    @pytest.mark.parametrize(
        ("found", "oldest", "why"),
        [
            ("0003", None, ""),
            ("0005", None, ""),
            ("0005", "0005", ""),
            ("0006", "0005", ""),
            ("0009", "0001", ""),
            (None, None, "the database has no schema 'pgqueue' of pgqueue; run `pgqueue migrate`"),
            (
                "0002",
                None,
                "database is at revision 0002, this pgqueue works with 0003 to 0005; run `pgqueue migrate`",
            ),
            (
                "0006",
                None,
                "database is at revision 0006, newer than this pgqueue, which is of 0005; upgrade pgqueue",
            ),
            (
                "0007",
                "0006",
                "database is at revision 0007 and needs a pgqueue of 0006 or newer, this one is of 0005;"
                " upgrade pgqueue",
            ),
        ],
    )
    def test_the_rule(
        self, monkeypatch: pytest.MonkeyPatch, found: str | None, oldest: str | None, why: str
    ) -> None:
        monkeypatch.setattr(migrate, "OLDEST_REVISION", "0003")
        monkeypatch.setattr(migrate, "revisions", lambda: ("0001", "0002", "0003", "0004", "0005"))
        if not why:
            migrate.require_revision(found, oldest)
            return
        with pytest.raises(SchemaMismatch) as refused:
            migrate.require_revision(found, oldest)
        assert str(refused.value) == why

    @pytest.mark.parametrize("revision", migrate.revisions())
    def test_this_release_works_on_every_revision_it_says(
        self, fresh_dsn: str, tmp_path: Path, revision: str
    ) -> None:
        migrate.upgrade(fresh_dsn, revision=revision)
        with closing(Jobs(fresh_dsn)) as jobs, Workers(fresh_dsn, tmp_path) as workers:
            workers.start("-c", "1")
            job, dead = jobs.add("echo", 1), jobs.add("fail_later")
            assert jobs.finished(job)["result"] == 1
            assert jobs.dead(dead)["reason"] == "not_retryable"
            for command in (["inspect", "queues"], ["dead", "list"], ["dead", "requeue", "--all", "--yes"]):
                assert pgqueue(fresh_dsn, *command)[0] == 0

    @pytest.mark.slow
    def test_a_newer_revision_that_is_harmless(self, fresh_dsn: str, tmp_path: Path) -> None:
        release = Release(tmp_path, HARMLESS)
        assert release.run(fresh_dsn, "migrate")[:2] == (
            0,
            f"schema pgqueue is at revision {NEXT} now, was empty\n",
        )
        assert oldest_code(fresh_dsn) == FIRST
        # Also the step that a deployment of the older release begins with.
        assert pgqueue(fresh_dsn, "migrate") == (
            0,
            f"schema pgqueue is at revision {NEXT}, newer than {HEAD}, and stays so\n",
            "",
        )
        with closing(Jobs(fresh_dsn)) as jobs, Workers(fresh_dsn, tmp_path) as workers:
            workers.start("-c", "1")
            assert jobs.finished(jobs.add("echo", 1))["result"] == 1
            assert pgqueue(fresh_dsn, "inspect", "queues")[0] == 0
        # Only who knows the way back goes it.
        status, _, err = pgqueue(fresh_dsn, "migrate", "--to", FIRST)
        assert status == ExitStatus.SCHEMA
        assert err == (
            f"pgqueue: database is at revision {NEXT}, this pgqueue knows {FIRST} to {HEAD};"
            " migrate down with the release that made it\n"
        )
        assert release.run(fresh_dsn, "migrate", "--to", FIRST)[0] == 0
        assert migrate.current_revision(fresh_dsn) == FIRST

    @pytest.mark.slow
    def test_a_newer_revision_that_asks_for_more(self, fresh_dsn: str, tmp_path: Path) -> None:
        release = Release(tmp_path, DEMANDING)
        with closing(Jobs(fresh_dsn)) as jobs, Workers(fresh_dsn, tmp_path) as workers:
            migrate.upgrade(fresh_dsn)
            worker = workers.start("-c", "1")
            assert release.run(fresh_dsn, "migrate")[0] == 0
            # Who runs already goes on; who starts is told.
            assert jobs.finished(jobs.add("echo", 1))["result"] == 1
            said = (
                f"pgqueue: database is at revision {NEXT} and needs a pgqueue of {NEXT} or newer,"
                f" this one is of {HEAD}; upgrade pgqueue"
            )
            for command in (
                ["inspect", "queues"],
                ["migrate"],
                ["-A", "tests_app:app", "worker", "-c", "1"],
            ):
                status, out, err = pgqueue(fresh_dsn, *command, cwd=APPS)
                assert (status, out) == (ExitStatus.SCHEMA, "")
                assert err.splitlines()[-1] == said
            assert worker.stop() == 0
        assert release.run(fresh_dsn, "inspect", "queues")[0] == 0


class TestNewQueues:
    @pytest.mark.parametrize("revision", [FIRST, "0011"])
    def test_who_serves_every_queue_finds_new_ones_before_they_are_notified(
        self, fresh_dsn: str, tmp_path: Path, revision: str
    ) -> None:
        migrate.upgrade(fresh_dsn, revision=revision)
        with closing(Jobs(fresh_dsn)) as jobs, Workers(fresh_dsn, tmp_path) as workers:
            # With the heartbeat it would find them once a minute.
            flags = ("-c", "1", "--heartbeat", "60", "--lease", "600", "--poll-interval", "60")
            worker = workers.start(*flags, all_queues=True)
            asked = (
                "select true as yes from pgqueue.wake where queue = '*' and wake_until > clock_timestamp()"
            )
            eventually(lambda: jobs.sql(asked), "it sleeps")
            waits = []
            for number in range(4):
                row = jobs.finished(jobs.add("echo", number, queue=f"new-{number}"))
                waits.append((row["claimed_at"] - row["enqueued_at"]).total_seconds())
            # The four in six seconds each, if it relied on being told.
            assert sum(waits) < 8
            migrate.upgrade(fresh_dsn)
            assert jobs.finished(jobs.add("echo", 1, queue="newer"))["result"] == 1
            assert worker.stop() == 0
            assert "Traceback" not in worker.log


class TestAtWork:
    @pytest.mark.slow
    def test_up_and_down_under_load(self, fresh_dsn: str, tmp_path: Path) -> None:
        migrate.upgrade(fresh_dsn, revision=FIRST)
        release = Release(tmp_path, HARMLESS)
        with closing(Jobs(fresh_dsn)) as jobs, Workers(fresh_dsn, tmp_path) as workers:
            workers.start("-c", "2")
            with Producer(fresh_dsn) as producer:
                producer.more(50)
                warm = len(producer.ids)
                quiet = producer.more(300)
                assert pgqueue(fresh_dsn, "migrate")[1].endswith(f"{HEAD} now, was {FIRST}\n")
                late = workers.start("-c", "2")
                producer.more(50)
                # This one changes the table that everybody works on.
                assert release.run(fresh_dsn, "migrate")[0] == 0
                later = workers.start("-c", "2")
                producer.more(50)
                assert release.run(fresh_dsn, "migrate", "--to", FIRST)[0] == 0
                producer.more(100)
                assert late.stop() == 0
                assert later.stop() == 0
                producer.more(50)
            before, after = p99(producer.seconds[warm:quiet]), p99(producer.seconds[quiet:])
            assert jobs.ends(producer.ids) == Counter(succeeded=len(producer.ids))
            assert workers.ledger.runs() == dict.fromkeys(producer.ids, 1)
            assert jobs.sql("select * from pgqueue.failures") == []
        assert after < before + HELD_UP
        assert migrate.current_revision(fresh_dsn) == FIRST

    @pytest.mark.slow
    def test_a_long_reader_holds_up_the_migration_and_nobody_else(
        self, fresh_dsn: str, tmp_path: Path
    ) -> None:
        release = Release(tmp_path, HARMLESS)
        migrate.upgrade(fresh_dsn)
        with Producer(fresh_dsn) as producer, ending() as ends:
            producer.more(20)
            with reading(fresh_dsn) as reader:
                pid = reader.info.backend_pid
                process = release.start(fresh_dsn, "migrate")
                ends.append(process)
                assert process.stderr is not None
                line = process.stderr.readline()
                assert re.fullmatch(
                    r"pgqueue: waiting for a lock; open transactions on the tables:"
                    rf" session {pid} \(\w+, long report, idle in transaction, for \d+ s\)\n",
                    line,
                )
                start = len(producer.ids)
                end = producer.more(600)
                assert process.poll() is None
                assert migrate.current_revision(fresh_dsn) == HEAD
            out, err = process.communicate(timeout=60)
        assert (process.returncode, out, err) == (
            0,
            f"schema pgqueue is at revision {NEXT} now, was {HEAD}\n",
            "",
        )
        assert p99(producer.seconds[start:end]) < HELD_UP
        assert max(producer.seconds) < 1

    def test_a_reader_that_does_not_end_is_named(
        self, fresh_dsn: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(migrate, "PATIENCE", 1.5)
        migrate.upgrade(fresh_dsn)
        before = schema_of(fresh_dsn)
        told: list[str] = []
        with reading(fresh_dsn, "finished_jobs") as reader:
            with pytest.raises(DatabaseError) as failed:
                migrate.downgrade(fresh_dsn, "base", tell=told.append)
            session = f"session {reader.info.backend_pid} ("
        assert re.fullmatch(
            r"cannot migrate: the tables cannot be locked for 1.5 s, in use by session \d+ \(.*\);"
            r" end them, or try again when there is less to do",
            str(failed.value),
        )
        assert session in str(failed.value)
        assert [session in line for line in told] == [True] * len(told)
        assert told
        assert schema_of(fresh_dsn) == before

    def test_another_migration_that_does_not_end_is_named(
        self, fresh_dsn: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(migrate, "PATIENCE", 0.3)
        told: list[str] = []
        with psycopg.connect(fresh_dsn) as other:
            other.execute("select pg_advisory_xact_lock(%s)", [migrate._LOCK_KEY])
            with pytest.raises(DatabaseError, match=r"another migration of this database goes on for over"):
                migrate.upgrade(fresh_dsn, tell=told.append)
        assert told == ["waiting for another migration of this database"]
        assert migrate.current_revision(fresh_dsn) is None

    @pytest.mark.slow
    def test_killed_in_the_middle_it_leaves_the_old_revision(self, fresh_dsn: str, tmp_path: Path) -> None:
        release = Release(tmp_path, ENDLESS)
        migrate.upgrade(fresh_dsn)
        before = schema_of(fresh_dsn)
        sleeping = "select pid from pg_stat_activity where query like %s and pid <> pg_backend_pid()"
        with closing(Jobs(fresh_dsn)) as jobs, ending() as ends:
            process = release.start(fresh_dsn, "migrate")
            ends.append(process)
            eventually(lambda: jobs.sql(sleeping, "SELECT pg_sleep(600)%"), "it is in the middle")
            process.kill()
            process.wait()
            eventually(lambda: not jobs.sql(sleeping, "SELECT pg_sleep(600)%"), "it is rolled back", 10)
            jobs.add("mark")
        assert migrate.current_revision(fresh_dsn) == HEAD
        assert schema_of(fresh_dsn) == before
        migrate.check_drift(fresh_dsn)
