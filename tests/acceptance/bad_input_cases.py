"""The cases of bad input: command lines, Python calls and SQL, and what each is to end in.

What a message says word for word is in docs/bad-input.md, which test_bad_input.py writes and compares. Words in
angle brackets (`<dsn>`) stand for something that is different in every run.
"""
# ruff: noqa: E501  (tables: a case is a line)

from __future__ import annotations

import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import click

from pgqueue.cli.main import cli
from pgqueue.config import PREFIX

HUGE = "9" * 400
JOB = "01890a5d-ac96-774b-bcce-b302099a8057"


@dataclass(frozen=True)
class Line:
    """A command line that is wrong.

    Attributes:
        arguments: Behind `pgqueue`.
        status: The exit status.
        environment: Variables beside `PGQUEUE_DSN`.
        names: A word that the message must hold, as a rule the wrong value.
        own_process: Run it as a shell does, not in this process.
        behind: How a shell goes on behind the command, as `2>&1 | head -1`.
        with_traceback: The application's own traceback may follow the line.
        topic: Its section of the page, if that is not the command's.
        out: What it says on stdout all the same.
    """

    arguments: tuple[str, ...]
    status: int = 2
    environment: Mapping[str, str] = field(default_factory=dict, hash=False)
    names: str = ""
    own_process: bool = False
    behind: str = ""
    with_traceback: bool = False
    topic: str = ""
    out: str = ""

    @property
    def section(self) -> str:
        if self.topic:
            return self.topic
        words: list[str] = ["pgqueue"]
        group: click.Command | None = cli
        for word in self.arguments:
            if not isinstance(group, click.Group):
                break
            found = group.get_command(click.Context(group), word)
            if found is not None:
                words.append(word)
                group = found
        return " ".join(words)

    @property
    def shown(self) -> str:
        variables = [f"{name}={shlex.quote(value)}" for name, value in self.environment.items()]
        words = [word if word.startswith("<") else shlex.quote(word) for word in self.arguments]
        return " ".join([*variables, "pgqueue", *words, *([self.behind] if self.behind else [])])


@dataclass(frozen=True)
class Call:
    """A Python expression that is wrong, and the class of what it raises."""

    section: str
    source: str
    raises: str
    names: str = ""

    @property
    def shown(self) -> str:
        return self.source


@dataclass(frozen=True)
class Sql:
    """A statement that is wrong, and the class psycopg has for what the server says."""

    section: str
    source: str
    raises: str = "InvalidParameterValue"
    names: str = ""

    @property
    def shown(self) -> str:
        return self.source


Case = Line | Call | Sql


# --- the command line, from the commands themselves ---

BEFORE = "Options before the command"
VARIABLES = "Settings in the environment"
DATABASES = "Databases that cannot be used"
APPLICATIONS = "Applications that cannot be used"
SURROUNDINGS = "Odd terminals, pipes and bytes"

VALID: Mapping[str, tuple[str, ...]] = {
    "pgqueue enqueue": ("t",),
    "pgqueue dead show": (JOB,),
    "pgqueue dead requeue": ("--dry-run",),
    "pgqueue dead purge": ("--dry-run",),
    "pgqueue queue pause": ("q",),
    "pgqueue queue resume": ("q",),
    "pgqueue queue purge": ("q", "--dry-run"),
    "pgqueue queue move": ("q", "r", "--dry-run"),
    "pgqueue schedule add": ("n", "--task", "t", "--cron", "@daily"),
    "pgqueue retention set": ("--task", "t", "--finished", "1d"),
    "pgqueue retention remove": ("--task", "t"),
    "pgqueue schedule pause": ("n",),
    "pgqueue schedule resume": ("n",),
    "pgqueue schedule remove": ("n",),
    "pgqueue schedule run-now": ("n",),
    "pgqueue schedule next": ("--cron", "@daily"),
}
"""What each command needs beside the option that is tried; none of it changes anything."""

TEXTS: Mapping[str, Sequence[str]] = {
    "queues": ("", ",", "high,", ",high", "a b", "high normal", "é", "a" * 64, "a,a", "a:1,a:2", "a:0", "a:-1",
               "a:x y", "a:1,b", "a;b", "*", "a:1e10", "a:" + HUGE),
    "queue": ("", "a b", "é", "a" * 64, "a/b", "*"),
    "task": ("", "a b", "a\tb", "a" * 256),
    "args": ("", "{}", "1", "null", "[1", "[1 2]", "[NaN]", "[Infinity]", "['a']", '"[]"', r'["\u0000"]', r'["\ud800"]',
             "[" * 100 + "]" * 100, f"[{'9' * 5000}]"),
    "kwargs": ("", "[]", "1", "null", "{1: 2}", "{'a': 1}", '{"a": NaN}', '{"a": 1, "a"'),
    "eta": ("", "soon", "2026-01-31", "2026-01-31T09:00", "2026-13-31T09:00Z", "9999-12-31T23:59Z", "1700000000"),
    "since": ("", "yesterday", "2h ago", "-2h", "2", "2 fortnights", f"{HUGE}d", "99999999d", "2026-13-01"),
    "error": ("",),
    "correlation_id": ("",),
    "tags": ("",),
    "enqueued_by": ("",),
    "action": ("",),
    "finished": ("", "soon", "-1d", "2 fortnights", HUGE),
    "failures": ("", "soon", "-1d", "2 fortnights", HUGE),
    "dead_letters": ("", "soon", "-1d", "2 fortnights", HUGE),
    "who": ("",),
    "schedule": ("",),
    "note": (),
    "name": ("",),
    "older_than": ("", "soon", "-1h", "2 fortnights", HUGE),
    "resume_in": ("", "soon", "0", "-1h", "2 fortnights", HUGE),
    "resume_at": ("", "soon", "2026-01-31T09:00", "9999-12-31T23:59Z"),
    "cron": ("", "0 9 * *", "60 9 * * *", "0 9 31 2 *", "@reboot", "every day"),
    "every": ("", "soon", "5", "0", "0.5", "-1h", "2 fortnights", "400d", HUGE),
    "timezone": ("", "Mars/Olympus", "../etc", "KST9"),
    "jitter": ("", "a while", "-1", "2d", HUGE),
    "since_revision": ("", "newest", "9999"),
    "to": ("", "newest", "9999", "../0001", "1"),
    "health_host": ("", " "),
    "listen_dsn": ("", " "),
    "schema": ("", "Shop", "my-queue", "pg_queue", "a b", "1st", "a" * 49, 'x"; drop table jobs; --', "é"),
    "dsn": ("", " ", "localhost", "postgresql://me:s3cret@[::1/x", "postgresql://me:s3%zzcret@localhost/x",
            "mysql+pymysql://me:s3cret@localhost/x", "postgresql://me:s3cret@localhost:port/x",
            "postgresql://me:s3cret@localhost:99999/x", "postgresql://me:s3/cret@localhost/x",
            "postgresql://me:s3@cret@localhost/x", "postgresql://me:s3:cret@localhost/x?nonsense=1",
            "host=localhost password=s3 cret", "host=localhost password='s3cret", "password=s3cret hots=localhost",
            "postgresql+psycopg://me:s3cret@localhost/x",
            "postgresql://me:s3cret@localhost/x?connect_timeout=soon"),
    "target": ("", ":", ":app", "shop:", "shop app", "no_such_module", "no_such_module:app", "shop:nothing", "shop:send",
               "shop.app:app", "shop:app:more", "shop.py", "./shop:app", "..shop:app", "shop:_app.x"),
}  # fmt: skip
"""Wrong values of the options and arguments that take text."""

SETTINGS_BY_FLAG = ("poll_interval", "heartbeat", "lease", "shutdown_timeout", "max_crashes")


def walk(
    command: click.Command = cli, path: tuple[str, ...] = ()
) -> Iterator[tuple[tuple[str, ...], click.Command]]:
    """Every command with the words that lead to it."""
    yield path, command
    if isinstance(command, click.Group):
        context = click.Context(command)
        for name in command.list_commands(context):
            found = command.get_command(context, name)
            assert found is not None
            yield from walk(found, (*path, name))


def lines() -> Iterator[Line]:
    for path, command in walk():
        yield from lines_of(path, command)
    yield from settings_by_environment()
    yield from LINES


def lines_of(path: tuple[str, ...], command: click.Command) -> Iterator[Line]:
    valid = VALID.get(" ".join(("pgqueue", *path)), ())
    before: tuple[str, ...] = ("-A", "shop:app") if path == ("worker",) else ()

    def line(*more: str, status: int = 2, names: str = "") -> Line:
        if not path:  # an option of the root command: shown with the shortest command that reads it
            return Line((*more, "dead", "list"), status, names=names, topic=BEFORE)
        return Line((*before, *path, *valid, *more), status, names=names)

    options = [each for each in command.params if isinstance(each, click.Option) and not each.is_eager]
    for option in options:
        name = max(option.opts, key=len)
        if option.is_flag:
            yield line(f"{name}=1", names=name)
            continue
        if path:
            yield line(name, names=name)  # without its value
        for status, value in wrong_values(
            option, any_name=path[0:1] in (("dead",), ("queue",), ("job",), ("audit",), ("retention",))
        ):
            yield line(name, value, status=status, names=value if shows(option, value) else "")
        yield line(
            f"{name[:-1]}={1}" if len(name) > 4 else f"{name}s=1", names=name
        )  # a slip: `--queue` for `--queues`
    yield line("--no-such-option", names="--no-such-option")
    if isinstance(command, click.Group):
        yield Line((*path, "nothing"), names="nothing")
        yield Line(path)
        return
    arguments = [each for each in command.params if isinstance(each, click.Argument)]
    if not any(each.nargs == -1 for each in arguments):
        yield Line((*before, *path, *valid, "more"), names="more")
    for argument in arguments:
        if argument.required:
            # The first one that is missing is named.
            yield Line((*path,), names=arguments[0].make_metavar(click.Context(command)))
        for value in (
            ("", "7", f"{JOB}0")
            if str(argument.name).removesuffix("s").endswith("_id")
            else TEXTS[str(argument.name)]
        ):
            yield Line((*path, "--", value))


def shows(option: click.Option, value: str) -> bool:
    """Whether the message has the value as it was typed: no DSN is shown, of a list the part that is wrong, of a
    number what was read, and of a long one the beginning."""
    if (
        option.name in ("dsn", "queues", "since", "to", "every", "jitter", "resume_in", "older_than")
        or len(value) > 80
        or "\t" in value
        or value.startswith(("9999-", '["\\'))
    ):
        return False
    return not isinstance(option.type, click.types.FloatParamType) or not value.lstrip("-")[:1].isdigit()


def wrong_values(option: click.Option, *, any_name: bool = False) -> Iterator[tuple[int, str]]:
    """Exit status and value; `any_name`: it asks for rows that may be called anything."""
    kind, name = option.type, str(option.name)
    if name in SETTINGS_BY_FLAG:  # judged as the setting it is
        yield from ((2, value) for value in ("", "many"))
        yield from ((2, value) for value in setting_values(name) if value not in ("", "many"))
    elif isinstance(kind, click.IntRange | click.FloatRange):
        yield from ((2, value) for value in ("", "many"))
        if isinstance(kind, click.IntRange):
            yield 2, "1.5"
        else:
            yield from ((2, value) for value in ("nan", "inf", "-inf"))
        if kind.min is not None:
            yield 2, f"{kind.min - 1:g}"
        yield 2, HUGE
    elif kind is click.INT:
        yield from ((2, value) for value in ("", "many", "1.5"))
    elif kind is click.FLOAT:
        yield from ((2, value) for value in ("", "many", "nan", "inf", "-inf", "1e12", HUGE))
    elif kind is click.UUID:
        yield from ((2, value) for value in ("", "7", f"{JOB}0"))
    elif isinstance(kind, click.Choice):
        yield from ((2, value) for value in ("", "nothing", f"{kind.choices[0]}s"))
    else:
        if any_name and name in ("queue", "task"):
            yield 2, ""
            return
        for value in TEXTS.get(
            "since_revision" if option.metavar == "REVISION" and name == "since" else name, ()
        ):
            yield 2, value


# --- settings ---

NUMBERS = ("", "many", "nan", "inf", "-inf", "-1", "1e10")
SETTINGS: Mapping[str, Sequence[str]] = {
    "dsn": TEXTS["dsn"][1:4],
    "schema": TEXTS["schema"],
    "listen": ("maybe", "2"),
    "listen_dsn": (" ",),
    "poll_interval": (*NUMBERS, "0", HUGE),
    "heartbeat": (*NUMBERS, "0", "11"),
    "lease": (*NUMBERS, "0", "14"),
    "shutdown_timeout": NUMBERS,
    "concurrency": ("many", "0", "-1", "1.5", "1025", HUGE),
    "pool": ("many", "gevent", "THREADS"),
    "processes": ("many", "0", "-1", "1.5", "65", HUGE),
    "task_pools": ("threads", "threads:0", "solo:1", "threads:1,threads:2", "fibers:3"),
    "autoscale": ("many", "8", "2,8", "8,0", "8,2,1", "1025,1", "8;2"),
    "max_tasks_per_child": ("", "many", "0", "-1", "1.5", HUGE),
    "max_memory_per_child": ("", "200MB", "0", "-1", "1.5", HUGE),
    "soft_time_limit": (*NUMBERS, "0"),
    "time_limit": (*NUMBERS, "0"),
    "max_crashes": ("", "many", "0", "-1", "1.5", HUGE),
    "retention_finished": (*NUMBERS, "0"),
    "retention_failures": (*NUMBERS, "0"),
    "retention_dead_letters": (*NUMBERS, "0"),
    "retention_audit": (*NUMBERS, "0"),
    "log_level": ("loud", "5", "INFO "),
    "queue": TEXTS["queue"],
    "priority": ("many", "-1", "10", "1.5", HUGE),
    "health_port": ("many", "-1", "65536", "1.5"),
    "health_host": (" ",),
}
"""Each setting of `Config` with wrong values, as a variable or a flag has them."""


WHOLE = ("max_crashes", "max_tasks_per_child", "max_memory_per_child")


def setting_values(name: str) -> Sequence[str]:
    # click reads the flags of whole numbers itself.
    found = [value for value in SETTINGS[name] if name not in WHOLE or value.lstrip("-").isdigit()]
    # These are wrong beside the other setting's default, which the application may change.
    return [value for value in found if (name, value) not in (("heartbeat", "11"), ("lease", "14"))]


def settings_by_environment() -> Iterator[Line]:
    for name, values in SETTINGS.items():
        variable = f"{PREFIX}{name.upper()}"
        for value in values:
            if value:  # an empty variable is one that is not set
                at_use = name == "dsn" and value != " "  # what is in it is looked at when it is used
                together = name in ("lease", "heartbeat") and value in ("11", "14")
                names = "lease" if together else "dsn" if at_use else variable
                yield Line(("dead", "list"), 2, {variable: value}, names=names, topic=VARIABLES)
    for misspelt in (
        "PGQUEUE_LAESE",
        "PGQUEUE_HEARTBEATS",
        "PGQUEUE_LOGLEVEL",
        "PGQUEUE_QUEUES",
        "PGQUEUE_SHEMA",
    ):
        yield Line(("dead", "list"), 2, {misspelt: "5"}, names=misspelt, topic=VARIABLES)


# --- command lines that the commands themselves do not show ---

READ = ("dead", "list")
UNREACHABLE = (
    "<dsn with a wrong password>",
    "<dsn of an unknown role>",
    "<dsn of an unknown database>",
    "<dsn of an unknown host>",
    "<dsn of a closed port>",
    "<dsn of a web server>",
    "<dsn of a silent server>",
    "<dsn that wants SSL>",
    "<dsn with an encoded password>",
)

LINES: tuple[Line, ...] = (
    Line(("queue", "pause", "q", "--for", "1h", "--until", "2099-01-31T09:00Z"), names="--until"),
    Line(("queue", "pause", "q", "--until", "2020-01-31T09:00Z"), 1, names="2020"),
    Line(("queue", "move", "q", "q"), names="'q'"),
    Line(("schedule", "add", "n", "--task", "t")),
    Line(("schedule", "add", "n\nm", "--task", "t", "--every", "60s")),
    Line(("schedule", "add", "n", "--task", "t", "--every", "60s", "--cron", "@daily")),
    Line(("-A", "shop:app", "schedule", "add", "n", "--task", "no.such", "--every", "60s"), 1, names="no.such"),
    Line(("-A", "shop:app", "schedule", "add", "n", "--task", "tasks.send", "--every", "60s"), names="order_id"),
    Line(("schedule", "next",)),
    Line(("schedule", "next", "n"), 1, names="'n'"),
    *(Line(("schedule", verb, "n"), 1, names="'n'") for verb in ("pause", "resume", "remove", "run-now")),
    Line(("-A", "shop:app"), names="Missing command"),
    Line(("worker",), names="-A module:attribute"),
    Line(("worker", "-A", "shop:app"), names="-A"),
    Line(("inspect", "queues", "dead", "list")),
    Line(("-A", "shop:app", "worker", "--heartbeat", "10", "--lease", "20"), 2, names="20"),
    Line(("-A", "shop:app", "worker", "--heartbeat", "11"), 2, names="11", own_process=True),
    # No database named.
    *(Line(each, environment={"PGQUEUE_DSN": ""}, names="--dsn", topic=DATABASES) for each in
      (("migrate",), READ, ("dead", "show", JOB), ("dead", "requeue", "--all"), ("inspect", "queues"),
       ("inspect", "active"), ("enqueue", "t"))),
    Line(("-A", "shop:app", "enqueue", "tasks.send", "--args", "[1]"), 2, {"PGQUEUE_DSN": ""}, names="PGQUEUE_DSN", topic=DATABASES),
    Line(("-A", "shop:app", "worker"), 2, {"PGQUEUE_DSN": ""}, names="PGQUEUE_DSN", own_process=True, topic=DATABASES),
    Line(("doctor",), 2, {"PGQUEUE_DSN": ""}, names="PGQUEUE_DSN", topic=DATABASES),
    Line(("doctor", "--dsn", "<dsn>"), names="--dsn"),
    Line(("doctor", "--only", "drift,clock"), names="drift,clock"),
    Line(("--schema", "shop", "bench"), names="--schema"),
    # One that cannot be used.
    *(Line(("--dsn", dsn, *command), 4, topic=DATABASES) for dsn in UNREACHABLE for command in (READ, ("enqueue", "t"), ("migrate",))),
    Line(("--dsn", "<dsn of a database without the schema>", *READ), 5, names="pgqueue migrate", topic=DATABASES),
    Line(("--dsn", "<dsn of a database without the schema>", "enqueue", "t"), 5, names="pgqueue migrate", topic=DATABASES),
    Line(("--dsn", "postgresql://me:s3cret@localhost/x?sslmode=sometimes", *READ), 4, names="sslmode", topic=DATABASES),
    Line(("--schema", "elsewhere", *READ), 5, names="elsewhere", topic=DATABASES),
    Line(("--schema", "elsewhere", "enqueue", "t"), 5, names="elsewhere", topic=DATABASES),
    Line(("--dsn", "<dsn of a database at an older revision>", *READ), 5, names="pgqueue migrate", topic=DATABASES),
    Line(("--dsn", "<dsn of a database at a newer revision>", *READ), 5, names="upgrade pgqueue", topic=DATABASES),
    Line(("--dsn", "<dsn of a database at a newer revision>", "migrate"), 5, names="upgrade pgqueue", topic=DATABASES),
    Line(("--dsn", "<dsn of a database at a newer revision>", "-A", "shop:app", "worker"), 5, own_process=True,
         names="upgrade pgqueue", topic=DATABASES),
    Line(("--dsn", "<dsn of a database without the schema>", "-A", "shop:app", "worker"), 5, own_process=True,
         names="pgqueue migrate", topic=DATABASES),
    Line(("--dsn", "<dsn with a wrong password>", "-A", "shop:app", "worker"), 4, own_process=True, topic=DATABASES),
    Line(("--dsn", "<dsn of a closed port>", "demo", "--orders", "1"), 4, own_process=True, topic=DATABASES),
    Line(("--dsn", "<dsn of a closed port>", "bench"), 4, topic=DATABASES),
    Line(("--dsn", "<dsn of a read-only session>", "bench"), 1, names="read-only", topic=DATABASES),
    Line(("--dsn", "<dsn of a role without rights>", "bench"), 1, names="GRANT CREATE ON DATABASE", topic=DATABASES),
    Line(("--dsn", "<dsn of a role without rights>", *READ), 1, names="rivilege", topic=DATABASES),
    Line(("--dsn", "<dsn of a role without rights>", "enqueue", "t"), 1, names="rivilege", topic=DATABASES),
    Line(("--dsn", "<dsn of a role without rights>", "inspect", "queues"), 1, names="rivilege", topic=DATABASES),
    Line(("--dsn", "<dsn of a role without rights>", "--schema", "other", "migrate"), 1, topic=DATABASES),
    # Applications.
    *(Line(("-A", target, *command), 6, names=names, own_process=own, with_traceback=True, topic=APPLICATIONS)
      for target, names in (("broken:app", "ZeroDivisionError"), ("syntax:app", "SyntaxError"),
                            ("needs:app", "no_such_package"), ("leaves:app", "configuration is missing"),
                            ("leaves_quietly:app", "SystemExit"), ("lost:app", "no_such_tasks"))
      for command, own in ((READ, False), (("enqueue", "t"), False))),
    *(Line(("-A", target, "worker"), 6, names=names, own_process=True, with_traceback=True, topic=APPLICATIONS)
      for target, names in (("broken:app", "ZeroDivisionError"), 
                            ("leaves:app", "configuration is missing"),
                            ("lost:app", "no_such_tasks"))),
    Line(("-A", "shop:nothing", "worker"), 6, own_process=True, names="shop:app", topic=APPLICATIONS),
    Line(("-A", "no_such_module:app", "worker"), 6, own_process=True, names="no_such_module", topic=APPLICATIONS),
    Line((*READ,), 2, {"PGQUEUE_APP": "shop:nothing"}, names="shop:app", topic=APPLICATIONS),
    # Jobs.
    Line(("enqueue", "t", "--eta", "2026-01-31T09:00Z", "--countdown", "1"), names="--countdown"),
    Line(("-A", "shop:app", "enqueue", "tasks.sned"), 1, names="tasks.sned"),
    Line(("-A", "shop:app", "enqueue", "tasks.send"), names="order_id"),
    Line(("-A", "shop:app", "enqueue", "tasks.send", "--args", '["x"]'), names="order_id must be int, got str 'x'"),
    Line(("-A", "shop:app", "enqueue", "tasks.send", "--args", "[1, null, 3]"), names="too many"),
    Line(("-A", "shop:app", "enqueue", "tasks.send", "--args", "[1]", "--kwargs", '{"order_id": 2}'), names="order_id"),
    Line(("-A", "shop:app", "enqueue", "tasks.send", "--args", "[1]", "--kwargs", '{"day": "tomorrow"}'), names="day"),
    Line(("-A", "shop:app", "enqueue", "tasks.send", "--args", "[1]", "--kwargs", '{"colour": "red"}'), names="colour"),
    Line(("enqueue", "t", "--args", '["<two megabytes>"]'), names="1,048,576"),
    # Dead letters.
    Line(("dead", "show", "<id of no job>"), 1, names="never committed"),
    Line(("dead", "show", "<id of a ready job>"), 1, names="ready, not dead"),
    Line(("dead", "show", "<id of a finished job>"), 1, names="succeeded, not dead"),
    Line(("dead", "requeue", "<id of no job>"), 1, names="never committed", out="requeued 0 dead letters\n"),
    Line(("dead", "requeue", "<id of a ready job>", "--note", "again"), 1, names="ready, not dead",
         out="requeued 0 dead letters\n"),
    Line(("dead", "requeue", "<id of no job>", "--dry-run"), 1, names="never committed",
         out="would requeue 0 dead letters\n"),
    Line(("dead", "requeue"), names="say which"),
    Line(("dead", "requeue", "--yes"), names="say which"),
    Line(("dead", "requeue", "--all", "--queue", "a"), names="exclude each other"),
    Line(("dead", "requeue", JOB, "--all"), names="exclude each other"),
    Line(("dead", "requeue", JOB, "--limit", "1"), names="--limit"),
    Line(("dead", "requeue", JOB, "7"), names="'7'"),
    # Through a shell.
    Line(("nothing",), own_process=True, names="nothing", topic=SURROUNDINGS),
    Line(("--dsn", "<dsn of a closed port>", *READ), 4, own_process=True, names="refused", topic=SURROUNDINGS),
    Line(("enqueue", "t", "--args", "[1"), own_process=True, names="[1", topic=SURROUNDINGS),
    Line(("enqueue", "t", "--args", '["<a byte that is no text>"]'), own_process=True, topic=SURROUNDINGS),
    Line(("dead", "list", "--queue", "<a byte that is no text>"), own_process=True, topic=SURROUNDINGS),
    Line(("dead", "list", "--task", "<a byte that is no text>"), own_process=True, topic=SURROUNDINGS),
    Line(("dead", "requeue", JOB, "--note", "<a byte that is no text>"), own_process=True, topic=SURROUNDINGS),
    Line(("--dsn", "<a byte that is no text>", *READ), 2, own_process=True, topic=SURROUNDINGS),
    Line(("--schema", "é", *READ), 2, {"LANG": "C", "LC_ALL": "C", "PYTHONUTF8": "0"}, own_process=True, topic=SURROUNDINGS),
    Line(("enqueue", "é b"), 2, {"LC_ALL": "POSIX", "PYTHONIOENCODING": "ascii"}, own_process=True, topic=SURROUNDINGS),
    Line(("dead", "list", "--reason", "bad luck"), 2, {"TERM": "dumb", "COLUMNS": "20"}, own_process=True,
         names="bad luck", topic=SURROUNDINGS),
    Line((*READ,), 1, own_process=True, behind="> /dev/full", names="No space left", topic=SURROUNDINGS),
    Line(("migrate", "--sql"), 1, own_process=True, behind="> /dev/full", names="No space left", topic=SURROUNDINGS),
    Line(("--help",), 1, own_process=True, behind="> /dev/full", names="No space left", topic=SURROUNDINGS),
    Line(("dead", "list", "--limit", "x"), 2, own_process=True, behind="<&-", names="x", topic=SURROUNDINGS),
    Line(("dead", "list", "--limit", "x"), 2, own_process=True, behind=">&-", names="x", topic=SURROUNDINGS),
)  # fmt: skip
"""Wrong ways to call a command that no single option shows."""

QUIET = (
    Line((*READ, "--json"), 0, own_process=True, behind=">&-"),
    Line((*READ,), 0, own_process=True, behind=">&-"),
    Line(("inspect", "queues"), 0, own_process=True, behind=">&-"),
    Line(("migrate", "--sql"), 0, own_process=True, behind="| head -1"),
    Line(("migrate", "--sql"), 0, own_process=True, behind="2>&- | head -1"),
    Line((*READ,), 0, own_process=True, behind="<&-"),
    Line(("dead", "requeue", "--all"), 0, own_process=True, behind="<&-"),
    Line(("dead", "list", "--limit", "x"), 2, own_process=True, behind="2>&-"),
    Line(("inspect", "queues"), 0, {"TERM": "dumb", "COLUMNS": "1"}, own_process=True),
    Line(
        ("dead", "list"), 0, {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONIOENCODING": "ascii"}, own_process=True
    ),
    Line(("-A", "prints:app", *READ, "--json"), 0, own_process=True),
    Line(("dead", "requeue", "--queue", "no_such_queue", "--yes"), 0, own_process=True),
)
"""Odd surroundings that are no mistake: no error, and no traceback either."""


# --- Python ---

BIG = "10**400"
WRONG_SETTINGS: Mapping[str, Sequence[str]] = {
    "dsn": ("''", "5", "b'postgresql://me:s3cret@localhost/x'"),
    "schema": ("''", "5", "'Shop'", "'pg_queue'", "'a' * 49", "['pgqueue']"),
    "listen": ("'maybe'", "2", "[]"),
    "listen_dsn": ("''", "5"),
    "poll_interval": ("0", "-1", "'5'", "True", "float('nan')", "float('inf')", BIG, "timedelta(seconds=5)"),
    "heartbeat": ("0", "'5'", "False", "11", BIG),
    "lease": ("0", "'30'", "14", "float('nan')"),
    "shutdown_timeout": ("-1", "'25'", "True", "float('inf')"),
    "concurrency": ("0", "-1", "1.5", "'2'", "True", "1025", BIG),
    "pool": ("''", "5", "'gevent'", "['threads']"),
    "processes": ("0", "-1", "1.5", "'2'", "True", "65", "2", BIG),
    "task_pools": ("5", "''", "'threads'", "'threads:0'", "'solo:1'", "{'threads': 3}"),
    "autoscale": ("5", "(2, 8)", "'8'", "(8, 2.5)", "(True, 1)", "(1025, 1)"),
    "max_tasks_per_child": ("0", "-1", "1.5", "'2'", "True", BIG),
    "max_memory_per_child": ("0", "-1", "1.5", "'200MB'", "True", BIG),
    "soft_time_limit": ("0", "-1", "'5'", "True", "float('nan')", BIG),
    "time_limit": ("0", "-1", "'5'", "True", "float('nan')", BIG),
    "max_crashes": ("0", "-1", "2.0", "'3'", "True", BIG),
    "retention_finished": ("0", "-1", "'7'", "float('inf')"),
    "retention_failures": ("0", "'30'"),
    "retention_dead_letters": ("0", "'90'"),
    "retention_audit": ("0", "'365'"),
    "log_level": ("''", "'loud'", "10", "logging.Logger"),
    "queue": ("''", "'a b'", "5", "'a' * 64"),
    "priority": ("-1", "10", "1.5", "'5'", "True", BIG),
    "health_port": ("-1", "65536", "'8080'", "True"),
    "health_host": ("''", "5"),
}

TASK_OPTION_VALUES: Mapping[str, Sequence[str]] = {
    "name": ("''", "'a b'", "5", "'a' * 256", r"'a\x00b'"),
    "bind": ("1", "'yes'"),
    "queue": ("''", "'a b'", "5", "'a' * 64"),
    "priority": ("-1", "10", "'high'", "True", "1.5"),
    "expires": ("0", "-1", "'1h'", "True", "float('nan')", "float('inf')", BIG),
    "dead_letter_queue": ("''", "'a b'", "5"),
    "autoretry_for": ("'OSError'", "5", "OSError()", "(OSError, 'x')", "Retry"),
    "dont_autoretry_for": ("'OSError'", "5"),
    "retry_kwargs": ("5", "{'max_retries': -2}", "{'countdown': 'soon'}", "{'max_retires': 1}", "{1: 2}"),
    "max_retries": ("-2", "1.5", "'3'", "True", BIG),
    "default_retry_delay": ("-1", "'3'", "True", "float('nan')", BIG),
    "retry_backoff": ("-1", "'2'", "float('nan')", BIG),
    "retry_backoff_max": ("-1", "'600'", "None", BIG),
    "retry_jitter": ("1", "'no'"),
    "max_crashes": ("0", "-1", "1.5", "'3'", "True", BIG),
    "on_crash": ("''", "'ignore'", "5", "True"),
    "soft_time_limit": ("-1", "'5'", "True", "float('nan')", BIG),
    "time_limit": ("-1", "'5'", "True", "float('inf')", "timedelta(seconds=5)"),
    "ignore_result": ("1", "'no'"),
    "history": ("0", "'no'"),
    "exclusive": ("1", "'yes'"),
    "transactional": ("1", "'yes'"),
    "pool": ("''", "'solo'", "'fibers'", "5"),
    "unique_until": ("''", "'success'", "5"),
    "retries": ("3",),
    "acks_late": ("True",),
    "qeue": ("'high'",),
}

JOB_OPTION_VALUES: Mapping[str, Sequence[tuple[str, str]]] = {
    "countdown": (("'soon'", "TypeError"), ("True", "TypeError"), ("timedelta(1)", "TypeError"),
                  ("float('nan')", "ValueError"), ("float('inf')", "ValueError"), (BIG, "ValueError"),
                  ("1e12", "ValueError")),
    "eta": (("60", "TypeError"), ("'2026-01-31T09:00Z'", "TypeError"), ("datetime(2026, 1, 31)", "ValueError"),
            ("datetime.max.replace(tzinfo=UTC)", "ValueError"), ("date(2026, 1, 31)", "TypeError")),
    "expires": (("'1h'", "TypeError"), ("True", "TypeError"), ("timedelta(1)", "TypeError"),
                ("datetime(2026, 1, 31)", "ValueError"), ("float('nan')", "ValueError"),
                ("datetime.max.replace(tzinfo=UTC)", "ValueError")),
    "priority": (("-1", "ValueError"), ("10", "ValueError"), ("'high'", "ValueError"), ("True", "ValueError"),
                 ("5.0", "ValueError"), (BIG, "ValueError")),
    "queue": (("''", "ValueError"), ("'a b'", "ValueError"), ("5", "ValueError"), ("'a' * 64", "ValueError"),
              ("'a' * 10**6", "ValueError"), ("['high']", "ValueError")),
    "max_retries": (("-2", "ValueError"), ("1.5", "TypeError"), ("'3'", "TypeError"), ("True", "TypeError"),
                    (BIG, "ValueError"), ("10**5000", "ValueError"), ("2**31", "ValueError")),
    "job_id": (("'order-7'", "ValueError"), ("''", "ValueError"), ("7", "ValueError"), ("'a' * 10**6", "ValueError"),
               ("object()", "ValueError")),
    "headers": (("'trace'", "TypeError"), ("[1]", "TypeError"), ("{'a': object()}", "PayloadError"),
                ("{1: 2}", "PayloadError"), ("{'a': float('nan')}", "PayloadError"),
                (r"{'a': '\x00'}", "PayloadError"), ("{'a': 'x' * 2**20}", "PayloadError"),
                ("{'pgqueue': {}}", "ValueError")),
    "correlation_id": (("42", "TypeError"), ("''", "ValueError"), ("'a' * 256", "ValueError"),
                       (r"'a\x00'", "ValueError"), (r"'\ud800'", "ValueError")),
    "tags": (("'vip'", "TypeError"), ("5", "TypeError"), ("{'vip'}", "TypeError"), ("['vip', 5]", "TypeError"), ("[0]", "TypeError"),
             ("['']", "ValueError"), ("['a' * 256]", "ValueError"), (r"['a\x00']", "ValueError"),
             ("[str(n) for n in range(33)]", "ValueError")),
    "task_id": (("'7'", "TypeError"),),
    "contdown": (("5", "TypeError"),),
    "unique_key": (("7", "TypeError"), ("''", "ValueError"), ("'a' * 513", "ValueError"), (r"'a\x00'", "ValueError"),
                   (r"'\ud800'", "ValueError")),
    "on_conflict": (("'ignore'", "ValueError"), ("5", "ValueError"), ("True", "ValueError")),
    "unique_until": (("'success'", "ValueError"), ("5", "ValueError")),
    "link": (("5", "TypeError"), ("'tasks.send'", "TypeError"), ("[send]", "TypeError")),
    "link_error": (("5", "TypeError"), ("[None]", "TypeError")),
    "soft_time_limit": (("-1", "ValueError"), ("'5'", "TypeError"), ("True", "TypeError"), ("float('nan')", "ValueError")),
    "time_limit": (("-1", "ValueError"), ("'5'", "TypeError"), ("timedelta(1)", "TypeError"), (BIG, "ValueError")),
}  # fmt: skip

CALLS: Mapping[str, Sequence[tuple[str, str, str]]] = {
    "PgQueue(…)": (
        ("PgQueue()", "TypeError", "name"),
        ("PgQueue('shop', 'postgresql://localhost/x', 'Shop')", "ConfigError", "Shop"),
        ("PgQueue('shop', heartbeat=5)", "TypeError", "heartbeat"),
        ("PgQueue(5)", "ConfigError", "5"),
        ("PgQueue('')", "ConfigError", "''"),
        ("PgQueue(app)", "ConfigError", "PgQueue"),
        ("PgQueue('shop', imports='shop.tasks')", "ConfigError", "shop.tasks"),
        ("PgQueue('shop', imports=5)", "ConfigError", "5"),
        ("PgQueue('shop', imports=[''])", "ConfigError", "''"),
        ("PgQueue('shop', imports=[send])", "ConfigError", "send"),
        ("PgQueue('shop', session_factory='postgresql://localhost/shop')", "ConfigError", "postgresql://localhost/shop"),
        ("PgQueue('shop', task_defaults={'transactional': True, 'history': False})", "ConfigError", "history"),
        ("PgQueue('shop', task_defaults=5)", "ConfigError", "5"),
        ("PgQueue('shop', task_defaults={'qeue': 'high'})", "ConfigError", "queue"),
        ("PgQueue('shop', task_defaults={'name': 'a'})", "ConfigError", "name"),
        ("PgQueue('shop', task_defaults={'priority': 10})", "ConfigError", "10"),
        ("PgQueue('shop', task_defaults={5: 6})", "ConfigError", "5"),
        ("PgQueue('shop', task_routes=5)", "ConfigError", "5"),
        ("PgQueue('shop', task_routes={'a.*': 'high'})", "ConfigError", "high"),
        ("PgQueue('shop', task_routes={'a.*': {'queue': 'a b'}})", "ConfigError", "a b"),
        ("PgQueue('shop', task_routes={'a.*': {'qeue': 'high'}})", "ConfigError", "qeue"),
        ("PgQueue('shop', task_routes={'a.*': {'priority': '9'}})", "ConfigError", "'9'"),
        ("PgQueue('shop', task_routes={5: {'queue': 'high'}})", "ConfigError", "5"),
    ),
    "app.configure(…)": (
        ("app.configure(laese=5)", "ConfigError", "lease"),
        ("app.configure(workers=5)", "ConfigError", "workers"),
        ("app.configure(lease=5, heartbeat='x', queue='a b')", "ConfigError", "a b"),
        ("app.configure(imports=None)", "ConfigError", "None"),
        ("app.configure(task_defaults=None)", "ConfigError", "None"),
        ("app.configure(task_routes=None)", "ConfigError", "None"),
        ("app.configure(session_factory=5)", "ConfigError", "5"),
        ("(used.config, used.configure(lease=60))", "ConfigError", "first use"),
    ),
    "app.periodic(…)": (
        ("app.periodic()", "ConfigError", "cron and every"),
        ("app.periodic(cron='61 * * * *')", "ConfigError", "61"),
        ("app.periodic(cron='@daily', timezone='Mars')", "ConfigError", "Mars"),
        ("app.periodic(every='1h')", "ConfigError", "1h"),
        ("app.periodic(every=60, catch_up='some', overlap='x', jitter=-1)", "ConfigError", "some"),
        ("app.periodic(every=60, countdown=5)", "ConfigError", "countdown"),
        ("app.periodic(every=60)(5)", "ConfigError", "5"),
        ("app.schedules.add('s', 'a b', every=60)", "ValueError", "a b"),
        ("app.schedules.add('', 't', every=60)", "ValueError", "''"),
    ),
    "app.dead_letters": (
        ("app.dead_letters.requeue('x')", "TypeError", "'x'"),
        ("app.dead_letters.requeue(['x'])", "ValueError", "'x'"),
        ("app.dead_letters.requeue(['x'], rate=5)", "ValueError", "rate"),
        ("app.dead_letters.list(5)", "TypeError", "5"),
    ),
    "app.queues": (
        ("app.queues.pause('a b')", "ValueError", "a b"),
        ("app.queues.pause('q', resume_in=0)", "ValueError", "resume_in"),
        ("app.queues.pause('q', resume_in='1h')", "TypeError", "1h"),
        ("app.queues.pause('q', resume_in=5, resume_at=datetime.now(UTC))", "ValueError", "resume_at"),
        ("app.queues.resume(5)", "ValueError", "5"),
        ("app.queues.move('q', 'q')", "ValueError", "'q'"),
        ("app.queues.move('q', 'a b')", "ValueError", "a b"),
    ),
    "app.hook(…)": (
        ("app.hook('task_faild')", "ConfigError", "task_failed"),
        ("app.hook('on_failure')", "ConfigError", "on_failure"),
        ("app.hook(5)", "ConfigError", "5"),
        ("app.hook('task_failed')(5)", "ConfigError", "5"),
        ("app.middleware(5)", "ConfigError", "5"),
        ("app.middleware(lambda context: None)", "ConfigError", "generator"),
    ),
    "app.task(…)": (
        ("app.task(5)", "ConfigError", "5"),
        ("app.task(transactional=True)(lambda: None)", "ConfigError", "bind=True"),
        ("app.task(bind=True, transactional=True, history=False)(lambda self: None)", "ConfigError", "history"),
        ("app.task('tasks.send')", "ConfigError", "tasks.send"),
        ("app.task(dict)", "ConfigError", "dict"),
        ("app.task(send)", "ConfigError", "send"),
        ("app.task(send.function, send.function)", "TypeError", "2"),
        ("app.task(name='tasks.send')(lambda: None)", "DuplicateTask", "tasks.send"),
        ("app.task(bind=True)(lambda: None)", "ConfigError", "context"),
        ("app.task(soft_time_limit=60, time_limit=60)(lambda: None)", "ConfigError", "soft_time_limit"),
        ("app.task(on_crash='dead_letter', max_crashes=3)(lambda: None)", "ConfigError", "max_crashes"),
        ("app.task(on_crash='skip', history=0, soft_time_limit=-1)(lambda: None)", "ConfigError", "-1"),
        ("app.task(queue='a b', priority=10)(lambda: None)", "ConfigError", "10"),
        ("app.find_task('tasks.sned')", "UnknownTask", "tasks.sned"),
        ("app.find_task(5)", "UnknownTask", "5"),
    ),
    "task.delay(…)": (
        ("send.delay()", "TypeError", "order_id"),
        ("send.delay(1, None, 3)", "TypeError", "too many"),
        ("send.delay(1, colour='red')", "TypeError", "colour"),
        ("send.delay(1, order_id=2)", "TypeError", "order_id"),
        ("send.delay('x')", "PayloadError", "'x'"),
        ("send.delay(None)", "PayloadError", "None"),
        ("send.delay(1.5)", "PayloadError", "1.5"),
        ("send.delay(True)", "PayloadError", "True"),
        ("send.delay(2**2049)", "PayloadError", "2048"),
        ("send.delay(1, 'tomorrow')", "PayloadError", "tomorrow"),
        ("anything.delay(object())", "PayloadError", "object"),
        ("anything.delay(float('nan'))", "PayloadError", "nan"),
        (r"anything.delay('a\x00b')", "PayloadError", ""),
        (r"anything.delay('\ud800')", "PayloadError", ""),
        ("anything.delay({1: 2})", "PayloadError", ""),
        ("anything.delay({1, 2})", "PayloadError", "set"),
        ("anything.delay(b'bytes')", "PayloadError", "bytes"),
        ("anything.delay('x' * 2**20)", "PayloadError", "1,048,576"),
        ("anything.delay(circle)", "PayloadError", ""),
        ("anything.delay(anything)", "PayloadError", ""),
        ("homeless.delay(1)", "ConfigError", "PGQUEUE_DSN"),
        ("asyncio.run(send.adelay('x'))", "PayloadError", "'x'"),
    ),
    "task.apply_async(…)": (
        ("send.apply_async(1)", "TypeError", "1"),
        ("send.apply_async('1')", "TypeError", "'1'"),
        ("send.apply_async(b'1')", "TypeError", "b'1'"),
        ("send.apply_async(None)", "TypeError", "None"),
        ("send.apply_async({'order_id': 1})", "TypeError", "order_id"),
        ("send.apply_async({1})", "TypeError", "{1}"),
        ("send.apply_async([1], [2])", "TypeError", "[2]"),
        ("send.apply_async([1], 'day')", "TypeError", "'day'"),
        ("send.apply_async([1], {1: 2})", "TypeError", "1"),
        ("send.apply_async([1], countdown=5, eta=datetime.now(UTC))", "ValueError", "countdown and eta"),
        ("asyncio.run(send.aapply_async(1))", "TypeError", "1"),
        ("asyncio.run(send.aapply_async([1], priority=10))", "ValueError", "10"),
    ),
    "app.send_task(…)": (
        ("app.send_task('')", "ValueError", "''"),
        ("app.send_task('a b')", "ValueError", "a b"),
        ("app.send_task(5)", "ValueError", "5"),
        ("app.send_task(send)", "ValueError", "send"),
        ("app.send_task('t', 1)", "TypeError", "1"),
        ("app.send_task('t', '1')", "TypeError", "'1'"),
        ("app.send_task('t', None)", "TypeError", "None"),
        ("app.send_task('t', {'a': 1})", "TypeError", "'a'"),
        ("app.send_task('t', [], [1])", "TypeError", "[1]"),
        ("app.send_task('t', [], 'a')", "TypeError", "'a'"),
        ("app.send_task('t', [object()])", "PayloadError", "object"),
        ("app.send_task('t', [datetime(2026, 1, 31)])", "PayloadError", "datetime"),
        ("app.send_task('t', [], {'a': float('inf')})", "PayloadError", "inf"),
        ("app.send_task('t', ['x' * 2**20])", "PayloadError", "1,048,576"),
        ("app.send_task('t', queue='a b')", "ValueError", "a b"),
        ("app.send_task('t', contdown=5)", "TypeError", "countdown"),
        ("app.send_task('tasks.send', ['x'])", "PayloadError", "'x'"),
        ("app.send_task('t', connection=5)", "UnsupportedConnection", "int"),
        ("asyncio.run(app.asend_task('a b'))", "ValueError", "a b"),
        ("asyncio.run(app.asend_task('t', connection=connection))", "UnsupportedConnection", "send_task()"),
    ),
    "app.enqueue_many(…)": (
        ("app.enqueue_many(5)", "TypeError", "5"),
        ("app.enqueue_many(None)", "TypeError", "None"),
        ("app.enqueue_many('send')", "TypeError", "'s'"),
        ("app.enqueue_many([1])", "TypeError", "1"),
        ("app.enqueue_many([send])", "TypeError", "send"),
        ("app.enqueue_many(send.s(1))", "TypeError", "send(1)"),
        ("app.enqueue_many([send.s(1).link(send.si(1))])", "ValueError", "link"),
        ("app.enqueue_many([send.delay])", "TypeError", "delay"),
        ("app.enqueue_many([send.s(1), send.s('x')])", "PayloadError", "'x'"),
        ("app.enqueue_many([send.s(1), send.s()])", "TypeError", "order_id"),
        ("app.enqueue_many([send.s(1), Signature('a b')])", "ValueError", "a b"),
        ("app.enqueue_many([send.s(1), Signature('t', 5)])", "TypeError", "5"),
        ("app.enqueue_many([send.s(1), Signature('t', (), [1])])", "TypeError", "[1]"),
        ("app.enqueue_many([send.s(1), Signature('t', options={'qeue': 'a'})])", "TypeError", "queue"),
        ("app.enqueue_many([send.s(1), Signature('t', options=5)])", "TypeError", "5"),
        ("app.enqueue_many([send.s(1).set(priority=10)])", "ValueError", "10"),
        ("app.enqueue_many([send.s(1).set(job_id='7')])", "ValueError", "'7'"),
        ("send.s(1).set(qeue='a')", "TypeError", "queue"),
        ("app.enqueue_many([send.s(1)], 5)", "UnsupportedConnection", "int"),
        ("app.enqueue_many([send.s(1)], connection=autocommit)", "NotInTransaction", "autocommit"),
        ("asyncio.run(app.aenqueue_many([1]))", "TypeError", "1"),
    ),
    "Canvas": (
        ("chain()", "ValueError", "step"),
        ("chain(send)", "TypeError", "send"),
        ("chain(send.s(1), 5)", "TypeError", "5"),
        ("chain('send', 'send').delay()", "TypeError", "'send'"),
        ("group().delay()", "ValueError", "member"),
        ("group([send.s(1), None])", "TypeError", "None"),
        ("group(send.s(1), on_member_failure='ignore')", "ValueError", "ignore"),
        ("chord([send.s(1)]).delay()", "TypeError", "body"),
        ("chord([send.s(1)], 5)", "TypeError", "5"),
        ("chord(5, send.s())", "TypeError", "5"),
        ("(send.s(1) | 5)", "TypeError", "5"),
        ("chain(send.s(1), group()).delay()", "ValueError", "group"),
        ("chain(send.s(1), send.s(2, 3)).delay()", "TypeError", "too many"),
        ("chain(send.s('x'), send.s()).delay()", "PayloadError", "'x'"),
        ("chain(send.s(1), send.s()).apply_async(qeue='a')", "TypeError", "queue"),
        ("chain(send.s(1), send.s()).apply_async(job_id='7')", "ValueError", "job_id"),
        ("chain(send.s(1), send.s().set(unique_key='a')).delay()", "ValueError", "unique_key"),
        ("chain(send.s(1), send.s()).apply_async(5)", "TypeError", "5"),
        ("chain(send.s(1), send.s()).apply_async(connection=5)", "UnsupportedConnection", "int"),
        ("chain(send.s(1), send.s()).on(autocommit).delay()", "NotInTransaction", "autocommit"),
        ("chain(Signature('a'), Signature('b')).delay()", "ValueError", "app.signature"),
        ("send.s(1).link(5)", "TypeError", "5"),
        ("send.s(1).link_error(chain(send.s(1))).delay()", "TypeError", "link_error"),
        ("send.apply_async([1], link=5)", "TypeError", "5"),
        ("app.signature('a b')", "ValueError", "a b"),
        ("app.signature('a', 5)", "TypeError", "5"),
        ("app.CanvasResult('7')", "ValueError", "'7'"),
        ("app.CanvasResult(uuid4()).get(timeout=0)", "TimeoutError", "unknown"),
    ),
    "task.on(…)": (
        ("send.on(None)", "UnsupportedConnection", "None"),
        ("send.on(5)", "UnsupportedConnection", "int"),
        ("send.on('postgresql://me:s3cret@localhost/x')", "UnsupportedConnection", "str"),
        ("send.on(connection.cursor())", "UnsupportedConnection", "cursor's connection"),
        ("send.on(engine)", "UnsupportedConnection", "engine.connect()"),
        ("send.on(sessionmaker(engine))", "UnsupportedConnection", "session it made"),
        ("send.on(a_sqlite3_connection)", "UnsupportedConnection", "sqlite3"),
        ("send.on(sqlite).delay(1)", "UnsupportedConnection", "sqlite"),
        ("send.on(autocommit).delay(1)", "NotInTransaction", "autocommit"),
        ("send.on(closed).delay(1)", "OperationalError", "closed"),
        ("send.on(failed).delay(1)", "InFailedSqlTransaction", "aborted"),
        ("send.on(elsewhere).delay(1)", "WrongDatabase", "pgqueue migrate"),
        ("send.on(another).delay(1)", "WrongDatabase", "another database"),
        ("send.on(connection).delay('x')", "PayloadError", "'x'"),
        ("send.on(connection).adelay(1)", "AttributeError", "adelay"),
        ("send.on(connection).apply_async([1], qeue='a')", "TypeError", "queue"),
        ("send.on(connection).apply_async([1], job_id='7')", "ValueError", "'7'"),
        ("send.on(connection).apply_async(1)", "TypeError", "1"),
        ("send.apply_async([1], connection=5)", "UnsupportedConnection", "int"),
    ),
    "app.AsyncResult(…)": (
        ("app.AsyncResult('7')", "ValueError", "'7'"),
        ("app.AsyncResult('')", "ValueError", "''"),
        ("app.AsyncResult(7)", "ValueError", "7"),
        ("app.AsyncResult(None)", "ValueError", "None"),
        ("app.AsyncResult('a' * 10**6)", "ValueError", "aaa"),
        ("app.AsyncResult(result)", "ValueError", "AsyncResult"),
        ("app.AsyncResult(ready).get(timeout=0)", "TimeoutError", "ready"),
        ("app.AsyncResult(ready).get(timeout='5')", "TypeError", "'5'"),
        ("app.AsyncResult(ready).get(timeout=True)", "TypeError", "True"),
        ("app.AsyncResult(ready).get(timeout=float('nan'))", "ValueError", "nan"),
        ("app.AsyncResult(ready).get(timeout=timedelta(1))", "TypeError", "timedelta"),
        ("app.AsyncResult(dead).get()", "JobFailed", "retries_exhausted"),
        ("app.AsyncResult(uuid4()).get(timeout=0)", "TimeoutError", "unknown"),
        ("asyncio.run(app.AsyncResult(ready).aget(timeout='5'))", "TypeError", "'5'"),
        ("homeless.app.AsyncResult(ready).state", "ConfigError", "PGQUEUE_DSN"),
        ("app_on('<dsn of a closed port>').AsyncResult(ready).state", "DatabaseUnavailable", "refused"),
        ("app_on('<dsn of a silent server>').AsyncResult(ready).state", "DatabaseUnavailable", "timeout"),
        ("app_on('<dsn of a web server>').AsyncResult(ready).state", "DatabaseUnavailable", ""),
        ("app_on('<dsn with a wrong password>').AsyncResult(ready).get()", "DatabaseUnavailable", "password"),
        ("app_on('<dsn of a database without the schema>').AsyncResult(ready).state", "SchemaMismatch", "migrate"),
        ("app_on('<dsn of a role without rights>').AsyncResult(ready).state", "PermissionDenied", "Privileges"),
        ("app_on('<dsn of a role without rights>').AsyncResult(ready).get()", "PermissionDenied", "Privileges"),
        ("asyncio.run(app_on('<dsn of a role without rights>').AsyncResult(ready).aget())", "PermissionDenied", "Privileges"),
    ),
    "Databases that cannot be used": (
        ("app_on('<dsn of a closed port>').send_task('t')", "DatabaseUnavailable", "refused"),
        ("app_on('<dsn of an unknown database>').send_task('t')", "DatabaseUnavailable", "does not exist"),
        ("app_on('<dsn of an unknown host>').send_task('t')", "DatabaseUnavailable", "resolve"),
        ("app_on('<dsn with a wrong password>').send_task('t')", "DatabaseUnavailable", "password"),
        ("app_on('<dsn of a web server>').send_task('t')", "DatabaseUnavailable", ""),
        ("app_on('<dsn that wants SSL>').send_task('t')", "DatabaseUnavailable", "SSL"),
        ("app_on('<dsn of a role without rights>').send_task('t')", "PermissionDenied", "Privileges"),
        ("app_on('<dsn of a role without rights>').enqueue_many([Signature('t')])", "PermissionDenied", "Privileges"),
        ("asyncio.run(app_on('<dsn of a role without rights>').asend_task('t'))", "PermissionDenied", "Privileges"),
        ("app_on('<dsn of a read-only session>').send_task('t')", "DatabaseUnavailable", "read-only"),
        ("app_on('<dsn of a database without the schema>').send_task('t')", "SchemaMismatch", "pgqueue migrate"),
        ("app_on('<dsn of a database without the schema>').enqueue_many([Signature('t')])", "SchemaMismatch",
         "pgqueue migrate"),
        ("app_on('localhost').send_task('t')", "ConfigError", "postgresql://"),
        ("app_on('postgresql://me:s3/cret@localhost/x').send_task('t')", "ConfigError", "%2F"),
        ("app_on('postgresql://me:s3@cret@localhost/x').send_task('t')", "ConfigError", "%40"),
        ("app_on('postgresql://me:s3cret@localhost:port/x').send_task('t')", "ConfigError", "port"),
    ),
    "self.retry(…)": (
        ("self.retry(countdown='soon')", "TypeError", "'soon'"),
        ("self.retry(countdown=True)", "TypeError", "True"),
        ("self.retry(countdown=float('nan'))", "ValueError", "nan"),
        ("self.retry(countdown=10**400)", "ValueError", ""),
        ("self.retry(eta='2026-01-31T09:00Z')", "TypeError", "2026"),
        ("self.retry(eta=datetime(2026, 1, 31))", "ValueError", "timezone"),
        ("self.retry(eta=datetime.now(UTC), countdown=5)", "ValueError", "countdown and eta"),
        ("self.retry(max_retries=-2)", "ValueError", "-2"),
        ("self.retry(max_retries='3')", "TypeError", "'3'"),
        ("self.retry(max_retries=2**31)", "ValueError", "2147483648"),
        ("self.retry(exc='broken')", "TypeError", "'broken'"),
        ("self.retry(exc=OSError)", "TypeError", "OSError"),
        ("self.retry(5)", "TypeError", "positional"),
        ("self.retry(delay=5)", "TypeError", "delay"),
    ),
}  # fmt: skip


def calls() -> Iterator[Call]:
    for name, values in WRONG_SETTINGS.items():
        for value in values:
            call = (
                f"PgQueue('shop', {name}={value})"
                if name in ("dsn", "schema")
                else f"app.configure({name}={value})"
            )
            yield Call(f"{call.partition('(')[0]}(…)", call, "ConfigError", names=name)
    for name, values in TASK_OPTION_VALUES.items():
        for value in values:
            yield Call("app.task(…)", f"app.task({name}={value})(lambda: None)", "ConfigError", names=name)
    for name, pairs in JOB_OPTION_VALUES.items():
        for value, raises in pairs:
            yield Call("task.apply_async(…)", f"send.apply_async([1], {name}={value})", raises, names=name)
    for section, entries in CALLS.items():
        for source, raises, names in entries:
            yield Call(section, source, raises, names)


# --- SQL ---

STATEMENTS: Mapping[str, Sequence[tuple[str, str, str]]] = {
    "pgqueue.enqueue": (
        ("pgqueue.enqueue()", "UndefinedFunction", ""),
        ("pgqueue.enqueue(NULL)", "", "NULL"),
        ("pgqueue.enqueue('')", "", "''"),
        ("pgqueue.enqueue('a b')", "", "'a b'"),
        (r"pgqueue.enqueue(E'a\tb')", "", ""),
        ("pgqueue.enqueue(repeat('a', 256))", "", "255"),
        ("pgqueue.enqueue(5)", "UndefinedFunction", ""),
        ("pgqueue.enqueue('t', '{}')", "", "array"),
        ("pgqueue.enqueue('t', 'null')", "", "array"),
        ("pgqueue.enqueue('t', NULL)", "", "array"),
        ("pgqueue.enqueue('t', '[1')", "InvalidTextRepresentation", "json"),
        ("pgqueue.enqueue('t', '[NaN]')", "InvalidTextRepresentation", "json"),
        (r"pgqueue.enqueue('t', '[\"\u0000\"]')".replace('\\"', '"'), "UntranslatableCharacter", ""),
        ("pgqueue.enqueue('t', kwargs => '[]')", "", "object"),
        ("pgqueue.enqueue('t', kwargs => NULL)", "", "object"),
        ("pgqueue.enqueue('t', headers => '[]')", "", "object"),
        ("pgqueue.enqueue('t', headers => '1')", "", "object"),
        ("pgqueue.enqueue('t', queue => '')", "", "''"),
        ("pgqueue.enqueue('t', queue => NULL)", "", "NULL"),
        ("pgqueue.enqueue('t', queue => 'a b')", "", "'a b'"),
        ("pgqueue.enqueue('t', queue => repeat('a', 64))", "", "63"),
        ("pgqueue.enqueue('t', queue => repeat('a', 100000))", "", "63"),
        ("pgqueue.enqueue('t', priority => 10)", "", "10"),
        ("pgqueue.enqueue('t', priority => -1)", "", "-1"),
        ("pgqueue.enqueue('t', priority => NULL)", "", "NULL"),
        ("pgqueue.enqueue('t', priority => 'high')", "InvalidTextRepresentation", "high"),
        ("pgqueue.enqueue('t', priority => 99999999999)", "UndefinedFunction", ""),
        ("pgqueue.enqueue('t', eta => 'soon')", "InvalidDatetimeFormat", "soon"),
        ("pgqueue.enqueue('t', eta => 'infinity')", "", "infinity"),
        ("pgqueue.enqueue('t', eta => '9999-06-01')", "", "9999"),
        ("pgqueue.enqueue('t', eta => '-infinity')", "", "-infinity"),
        ("pgqueue.enqueue('t', expires_at => 'infinity')", "", "infinity"),
        ("pgqueue.enqueue('t', expires_at => 'never')", "InvalidDatetimeFormat", "never"),
        ("pgqueue.enqueue('t', job_id => '7')", "InvalidTextRepresentation", "7"),
        ("pgqueue.enqueue('t', max_retries => -2)", "", "-2"),
        ("pgqueue.enqueue('t', max_retries => 99999999999)", "UndefinedFunction", ""),
        ("pgqueue.enqueue('t', countdown => 5)", "UndefinedFunction", "countdown"),
        ("pgqueue.enqueue('t', jsonb_build_array(repeat('x', 17000000)))", "CheckViolation", "jobs_payload_size"),
    ),
    "pgqueue.enqueue_many": (
        ("pgqueue.enqueue_many()", "UndefinedFunction", ""),
        ("pgqueue.enqueue_many(NULL)", "", "NULL"),
        ("pgqueue.enqueue_many('{}')", "", "array"),
        ("pgqueue.enqueue_many('1')", "", "array"),
        ("pgqueue.enqueue_many('[1]')", "", "object"),
        ("pgqueue.enqueue_many('[null]')", "", "object"),
        ("pgqueue.enqueue_many('[[]]')", "", "object"),
        ("pgqueue.enqueue_many('[')", "InvalidTextRepresentation", "json"),
        ("pgqueue.enqueue_many('[{}]')", "", "id"),
        ("pgqueue.enqueue_many('[{\"task\": \"t\"}]')", "", "id"),
        ("pgqueue.enqueue_many('[{\"id\": \"7\", \"task\": \"t\"}]')", "InvalidTextRepresentation", "7"),
        *((f"pgqueue.enqueue_many('[{{\"id\": \"{JOB}\"{more}}}]')", raises, names) for more, raises, names in (
            ("", "", "task"),
            (", \"task\": \"\"", "", "''"),
            (", \"task\": \"a b\"", "", "'a b'"),
            (", \"task\": 5, \"queue\": \"a b\"", "", "'a b'"),
            (", \"task\": \"t\", \"queue\": \"\"", "", "''"),
            (", \"task\": \"t\", \"priority\": 10", "", "10"),
            (", \"task\": \"t\", \"priority\": \"high\"", "InvalidTextRepresentation", "high"),
            (", \"task\": \"t\", \"priority\": 99999", "", "99999"),
            (", \"task\": \"t\", \"args\": {}", "", "array"),
            (", \"task\": \"t\", \"args\": \"[]\"", "", "array"),
            (", \"task\": \"t\", \"kwargs\": []", "", "object"),
            (", \"task\": \"t\", \"headers\": 1", "", "object"),
            (", \"task\": \"t\", \"eta\": \"soon\"", "InvalidDatetimeFormat", "soon"),
            (", \"task\": \"t\", \"eta\": \"infinity\"", "", "infinity"),
            (", \"task\": \"t\", \"expires_at\": \"infinity\"", "", "infinity"),
            (", \"task\": \"t\", \"max_retries\": -2", "", "-2"),
        )),
        (f"pgqueue.enqueue_many('[{{\"id\": \"{JOB}\", \"task\": \"t\"}}, {{\"task\": \"u\"}}]')", "", "id"),
    ),
    "pgqueue.wake_workers": (
        ("pgqueue.wake_workers()", "UndefinedFunction", ""),
        ("pgqueue.wake_workers('a')", "InvalidTextRepresentation", "a"),
        ("pgqueue.wake_workers(ARRAY[1])", "UndefinedFunction", ""),
        ("pgqueue.wake_workers('{a}', 'soon')", "InvalidDatetimeFormat", "soon"),
    ),
    "Canvases": (
        ("pgqueue.cancel_canvas('7')", "InvalidTextRepresentation", "7"),
        ("pgqueue.prune_canvases('-1 day', '1 day')", "", "-1 day"),
        ("pgqueue.prune_canvases('1 day', NULL)", "", "NULL"),
        (f"pgqueue.enqueue_canvas_nodes('{JOB}', '[]')", "ObjectNotInPrerequisiteState", JOB),
        ("pgqueue.settle_canvases('7')", "InvalidTextRepresentation", "7"),
    ),
    "Other functions": (
        ("pgqueue.id_floor('7')", "InvalidTextRepresentation", "7"),
        ("pgqueue.make_partitions('many')", "InvalidTextRepresentation", "many"),
        ("pgqueue.make_partitions(1000000000)", "", "days"),
        ("pgqueue.make_partitions(-1)", "", "days"),
        ("pgqueue.make_partitions(NULL)", "", "days"),
        ("pgqueue.drop_partitions('soon', '1 day')", "InvalidDatetimeFormat", "soon"),
        ("pgqueue.drop_partitions('-1 day', '1 day')", "", "-1 day"),
        ("pgqueue.drop_partitions('1 day', NULL)", "", "NULL"),
    ),
}  # fmt: skip


def statements() -> Iterator[Sql]:
    for section, entries in STATEMENTS.items():
        for call, raises, names in entries:
            yield Sql(section, f"SELECT {call}", raises or "InvalidParameterValue", names)


def cases() -> list[Case]:
    """Each once, in the order of the page."""
    return list(dict.fromkeys([*lines(), *calls(), *statements()]))
