"""The wheel, in a fresh environment: it carries its migrations and its demo, and its command works."""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
from pathlib import Path

import psycopg
import pytest

from pgqueue.database.migrate import head_revision

CHECKOUT = Path(__file__).resolve().parents[2]


def run(*command: str | Path, cwd: Path) -> str:
    """The command's output; fails the test with it when the command fails."""
    environment = {
        key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "PGQUEUE_DSN")
    }
    done = subprocess.run(
        [str(part) for part in command],
        cwd=cwd,
        env=environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, f"{command}:\n{done.stdout}\n{done.stderr}"
    return done.stdout


def pip() -> list[str]:
    """A pip that can install into another environment."""
    for python in (sys.executable, "python3"):
        found = subprocess.run([python, "-m", "pip", "--version"], capture_output=True)
        if found.returncode == 0:
            return [python, "-m", "pip"]
    pytest.fail("this test needs pip: apt-get install python3-pip")


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A fresh virtual environment with the wheel installed; requirements are borrowed from this one."""
    folder = tmp_path_factory.mktemp("wheel")
    run(sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", folder / "dist", cwd=CHECKOUT)
    (wheel,) = (folder / "dist").glob("pgqueue-*.whl")
    fresh = folder / "venv"
    run(sys.executable, "-m", "venv", "--without-pip", fresh, cwd=folder)
    # A path file only adds to the path: the editable pgqueue of this environment does not come along.
    (site,) = fresh.glob("lib/python3*/site-packages")
    (site / "requirements.pth").write_text(sysconfig.get_path("purelib") + "\n")
    run(*pip(), "--python", fresh / "bin" / "python", "install", "--no-deps", "--no-index", wheel, cwd=folder)
    return fresh


def test_it_migrates_an_empty_database(environment: Path, fresh_dsn: str, tmp_path: Path) -> None:
    said = run(environment / "bin" / "pgqueue", "--dsn", fresh_dsn, "migrate", cwd=tmp_path)
    assert f"at revision {head_revision()} now, was empty" in said
    with psycopg.connect(fresh_dsn) as connection:
        row = connection.execute("SELECT pgqueue.enqueue('shop.send_email') IS NOT NULL").fetchone()
    assert row == (True,)


def test_everything_comes_from_the_wheel(environment: Path, tmp_path: Path) -> None:
    program = (
        "import pgqueue; from pathlib import Path; from pgqueue.database.migrate import migrations_folder;"
        "package = Path(pgqueue.__file__).parent; print(package); print(migrations_folder());"
        "print((package / 'examples' / 'shop' / 'tasks.py').is_file(), (package / 'py.typed').is_file())"
    )
    package, migrations, files = run(environment / "bin" / "python", "-c", program, cwd=tmp_path).splitlines()
    assert Path(package).is_relative_to(environment)
    assert Path(migrations) == Path(package) / "migrations"
    assert files == "True True"


def test_every_sql_file_and_template_is_in_it(environment: Path) -> None:
    (installed,) = environment.glob("lib/python3*/site-packages/pgqueue")
    for folder, there in (("pgqueue", installed), ("migrations", installed / "migrations")):
        ours = {
            path.relative_to(CHECKOUT / folder)
            for path in (CHECKOUT / folder).rglob("*")
            if path.suffix in (".py", ".sql", ".mako", ".typed")
        }
        assert ours <= {path.relative_to(there) for path in there.rglob("*") if path.is_file()}


def test_pytest_finds_its_fixture(environment: Path, server_dsn: str, tmp_path: Path) -> None:
    (tmp_path / "shop.py").write_text("from pgqueue import PgQueue\napp = PgQueue('shop')\n")
    (tmp_path / "test_shop.py").write_text(
        "import pytest_pgqueue\n\n"
        "def test_it(pgqueue_app):\n"
        "    print(pytest_pgqueue.__file__)\n"
        "    pgqueue_app.app.send_task('shop.nothing')\n"
        "    assert pgqueue_app.drain().counts == {'dead': 1}\n"
    )
    options = ["-s", "-p", "no:cacheprovider", "-o", "pgqueue_app=shop:app", "--pgqueue-test-dsn", server_dsn]
    said = run(environment / "bin" / "python", "-m", "pytest", *options, cwd=tmp_path)
    assert "1 passed" in said
    assert f"{environment}/" in said
