"""Whatever is wrong in a command line, a call or a statement: one clear error, at once, and nothing happens.

The cases are in `bad_input_cases`. What each gets is in docs/bad-input.md, which is written by
`PGQUEUE_WRITE_DOCS=1 pytest tests/acceptance/test_bad_input.py` and compared by an ordinary run.
"""

from __future__ import annotations

import asyncio
import contextlib
import difflib
import logging
import os
import re
import secrets
import signal
import socket
import sqlite3
import struct
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from dataclasses import dataclass, field
from datetime import UTC, date, datetime, timedelta
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit, urlunsplit
from uuid import uuid4

import psycopg
import pytest
import sqlalchemy
from sqlalchemy.orm import sessionmaker

import pgqueue
from pgqueue import PgQueue, Request, Retry, Signature, TaskContext
from pgqueue.cli.main import main
from pgqueue.config import Config
from pgqueue.database.migrate import upgrade
from pgqueue.job import new_id
from tests.acceptance.bad_input_cases import QUIET, SETTINGS, WRONG_SETTINGS, Call, Case, Line, Sql, cases

PAGE = Path(__file__).resolve().parents[2] / "docs" / "bad-input.md"
WRITE = bool(os.environ.get("PGQUEUE_WRITE_DOCS"))
SECONDS = 20
LONGEST = 1000
SECRETS = (
    "s3cret",
    "s3/cret",
    "s3@cret",
    "s3:cret",
    "s3%zz",
    "cret@",
    "'cret",
    '"cret',
    "s3 ",
    "p@ss",
    "p%40ss",
    "ss/w0rd",
)
"""Passwords of the cases, and parts of them that a reader of DSNs could take for something else."""

APPS = {
    "shop": """
from datetime import date
from pgqueue import PgQueue
app = PgQueue("shop")

@app.task(name="tasks.send")
def send(order_id: int, day: date | None = None) -> None: ...
""",
    "broken": "from pgqueue import PgQueue\napp = PgQueue('broken')\nrate = 1 / 0\n",
    "syntax": "from pgqueue import PgQueue\ndef app(:\n",
    "needs": "import no_such_package\n",
    "leaves": "import sys\nsys.exit('configuration is missing')\n",
    "leaves_quietly": "import sys\nsys.exit(0)\n",
    "lost": "from pgqueue import PgQueue\napp = PgQueue('lost', imports=['no_such_tasks'])\n",
    "prints": "from pgqueue import PgQueue\nprint('hello')\napp = PgQueue('prints')\n",
}

CASES = cases()
GOT: dict[Case, tuple[str, str]] = {}
"""Exit status or exception, and message, of the cases that ran."""


@dataclass
class Bench:
    """What the cases are tried on: a queue with one job of each kind, and databases that are of no use."""

    dsn: str
    folder: Path
    words: dict[str, str]
    watch: psycopg.Connection
    sql: psycopg.Connection
    before: list[Any] = field(default_factory=list)

    def fill(self, text: str) -> str:
        for word, value in self.words.items():
            text = text.replace(word, value)
        return text

    def rows(self) -> list[Any]:
        """Everything that a mistake could have made, changed or lost."""
        return self.watch.execute(
            "select 'job', id::text, state, attempt from pgqueue.jobs union all"
            " select 'finished', id::text, state, attempt from pgqueue.finished_jobs union all"
            " select 'dead', id::text, reason, attempt from pgqueue.dead_letters union all"
            " select 'audit', id::text, action, 0 from pgqueue.audit_log union all"
            " select 'worker', id, '', 0 from pgqueue.workers union all"
            " select 'failures', job_id::text, '', attempt from pgqueue.failures order by 1, 2"
        ).fetchall()

    def changes(self) -> list[str]:
        """What is there now and was not, or the other way round, since the last look."""
        before, self.before = self.before, self.rows()
        return [f"it made {row}" for row in self.before if row not in before] + [
            f"it lost {row}" for row in before if row not in self.before
        ]


class Answering:
    """A server on a port of its own that does with each connection what it is told to."""

    def __init__(self, answer: Callable[[socket.socket], None]) -> None:
        self._answer = answer
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]
        self._stopped = threading.Event()
        self._connections: list[socket.socket] = []
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self._thread.start()

    def _serve(self) -> None:
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return
            self._connections.append(connection)
            with contextlib.suppress(OSError, struct.error):
                self._answer(connection)

    def close(self) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self._thread.join(SECONDS)
        for connection in self._connections:
            connection.close()


def say_nothing(connection: socket.socket) -> None:
    """Keep it open."""


def speak_http(connection: socket.socket) -> None:
    connection.recv(1024)
    connection.sendall(b"HTTP/1.1 400 Bad Request\r\nContent-Length: 0\r\nConnection: close\r\n\r\n")
    connection.close()


def refuse_login(connection: socket.socket) -> None:
    """PostgreSQL's protocol, version 3: no encryption, a password please, and it is wrong."""
    while True:
        size, code = struct.unpack("!II", connection.recv(8))
        startup = connection.recv(size - 8)
        if code not in (80877103, 80877104):  # SSLRequest, GSSENCRequest
            break
        connection.sendall(b"N")
    user = startup.split(b"\0")[1]
    connection.sendall(b"R" + struct.pack("!II", 8, 3))
    connection.recv(1024)
    text = b'password authentication failed for user "' + user + b'"'
    error = b"SFATAL\0VFATAL\0C28P01\0M" + text + b"\0\0"
    connection.sendall(b"E" + struct.pack("!I", len(error) + 4) + error)
    connection.close()


@pytest.fixture(scope="module")
def bench(postgres: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bench]:
    folder = tmp_path_factory.mktemp("shop")
    for name, text in APPS.items():
        (folder / f"{name}.py").write_text(text)
    with ExitStack() as stack:
        queue, bare, older, newer, another = (postgres.create_database() for _ in range(5))
        for each in (queue, bare, older, newer, another):
            stack.callback(postgres.drop_database, each)
        for each in (queue, older, newer, another):
            upgrade(each.dsn)
        role = f"visitor_{secrets.token_hex(4)}"
        ids = [new_id() for _ in range(3)]
        watch = stack.enter_context(closing(psycopg.connect(queue.dsn, autocommit=True)))
        watch.execute(f"create role {role} login password 'visitor'".encode())
        stack.callback(drop_role, postgres.dsn, role)
        for each, revision in ((older, "0000"), (newer, "9999")):
            with psycopg.connect(each.dsn) as connection:
                connection.execute("update pgqueue.alembic_version set version_num = %s", [revision])
                connection.execute("update pgqueue.meta set oldest_code_revision = %s", [revision])
        seed(watch, *ids)
        web, silent, login = (
            stack.enter_context(closing(Answering(each))) for each in (speak_http, say_nothing, refuse_login)
        )
        stranger = f"me:s3cret@127.0.0.1:{login.port}/shop"
        words = {
            "<dsn>": queue.dsn,
            "<dsn with a wrong password>": f"postgresql://{stranger}",
            "<dsn with an encoded password>": f"postgresql://{stranger.replace('s3cret', 'p%40ss%2Fw0rd')}",
            "<dsn of an unknown role>": with_user(queue.dsn, "nobody_we_know:s3cret"),
            "<dsn of an unknown database>": urlunsplit(urlsplit(queue.dsn)._replace(path="/there_is_none")),
            "<dsn of an unknown host>": "postgresql://me:s3cret@no-such-host.invalid/shop",
            "<dsn of a closed port>": "postgresql://me:s3cret@127.0.0.1:1/shop",
            "<dsn of a web server>": f"postgresql://me:s3cret@127.0.0.1:{web.port}/shop",
            "<dsn of a silent server>": f"postgresql://me:s3cret@127.0.0.1:{silent.port}/shop?connect_timeout=2",
            "<dsn that wants SSL>": f"postgresql://{stranger}?sslmode=require",
            "<dsn of a database without the schema>": bare.dsn,
            "<dsn of a database at an older revision>": older.dsn,
            "<dsn of a database at a newer revision>": newer.dsn,
            "<dsn of a role without rights>": with_user(queue.dsn, f"{role}:visitor"),
            "<dsn of a read-only session>": f"{queue.dsn}?options=-c%20default_transaction_read_only%3Don",
            "<dsn of another queue>": another.dsn,
            "<id of a ready job>": ids[0],
            "<id of a finished job>": ids[1],
            "<id of a dead job>": ids[2],
            "<id of no job>": new_id(),
            "<a byte that is no text>": "\udcff",
            "<two megabytes>": "x" * (2 << 20),
        }
        options = "-c statement_timeout=5s -c default_transaction_isolation=read\\ committed"
        connection = stack.enter_context(
            closing(psycopg.connect(queue.dsn, autocommit=True, options=options))
        )
        bench = Bench(queue.dsn, folder, words, watch, connection)
        bench.changes()
        yield bench


def seed(connection: psycopg.Connection, ready: str, finished: str, dead: str) -> None:
    connection.execute("select pgqueue.enqueue('tasks.send', '[1]', job_id => %s::uuid)", [ready])
    connection.execute(
        "insert into pgqueue.finished_jobs (id, state, queue, task, args, kwargs, priority, attempt, retries,"
        " crashes, rescues, enqueued_at, enqueued_by, headers)"
        " values (%s, 'succeeded', 'q', 't', '[]', '{}', 5, 1, 0, 0, 0, now(), 'me', '{}')",
        [finished],
    )
    connection.execute(
        "insert into pgqueue.dead_letters (id, queue, task, args, kwargs, priority, attempt, retries,"
        " crashes, rescues, enqueued_at, enqueued_by, headers, dead_letter_queue, reason, error_class,"
        " error_message)"
        " values (%s, 'q', 't', '[]', '{}', 5, 4, 3, 0, 0, now(), 'me', '{}', 'q', 'retries_exhausted',"
        " 'shop.Lost', 'lost')",
        [dead],
    )


def drop_role(dsn: str, role: str) -> None:
    with psycopg.connect(dsn, autocommit=True) as connection:
        connection.execute(f"drop role {role}".encode())


def with_user(dsn: str, user: str) -> str:
    parts = urlsplit(dsn)
    return urlunsplit(parts._replace(netloc=f"{user}@{parts.netloc.rpartition('@')[2]}"))


SECTIONS = list(dict.fromkeys(case.section for case in CASES))


class TookTooLong(BaseException):
    """A case that is no error at all, but waits or runs."""


@contextlib.contextmanager
def ended_in_time() -> Iterator[None]:
    """Fail a case after `SECONDS`; the time limit of the whole test is pytest's."""
    main_thread = threading.main_thread().ident
    assert main_thread is not None

    def end(*_: object) -> None:
        raise TookTooLong

    before = signal.signal(signal.SIGUSR1, end)
    timer = threading.Timer(SECONDS, signal.pthread_kill, (main_thread, signal.SIGUSR1))
    timer.start()
    try:
        yield
    except TookTooLong:
        pytest.fail(f"it has not ended in {SECONDS} s", pytrace=False)
    finally:
        timer.cancel()
        timer.join()
        signal.signal(signal.SIGUSR1, before)


# A test per section, not per case: what surrounds a test takes longer than most cases.
@pytest.mark.timeout(300)
@pytest.mark.parametrize("section", SECTIONS)
def test_what_is_wrong_is_one_clear_error_and_nothing_happens(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], section: str
) -> None:
    clear_environment(monkeypatch)
    problems = []
    for case in CASES:
        if case.section != section:
            continue
        try:
            with pytest.MonkeyPatch.context() as patch, ended_in_time():
                try_case(bench, patch, capfd, case)
        except (Exception, pytest.fail.Exception) as error:
            problems.append(
                f"{case.shown[:200]}: {type(error).__name__} {' | '.join(str(error).splitlines())[:700]}"
            )
        problems += [f"{case.shown[:200]}: {what}" for what in bench.changes()]
    assert not problems, "\n".join(["", *problems])


def test_every_setting_has_wrong_values() -> None:
    assert SETTINGS.keys() == WRONG_SETTINGS.keys() == Config.__dataclass_fields__.keys()


def try_case(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], case: Case
) -> None:
    if isinstance(case, Call):
        kind, message = raised_by_call(bench, case)
        check(bench, case, message, everything=message)
        expected = case.raises
    elif isinstance(case, Sql):
        kind, message, everything = raised_by_sql(bench, case)
        check(bench, case, message, everything=everything)
        expected = case.raises
    else:
        if case.own_process:
            status, out, err = in_its_own_process(bench, case)
        else:
            status, out, err = in_this_process(bench, monkeypatch, capfd, case)
        kind, expected = f"{status}", f"{case.status}"
        message = message_of(err, with_traceback=case.with_traceback)
        check(bench, case, message, everything=out + err)
        assert out == case.out
    GOT[case] = (kind, message)
    assert kind == expected, f"{kind}: {message}"


@pytest.mark.parametrize("case", QUIET, ids=lambda case: case.shown)
def test_odd_surroundings_are_no_mistake(bench: Bench, case: Line) -> None:
    status, out, err = in_its_own_process(bench, case)
    assert "Traceback" not in err
    assert "Exception ignored" not in err
    assert status == case.status, err
    assert err == ("hello\n" if "prints:app" in case.arguments else "")
    assert "hello" not in out
    assert bench.changes() == []


def raised_by_call(bench: Bench, case: Call) -> tuple[str, str]:
    with namespace(bench) as names:
        try:
            value = eval(bench.fill(case.source), {}, names)  # noqa: S307
        except Exception as error:
            return public_name(error), str(error)
    pytest.fail(f"it is {value!r}", pytrace=False)


def public_name(error: Exception) -> str:
    """The class that callers catch: some of ours have subclasses for our own use."""
    ours = (each for each in type(error).__mro__ if not each.__module__.startswith("pgqueue.database"))
    return next(ours).__name__


def raised_by_sql(bench: Bench, case: Sql) -> tuple[str, str, str]:
    try:
        rows = bench.sql.execute(case.source.encode()).fetchall()
    except psycopg.Error as error:
        return type(error).__name__, error.diag.message_primary or "", str(error)
    pytest.fail(f"it is {rows!r}", pytrace=False)


def check(bench: Bench, case: Case, message: str, *, everything: str) -> None:
    """What holds for every message: one line, of a length one reads, about the value, without a secret."""
    lines = message.splitlines()
    assert len(lines) == 1, message
    assert len(message) <= LONGEST
    assert isinstance(case, Sql) or lines[0].isprintable(), ascii(message)
    assert message.startswith("Error: ") or not message.endswith("."), message  # click's own end with one
    assert bench.fill(case.names) in message, f"{case.names!r} is not in: {message}"
    for secret in (*SECRETS, urlsplit(bench.dsn).password or "visitor"):
        assert secret not in everything, everything


def message_of(err: str, *, with_traceback: bool) -> str:
    """The message of a command, which has one of three forms."""
    text, _, traceback = err.partition("\nTraceback (most recent call last)")
    assert bool(traceback) <= with_traceback, err
    lines = text.rstrip("\n").split("\n")
    if lines[0].startswith("pgqueue: "):
        assert len(lines) == 1, err
        return lines[0]
    assert lines[0].startswith("Usage: ") or lines[0].startswith("Error: "), err
    errors = [line for line in lines if line.startswith("Error: ")]
    if not errors and lines[-1].strip():  # the command's help
        return "its help"
    assert errors == lines[-1:], err
    return errors[0]


def in_this_process(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], case: Line
) -> tuple[object, str, str]:
    """The command's entry point, without the half second that starting a process takes."""
    for name, value in {"PGQUEUE_DSN": bench.dsn, **case.environment}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("pgqueue.worker.run.run_worker", fail_if_started)
    monkeypatch.setattr("pgqueue.cli.demo.require_packages", fail_if_started)
    monkeypatch.setattr(sys, "argv", ["pgqueue", *map(bench.fill, case.arguments)])
    # Other tests of this run import the example shop.
    monkeypatch.setattr(sys, "path", [each for each in sys.path if each and not each.endswith("/examples")])
    for name in [name for name in sys.modules if name.partition(".")[0] in APPS]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.chdir(bench.folder)
    capfd.readouterr()
    try:
        with pytest.raises(SystemExit) as exit:
            main()
    finally:
        for name in APPS:
            sys.modules.pop(name, None)
    said = capfd.readouterr()
    return exit.value.code, said.out, said.err


def fail_if_started(*arguments: object, **options: object) -> None:
    pytest.fail("it started", pytrace=False)


def clear_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [*os.environ]:
        if name.startswith(("PGQUEUE_", "PG")) or name in ("COLUMNS", "FORCE_COLOR"):
            monkeypatch.delenv(name)


def in_its_own_process(bench: Bench, case: Line) -> tuple[int, str, str]:
    """The command as a shell runs it."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("PGQUEUE_", "PG"))}
    given = (
        kept
        | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "PGQUEUE_DSN": bench.dsn}
        | case.environment
    )
    command = [sys.executable, "-m", "pgqueue.cli.main", *map(bench.fill, case.arguments)]
    done = subprocess.run(
        ["bash", "-c", f'"$@" {case.behind}', "bash", *command],
        env=given,
        cwd=bench.folder,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        timeout=SECONDS - 1,
    )
    return done.returncode, done.stdout.decode("utf-8", "replace"), done.stderr.decode("utf-8", "replace")


@contextlib.contextmanager
def namespace(bench: Bench) -> Iterator[Names]:
    """What the calls of the cases know."""
    with ExitStack() as stack:

        def app_on(dsn: str) -> PgQueue:
            app = PgQueue("shop", dsn=dsn)
            stack.callback(app.close)
            return app

        def connect(word: str = "<dsn>", **options: Any) -> Any:
            return stack.enter_context(closing(psycopg.connect(bench.fill(word), **options)))

        names: dict[str, Any] = {name: getattr(pgqueue, name) for name in pgqueue.__all__} | {
            "PgQueue": PgQueue, "Signature": Signature, "Retry": Retry, "UTC": UTC, "date": date,
            "datetime": datetime, "timedelta": timedelta, "uuid4": uuid4, "asyncio": asyncio,
            "logging": logging, "sessionmaker": sessionmaker, "app_on": app_on,
        }  # fmt: skip
        app = names["app"] = app_on(bench.dsn)
        names["used"] = app_on(bench.dsn)
        homeless = PgQueue("homeless")

        @app.task(name="tasks.send")
        def send(order_id: int, day: date | None = None) -> None: ...

        @app.task(name="tasks.anything", bind=True)
        def anything(self: TaskContext, value: Any) -> None: ...

        names |= {
            "send": send,
            "anything": anything,
            "homeless": homeless.task(name="tasks.homeless")(len_of),
        }
        names["self"] = TaskContext(anything, Request(id=new_id(), task="tasks.anything"))
        names["circle"] = []
        names["circle"].append(names["circle"])
        names["ready"] = bench.words["<id of a ready job>"]
        names["dead"] = bench.words["<id of a dead job>"]
        names["result"] = app.AsyncResult(names["ready"])
        yield Names(names, lambda name: CONNECTIONS[name](connect, stack))


def len_of(value: int) -> None: ...


class Names(dict[str, Any]):
    """Connections are made when a case asks for them."""

    def __init__(self, names: dict[str, Any], make: Callable[[str], Any]) -> None:
        super().__init__(names)
        self._make = make

    def __missing__(self, name: str) -> Any:
        if name not in CONNECTIONS:
            raise KeyError(name)
        return self._make(name)


def closed_connection(connect: Callable[..., Any], stack: ExitStack) -> Any:
    connection = connect()
    connection.close()
    return connection


def failed_transaction(connect: Callable[..., Any], stack: ExitStack) -> Any:
    connection = connect()
    with contextlib.suppress(psycopg.Error):
        connection.execute("select 1 / 0")
    return connection


def sqlite_connection(connect: Callable[..., Any], stack: ExitStack) -> Any:
    engine = sqlalchemy.create_engine("sqlite://")
    stack.callback(engine.dispose)
    return stack.enter_context(engine.connect())


CONNECTIONS: dict[str, Callable[[Callable[..., Any], ExitStack], Any]] = {
    "connection": lambda connect, stack: connect(),
    "autocommit": lambda connect, stack: connect(autocommit=True),
    "closed": closed_connection,
    "failed": failed_transaction,
    "elsewhere": lambda connect, stack: connect("<dsn of a database without the schema>"),
    "another": lambda connect, stack: connect("<dsn of another queue>"),
    "engine": lambda connect, stack: sqlalchemy.create_engine("postgresql+psycopg://"),
    "sqlite": sqlite_connection,
    "a_sqlite3_connection": lambda connect, stack: stack.enter_context(closing(sqlite3.connect(":memory:"))),
}


INTRODUCTION = """# Bad input

What is wrong is said in one line, at once, and nothing else happens: no job is made, changed or lost, and no
password is printed. A message names the rule, the value it got and the way out, as far as there is one.

**Commands** say it on stderr, after `pgqueue:`, or, when the command line itself cannot be read, after a
reminder of the usage and `Error:`. The [exit status](operations.md#signals-and-exit-codes) is 2 when the
command line, a setting or the DSN is wrong, 4 when the database cannot be reached, 5 when its schema is
missing or does not fit, 6 when the application cannot be imported (its traceback follows, to show where), 1
for everything else.

**Python** raises `TypeError` for a value of the wrong type and `ValueError` for one out of its range. What an
application sets wrong is a `ConfigError`, arguments that cannot be stored are a `PayloadError` (both are
`ValueError`s), and what the queue's own work on the database ends in is a `DatabaseError`, with the driver's
exception as its cause. On a connection of your own, what the driver raises comes through as it is.

**SQL** functions raise `invalid_parameter_value` (22023), or what Postgres itself says of text that is no
JSON, no time or no UUID.

The tables are written by the tests from what they got. `<dsn of …>` stands for a database, `…` for what was
cut.
"""


def test_the_page_says_what_one_gets() -> None:
    """Last: the other tests have filled `GOT`."""
    if len(GOT) < len(CASES):
        pytest.skip("not every case was tried, or not every one ended as it is to")
    page = "\n".join([INTRODUCTION, *(table_of(section) for section in SECTIONS)])
    if WRITE:
        PAGE.write_text(page, encoding="utf-8")
    written = PAGE.read_text(encoding="utf-8") if PAGE.exists() else ""
    different = list(difflib.unified_diff(written.splitlines(), page.splitlines(), lineterm="", n=0))
    assert not different, "\n".join(
        ["write docs/bad-input.md anew, as the top of this file says:", *different]
    )


def table_of(section: str) -> str:
    found = [case for case in CASES if case.section == section]
    what = {Line: "exit status", Call: "raises", Sql: "raises"}[type(found[0])]
    rows = [f"| {cell(case.shown)} | {GOT[case][0]} | {cell(GOT[case][1])} |" for case in found]
    return "\n".join([f"## {section}", "", f"| input | {what} | message |", "|---|---|---|", *rows, ""])


def cell(text: str) -> str:
    """As code in a table, shortened; what differs from run to run is left out."""
    text = text.removeprefix("pgqueue: ").removeprefix("Error: ")
    text = "".join(each if each.isprintable() else repr(each)[1:-1] for each in text)
    text = re.sub(r"(\S)\1{30,}", r"\1\1\1…", text)
    for pattern, word in PLACEHOLDERS:
        text = re.sub(pattern, word, text)
    text = text if len(text) <= WIDEST else f"{text[: WIDEST - 1]}…"
    fence = "``" if "`" in text else "`"
    blank = " " if "`" in text[:1] + text[-1:] else ""
    return f"{fence}{blank}{text}{blank}{fence}".replace("|", "\\|")


WIDEST = 240
PLACEHOLDERS = (
    (r"/\S*/shop0?(?=\W)", "<folder>"),
    (r"\(/\S*/test_bad_input\.py:\d+\)", "(<file>)"),
    (r"port \d{4,5}", "port <port>"),
    (r"[0-9a-f]{8}-[0-9a-f]{4}(-[0-9a-f]{4}){2}-[0-9a-f]{12}", "<id>"),
    (r" at 0x[0-9a-f]+", " at <address>"),
    (r"visitor_[0-9a-f]{8}", "visitor"),
    (r"\[Errno -\d\] [^;]*", "<what the resolver says>"),
    (r"pgqueue_test_[0-9a-f]+", "<database>"),
)
