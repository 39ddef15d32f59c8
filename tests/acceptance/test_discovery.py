"""Workers and commands that find their application, and its tasks, among what is installed."""

from __future__ import annotations

import os
from pathlib import Path

from tests.acceptance.workers import PACKAGE, Jobs, Workers
from tests.unit.test_discovery import distribute

APP = """
from pgqueue import PgQueue
app = PgQueue("{name}")

@app.task
def where() -> str:
    return __file__
"""


def installed(site: Path, *, name: str = "shop", module: str = "installed_shop") -> dict[str, str]:
    """The environment of a command beside an installed application."""
    (site / f"{module}.py").write_text(APP.format(name=name))
    distribute(site, module, f"[pgqueue.apps]\n{name} = {module}:app\n")
    path = [str(PACKAGE), str(site), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {"PYTHONPATH": os.pathsep.join(path)}


def offer_tasks(site: Path, application: str, module: str, text: str) -> None:
    (site / f"{module}.py").write_text(text)
    distribute(site, module, f"[pgqueue.tasks]\n{application} = {module}\n")


def test_a_worker_finds_the_installed_application_and_its_offered_tasks(
    jobs: Jobs, workers: Workers, tmp_path: Path
) -> None:
    env = installed(tmp_path)
    offer_tasks(
        tmp_path,
        "shop",
        "installed_reports",
        "from installed_shop import app\n@app.task\ndef close_day(day: str) -> str:\n    return day\n",
    )
    offer_tasks(tmp_path, "bank", "installed_for_the_bank", "1 / 0\n")
    workers.start("-c", "1", app="shop", env=env)
    where = jobs.finished(jobs.add("installed_shop.where"))["result"]
    assert where == str(tmp_path / "installed_shop.py")
    assert jobs.finished(jobs.add("installed_reports.close_day", "monday"))["result"] == "monday"


def test_a_worker_without_a_name_takes_the_only_one(workers: Workers, tmp_path: Path) -> None:
    env = installed(tmp_path) | {"PGQUEUE_DSN": "postgresql://localhost:1/x?connect_timeout=1"}
    offer_tasks(tmp_path, "shop", "installed_broken", "raise RuntimeError('the offered one was imported')\n")
    done = workers.run("worker", env=env)
    assert done.returncode == 6, done.stderr
    assert done.stderr.splitlines()[0] == (
        "pgqueue: cannot load installed_shop:app: cannot import the task module 'installed_broken' "
        "(offered by installed_broken 1.0): RuntimeError: the offered one was imported"
    )


def test_a_worker_without_a_name_beside_two_applications_says_which(workers: Workers, tmp_path: Path) -> None:
    env = installed(tmp_path, name="bank", module="installed_bank")
    env = installed(tmp_path)
    done = workers.run("worker", env=env)
    assert done.returncode == 2
    assert done.stderr == (
        "pgqueue: 2 applications are installed: bank (installed_bank:app, of installed_bank 1.0), "
        "shop (installed_shop:app, of installed_shop 1.0); choose one with -A NAME or -A module:attribute\n"
    )


def test_a_command_with_a_database_leaves_the_installed_application_alone(
    jobs: Jobs, workers: Workers, tmp_path: Path
) -> None:
    env = installed(tmp_path)
    (tmp_path / "installed_shop.py").write_text("1 / 0\n")
    assert workers.run("enqueue", "any.task", env=env).returncode == 0
    done = workers.run("enqueue", "any.task", env=env | {"PGQUEUE_DSN": ""})
    assert done.returncode == 6, done.stderr
    assert "cannot load installed_shop:app: ZeroDivisionError" in done.stderr


def test_a_command_takes_the_database_of_the_installed_application(
    jobs: Jobs, workers: Workers, tmp_path: Path
) -> None:
    env = installed(tmp_path)
    (tmp_path / "installed_shop.py").write_text(
        f"from pgqueue import PgQueue\napp = PgQueue('shop', dsn={jobs.dsn!r})\n"
    )
    done = workers.run("inspect", "queues", env=env | {"PGQUEUE_DSN": ""})
    assert done.returncode == 0, done.stderr


def test_two_tasks_of_one_name_end_a_worker_in_one_line(workers: Workers, tmp_path: Path) -> None:
    env = installed(tmp_path)
    for module in ("installed_one", "installed_two"):
        offer_tasks(
            tmp_path,
            "shop",
            module,
            "from installed_shop import app\n@app.task(name='send')\ndef send() -> None: ...\n",
        )
    done = workers.run("-A", "shop", "worker", "-c", "1", env=env)
    assert done.returncode == 6
    (line,) = done.stderr.splitlines()
    assert f"two functions are the task 'send': installed_one.send ({tmp_path}/installed_one.py:2)" in line
    assert f"installed_two.send ({tmp_path}/installed_two.py:2); give one another name=" in line
