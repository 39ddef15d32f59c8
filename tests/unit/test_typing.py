"""The types of the public calls, as mypy --strict and pyright see them: right ones and mistakes."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "tests" / "typing"
RIGHT, WRONG = FOLDER / "public_calls.py", FOLDER / "mistakes.py"

Found = dict[int, set[str]]
"""The codes of the errors in each line."""


def run(*command: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", *command], cwd=ROOT, capture_output=True, text=True, timeout=110
    )


def mypy(path: Path) -> Found:
    done = run("mypy", "--no-error-summary", "--hide-error-context", "--no-pretty", str(path))
    found: Found = defaultdict(set)
    for line in done.stdout.splitlines():
        if match := re.fullmatch(r"(.+?):(\d+): error: .*?\[([\w-]+)\]", line):
            assert Path(ROOT, match[1]) == path, line
            found[int(match[2])].add(match[3])
    assert done.returncode == (1 if found else 0), done.stdout + done.stderr
    return dict(found)


def pyright(path: Path) -> Found:
    """Of basedpyright, which brings its own node, with the rules of pyright's `strict`."""
    pytest.importorskip("basedpyright")
    settings = ["-p", str(FOLDER / "pyrightconfig.json"), "--pythonpath", sys.executable, "--level", "error"]
    done = run("basedpyright", *settings, "--outputjson")
    report = json.loads(done.stdout)
    assert report["summary"]["filesAnalyzed"] == 2, done.stdout
    found: Found = defaultdict(set)
    for each in report["generalDiagnostics"]:
        if Path(each["file"]) == path:
            found[each["range"]["start"]["line"] + 1].add(each.get("rule", "syntax"))
    return dict(found)


def expected(path: Path, place: int) -> dict[int, str]:
    """The code in each line's `# error: mypys-code pyrights-rule`."""
    lines = enumerate(path.read_text().splitlines(), 1)
    return {
        number: match.groups()[place]
        for number, line in lines
        if (match := re.search(r"# error: ([\w-]+) (\w+)$", line))
    }


CHECKERS = pytest.mark.parametrize(("checker", "place"), [(mypy, 0), (pyright, 1)], ids=["mypy", "pyright"])


@CHECKERS
def test_what_is_right_has_no_errors(checker: Callable[[Path], Found], place: int) -> None:
    assert checker(RIGHT) == {}


@CHECKERS
def test_each_mistake_is_found_in_its_line(checker: Callable[[Path], Found], place: int) -> None:
    codes = expected(WRONG, place)
    found = checker(WRONG)
    assert len(codes) > 25
    assert found.keys() == codes.keys()
    assert {number: code for number, code in codes.items() if code not in found[number]} == {}
