"""What docs/moving-from-celery.md says of Celery's names is complete, and true on our side.

The verdicts are in docs/celery-table.txt, the names come from Celery itself. The page's tables are written by
`PGQUEUE_WRITE_DOCS=1 pytest tests/unit/test_moving_from_celery.py` and compared by an ordinary run.
"""

from __future__ import annotations

import ast
import difflib
import inspect
import os
import re
import shlex
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, fields
from fnmatch import fnmatchcase
from functools import cache
from pathlib import Path
from typing import Any, get_args
from uuid import uuid4

import celery
import celery.states
import click
import pytest

import pgqueue
from pgqueue import AsyncResult, PgQueue, Request, TaskContext
from pgqueue.cli.main import cli
from pgqueue.config import Config
from pgqueue.hooks import HookName
from pgqueue.job import FINISHED_STATES, LIVE_STATES
from pgqueue.options import _CELERY_JOB_OPTIONS, _CELERY_TASK_OPTIONS, JOB_OPTIONS, TASK_OPTIONS
from tests.unit.celery_names import names
from tests.unit.test_docs import parse

ROOT = Path(__file__).resolve().parents[2]
DATA = ROOT / "docs" / "celery-table.txt"
PAGE = ROOT / "docs" / "moving-from-celery.md"
WRITE = bool(os.environ.get("PGQUEUE_WRITE_DOCS"))
VERDICTS = {"same": "same", "different": "different", "no": "not there"}

SAMPLES: dict[str, Any] = {
    "autoretry_for": (OSError,),
    "bind": True,
    "connection": None,
    "countdown": 1,
    "dont_autoretry_for": (OSError,),
    "eta": None,
    "expires": 60,
    "headers": {"a": 1},
    "job_id": str(uuid4()),
    "name": "shop.send",
    "on_crash": "retry",
    "queue": "mails",
    "retry_kwargs": {"max_retries": 1},
    "tags": ["vip"],
    "correlation_id": "order 42",
}
"""What options take; the others take 5, or failing that `True`."""


@dataclass(frozen=True)
class Row:
    """One line of the data: some of Celery's names, and what has become of them."""

    section: str
    names: tuple[str, ...]
    verdict: str
    claim: str
    text: str

    @property
    def shown(self) -> str:
        return f"{self.section}: {', '.join(self.names)}"


def read_rows(text: str) -> list[Row]:
    rows, section = [], ""
    for line in text.splitlines():
        if line.startswith("== "):
            section = line.removeprefix("== ")
        elif line and not line.startswith("#"):
            found, verdict, claim, said = (each.strip() for each in line.split("|", 3))
            rows.append(Row(section, tuple(each.strip() for each in found.split(",")), verdict, claim, said))
    return rows


ROWS = read_rows(DATA.read_text(encoding="utf-8"))


@cache
def celerys() -> dict[str, list[str]]:
    return names()


def rows_of(section: str) -> list[Row]:
    return [row for row in ROWS if row.section == section]


def matching(section: str, name: str) -> list[Row]:
    """The rows that speak of a name: those that have it, else the ones with a glob that fits it best."""
    rows = rows_of(section)
    exact = [row for row in rows for each in row.names if each == name]
    if exact:
        return exact
    globs = [
        (len(each), row) for row in rows for each in row.names if "*" in each and fnmatchcase(name, each)
    ]
    most = max((length for length, _ in globs), default=0)
    return [row for length, row in globs if length == most]


def test_every_name_of_celery_has_its_row() -> None:
    found = {
        f"{section}: {name}": len(matching(section, name))
        for section, those in celerys().items()
        for name in those
    }
    assert {name: count for name, count in found.items() if count != 1} == {}


def test_every_row_is_of_a_name_that_celery_has() -> None:
    celery_has = celerys()
    assert [row.section for row in ROWS if row.section not in celery_has] == []
    extra = [
        f"{row.section}: {name}"
        for row in ROWS
        for name in row.names
        if not any(row in matching(row.section, each) for each in celery_has[row.section])
        or ("*" not in name and name not in celery_has[row.section])
    ]
    assert extra == []


def test_every_row_is_whole() -> None:
    wrong = [
        row.shown
        for row in ROWS
        if row.verdict not in VERDICTS
        or (row.verdict == "no") != (row.claim == "")
        or row.text.count("`") % 2
    ]
    assert wrong == []
    assert [row.shown for row in ROWS if row.verdict == "different" and not row.text] == [], "how different?"


def test_the_version_is_the_one_that_the_page_names() -> None:
    assert f"Celery {celery.__version__}" in PAGE.read_text(encoding="utf-8")


# Our side.


@pytest.fixture(scope="module")
def app() -> PgQueue:
    return PgQueue("shop")


def is_there(claim: str, app: PgQueue) -> bool:
    """Whether pgqueue has what a row says."""
    kind, _, what = claim.partition(":")
    if kind == "task":
        return accepts_task_option(what)
    if kind == "call":
        return accepts_call_option(what)
    if kind == "setting":
        parameters = inspect.signature(PgQueue).parameters
        return what in {each.name for each in fields(Config)} or what in parameters
    if kind == "hook":
        return what in get_args(HookName)
    if kind == "name":
        return what in pgqueue.__all__
    if kind == "cli":
        return has_command(what.split())
    if kind == "py":
        owner, _, member = what.partition(".")
        return hasattr(sample(owner, app), member)
    raise AssertionError(f"what is {claim}?")


def accepts_task_option(name: str) -> bool:
    app = PgQueue("shop")

    def send(self: object, *args: object) -> None: ...

    for value in (SAMPLES[name],) if name in SAMPLES else (5, True):
        try:
            app.task(**{name: value})(send)
        except pgqueue.ConfigError:
            continue
        return True
    return False


def accepts_call_option(name: str) -> bool:
    app = PgQueue("shop")

    @app.task
    def send() -> None: ...

    if name in ("args", "kwargs", "connection"):
        return name in inspect.signature(send.apply_async).parameters
    value = send.si() if name.startswith("link") else SAMPLES.get(name, 5)
    with app.eager():
        try:
            options: dict[str, Any] = {name: value}
            return send.apply_async(**options).state == "succeeded"
        except TypeError:
            return False


def sample(owner: str, app: PgQueue) -> object:
    """Something of this class, with what it gets when it is made."""

    def send() -> None: ...

    task = app.task(name="shop.send")(send) if "shop.send" not in app.tasks else app.tasks["shop.send"]
    request = Request(id=str(uuid4()), task="shop.send")
    samples = {
        "PgQueue": app,
        "Task": task,
        "Signature": task.s(),
        "Request": request,
        "TaskContext": TaskContext(task, request),
        "AsyncResult": AsyncResult,
        "group": pgqueue.group(task.s()),
        "chord": pgqueue.chord([task.s()], task.s()),
    }
    return samples[owner] if owner in samples else getattr(pgqueue, owner)


def has_command(words: list[str]) -> bool:
    """Whether the command line has such a command, with such an argument or flag if one is named."""
    command: click.Command = cli
    for word in words:
        if word.startswith("-"):
            if word not in {flag for each in command.params for flag in each.opts}:
                return False
            continue
        if word.isupper():
            arguments = [each for each in command.params if isinstance(each, click.Argument)]
            if not any(word.lower() in (str(each.name), str(each.metavar).lower()) for each in arguments):
                return False
            continue
        if not isinstance(command, click.Group):
            return False
        found = command.get_command(click.Context(command), word)
        if found is None:
            return False
        command = found
    return True


def test_what_the_rows_say_we_have_is_there(app: PgQueue) -> None:
    checked = [row for row in ROWS if row.claim]
    missing = [f"{row.shown}: {row.claim}" for row in checked if not is_there(row.claim, app)]
    assert missing == []
    assert len(checked) > 100


@pytest.mark.parametrize(
    "claim",
    ["task:rate_limit", "call:task_id", "setting:broker_url", "hook:task_revoked", "name:xmap", "cli:beat",
     "cli:worker -P", "cli:enqueue NAME", "py:AsyncResult.forget", "cli:worker -Q -X"],
)  # fmt: skip
def test_what_is_not_there_is_seen(app: PgQueue, claim: str) -> None:
    assert not is_there(claim, app)


def test_the_text_names_what_we_have() -> None:
    """A row that has another name of ours than Celery's says it."""
    silent = []
    for row in ROWS:
        ours = re.split(r"[.: ]", row.claim)[-1].removeprefix("--")
        if row.claim.endswith(("TaskContext.retry", "AsyncResult.get")) or ours.isupper():
            continue  # an argument
        theirs = {name.split()[-1].removeprefix("--") for name in row.names}
        if row.claim and ours not in theirs and ours.lower() not in row.text.lower().replace("--", ""):
            silent.append(f"{row.shown}: {row.claim}")
    assert silent == []


@pytest.mark.parametrize("kind", ["task", "call"])
def test_rows_and_hints_of_errors_agree(kind: str) -> None:
    section = {"task": "Options of a task", "call": "Arguments of apply_async and send_task"}[kind]
    ours = {"task": TASK_OPTIONS, "call": JOB_OPTIONS | {"args", "kwargs", "connection"}}[kind]
    hints = {"task": _CELERY_TASK_OPTIONS, "call": _CELERY_JOB_OPTIONS}[kind]
    problems = []
    for name in celerys()[section]:
        (row,) = matching(section, name)
        if name in ours and (row.verdict == "no" or name in hints):
            problems.append(f"{name} is an option")
        if name not in ours and row.verdict == "same":
            problems.append(f"{name} is no option")
        if name in hints and not row.text.replace("`", "").startswith(hints[name]):
            problems.append(f"{name}: the error says {hints[name]!r}, the row {row.text!r}")
    assert problems == []


# The page.


def counts(rows: dict[str, list[str]]) -> dict[str, Counter[str]]:
    """Names with each verdict, by section."""
    return {
        section: Counter(matching(section, name)[0].verdict for name in those)
        for section, those in rows.items()
    }


def numbers(found: Counter[str]) -> str:
    return " | ".join(str(found[verdict]) for verdict in (*VERDICTS,)) + f" | {found.total()}"


def summary() -> Iterator[str]:
    yield "| table | same | different | not there | names |"
    yield "|---|---|---|---|---|"
    found = counts(celerys())
    for section, those in found.items():
        yield f"| [{section}](#{anchor(section)}) | {numbers(those)} |"
    total = sum(found.values(), Counter())
    yield f"| **together** | {numbers(total)} |"


def anchor(section: str) -> str:
    return re.sub(r"[^\w\- ]", "", section.lower()).replace(" ", "-")


def tables() -> Iterator[str]:
    for section in celerys():
        yield f"### {section}"
        yield ""
        yield "| Celery | | pgqueue |"
        yield "|---|---|---|"
        for row in rows_of(section):
            shown = ", ".join(f"`{name}`" if name != "*" else "the rest" for name in row.names)
            text = row.text or (own_name(row) if row.verdict != "no" else "")
            text = text[:1].upper() + text[1:]
            yield f"| {shown} | {VERDICTS[row.verdict]} | {text} |".replace("|  |", "| |")
        yield ""


def own_name(row: Row) -> str:
    """What a row without a text has: the name that it has in Celery."""
    return ", ".join(f"`{name.split()[-1]}`" for name in row.names)


def written(text: str) -> str:
    """The page with its generated parts anew."""
    for name, lines in (("counts", summary()), ("tables", tables())):
        begin, end = f"<!-- {name}: written by the tests -->\n", f"<!-- end of {name} -->"
        head, found, rest = text.partition(begin)
        assert found, begin
        assert end in rest, end
        body = "\n".join(lines).rstrip("\n")
        text = f"{head}{begin}\n{body}\n\n{end}{rest.partition(end)[2]}"
    return text


def test_the_page_has_the_tables() -> None:
    before = PAGE.read_text(encoding="utf-8")
    after = written(before)
    if WRITE:
        PAGE.write_text(after, encoding="utf-8")
        before = after
    different = list(difflib.unified_diff(before.splitlines(), after.splitlines(), lineterm="", n=0))
    assert not different, "\n".join(["write the page anew, as the top of this file says:", *different])


def test_the_counts_are_printed(capsys: pytest.CaptureFixture[str]) -> None:
    with capsys.disabled():
        print()
        for section, found in counts(celerys()).items():
            print(f"{section:48}", *(f"{found[key]:4} {word}" for key, word in VERDICTS.items()))
        total = sum(counts(celerys()).values(), Counter())
        print(f"{'together':48}", *(f"{total[key]:4} {word}" for key, word in VERDICTS.items()))
    assert total.total() == sum(map(len, celerys().values()))


def inline_commands() -> list[str]:
    """What the page has as `pgqueue …` in its prose and tables."""
    return re.findall(r"`pgqueue [^`]+`", PAGE.read_text(encoding="utf-8"))


def test_commands_in_the_tables_parse() -> None:
    problems = []
    for found in inline_commands():
        line = found.strip("`").removeprefix("pgqueue ").replace("ID", str(uuid4()))
        arguments = shlex.split(line)
        if has_command(arguments):
            continue  # a mention, not a line to type
        try:
            parse(cli, arguments)
        except click.exceptions.Exit:
            continue  # --help
        except click.UsageError as error:
            problems.append(f"{found}: {error.format_message()}")
    assert problems == []


def section_of_the_page(heading: str) -> list[list[str]]:
    """The rows of the table under a heading."""
    text = PAGE.read_text(encoding="utf-8").partition(f"### {heading}\n")[2].partition("\n##")[0]
    rows = [line.strip("|").split(" | ") for line in text.splitlines() if line.startswith("|")]
    assert len(rows) > 4, heading
    return rows[2:]


def quoted(text: str) -> list[str]:
    return re.findall(r"`(\w+)[^`]*`", text)


def test_settings_of_the_recipe_are_celerys() -> None:
    named = {name for row in section_of_the_page("4. Settings") for name in quoted(row[0])}
    assert named - set(celerys()["Settings"]) == set()
    assert len(named) > 15


def test_states_are_those_of_both() -> None:
    rows = section_of_the_page("States")
    theirs = [name for row in rows for name in quoted(row[0])]
    assert sorted(theirs) == sorted({*celery.states.ALL_STATES})
    ours = {name for row in rows for name in quoted(row[1])}
    assert ours == {*LIVE_STATES, *FINISHED_STATES, "dead", "unknown"}


def test_python_of_the_page_names_what_is_there() -> None:
    """What its examples import from pgqueue."""
    missing = []
    for block in re.findall(
        r"^```python\n(.*?)^```", PAGE.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL
    ):
        for node in ast.walk(ast.parse(block)):
            if isinstance(node, ast.ImportFrom) and node.module == "pgqueue":
                missing += [each.name for each in node.names if each.name not in pgqueue.__all__]
    assert missing == []
