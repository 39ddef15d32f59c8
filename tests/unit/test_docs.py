"""README and docs/ are true as far as a machine can tell: links, commands, code, variables, log events."""

from __future__ import annotations

import ast
import re
import shlex
from dataclasses import fields
from pathlib import Path
from typing import NamedTuple
from urllib.parse import unquote

import click
import pytest

from pgqueue.cli.main import cli
from pgqueue.config import PREFIX, Config
from pgqueue.database import migrate
from pgqueue.failpoints import FAILPOINTS
from pgqueue.job import DEAD_REASONS, FINISHED_STATES, LIVE_STATES

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", ROOT / "README.ko.md", *sorted((ROOT / "docs").glob("*.md"))]
OPERATIONS = ROOT / "docs" / "operations.md"

_BLOCK = re.compile(r"^```(\w*)[^\n]*\n(.*?)^```", re.MULTILINE | re.DOTALL)
_LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
_COMMAND = re.compile(r"^\s*(?:\$ )?(?:ExecStart=)?(?:\w+=\S+ )*(?:\S*/)?pgqueue (?P<line>.*)$")
_SHELL_LANGUAGES = ("", "sh", "console", "ini")
_EVENT_ROW = re.compile(r"^\| `(?P<name>\w+)` \| (?P<level>\w+) \|(?P<fields>[^|]*)\|", re.MULTILINE)
_FIELD = re.compile(r"(\w+)=")


class Event(NamedTuple):
    """A log event: what an operator searches the log for."""

    level: str
    fields: frozenset[str]


def name_of(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


def blocks(text: str, *languages: str) -> list[str]:
    """The code blocks in these languages."""
    return [code for language, code in _BLOCK.findall(text) if language in languages]


def links(text: str) -> list[str]:
    """Targets of relative links, outside code."""
    found = _LINK.findall(_BLOCK.sub("", text))
    return [target for target in found if not re.match(r"[a-z]+:", target)]


def anchors(text: str) -> set[str]:
    """The names GitHub gives to the headings."""
    headings = re.findall(r"^#+ (.+)$", _BLOCK.sub("", text), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def broken_links(text: str, folder: Path) -> list[str]:
    """Relative links that lead nowhere."""
    broken = []
    for target in links(text):
        path, _, anchor = target.partition("#")
        file = folder / unquote(path)
        if not file.exists():
            broken.append(target)
        elif anchor:
            there = file.read_text(encoding="utf-8") if path else text
            broken += [] if anchor in anchors(there) else [target]
    return broken


def commands(text: str) -> list[list[str]]:
    """The arguments of every `pgqueue …` line in shell blocks."""
    lines = [line for block in blocks(text, *_SHELL_LANGUAGES) for line in block.splitlines()]
    matches = [match for line in lines if (match := _COMMAND.match(line))]
    return [_arguments(match["line"]) for match in matches]


def _arguments(line: str) -> list[str]:
    words = shlex.shlex(line, posix=True, punctuation_chars="|&;<>")
    words.whitespace_split = True
    words.commenters = "#"
    arguments = []
    for word in words:
        if set(word) <= set("|&;<>"):
            break
        arguments.append(word)
    return arguments


def parse(command: click.Command, line: list[str], parent: click.Context | None = None) -> None:
    """Parse a command line down to its last subcommand; UsageError if it is wrong. Runs nothing."""
    context = command.make_context(command.name, list(line), parent=parent)
    if isinstance(command, click.Group):
        _, found, rest = command.resolve_command(context, [*context._protected_args, *context.args])
        assert found is not None
        parse(found, rest, context)


def known_variables() -> set[str]:
    """Settings and the variables that options of the command line read."""
    variables = {f"{PREFIX}{field.name.upper()}" for field in fields(Config)}
    pending: list[click.Command] = [cli]
    while pending:
        command = pending.pop()
        variables |= {str(param.envvar) for param in command.params if param.envvar}
        if isinstance(command, click.Group):
            context = click.Context(command)
            found = [command.get_command(context, name) for name in command.list_commands(context)]
            pending += [each for each in found if each is not None]
    return variables


def variables_of_the_fault_suite() -> set[str]:
    """What makes processes come to grief, and steers the tests that do."""
    sources = [ROOT / "pgqueue" / "failpoints.py", *(ROOT / "tests" / "faults").glob("*.py")]
    return set().union(*(named_variables(path.read_text(encoding="utf-8")) for path in sources))


def variables_of_tests() -> set[str]:
    """What steers the tests of applications."""
    return named_variables((ROOT / "pgqueue" / "testing" / "server.py").read_text(encoding="utf-8"))


def named_variables(text: str) -> set[str]:
    return set(re.findall(rf"{PREFIX}[A-Z_]+", text))


def events_in(source: str) -> list[tuple[str, Event]]:
    """Name, level and fields of each `log.<level>("name field=…")`."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.args):
            continue
        first = node.args[0]
        is_log = isinstance(node.func.value, ast.Name) and node.func.value.id == "log"
        if is_log and isinstance(first, ast.Constant):
            name, _, rest = str(first.value).partition(" ")
            found.append((name, Event(node.func.attr, frozenset(_FIELD.findall(rest)))))
    return found


def logged_events() -> dict[str, Event]:
    """Every event the package logs."""
    events: dict[str, Event] = {}
    for path in sorted((ROOT / "pgqueue").rglob("*.py")):
        for name, event in events_in(path.read_text(encoding="utf-8")):
            assert events.setdefault(name, event) == event, f"{name} is logged in two ways"
    return events


def documented_events(text: str) -> dict[str, Event]:
    """The rows of the table of events."""
    return {
        row["name"]: Event(row["level"], frozenset(re.findall(r"\w+", row["fields"])))
        for row in _EVENT_ROW.finditer(text)
    }


@pytest.fixture(params=PAGES, ids=name_of)
def page(request: pytest.FixtureRequest) -> Path:
    path: Path = request.param
    return path


def test_links_lead_somewhere(page: Path) -> None:
    assert broken_links(page.read_text(encoding="utf-8"), page.parent) == []


def test_commands_parse(page: Path) -> None:
    for line in commands(page.read_text(encoding="utf-8")):
        try:
            parse(cli, line)
        except click.UsageError as error:
            pytest.fail(f"pgqueue {shlex.join(line)}: {error.format_message()}", pytrace=False)


def test_python_compiles(page: Path) -> None:
    for block in blocks(page.read_text(encoding="utf-8"), "python"):
        compile(block, name_of(page), "exec", flags=ast.PyCF_ALLOW_TOP_LEVEL_AWAIT)


def test_variables_are_read_by_somebody(page: Path) -> None:
    if page.name == "bad-input.md":
        pytest.skip("its misspelt variables are meant")
    known = known_variables() | variables_of_the_fault_suite() | variables_of_tests()
    assert named_variables(page.read_text(encoding="utf-8")) - known == set()


def test_every_setting_is_in_operations() -> None:
    assert known_variables() - named_variables(OPERATIONS.read_text(encoding="utf-8")) == set()


def test_log_events_are_those_of_the_code() -> None:
    assert documented_events(OPERATIONS.read_text(encoding="utf-8")) == logged_events()


def test_operations_say_which_revisions_this_release_works_with() -> None:
    words = f"This release: {migrate.OLDEST_REVISION} to {migrate.head_revision()}."
    assert words in OPERATIONS.read_text(encoding="utf-8")


def test_every_page_is_linked_from_the_readme() -> None:
    linked = set(links(PAGES[0].read_text(encoding="utf-8")))
    assert {name_of(page) for page in PAGES[1:]} <= linked


def test_every_failpoint_is_in_reliability() -> None:
    text = (ROOT / "docs" / "reliability.md").read_text(encoding="utf-8")
    assert dict(re.findall(r"^\| `(\w+)` \| ([^|]+) \|$", text, re.MULTILINE)) == FAILPOINTS


def test_the_glossary_is_in_order_and_has_every_state() -> None:
    words, states, others = (ROOT / "docs" / "glossary.md").read_text(encoding="utf-8").split("\n## ")
    listed = [word.strip("`") for word in re.findall(r"^\| ([^|]+) \|", words, re.MULTILINE)][1:]
    assert listed == sorted(listed, key=lambda word: word.replace("-", " "))
    assert set(re.findall(r"^\| `(\w+)`", states, re.MULTILINE)) == {
        *LIVE_STATES,
        *FINISHED_STATES,
        "dead",
        "unknown",
    }
    ours = {
        word
        for cell in re.findall(r" \| ([^|(]+?)(?: \([^|]*)? \|$", others, re.MULTILINE)[1:]
        for word in cell.split(", ")
    }
    assert {word.removesuffix("s") for word in ours} <= {
        word.split(", ")[0].removesuffix("s") for word in listed
    }


def test_every_reason_for_a_dead_letter_is_in_retries() -> None:
    text = (ROOT / "docs" / "retries.md").read_text(encoding="utf-8")
    (section,) = re.findall(r"^## What is dead\n(.*?)^## ", text, re.MULTILINE | re.DOTALL)
    assert re.findall(r"^\| `(\w+)`", section, re.MULTILINE) == list(DEAD_REASONS)


def test_the_checks_see_something() -> None:
    texts = [page.read_text(encoding="utf-8") for page in PAGES]
    assert len(PAGES) >= 10
    assert sum(len(links(text)) for text in texts) > 20
    assert sum(len(commands(text)) for text in texts) > 20
    assert sum(len(blocks(text, "python")) for text in texts) > 10
    assert len(logged_events()) > 15


def test_a_wrong_link_is_seen(tmp_path: Path) -> None:
    (tmp_path / "there.md").write_text("# One heading\n")
    text = "[a](there.md) [b](there.md#one-heading) [c](https://example.org/x) `[d](no.md)`\n"
    assert broken_links(text.replace("`", ""), tmp_path) == ["no.md"]
    assert broken_links("[e](there.md#two) [f](#g)\n", tmp_path) == ["there.md#two", "#g"]


@pytest.mark.parametrize(
    "line",
    [
        "pgqueue quit",
        "$ pgqueue inspect nothing",
        "pgqueue -A shop:app worker --queue high",
        "PGQUEUE_DSN=x pgqueue worker -c many",
        "ExecStart=/usr/bin/pgqueue --dns x worker",
    ],
)
def test_a_wrong_command_is_seen(line: str) -> None:
    (found,) = commands(f"```sh\n{line}\n```\n")
    with pytest.raises(click.UsageError):
        parse(cli, found)


def test_a_command_ends_where_the_shell_says() -> None:
    text = "```sh\npgqueue migrate --sql > pgqueue.sql\npgqueue inspect queues --json | jq .  # all\n```\n"
    assert commands(text) == [["migrate", "--sql"], ["inspect", "queues", "--json"]]


def test_a_wrong_variable_is_seen() -> None:
    assert named_variables("`PGQUEUE_DNS` or PGQUEUE_DSN") - known_variables() == {"PGQUEUE_DNS"}


def test_events_are_read_from_code_and_table() -> None:
    source = 'log.warning("job_lost job=%s task=%s", 1, 2)\nprint("x y=1")\n'
    table = "| event | level | fields |\n|---|---|---|\n| `job_lost` | warning | `job` `task` |\n"
    assert dict(events_in(source)) == documented_events(table)
