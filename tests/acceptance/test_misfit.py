"""Flags beside settings of the application that they do not fit."""

from __future__ import annotations

import sys
from pathlib import Path

from tests.acceptance.test_discovery import APP, installed
from tests.acceptance.workers import Workers


def test_a_flag_that_does_not_fit_the_application_is_wrong_usage(workers: Workers, tmp_path: Path) -> None:
    env = installed(tmp_path)
    done = workers.run("-A", "shop", "worker", "--heartbeat", "11", env=env)
    assert done.returncode == 2
    assert done.stderr == "pgqueue: lease must be at least 3 times heartbeat (11 s), got 30\n"


def test_a_setting_that_the_application_itself_gets_wrong_is_not(workers: Workers, tmp_path: Path) -> None:
    env = installed(tmp_path)
    with (tmp_path / "installed_shop.py").open("a") as file:
        file.write("app.configure(heartbeat=11)\n")
    done = workers.run("-A", "shop", "worker", env=env)
    assert done.returncode == 6
    (tmp_path / "installed_shop.py").write_text(APP.format(name="shop") + "app.config\n")
    done = workers.run("-A", "shop", "worker", "-c", "1", env=env)
    assert done.returncode == 6
    assert "before the application's first use" in done.stderr
    assert sys.executable not in done.stderr
