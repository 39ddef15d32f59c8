"""The installed command, as a shell runs it: what it prints, where, and its exit status."""

from __future__ import annotations

import json
import os
import pty
import select
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit, urlunsplit

import psycopg
import pytest
from psycopg.rows import dict_row

from pgqueue.cli.main import main
from pgqueue.job import new_id

APP = """
from pgqueue import PgQueue
from datetime import date
app = PgQueue("shop", task_routes={"tasks.send": {"queue": "email", "priority": 8}})

@app.task(name="tasks.send")
def send(order_id: int, day: date | None = None) -> None: ...
"""

COMMANDS = [
    [],
    ["migrate"],
    ["worker"],
    ["ping"],
    ["demo"],
    ["enqueue"],
    ["audit"],
    ["retention"],
    ["retention", "list"],
    ["retention", "set"],
    ["retention", "remove"],
    ["prune"],
    ["inspect"],
    ["inspect", "active"],
    ["inspect", "reserved"],
    ["inspect", "scheduled"],
    ["inspect", "registered"],
    ["inspect", "stats"],
    ["inspect", "queues"],
    ["inspect", "workers"],
    ["inspect", "conf"],
    ["canvas"],
    ["canvas", "list"],
    ["canvas", "show"],
    ["canvas", "cancel"],
    ["job"],
    ["job", "list"],
    ["job", "show"],
    ["job", "cancel"],
    ["job", "retry"],
    ["dead"],
    ["dead", "list"],
    ["dead", "show"],
    ["dead", "requeue"],
    ["dead", "purge"],
    ["queue"],
    ["queue", "list"],
    ["queue", "pause"],
    ["queue", "resume"],
    ["queue", "purge"],
    ["queue", "move"],
    ["schedule"],
    ["schedule", "list"],
    ["schedule", "add"],
    ["schedule", "pause"],
    ["schedule", "resume"],
    ["schedule", "remove"],
    ["schedule", "run-now"],
    ["schedule", "next"],
    ["doctor"],
    ["bench"],
]


@dataclass(frozen=True)
class Said:
    """What a command said."""

    status: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        return json.loads(self.out)


@dataclass(frozen=True)
class Command:
    """Runs `pgqueue` on one database, in one folder."""

    dsn: str | None
    folder: Path

    def environment(self) -> dict[str, str]:
        kept = {name: value for name, value in os.environ.items() if not name.startswith("PGQUEUE_")}
        for name in ("FORCE_COLOR", "CLICOLOR_FORCE", "TTY_COMPATIBLE"):
            kept.pop(name, None)
        kept |= {"TERM": "xterm-256color", "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
        return kept | ({"PGQUEUE_DSN": self.dsn} if self.dsn else {})

    def __call__(self, *arguments: str, **environment: str) -> Said:
        done = subprocess.run(
            [sys.executable, "-m", "pgqueue.cli.main", *arguments],
            env=self.environment() | environment,
            cwd=self.folder,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=60,
        )
        assert "Traceback (most recent call last)" not in done.stderr, done.stderr
        assert "\x1b" not in done.stdout + done.stderr, "escape codes in a pipe"
        return Said(done.returncode, done.stdout, done.stderr)


class Queue:
    """The tables of this test's database."""

    def __init__(self, dsn: str) -> None:
        self.dsn = dsn

    def sql(self, text: str, *parameters: object) -> list[dict[str, Any]]:
        with psycopg.connect(self.dsn, autocommit=True, row_factory=dict_row) as connection:
            cursor = connection.execute(text.encode(), parameters)
            return cursor.fetchall() if cursor.description else []

    def bury(
        self, task: str = "tasks.send", queue: str = "email", message: str = "lost", key: str | None = None
    ) -> str:
        job_id = new_id()
        self.sql(
            "insert into pgqueue.dead_letters (id, queue, task, args, kwargs, priority, attempt, retries,"
            " crashes, rescues, enqueued_at, enqueued_by, headers, dead_letter_queue, reason, error_class,"
            " error_message, traceback, unique_key) values (%s, %s, %s, '[1]', '{\"day\": \"2026-01-31\"}',"
            " 5, 2, 1, 0, 0, now(), 'me', '{}', %s, 'retries_exhausted', 'shop.errors.Lost', %s,"
            " 'Traceback: here', %s)",
            *(job_id, queue, task, f"failed_{queue}", message, key),
        )
        self.sql(
            "insert into pgqueue.failures (job_id, attempt, task, queue, kind, error_class, error_message)"
            " values (%s, 1, %s, %s, 'failed', 'shop.errors.Lost', 'the first time')",
            *(job_id, task, queue),
        )
        return job_id

    def ids(self, table: str) -> list[str]:
        return [row["id"] for row in self.sql(f"select id::text as id from pgqueue.{table} order by id")]

    def job(self) -> dict[str, Any]:
        (row,) = self.sql("select * from pgqueue.jobs")
        return row


@pytest.fixture
def pgqueue(db: str, tmp_path: Path) -> Command:
    (tmp_path / "shop.py").write_text(APP)
    return Command(db, tmp_path)


@pytest.fixture
def queue(db: str) -> Queue:
    return Queue(db)


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: " ".join(command) or "pgqueue")
def test_every_command_helps_with_an_example(tmp_path: Path, command: list[str]) -> None:
    said = Command(None, tmp_path)(*command, "--help")
    assert said.status == 0
    assert said.out.startswith("Usage: ")
    examples = said.out.split("Examples:", 1)[1].splitlines()
    assert any(line.split()[:1] == ["pgqueue"] and " ".join(command) in line for line in examples)
    assert said.err == ""


def test_the_root_command_lists_every_command(tmp_path: Path) -> None:
    said = Command(None, tmp_path)("--help")
    commands = said.out.split("Commands:")[1].split("Examples:")[0]
    assert {command[0] for command in COMMANDS if command} == {
        line.split()[0] for line in commands.splitlines() if line.startswith("  ") and line[2:3].strip()
    }


def test_enqueue_prints_the_id_of_the_job(pgqueue: Command, queue: Queue) -> None:
    said = pgqueue(
        *("enqueue", "other.task", "--args", '[1, "é"]', "--kwargs", '{"a": null}', "-q", "low"),
        *("--priority", "9", "--countdown", "60", "--expires", "120", "--max-retries", "-1"),
    )
    assert (said.status, said.err) == (0, "")
    job = queue.job()
    assert said.out == f"{job['id']}\n"
    assert (job["task"], job["args"], job["kwargs"]) == ("other.task", [1, "é"], {"a": None})
    assert (job["queue"], job["priority"], job["max_retries"]) == ("low", 9, -1)
    assert job["state"] == "scheduled"
    assert 55 < (job["eta"] - job["enqueued_at"]).total_seconds() < 65
    assert 115 < (job["expires_at"] - job["enqueued_at"]).total_seconds() < 125


def test_enqueue_as_json_with_an_id_of_ones_own(pgqueue: Command, queue: Queue) -> None:
    job_id = new_id()
    for _ in range(2):
        said = pgqueue(
            "enqueue", "other.task", "--job-id", job_id, "--eta", "2099-01-31T09:00+09:00", "--json"
        )
        assert said.json == {"id": job_id}
    assert queue.job()["eta"].isoformat() == "2099-01-31T00:00:00+00:00"


def test_enqueue_with_an_application_takes_its_routes_and_checks_the_call(
    pgqueue: Command, queue: Queue
) -> None:
    said = pgqueue(
        "-A", "shop:app", "enqueue", "tasks.send", "--args", "[1]", "--kwargs", '{"day": "2026-01-31"}'
    )
    assert said.status == 0, said.err
    job = queue.job()
    assert (job["queue"], job["priority"], job["args"]) == ("email", 8, [1])
    assert job["kwargs"] == {"day": "2026-01-31"}


WRONG_CALLS = [
    (["--args", "[]"], "missing a required argument: 'order_id'", 2),
    (["--args", '["x"]'], "order_id must be int, got str 'x'", 2),
    (["--args", "[1]", "--kwargs", '{"day": "tomorrow"}'], "day must be", 2),
    (["--args", "[1, null, 3]"], "too many positional arguments", 2),
]


@pytest.mark.parametrize(("arguments", "message", "status"), WRONG_CALLS, ids=lambda value: str(value))
def test_enqueue_with_an_application_refuses_a_wrong_call(
    pgqueue: Command, queue: Queue, arguments: list[str], message: str, status: int
) -> None:
    said = pgqueue("-A", "shop:app", "enqueue", "tasks.send", *arguments)
    assert (said.status, said.out) == (status, "")
    assert message in said.err
    assert queue.ids("jobs") == []


def test_enqueue_with_an_application_refuses_an_unknown_task(pgqueue: Command, queue: Queue) -> None:
    said = pgqueue("-A", "shop:app", "enqueue", "tasks.sned")
    assert (said.status, said.out) == (1, "")
    assert "no task 'tasks.sned' is registered" in said.err
    assert queue.ids("jobs") == []


SOME_ID = "01890a5d-ac96-774b-bcce-b302099a8057"

BAD_INPUT = [
    (["enqueue", "t", "--args", "{}"], "--args must be a JSON array, got '{}'"),
    (["enqueue", "t", "--args", "[1"], "--args must be a JSON array, got '[1'"),
    (["enqueue", "t", "--args", "[NaN]"], "NaN is not JSON"),
    (["enqueue", "t", "--args", "[" * 50_000], "--args must be a JSON array"),
    (["enqueue", "t", "--kwargs", "[]"], "--kwargs must be a JSON object, got '[]'"),
    (["enqueue", "t", "--priority", "10"], "10 is not in the range"),
    (["enqueue", "t", "-q", "a b"], "a queue name is 1 to 63 letters"),
    (["enqueue", "a task"], "a task name is 1 to 255 characters without blanks"),
    (["enqueue", "t", "--eta", "2026-01-31"], "must have a timezone"),
    (["enqueue", "t", "--eta", "soon"], "must be like 2026-01-31T09:00Z, got 'soon'"),
    (["enqueue", "t", "--eta", "2026-01-31T09:00Z", "--countdown", "1"], "exclude each other"),
    (["enqueue", "t", "--countdown", "inf"], "countdown must be a finite number"),
    (["enqueue", "t", "--expires", "nan"], "expires must be a finite number"),
    (["enqueue", "t", "--max-retries", "-2"], "-2 is not in the range"),
    (["enqueue", "t", "--job-id", "7"], "'7' is not a valid UUID"),
    (["enqueue"], "Missing argument 'TASK'"),
    (["dead", "list", "--since", "yesterday"], "must be like 30m, 2h, 3d"),
    (["dead", "list", "--since", "2 fortnights"], "must be like 30m, 2h, 3d"),
    (["dead", "list", "--since", "99999999999d"], "must be like 30m, 2h, 3d"),
    (["dead", "list", "--reason", "bad luck"], "'bad luck' is not one of"),
    (["dead", "list", "--limit", "0"], "0 is not in the range"),
    (["dead", "show", "7"], "a job id is a UUID, got '7'"),
    (["dead", "show"], "Missing argument 'ID'"),
    (["dead", "requeue"], "say which: ids, or filters"),
    (["dead", "requeue", "7"], "a job id is a UUID, got '7'"),
    (["dead", "requeue", "--all", "--queue", "a"], "exclude each other"),
    (["dead", "requeue", SOME_ID, "--all"], "exclude each other"),
    (["dead", "requeue", SOME_ID, "--limit", "1"], "--limit goes with filters"),
    (["dead", "requeue", SOME_ID, "--rate", "1"], "--rate goes with filters"),
    (["dead", "purge"], "say which: ids, or filters"),
    (["dead", "purge", SOME_ID, "--limit", "1"], "--limit goes with filters"),
    (["inspect", "queues", "--watch", "0"], "0.0 is not in the range"),
    (["inspect", "nothing"], "No such command 'nothing'"),
    (["nothing"], "No such command 'nothing'"),
]


@pytest.mark.parametrize(("arguments", "message"), BAD_INPUT, ids=lambda value: str(value)[:60])
def test_wrong_usage_exits_with_2_and_says_what_is_wrong(
    db: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    message: str,
) -> None:
    # In this process: the same entry point, without the half second that starting one takes.
    monkeypatch.setenv("PGQUEUE_DSN", db)
    monkeypatch.setattr(sys, "argv", ["pgqueue", *arguments])
    with pytest.raises(SystemExit) as exit:
        main()
    said = capsys.readouterr()
    assert (exit.value.code, said.out) == (2, "")
    assert message in said.err


INSPECTIONS = ["active", "reserved", "scheduled", "registered", "stats", "queues", "workers", "conf"]
READING = [
    *(["inspect", name] for name in INSPECTIONS),
    ["queue", "list"],
    ["schedule", "list"],
    ["dead", "list"],
    ["dead", "requeue", "--all"],
]


@pytest.mark.parametrize("command", [*READING, ["enqueue", "t"]], ids=" ".join)
def test_without_a_database_the_ways_to_name_one_are_told(tmp_path: Path, command: list[str]) -> None:
    said = Command(None, tmp_path)(*command)
    assert said.status == 2
    assert "no database: pass --dsn, set PGQUEUE_DSN, or name an application with -A" in said.err


@pytest.mark.parametrize("command", [*READING, ["enqueue", "t"]], ids=" ".join)
def test_on_a_database_without_the_schema_the_command_is_named(
    fresh_dsn: str, tmp_path: Path, command: list[str]
) -> None:
    said = Command(fresh_dsn, tmp_path)(*command)
    assert (said.status, said.out) == (5, "")
    assert said.err == "pgqueue: the database has no schema 'pgqueue' of pgqueue; run `pgqueue migrate`\n"


@pytest.mark.parametrize("command", READING, ids=" ".join)
def test_on_a_database_at_another_revision_the_command_is_named(
    pgqueue: Command, queue: Queue, command: list[str]
) -> None:
    (row,) = queue.sql("select version_num from pgqueue.alembic_version")
    queue.sql("update pgqueue.alembic_version set version_num = '0000'")
    try:
        said = pgqueue(*command)
    finally:
        queue.sql("update pgqueue.alembic_version set version_num = %s", row["version_num"])
    assert (said.status, said.out) == (5, "")
    assert said.err.startswith("pgqueue: database is at revision 0000, this pgqueue works with ")
    assert said.err.endswith("; run `pgqueue migrate`\n")


def with_user(dsn: str, user: str) -> str:
    parts = urlsplit(dsn)
    return urlunsplit(parts._replace(netloc=f"{user}@{parts.netloc.rpartition('@')[2]}"))


def unreachable(dsn: str) -> dict[str, str]:
    return {
        "refused login": with_user(dsn, "nobody_we_know:s3cret"),
        "nobody listens": "postgresql://me:s3cret@127.0.0.1:1/x",
        "no such database": urlunsplit(urlsplit(dsn)._replace(path="/there_is_none")),
    }


@pytest.mark.parametrize("case", list(unreachable("")))
def test_a_database_that_cannot_be_reached_is_one_line(pgqueue: Command, db: str, case: str) -> None:
    said = pgqueue("--dsn", unreachable(db)[case], "inspect", "queues")
    assert (said.status, said.out) == (4, "")
    assert said.err.startswith("pgqueue: cannot reach the database: ")
    assert said.err.endswith("; check the dsn (--dsn, PGQUEUE_DSN)\n")
    assert said.err.count("\n") == 1
    assert "s3cret" not in said.err


def test_a_dsn_that_cannot_be_read_is_not_printed(pgqueue: Command) -> None:
    said = pgqueue("--dsn", "s3cret word", "inspect", "queues")
    assert said.status == 2
    assert said.err == (
        "pgqueue: dsn must be a PostgreSQL URL (postgresql://user@host/database) or key=value pairs\n"
    )


def test_inspect_queues(pgqueue: Command, queue: Queue) -> None:
    assert pgqueue("inspect", "queues").out == "no queue has jobs, dead letters or workers\n"
    assert pgqueue("inspect", "queues", "--json").json == []
    pgqueue("enqueue", "t", "-q", "lonely")
    queue.bury()
    said = pgqueue("inspect", "queues")
    assert (said.status, said.err) == (0, "")
    rows = [line.split() for line in said.out.splitlines()]
    assert rows[0] == ["queue", "ready", "scheduled", "running", "dead", "oldest", "ready", "workers"]
    assert rows[1] == ["email", "0", "0", "0", "1", "-", "0"]
    assert (rows[2][:5], rows[2][-1]) == (["lonely", "1", "0", "0", "0"], "nobody")
    assert "nobody serves lonely; start a worker with -Q lonely" in said.out
    found = {each["queue"]: each for each in pgqueue("inspect", "queues", "--json", "--exact").json}
    assert (found["lonely"]["ready"], found["lonely"]["served"]) == (1, False)
    assert (found["email"]["dead"], found["email"]["served"]) == (1, True)
    assert found["email"]["at_least"] == []


def test_inspect_active(pgqueue: Command, queue: Queue) -> None:
    assert pgqueue("inspect", "active").out == "no job has been running for more than a second\n"
    assert pgqueue("inspect", "active", "--json").json == []
    job_id = pgqueue("enqueue", "tasks.send").out.strip()
    queue.sql(
        "insert into pgqueue.workers (id, host, pid, queues, pool, concurrency, version, running)"
        " values ('w', 'box', 4711, '{}', 'prefork', 1, '1', array[%s]::uuid[])",
        job_id,
    )
    queue.sql(
        "update pgqueue.jobs set state = 'running', worker_id = 'w', claimed_at = now() - interval '1 h'"
    )
    said = pgqueue("inspect", "active")
    assert said.out.splitlines()[1].split() == [
        job_id,
        "tasks.send",
        "default",
        "0",
        "box:4711",
        "60",
        "min",
    ]
    (found,) = pgqueue("inspect", "active", "--json").json
    assert (found["id"], found["active"], found["host"], found["pid"]) == (job_id, True, "box", 4711)


def test_watching_prints_one_json_line_each_time_until_ctrl_c(pgqueue: Command) -> None:
    watching = subprocess.Popen(
        [sys.executable, "-m", "pgqueue.cli.main", "inspect", "queues", "--json", "--watch", "0.1"],
        env=pgqueue.environment() | {"PYTHONUNBUFFERED": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    with watching:
        assert watching.stdout is not None
        assert [json.loads(watching.stdout.readline()) for _ in range(3)] == [[], [], []]
        watching.send_signal(2)
        rest, err = watching.communicate(timeout=20)
    assert (watching.returncode, err) == (0, ""), rest


def test_dead_list(pgqueue: Command, queue: Queue) -> None:
    assert pgqueue("dead", "list").out == "no dead letters\n"
    assert pgqueue("dead", "list", "--json").json == []
    first = queue.bury(message="\x1b[31mred\x07\n[bold]and long[/bold] " + "x" * 300)
    second = queue.bury(task="tasks.other", queue="low")
    said = pgqueue("dead", "list")
    assert (said.status, said.err) == (0, "")
    lines = said.out.splitlines()
    assert [line.split()[0] for line in lines] == ["id", second, first]
    assert "shop.errors.Lost: \\x1b[31mred\\x07 [bold]and long[/bold] " + "x" * 300 in lines[2]
    assert [each["id"] for each in pgqueue("dead", "list", "--queue", "failed_email", "--json").json] == [
        first
    ]
    assert [each["id"] for each in pgqueue("dead", "list", "--task", "tasks.other", "--json").json] == [
        second
    ]
    assert len(pgqueue("dead", "list", "--error", "Lost", "--since", "2h", "--json").json) == 2
    assert pgqueue("dead", "list", "--reason", "crashed", "--json").json == []
    assert pgqueue("dead", "list", "--since", "2999-01-01", "--json").json == []
    limited = pgqueue("dead", "list", "--limit", "1")
    assert len(limited.out.splitlines()) == 2
    assert limited.err == "1 of 2; --limit shows more\n"


def test_dead_show(pgqueue: Command, queue: Queue) -> None:
    job_id = queue.bury(message="lost\x1b[2J")
    said = pgqueue("dead", "show", job_id)
    assert (said.status, said.err) == (0, "")
    for part in (
        "args               [1]",
        '{"day": "2026-01-31"}',
        "Traceback: here",
        "the first time",
        "failed_email",
    ):
        assert part in said.out
    found = pgqueue("dead", "show", job_id, "--json").json
    assert (found["args"], found["kwargs"]) == ([1], {"day": "2026-01-31"})
    assert [failure["error_message"] for failure in found["failures"]] == ["the first time"]


def test_dead_requeue_by_id_acts_at_once(pgqueue: Command, queue: Queue) -> None:
    job_id = queue.bury()
    said = pgqueue("dead", "requeue", job_id, "--note", "mended")
    assert (said.status, said.out, said.err) == (0, "requeued 1 dead letter\n", "")
    assert (queue.ids("jobs"), queue.ids("dead_letters")) == ([job_id], [])
    (note,) = queue.sql("select * from pgqueue.audit_log")
    assert (str(note["job_id"]), note["action"], note["reason"]) == (job_id, "requeue", "mended")
    assert "@" in note["details"]["by"]


NOT_DEAD = {
    "ready": "is ready, not dead",
    "succeeded": "is succeeded, not dead",
    "unknown": "never committed, pruned",
}


def test_dead_requeue_at_a_rate(pgqueue: Command, queue: Queue) -> None:
    """Spread over time: with twenty a second the last of sixty waits until five sixths of three seconds."""
    for _ in range(60):
        queue.bury()
    said = pgqueue("dead", "requeue", "--all", "--rate", "20", "--yes")
    assert said.out == "requeued 60 dead letters\n"
    (row,) = queue.sql("select max(at) - min(at) as took from pgqueue.audit_log")
    assert row["took"].total_seconds() > 2.4


def test_dead_purge_by_id_and_by_filter(pgqueue: Command, queue: Queue) -> None:
    one, others = queue.bury(), [queue.bury(queue="other") for _ in range(3)]
    never = new_id()
    assert pgqueue("dead", "purge", one).out == "would purge 1 dead letter; --yes does it\n"
    assert pgqueue("dead", "purge", "--all", "--json").json == {"dry_run": True, "would_purge": 4}
    said = pgqueue("dead", "purge", one, never, "--note", "a test", "--yes")
    assert (said.status, said.out) == (1, "purged 1 dead letter\n")
    assert f"no job {never}: never committed" in said.err
    said = pgqueue("dead", "purge", "--queue", "other", "--limit", "2", "--yes", "--json")
    assert (said.status, said.json["purged"]) == (0, sorted(others)[:2])
    assert queue.ids("dead_letters") == sorted(others)[2:]
    acts = queue.sql("select * from pgqueue.audit_log order by id")
    assert [(act["action"], str(act["job_id"])) for act in acts] == [
        ("purge_dead_letter", each) for each in (one, *sorted(others)[:2])
    ]
    assert acts[0]["reason"] == "a test"
    assert acts[0]["details"]["before"]["task"] == "tasks.send"
    assert "@" in acts[0]["details"]["by"]
    assert queue.sql("select count(*) as kept from pgqueue.failures where job_id = %s", one)[0]["kept"] == 1


@pytest.mark.parametrize("state", NOT_DEAD)
@pytest.mark.parametrize("command", ["show", "requeue"])
def test_an_id_that_is_not_dead_is_told_what_it_is(
    pgqueue: Command, queue: Queue, command: str, state: str
) -> None:
    job_id = new_id()
    if state == "ready":
        pgqueue("enqueue", "t", "--job-id", job_id)
    elif state == "succeeded":
        queue.sql(
            "insert into pgqueue.finished_jobs (id, state, queue, task, args, kwargs, priority, attempt,"
            " retries, crashes, rescues, enqueued_at, enqueued_by, headers) values"
            " (%s, 'succeeded', 'q', 't', '[]', '{}', 5, 1, 0, 0, 0, now(), 'me', '{}')",
            job_id,
        )
    said = pgqueue("dead", command, job_id)
    assert said.status == 1
    assert said.err.startswith("pgqueue: ")
    assert said.err.count("\n") == 1
    assert job_id in said.err
    assert NOT_DEAD[state] in said.err


def test_dead_requeue_of_several_ids_does_those_it_can(pgqueue: Command, queue: Queue) -> None:
    holder, blocked, free, never = queue.bury(key="k"), queue.bury(key="k"), queue.bury(), new_id()
    said = pgqueue("dead", "requeue", holder, blocked, free, never, "--json")
    assert said.status == 1
    assert sorted(said.json["requeued"]) == sorted([holder, free])
    assert [each["id"] for each in said.json["refused"]] == [blocked]
    assert f"job {blocked} stays dead: job {holder} has its unique key 'k'" in said.err
    assert f"no job {never}" in said.err
    assert queue.ids("dead_letters") == [blocked]


@pytest.mark.parametrize("flags", [[], ["--dry-run"], ["--dry-run", "--yes"]], ids=str)
def test_dead_requeue_by_filter_only_counts_without_yes(
    pgqueue: Command, queue: Queue, flags: list[str]
) -> None:
    ids = [queue.bury(), queue.bury(), queue.bury(queue="low")]
    said = pgqueue("dead", "requeue", "--queue", "email", *flags)
    assert said.status == 0
    assert said.out.startswith("would requeue 2 dead letters")
    assert ("--yes" in said.out) == (not flags)
    assert pgqueue("dead", "requeue", "--all", *flags, "--json").json == {"dry_run": True, "would_requeue": 3}
    assert queue.ids("dead_letters") == sorted(ids)


def test_dead_requeue_by_filter_with_yes(pgqueue: Command, queue: Queue) -> None:
    ids = [queue.bury(), queue.bury(), queue.bury()]
    other = queue.bury(queue="low")
    said = pgqueue("dead", "requeue", "--queue", "email", "--limit", "2", "--yes")
    assert (said.status, said.out, said.err) == (0, "requeued 2 dead letters\n", "")
    assert queue.ids("jobs") == sorted(ids)[:2]
    said = pgqueue("dead", "requeue", "--all", "--yes")
    assert said.out == "requeued 2 dead letters\n"
    assert queue.ids("jobs") == sorted([*ids, other])
    assert pgqueue("dead", "requeue", "--all", "--yes").out == "would requeue 0 dead letters\n"


@pytest.mark.parametrize(("answer", "left"), [("y", 0), ("n", 1)])
def test_dead_requeue_by_filter_asks_on_a_terminal(
    pgqueue: Command, queue: Queue, answer: str, left: int
) -> None:
    queue.bury()
    status, shown = on_a_terminal(pgqueue, ["dead", "requeue", "--all"], "[y/N]", f"{answer}\n")
    assert "requeue 1 dead letter?" in shown
    assert status == 0
    assert len(queue.ids("dead_letters")) == left


def on_a_terminal(command: Command, arguments: list[str], prompt: str, answer: str) -> tuple[int, str]:
    """Run it on a terminal of its own, and answer its question."""
    ours, theirs = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-m", "pgqueue.cli.main", *arguments],
        env=command.environment(),
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
    )
    os.close(theirs)
    shown, answered, deadline = "", False, time.monotonic() + 60
    with process:
        while time.monotonic() < deadline:
            if not select.select([ours], [], [], 0.1)[0]:
                continue
            try:
                part = os.read(ours, 65536).decode()
            except OSError:  # the other side is closed
                break
            if not part:
                break
            shown += part
            if prompt in shown and not answered:
                answered = True
                os.write(ours, answer.encode())
        else:
            process.kill()
    os.close(ours)
    return process.returncode, shown


def test_output_survives_a_locale_without_the_letters(pgqueue: Command, queue: Queue) -> None:
    queue.bury(message="verloren: ≥")
    said = pgqueue("dead", "list", PYTHONIOENCODING="latin-1")
    assert said.status == 0
    assert "\\u2265" in said.out
