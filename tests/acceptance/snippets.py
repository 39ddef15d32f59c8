"""The code blocks of README and docs/, and a place in which they are run as a reader would run them.

A comment above a block says what is special about it:

    <!-- snippet: exempt REASON -->      not run; REASON is one of EXEMPT
    <!-- snippet: parsed -->             its commands are only parsed, see `Place.parse`
    <!-- snippet: raises NAME -->        Python that ends in this exception
    <!-- snippet: then CODE -->          Python to run after it, such as a call of what it defines
    <!-- snippet: status 0 1 -->         the exit statuses that its commands may have, instead of 0
    <!-- snippet: worker shop:app -->    a worker of this application runs from here on
    <!-- snippet: file -->               Python that becomes a file which a later block runs
    <!-- snippet: rolled back -->        SQL that leaves nothing behind
    <!-- snippet: output of COMMAND -->  what this command prints; `…` stands for anything

Python whose first line is `# name.py` becomes that file, and is imported. In `console` blocks the lines
without `$` are what the command before them prints; in Python `# -> …` is what was printed, in SQL lines of
`-- … | …` are the rows that there are in the end. Commands that serve (a worker, a server, `--watch`) run in
the background until the page ends; another worker takes the place of the one before, and what a server says
to export is exported.
"""

from __future__ import annotations

import configparser
import json
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import time
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

import jsonschema
import psycopg
import yaml

from pgqueue import discovery
from pgqueue.cli.main import cli
from pgqueue.cli.status import ExitStatus
from pgqueue.config import Config
from tests.unit.test_docs import parse

ROOT = Path(__file__).resolve().parents[2]
PAGES = ["README.md", *sorted(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md"))]
PATIENCE = 45.0

EXEMPT = {
    "outline": "no code: a drawing, a signature, or a list of what something looks like",
    "docker": "needs a Docker engine; the file it starts is checked by test_compose.py",
}
"""The reasons for which a block is neither run nor parsed."""

_BLOCK = re.compile(
    r"(?P<comments>(?:^<!-- snippet: [^\n]* -->\n)*)^```(?P<language>\w*)[^\n]*\n(?P<code>.*?)^```$",
    re.MULTILINE | re.DOTALL,
)
_COMMENT = re.compile(
    r"^<!-- snippet: (?P<word>exempt|parsed|raises|then|status|worker|rolled|output|file)(?P<rest>.*) -->$"
)
_ROW = re.compile(r"^--(.*\|.*)$", re.MULTILINE)
_REMARK = re.compile(r"(^|\s+)#\s.*$")
_FILE = re.compile(r"# (?P<name>\w+)\.py\n")
_SERVES = re.compile(r"\bpgqueue\b.* worker\b(?!.*--help)|--watch\b|^python server\.py$")
_WORKER = re.compile(r"\bpgqueue\b.* worker\b")
_ONE_COMMAND = re.compile(r"pgqueue (?:[^'|&;<>$`]|'[^']*')*")
_TARGET = re.compile(r"[a-z_]\w*(\.\w+)*(:\w+)?")


@dataclass(frozen=True)
class Snippet:
    """A code block, where it stands, and what the comments above it say."""

    page: str
    line: int
    language: str
    code: str
    section: str
    notes: Mapping[str, str]

    def __str__(self) -> str:
        return f"{self.page}:{self.line}"

    @property
    def module(self) -> str | None:
        """The file that it is, without `.py`."""
        found = _FILE.match(self.code) if self.language == "python" else None
        return found["name"] if found else None

    @property
    def way(self) -> str:
        """`executed`, `validated` or `exempt`."""
        if "exempt" in self.notes:
            return "exempt"
        parsed = "parsed" in self.notes or self.language in ("toml", "yaml", "ini")
        return "validated" if parsed else "executed"


def snippets(page: str, text: str | None = None) -> list[Snippet]:
    """The blocks of a page, in order."""
    text = (ROOT / page).read_text(encoding="utf-8") if text is None else text
    found = []
    for match in _BLOCK.finditer(text):
        notes = {}
        for comment in match["comments"].splitlines():
            note = _COMMENT.match(comment)
            assert note is not None, f"{page}: {comment} is none of those that {__name__} names"
            notes[note["word"]] = note["rest"].strip()
        headings = re.findall(r"^##? (.+)$", _BLOCK.sub("", text[: match.start()]), re.MULTILINE)
        line = text.count("\n", 0, match.start("code")) + 1
        section = headings[-1] if headings else ""
        found.append(Snippet(page, line, match["language"], match["code"], section, notes))
    # A fence that the pattern does not see would be a block that nobody runs.
    assert len(re.findall(r"^ *(?:```|~~~)", text, re.MULTILINE)) == 2 * len(found), (
        f"{page}: a fence is not read"
    )
    return found


@dataclass
class Command:
    """A line of a shell block, and what the page says it prints."""

    line: str
    printed: list[str] = field(default_factory=list)


def commands(snippet: Snippet) -> list[Command]:
    lines = snippet.code.replace("\\\n", " ").splitlines()
    if snippet.language != "console":
        return [Command(line) for each in lines if (line := _REMARK.sub("", each).strip())]
    found: list[Command] = []
    for line in lines:
        if line.startswith("$ "):
            found.append(Command(line[2:]))
        else:
            found[-1].printed.append(line)
    return found


def as_printed(page: str) -> re.Pattern[str]:
    """What the page shows, as a pattern: `…` is anything, and blanks are as many as you like."""
    words = [re.escape(word).replace("…", ".*?") for word in page.split()]
    return re.compile(r"\s+".join(words), re.DOTALL)


class Commands:
    """`pgqueue`, already imported: see `snippet_commands`."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.acceptance.snippet_commands"],
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def run(self, argv: list[str], cwd: Path, env: Mapping[str, str]) -> subprocess.CompletedProcess[str]:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        request = {"argv": argv, "cwd": str(cwd), "env": dict(env)}
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        status, out, err = json.loads(self._process.stdout.readline())
        return subprocess.CompletedProcess(argv, status, out, err)

    def close(self) -> None:
        self._process.communicate(timeout=20)


class Place:
    """A folder, a database and a namespace in which a page is run from top to bottom.

    Args:
        addresses: What stands in the pages for the reader's own database and ports, and what is here instead.
        roles: Database roles that SQL blocks which are rolled back may name.
        commands: Where its commands run; None: in the shell, as the installed program.
    """

    def __init__(
        self,
        folder: Path,
        dsn: str,
        addresses: Mapping[str, str],
        *,
        roles: tuple[str, ...] = (),
        commands: Commands | None = None,
    ) -> None:
        self.folder = folder
        self.dsn = dsn
        self._addresses = addresses
        self._roles = roles
        self._commands = commands
        inherited = {
            key: value for key, value in os.environ.items() if not key.startswith(("PGQUEUE_", "PG"))
        }
        path = os.pathsep.join([str(_tools(folder)), str(Path(sys.executable).parent), inherited["PATH"]])
        self.env = {
            **inherited,
            "PATH": path,
            "PGQUEUE_DSN": dsn,
            "CHECKOUT": str(ROOT),
            "COLUMNS": "200",
            "HOME": str(folder),
        }
        self.cwd = folder
        self._kernel: subprocess.Popen[str] | None = None
        self._services: list[tuple[str, subprocess.Popen[bytes], Path]] = []

    def __enter__(self) -> Place:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for _, process, log in reversed(self._services):
            self._stop(process)
            if kind is not None:
                print(f"--- {log.name}\n{log.read_text(errors='replace')}")
        if self._kernel is not None:
            assert self._kernel.stdin is not None
            assert self._kernel.stdout is not None
            self._kernel.stdin.close()
            self._kernel.wait(20)
            self._kernel.stdout.close()

    def here(self, code: str) -> str:
        """The code, with the reader's database being this one."""
        for there, here in self._addresses.items():
            code = code.replace(there, here)
        return code

    def run(self, snippet: Snippet) -> None:
        if "worker" in snippet.notes:
            self.serve(f"pgqueue -A {snippet.notes['worker']} worker -c 1", [])
        if "output" in snippet.notes:
            self.shell(
                Command(snippet.notes["output"].removeprefix("of "), snippet.code.splitlines()), snippet
            )
        elif snippet.language == "python":
            self.python(snippet)
        elif snippet.language in ("sh", "console"):
            for command in commands(snippet):
                self.parse(command.line) if "parsed" in snippet.notes else self.shell(command, snippet)
        elif snippet.language == "sql":
            self.sql(snippet)
        else:
            _VALIDATORS[snippet.language](snippet.code)
        if "then" in snippet.notes:
            self.evaluate(snippet.notes["then"], snippet)

    def python(self, snippet: Snippet) -> None:
        code = self.here(snippet.code)
        expected = snippet.notes.get("raises")
        if snippet.module is not None:
            (self.cwd / f"{snippet.module}.py").write_text(code)
            if "file" in snippet.notes:
                return
            answer = self._ask({"module": snippet.module})
        else:
            answer = self._ask({"code": code, "page": snippet.page, "line": snippet.line})
        assert answer["error"] == expected, f"{snippet}: {answer['traceback'] or f'did not raise {expected}'}"
        wanted = re.findall(r"# -> (.+)$", snippet.code, re.MULTILINE)
        if wanted:
            pattern = as_printed(" ".join(wanted))
            assert pattern.fullmatch(answer["printed"].strip()), f"{snippet}: printed {answer['printed']}"

    def evaluate(self, code: str, snippet: Snippet | None = None) -> None:
        """Run Python that is not on the page."""
        page = str(snippet or "prelude")
        answer = self._ask({"code": self.here(code), "page": page, "line": 1})
        assert answer["error"] is None, f"{page}: {code}\n{answer['traceback']}"

    def _ask(self, block: dict[str, Any]) -> dict[str, Any]:
        if self._kernel is None:
            self._kernel = subprocess.Popen(
                [sys.executable, str(Path(__file__).with_name("snippet_kernel.py"))],
                cwd=self.cwd,
                env=self.env,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
            )
        assert self._kernel.stdin is not None
        assert self._kernel.stdout is not None
        self._kernel.stdin.write(json.dumps(block) + "\n")
        self._kernel.stdin.flush()
        answer: dict[str, Any] = json.loads(self._kernel.stdout.readline())
        return answer

    def shell(self, command: Command, snippet: Snippet) -> None:
        line = self.here(command.line)
        if _SERVES.search(line):
            self.serve(line, command.printed)
            return
        done = self._shell(line)
        allowed = [int(word) for word in snippet.notes.get("status", "0").split()]
        said = f"{snippet}: {line}\nstatus {done.returncode}\n{done.stdout}{done.stderr}"
        assert done.returncode in allowed, said
        if command.printed:
            page = self.here("\n".join(command.printed))
            # What a block of its own shows may be a part; a console shows all.
            look = re.Pattern.search if "output" in snippet.notes else re.Pattern.fullmatch
            assert look(as_printed(page), (done.stdout + done.stderr).strip()), (
                f"{said}\nthe page says\n{page}"
            )

    def _shell(self, line: str) -> subprocess.CompletedProcess[str]:
        """Run a line; what it exports, and where it goes, holds for the next one."""
        if self._commands is not None and _ONE_COMMAND.fullmatch(line):
            return self._commands.run(shlex.split(line), self.cwd, self.env)
        state = self.folder / ".shell"
        state.unlink(missing_ok=True)
        script = f"{line}\nstatus=$?; {{ pwd; env -0; }} > {shlex.quote(str(state))}; exit $status"
        done = subprocess.run(
            ["bash", "-c", script],
            cwd=self.cwd,
            env=self.env,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=90,
        )
        if state.exists():
            folder, _, variables = state.read_text().partition("\n")
            self.cwd = Path(folder)
            self.env = dict(each.split("=", 1) for each in variables.split("\0") if "=" in each)
        return done

    def serve(self, line: str, printed: list[str]) -> None:
        """Start a command that goes on, and wait for what it prints first."""
        if _WORKER.search(line):
            for other, process, _ in self._services:
                if _WORKER.search(other):
                    self._stop(process)
        log = self.folder / f"service-{len(self._services) + 1}.log"
        with log.open("wb") as output:
            process = subprocess.Popen(
                ["bash", "-c", f"exec {line}"],
                cwd=self.cwd,
                env=self.env,
                stdin=subprocess.PIPE,
                stdout=output,
                stderr=subprocess.STDOUT,
            )
        self._services.append((line, process, log))
        started = r"worker_started" if _WORKER.search(line) else r"\S"
        wanted = [re.compile(started), *(as_printed(each) for each in printed)]
        deadline = time.monotonic() + PATIENCE
        while not all(pattern.search(log.read_text(errors="replace")) for pattern in wanted):
            said = log.read_text(errors="replace")
            assert process.poll() is None, f"{line}: ended with {process.returncode}\n{said}"
            assert time.monotonic() < deadline, f"{line}: said within {PATIENCE:g} s only\n{said}"
            time.sleep(0.02)
        for export in re.findall(r"^export \S+$", log.read_text(errors="replace"), re.MULTILINE):
            self._shell(export)

    def _stop(self, process: subprocess.Popen[bytes]) -> None:
        """As Ctrl-C does."""
        assert process.stdin is not None
        process.stdin.close()
        if process.poll() is None:
            process.send_signal(signal.SIGINT)
            process.wait(30)

    def sql(self, snippet: Snippet) -> None:
        with psycopg.connect(self.env["PGQUEUE_DSN"]) as connection:
            wanted = [[cell.strip() for cell in row.split("|")] for row in _ROW.findall(snippet.code)]
            if wanted:
                self._await_rows(connection, snippet, wanted)
                return
            for role in self._roles if "rolled" in snippet.notes else ():
                if not connection.execute("select from pg_roles where rolname = %s", [role]).fetchone():
                    connection.execute(f"create role {role}".encode())
            connection.execute(self.here(snippet.code).encode())
            if "rolled" in snippet.notes:
                connection.rollback()

    def _await_rows(self, connection: psycopg.Connection, snippet: Snippet, wanted: list[list[str]]) -> None:
        deadline = time.monotonic() + PATIENCE
        while True:
            rows = connection.execute(snippet.code.encode()).fetchall()
            connection.rollback()
            found = [["" if cell is None else _shown(cell) for cell in row] for row in rows]
            if found == wanted:
                return
            assert time.monotonic() < deadline, f"{snippet}: found {found}, the page says {wanted}"
            time.sleep(0.02)

    def parse(self, line: str) -> None:
        """Parse a command that would take long: by `make -n`, pytest's collection, or its own parser."""
        words = shlex.split(self.here(line), comments=True)
        while words and re.fullmatch(r"\w+=\S*", words[0]):
            words.pop(0)
        if words[0] == "make":
            check = ["make", "-n", *words[1:]]
        elif words[:3] == ["python", "-m", "pytest"]:
            check = [sys.executable, *words[1:], "--collect-only", "-q", "-p", "no:cacheprovider"]
        elif words[0] == "python":
            check = [sys.executable, "-c", _ONLY_PARSE, *words[1:]]
        else:
            raise AssertionError(f"nothing here parses {words[0]}; run it, or teach {__name__}")
        done = subprocess.run(check, cwd=ROOT, capture_output=True, text=True, timeout=90)
        assert done.returncode == 0, f"{line}\n{done.stdout}{done.stderr}"


_ONLY_PARSE = """
import argparse, runpy, sys
is_module = sys.argv[1] == "-m"
sys.argv = sys.argv[2:] if is_module else sys.argv[1:]
parse = argparse.ArgumentParser.parse_args
def only_parse(self, *given):
    parse(self, *given)
    sys.exit(0)
argparse.ArgumentParser.parse_args = only_parse
(runpy.run_module if is_module else runpy.run_path)(sys.argv[0], run_name="__main__")
raise SystemExit("it does not parse its arguments with argparse")
"""


def _shown(cell: object) -> str:
    """A value of a column as the pages write it."""
    return cell if isinstance(cell, str) else json.dumps(cell)


def _tools(folder: Path) -> Path:
    """A `pip` that installs nothing, but knows which extras there are."""
    tools = folder / ".tools"
    tools.mkdir(exist_ok=True)
    extras = set(tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"])
    pip = tools / "pip"
    pip.write_text(
        f"#!{sys.executable}\nimport re, sys\n"
        f"command, requirement = sys.argv[1:]\n"
        f"found = re.fullmatch(r'(?:\\S*/)?pgqueue(?:\\[([a-z,]+)\\])?', requirement)\n"
        f"extras = set(found[1].split(',')) if found and found[1] else set()\n"
        f"sys.exit(not (command == 'install' and found and extras <= {extras!r}))\n"
    )
    pip.chmod(0o755)
    return tools


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def _toml(code: str) -> None:
    (groups,) = [each["entry-points"] for each in tomllib.loads(code).values()]
    for group, entries in groups.items():
        assert group in (discovery.TASKS, discovery.APPS), group
        assert all(_TARGET.fullmatch(target) for target in entries.values()), entries


def _ini(code: str) -> None:
    unit = configparser.ConfigParser(interpolation=None)
    unit.optionxform = str  # type: ignore[assignment,method-assign]
    unit.read_string(code)
    assert unit.sections() == ["Unit", "Service", "Install"]
    service = unit["Service"]
    program, *arguments = shlex.split(service["ExecStart"])
    assert program.endswith("/pgqueue")
    parse(cli, arguments)
    statuses = service["SuccessExitStatus"].split() + service["RestartPreventExitStatus"].split()
    assert {int(status) for status in statuses} <= {int(each) for each in ExitStatus}
    assert int(service["TimeoutStopSec"]) > Config().shutdown_timeout


def _yaml(code: str) -> None:
    document = yaml.safe_load(code)
    if "containers" in document:
        _pod(document)
    else:
        schema = json.loads(Path(__file__).with_name("compose-spec.json").read_text())
        compose = {"services": {"worker": {"image": "shop", **document}}}
        jsonschema.validate(compose, schema, cls=jsonschema.Draft202012Validator)
        kind, program, *arguments = document["healthcheck"]["test"]
        assert (kind, program) == ("CMD", "pgqueue")
        parse(cli, arguments)


def _pod(spec: dict[str, Any]) -> None:
    """The part of a Kubernetes pod that the page shows: what it names is there, and the probes are ours."""
    assert spec["terminationGracePeriodSeconds"] > Config().shutdown_timeout
    (container,) = spec["containers"]
    parse(cli, container["args"])
    ports = {port["name"]: port["containerPort"] for port in container["ports"]}
    assert str(ports["health"]) in container["args"]
    probes = {name: probe for name, probe in container.items() if name.endswith("Probe")}
    assert set(probes) == {"startupProbe", "livenessProbe", "readinessProbe"}
    for probe in probes.values():
        asks = probe.pop("httpGet")
        assert asks["path"] in ("/live", "/ready")
        assert asks["port"] in ports
        assert set(probe) <= {"periodSeconds", "timeoutSeconds", "failureThreshold"}
        assert all(isinstance(number, int) for number in probe.values())


_VALIDATORS = {"toml": _toml, "ini": _ini, "yaml": _yaml}
