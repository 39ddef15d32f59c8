"""Applications and task modules that installed distributions offer, and imports that fail."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import pgqueue
from pgqueue import AppNotLoaded, ConfigError, PgQueue
from pgqueue.discovery import find_target, task_modules


@pytest.fixture(autouse=True)
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder of installed distributions."""
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    before = set(sys.modules)
    yield tmp_path
    for name in set(sys.modules) - before:
        if str(getattr(sys.modules[name], "__file__", None)).startswith(str(tmp_path)):
            del sys.modules[name]


def distribute(site: Path, name: str, entry_points: str, version: str = "1.0") -> None:
    info = site / f"{name.replace('-', '_')}-{version}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    (info / "entry_points.txt").write_text(entry_points)


def test_with_nothing_installed_a_target_is_what_it_says() -> None:
    assert find_target(None) is None
    assert [find_target(each) for each in ("shop", "shop:app", "")] == ["shop", "shop:app", ""]


def test_the_only_installed_application_is_found_without_a_name_and_by_its_name(site: Path) -> None:
    distribute(site, "the-shop", "[pgqueue.apps]\nshop = shop.app:app\n\n[other.group]\nx = y:z\n")
    assert find_target(None) == find_target("shop") == "shop.app:app"
    assert find_target("shop.other") == "shop.other"
    assert find_target("shop:app") == "shop:app"


def test_of_several_one_must_be_named(site: Path) -> None:
    distribute(site, "the-shop", "[pgqueue.apps]\nshop = shop.app:app\n")
    distribute(site, "billing", "[pgqueue.apps]\nbilling = billing:app\n", "2.1")
    assert find_target("billing") == "billing:app"
    with pytest.raises(ConfigError) as caught:
        find_target(None)
    assert str(caught.value) == (
        "2 applications are installed: billing (billing:app, of billing 2.1), shop (shop.app:app, of "
        "the-shop 1.0); choose one with -A NAME or -A module:attribute"
    )


def test_two_applications_of_one_name_cannot_be_told_apart_by_it(site: Path) -> None:
    distribute(site, "the-shop", "[pgqueue.apps]\nshop = shop.app:app\n")
    distribute(site, "corner-shop", "[pgqueue.apps]\nshop = corner:app\n")
    with pytest.raises(ConfigError, match=r"2 installed applications are named 'shop': .*-A module:attr"):
        find_target("shop")


def test_one_application_offered_twice_is_one(site: Path) -> None:
    distribute(site, "the-shop", "[pgqueue.apps]\nshop = shop.app:app\n")
    distribute(site, "the-shop-dev", "[pgqueue.apps]\nshop = shop.app:app\n", "1.1")
    assert find_target(None) == "shop.app:app"


def test_task_modules_are_offered_by_the_applications_name(site: Path) -> None:
    distribute(site, "reports", "[pgqueue.tasks]\nshop = offered_reports\n")
    distribute(site, "others", "[pgqueue.tasks]\nbank = offered_to_the_bank\n")
    assert task_modules("shop") == [("offered_reports", "reports 1.0")]
    (site / "offered_reports.py").write_text("")
    PgQueue("shop").import_tasks()
    assert "offered_reports" in sys.modules
    assert "offered_to_the_bank" not in sys.modules


def test_all_imports_that_fail_are_reported_together(site: Path) -> None:
    distribute(site, "reports", "[pgqueue.tasks]\nshop = breaks_offered\n")
    (site / "breaks_at_once.py").write_text("1 / 0\n")
    (site / "breaks_offered.py").write_text("raise SystemExit('no\\nreports today')\n")
    (site / "fine_tasks.py").write_text("")
    app = PgQueue("shop", imports=("no_such_tasks", "breaks_at_once", "fine_tasks"))
    with pytest.raises(AppNotLoaded) as caught:
        app.import_tasks()
    line, _, traces = str(caught.value).partition("\n")
    assert line == (
        "cannot import 3 task modules: 'no_such_tasks' (in imports=): ModuleNotFoundError: No module named "
        "'no_such_tasks'; 'breaks_at_once' (in imports=): ZeroDivisionError: division by zero; "
        "'breaks_offered' (offered by reports 1.0): SystemExit: no reports today"
    )
    assert traces.count("Traceback (most recent call last)") == 3
    assert "breaks_at_once.py" in traces
    assert "fine_tasks" in sys.modules


def test_one_file_imported_under_two_names_is_told_from_two_functions(site: Path) -> None:
    package = site / "twice_package"
    package.mkdir()
    (package / "__init__.py").write_text("from pgqueue import PgQueue\napp = PgQueue('shop')\n")
    (package / "twice_tasks.py").write_text(
        "from twice_package import app\n\n@app.task(name='send')\ndef send() -> None: ...\n"
    )
    sys.path.insert(0, str(package))
    try:
        import twice_package  # type: ignore[import-not-found]

        app: PgQueue = twice_package.app
        app.configure(imports=("twice_tasks", "twice_package.twice_tasks"))
        with pytest.raises(AppNotLoaded) as caught:
            app.import_tasks()
    finally:
        sys.path.remove(str(package))
    message = str(caught.value)
    assert "two functions are the task 'send'" in message
    assert (
        "it is one file, imported as twice_tasks and as twice_package.twice_tasks: import it under one name "
        "everywhere, also in -A and imports=" in message
    )
    assert "another name=" not in message
    assert "Traceback" not in message


def test_nothing_is_read_at_import(site: Path) -> None:
    code = "import pgqueue, sys; app = pgqueue.PgQueue('shop'); print('importlib.metadata' in sys.modules)"
    environ = {"PYTHONPATH": str(Path(pgqueue.__file__).parents[1]), "PATH": os.environ["PATH"]}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, env=environ
    )
    assert done.stdout == "False\n", done.stderr
