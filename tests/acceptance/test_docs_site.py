"""`make docs` builds every page, in reading order and without a warning, and no link of the site is dead."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from posixpath import normpath
from typing import Any
from urllib.parse import unquote, urlsplit

import pytest

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"
CONFIG = "zensical.toml"

_LINKS = {"a": "href", "link": "href", "img": "src", "script": "src", "iframe": "src", "source": "src"}


class Page(HTMLParser):
    """The anchors of a page, and where its links lead."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.anchors: set[str] = set()
        self.links: set[str] = set()
        self.loads: set[str] = set()
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = {name: value for name, value in attrs if value}
        self.anchors |= {given[name] for name in ("id", "name") if name in given}
        if target := given.get(_LINKS.get(tag, "")):
            self.links.add(target)
            if tag != "a":
                self.loads.add(target)


def nav() -> list[str]:
    """The pages in the order in which they are to be read."""

    def flat(entries: list[dict[str, Any]]) -> Iterator[str]:
        for entry in entries:
            for value in entry.values():
                if isinstance(value, str):
                    yield value
                else:
                    yield from flat(value)

    return list(flat(tomllib.loads((ROOT / CONFIG).read_text())["project"]["nav"]))


def build(folder: Path) -> subprocess.CompletedProcess[str]:
    """Build the site in a copy of what it is built from, by the command of `make docs`."""
    recipe = subprocess.run(["make", "-n", "docs"], cwd=ROOT, capture_output=True, text=True, check=True)
    (command,) = re.findall(r"^\.venv/bin/(zensical .*)$", recipe.stdout, re.MULTILINE)
    program, *arguments = command.split()
    return subprocess.run(
        [Path(sys.executable).parent / program, *arguments],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=90,
    )


def copy_docs(folder: Path) -> Path:
    shutil.copytree(DOCS, folder / "docs")
    shutil.copy(ROOT / CONFIG, folder)
    return folder


def dead_links(site: Path) -> list[str]:
    """Links of a site's pages to files or anchors that are not there."""
    pages = {path: Page(path.read_text(encoding="utf-8")) for path in sorted(site.rglob("*.html"))}
    dead = []
    for path, page in pages.items():
        for link in sorted(page.links):
            parts = urlsplit(link)
            if parts.scheme or parts.netloc:
                continue
            base = site if parts.path.startswith("/") else path.parent
            file = (base / unquote(parts.path).lstrip("/")).resolve() if parts.path else path
            file = file / "index.html" if file.is_dir() else file
            gone = not file.is_relative_to(site.resolve()) or not file.is_file()
            anchor = unquote(parts.fragment)
            if gone or (anchor and file in pages and anchor not in pages[file].anchors):
                dead.append(f"{path.name}: {link}")
    return dead


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The site, and what was said while it was built."""
    folder = copy_docs(tmp_path_factory.mktemp("site"))
    done = build(folder)
    said = done.stdout + done.stderr
    assert done.returncode == 0, said
    return folder / "site", said


@pytest.fixture
def site(built: tuple[Path, str]) -> Path:
    return built[0]


def test_it_builds_without_a_warning(built: tuple[Path, str]) -> None:
    said = built[1]
    assert "No issues found" in said
    assert not re.search(r"warn|error|deprecat", said, re.IGNORECASE), said


def test_every_page_is_in_the_navigation_and_built(site: Path) -> None:
    assert sorted(nav()) == sorted(path.name for path in DOCS.glob("*.md"))
    for page in nav():
        title = re.findall(r"^# (.+)$", (DOCS / page).read_text(encoding="utf-8"), re.MULTILINE)[0]
        html = (site / page).with_suffix(".html").read_text(encoding="utf-8")
        assert re.search(rf"<h1[^>]*>{re.escape(title)}", html), page


def test_each_page_leads_to_all_others(site: Path) -> None:
    wanted = {page.replace(".md", ".html") for page in nav()}
    for page in nav():
        links = Page((site / page).with_suffix(".html").read_text(encoding="utf-8")).links
        found = {normpath(link.partition("#")[0] or page.replace(".md", ".html")) for link in links}
        assert wanted - found == set(), page


def test_no_link_is_dead(site: Path) -> None:
    assert dead_links(site) == []


def test_nothing_is_loaded_from_elsewhere(site: Path) -> None:
    for path in site.rglob("*.html"):
        loads = Page(path.read_text(encoding="utf-8")).loads
        assert [link for link in loads if urlsplit(link).netloc] == [], path.name
    for path in site.rglob("*.css"):
        assert not re.search(r"url\(['\"]?https?:|@import", path.read_text(encoding="utf-8")), path.name


def test_code_is_code_and_tables_are_tables(site: Path) -> None:
    """Markdown that GitHub shows well, but the site as raw text."""
    for page in nav():
        text = (DOCS / page).read_text(encoding="utf-8")
        html = (site / page).with_suffix(".html").read_text(encoding="utf-8")
        assert html.count("<pre") == len(re.findall(r"^```\w+$", text, re.MULTILINE)), page
        assert html.count("<table>") == len(re.findall(r"^\|[-:|]+\|$", text, re.MULTILINE)), page
        assert "```" not in html, page


def test_the_readme_has_the_pages_in_reading_order() -> None:
    for readme in ("README.md", "README.ko.md"):
        text = (ROOT / readme).read_text(encoding="utf-8")
        listed = re.findall(r"^- \[[^\]]+\]\(docs/([\w-]+\.md)\)", text, re.MULTILINE)
        assert listed == [page for page in nav() if page != "index.md"], readme


def test_a_dead_link_fails_the_build(tmp_path: Path) -> None:
    folder = copy_docs(tmp_path)
    with (folder / "docs" / "glossary.md").open("a") as page:
        page.write("\n[one](no-such-page.md) [two](tasks.md#no-such-heading)\n")
    done = build(folder)
    assert done.returncode != 0
    assert "page does not exist" in done.stdout + done.stderr
    assert "anchor does not exist" in done.stdout + done.stderr


def test_a_dead_link_that_the_build_does_not_see_is_seen(tmp_path: Path) -> None:
    (tmp_path / "a.html").write_text(
        '<h1 id="top"></h1><a href="b.html">1</a><a href="b.html#there">2</a><a href="#top">3</a>'
        '<a href="../Makefile">4</a><a href="b.html#gone">5</a><img src="no.png"><a href="https://example.org">6</a>'
    )
    (tmp_path / "b.html").write_text('<h2 id="there"></h2>')
    assert dead_links(tmp_path) == ["a.html: ../Makefile", "a.html: b.html#gone", "a.html: no.png"]
