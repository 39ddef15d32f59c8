"""The application: names, settings, routes."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
from pathlib import Path
from typing import Any, ClassVar

import pytest

import pgqueue
from pgqueue import AppNotLoaded, ConfigError, DuplicateTask, PgQueue, Signature, UnknownTask


@pytest.fixture(autouse=True)
def _no_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith("PGQUEUE_")]:
        monkeypatch.delenv(name)


def module_level(number: int) -> int:
    return number


def test_a_task_is_named_after_its_module_and_function() -> None:
    app = PgQueue("tests")
    task = app.task(module_level)
    assert task.name == f"{__name__}.module_level"
    assert app.find_task(task.name) is task
    assert dict(app.tasks) == {task.name: task}


def test_both_spellings_of_the_decorator() -> None:
    app = PgQueue("tests")
    assert app.task(name="a")(module_level)(1) == app.task(module_level)(1) == 1


@pytest.mark.parametrize("thing", [int, "text", 3])
def test_only_functions_are_tasks(thing: Any) -> None:
    app = PgQueue("tests")
    with pytest.raises(ConfigError, match="decorates a function"):
        app.task(name="a")(thing)
    task = app.task(name="a")(module_level)
    with pytest.raises(ConfigError, match="decorates a function"):
        app.task(name="b")(task)


def test_two_functions_of_one_name_are_both_named() -> None:
    app = PgQueue("tests")
    app.task(name="a")(module_level)
    with pytest.raises(DuplicateTask) as caught:

        @app.task(name="a")
        def other() -> None: ...

    message = str(caught.value)
    assert "two functions are the task 'a'" in message
    for function in (module_level, test_two_functions_of_one_name_are_both_named):
        assert f"{__file__}:" in message
        assert function.__name__ in message


def test_a_function_defined_twice_in_one_place_is_two() -> None:
    app = PgQueue("tests")

    @app.task
    def one() -> None: ...

    with pytest.raises(DuplicateTask):

        @app.task
        def one() -> None: ...


TASKS = """
from pgqueue import PgQueue
app = app if "app" in globals() else PgQueue("tests")

@app.task
def note():
    return {value}
"""


def test_a_reloaded_module_brings_its_tasks_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    source = tmp_path / "reloaded_tasks.py"
    source.write_text(TASKS.format(value=1))
    module = importlib.import_module("reloaded_tasks")
    importlib.reload(module)
    source.write_text("# moved down\n" + TASKS.format(value=22))
    importlib.reload(module)
    assert module.app.find_task("reloaded_tasks.note")() == 22


def test_a_function_defined_twice_in_a_module_is_two(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "twice_tasks.py").write_text(TASKS.format(value=1) + TASKS.format(value=2))
    with pytest.raises(DuplicateTask):
        importlib.import_module("twice_tasks")


SCRIPT = """
from pgqueue import PgQueue
app = PgQueue("shop")
@app.task
def note(): ...
print(note.name)
"""


@pytest.mark.parametrize(
    ("how", "name"),
    [
        (["do_things.py"], "do_things.note"),
        (["-m", "do_things"], "do_things.note"),
        (["-m", "package.inside"], "package.inside.note"),
        (["-c", SCRIPT], "shop.note"),
    ],
)
def test_a_task_of_the_main_module_has_the_name_workers_know(
    tmp_path: Path, how: list[str], name: str
) -> None:
    (tmp_path / "do_things.py").write_text(SCRIPT)
    (tmp_path / "package").mkdir()
    (tmp_path / "package" / "inside.py").write_text(SCRIPT)
    environ = {**os.environ, "PYTHONPATH": str(Path(pgqueue.__file__).parent.parent)}
    done = subprocess.run(
        [sys.executable, *how], capture_output=True, text=True, timeout=60, cwd=tmp_path, env=environ
    )
    assert done.stdout.strip() == name, done.stderr


def test_an_unknown_task_names_the_imports() -> None:
    with pytest.raises(
        UnknownTask, match=r"no task 'a' is registered with 'tests'.*imports= \(shop\.tasks\)"
    ):
        PgQueue("tests", imports=["shop.tasks"]).find_task("a")


def test_imports_are_imported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "imported_tasks.py").write_text("seen = True")
    app = PgQueue("tests", imports=("imported_tasks",))
    assert "imported_tasks" not in sys.modules
    app.import_tasks()
    assert sys.modules["imported_tasks"].seen
    with pytest.raises(AppNotLoaded, match="no_such_tasks"):
        PgQueue("tests", imports=("no_such_tasks",)).import_tasks()


@pytest.mark.parametrize("imports", ["shop.tasks", [1], [""], 3])
def test_imports_must_be_names_of_modules(imports: Any) -> None:
    with pytest.raises(ConfigError, match="imports must be"):
        PgQueue("tests", imports=imports)


class TestSettings:
    def test_arguments_beat_the_environment(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("PGQUEUE_DSN", "postgresql://from-environ/db")
        monkeypatch.setenv("PGQUEUE_QUEUE", "from_environ")
        monkeypatch.setenv("PGQUEUE_SCHEMA", "from_environ")
        app = PgQueue("tests", dsn="postgresql://given/db")
        assert (app.dsn, app.config.queue, app.schema) == (
            "postgresql://given/db",
            "from_environ",
            "from_environ",
        )
        assert PgQueue("tests").dsn == "postgresql://from-environ/db"
        assert PgQueue("tests", schema="given").schema == "given"

    def test_configure_until_the_first_use(self) -> None:
        app = PgQueue("tests", dsn="postgresql://one/db")
        note = app.task(name="a")(module_level)
        app.configure(dsn="postgresql://two/db", queue="q", imports=["m"], task_defaults={"priority": 1})
        assert app.config.dsn == "postgresql://two/db"
        assert (note.queue, note.priority, app.imports) == ("q", 1, ("m",))
        with pytest.raises(ConfigError, match="before the application's first use"):
            app.configure(queue="other")

    def test_a_wrong_setting_is_refused_at_once(self) -> None:
        with pytest.raises(ConfigError, match="schema must be"):
            PgQueue("tests", schema="My Schema")
        with pytest.raises(ConfigError, match="unknown option 'qeue', did you mean 'queue'"):
            PgQueue("tests").configure(qeue="x")

    def test_without_a_dsn(self) -> None:
        with pytest.raises(
            ConfigError, match=r"no database: pass dsn=, or set PGQUEUE_DSN, or enqueue through"
        ):
            _ = PgQueue("tests").dsn

    def test_nothing_is_opened_by_closing(self) -> None:
        app = PgQueue("tests")
        app.close()
        app.configure(queue="still_possible")


class TestRoutes:
    ROUTES: ClassVar[dict[str, Any]] = {
        "shop.*": {"queue": "shop"},
        "shop.mail.*": {"queue": "never"},
        "shop.mail.send": {"queue": "mail", "dead_letter_queue": "dead_mail"},
    }

    @pytest.mark.parametrize(
        ("task", "queue"),
        [("shop.mail.send", "mail"), ("shop.mail.other", "shop"), ("shop.a", "shop"), ("other", "default")],
    )
    def test_an_exact_name_beats_a_glob_and_the_first_glob_the_others(self, task: str, queue: str) -> None:
        app = PgQueue("tests", task_routes=self.ROUTES)
        assert app.task(name=task)(module_level).queue == queue

    def test_they_hold_for_tasks_known_by_name_only(self) -> None:
        app = PgQueue("tests", task_routes=self.ROUTES, task_defaults={"priority": 1, "expires": 9})
        request = app._requests_for([Signature("shop.elsewhere", (1,))])[0]
        assert (request.queue, request.priority, request.expires_in) == ("shop", 1, 9)

    def test_all_that_is_wrong_is_said_at_once(self) -> None:
        with pytest.raises(ConfigError) as caught:
            PgQueue(
                "tests",
                task_routes={
                    "a": {"queue": "x y"},
                    "b": {"exchange": "x"},
                    "c": "mail",
                    "d": {"priority": 10},
                },  # type: ignore[dict-item]
            )
        message = str(caught.value)
        assert message.startswith("task_routes: 'a': a queue name is")
        assert "'b' has an unknown 'exchange' (known are queue, priority, dead_letter_queue)" in message
        assert "'c' must be a dict, got 'mail'" in message
        assert "'d': priority must be" in message


def test_a_task_name_to_send_is_checked() -> None:
    with pytest.raises(ValueError, match="a task name is 1 to 255 characters without blanks, got 'a b'"):
        PgQueue("tests").send_task("a b")


def test_a_setting_is_judged_beside_those_that_came_before(monkeypatch: pytest.MonkeyPatch) -> None:
    app = PgQueue("shop")
    app.configure(heartbeat=1)
    app.configure(lease=4)  # too short for the default heartbeat, not for this one
    assert app.config.lease == 4
    monkeypatch.setenv("PGQUEUE_HEARTBEAT", "1")
    PgQueue("shop").configure(lease=4)
    monkeypatch.delenv("PGQUEUE_HEARTBEAT")
    with pytest.raises(ConfigError, match="lease must be at least 3 times heartbeat"):
        PgQueue("shop").configure(lease=4)


def test_an_application_that_nobody_has_is_gone_at_once() -> None:
    """And with it its connections: it must not wait for the garbage collector."""
    import weakref

    app = PgQueue("tests")
    _ = app.schedules, app.queues, app.dead_letters
    gone = weakref.ref(app)
    del app, _
    assert gone() is None
