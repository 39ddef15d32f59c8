"""Real workers and their health port: what a probe sees when they idle, work, hang, die and lose their
database; and `pgqueue ping`.
"""

from __future__ import annotations

import http.client
import json
import os
import signal
import socket
import struct
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import pytest

from pgqueue.cli.main import main
from pgqueue.worker.health import BLIND, CLAIM_PATIENCE
from tests.acceptance.conftest import Place
from tests.acceptance.workers import PACKAGE, Gate, Jobs, Ledger, Worker, Workers, eventually

SABOTAGE = '''
"""Imported by Python before everything else: lets parts of a worker hang while a file is there."""
import asyncio
import os
import sys

FOLDER = os.environ["SABOTAGE"]


def there(name):
    return os.path.exists(os.path.join(FOLDER, name))


def after_fork():
    if there("executors_die"):
        os._exit(9)


def hanging(function, name):
    async def wrapped(*arguments, **named):
        while there(name):
            await asyncio.sleep(0.02)
        return await function(*arguments, **named)

    return wrapped


os.register_at_fork(after_in_child=after_fork)
if "worker" in sys.orig_argv:
    from pgqueue.worker import claimer, health, maintenance, supervisor

    supervisor.RESTART_MOST = 0.3
    claimer.Claimer._round = hanging(claimer.Claimer._round, "claims_hang")
    maintenance.Maintenance.run_once = hanging(maintenance.Maintenance.run_once, "maintenance_hangs")
    for name, value in os.environ.items():
        if name.startswith("LIMIT_"):
            setattr(health, name.removeprefix("LIMIT_"), float(value))
'''


@dataclass(frozen=True)
class Answer:
    """What a health port said."""

    status: int
    document: dict[str, Any]


def ask(port: int, path: str, timeout: float = 20) -> Answer:
    """Ask with the patience of a busy machine."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=timeout)
    with closing(connection):
        connection.request("GET", path)
        answer = connection.getresponse()
        return Answer(answer.status, json.loads(answer.read()))


def port_of(worker: Worker) -> int:
    return int(worker.wait_for_log(r"health_listening host=\S+ port=(\d+)").group(1))


def states(worker: Worker) -> tuple[int, int]:
    """The statuses of /live and /ready."""
    port = port_of(worker)
    return ask(port, "/live").status, ask(port, "/ready").status


def until(worker: Worker, live: int, ready: int, what: str, within: float = 45) -> Answer:
    """Until the worker says so; what it says of its readiness then."""
    eventually(lambda: states(worker) == (live, ready), f"live {live}, ready {ready}: {what}", within)
    return ask(port_of(worker), "/ready")


@dataclass(frozen=True)
class Saboteur:
    """Starts workers parts of which can be made to hang."""

    workers: Workers
    folder: Path

    def start(self, *flags: str, **limits: float) -> Worker:
        env: dict[str, str | None] = {
            "PYTHONPATH": os.pathsep.join([str(self.folder), str(PACKAGE)]),
            "SABOTAGE": str(self.folder),
        }
        env |= {f"LIMIT_{name}": str(value) for name, value in limits.items()}
        worker = self.workers.start(*flags, "--health-port", "0", env=env)
        until(worker, 200, 200, "it has started")
        return worker

    def make(self, what: str) -> None:
        (self.folder / what).touch()

    def undo(self, what: str) -> None:
        (self.folder / what).unlink()


@pytest.fixture
def saboteur(workers: Workers, tmp_path: Path) -> Iterator[Saboteur]:
    folder = tmp_path / "sabotage"
    folder.mkdir()
    (folder / "sitecustomize.py").write_text(SABOTAGE)
    yield Saboteur(workers, folder)
    for what in ("claims_hang", "maintenance_hangs", "executors_die"):
        (folder / what).unlink(missing_ok=True)  # before the workers are stopped


def heartbeat(jobs: Jobs, worker: Worker) -> int:
    (row,) = jobs.sql("select heartbeat from pgqueue.workers where id = %s", worker.id)
    return int(row["heartbeat"])


@contextmanager
def frozen(*processes: psutil.Process) -> Iterator[None]:
    """The processes do not run for the length of the block."""
    for process in processes:
        process.suspend()
    try:
        yield
    finally:
        for process in processes:
            with suppress(psutil.NoSuchProcess):
                process.resume()


def let_pass(seconds: float) -> None:
    """For what must *not* happen in a while."""
    time.sleep(seconds)


class TestOrdinaryLife:
    def test_idle_then_busy_then_draining(self, jobs: Jobs, workers: Workers, gate: Gate) -> None:
        worker = workers.start("-c", "2", "--health-port", "0")
        idle = until(worker, 200, 200, "it is idle").document
        assert (idle["worker"], idle["why"], idle["database"]) == (worker.id, [], "ok")
        assert (idle["executors"], idle["concurrency"], idle["running"]) == (2, 2, 0)
        assert (idle["draining"], idle["database_away_for"]) == (False, None)
        assert idle["last_claim_ago"] < 10
        jobs.add_many("gated", [(gate.path,)] * 2)
        eventually(lambda: ask(port_of(worker), "/live").document["running"] == 2, "both run")
        assert states(worker) == (200, 200)
        worker.send(signal.SIGTERM)
        worker.wait_for_log("worker_stopping")
        said = until(worker, 200, 503, "it is draining").document
        assert (said["why"], said["draining"], said["running"]) == (["it is draining"], True, 2)
        gate.open()
        port = port_of(worker)
        assert worker.wait() == 0
        with pytest.raises(ConnectionRefusedError):
            ask(port, "/live")
        assert "worker_not_live" not in worker.log

    def test_without_the_flag_nothing_listens(self, workers: Workers) -> None:
        worker = workers.start("-c", "1")
        assert "health_listening" not in worker.log
        for process in worker.tree():
            assert [c for c in process.net_connections() if c.status == psutil.CONN_LISTEN] == []

    def test_only_the_supervisor_listens_and_only_here(self, workers: Workers) -> None:
        worker = workers.start("-c", "2", "--health-port", "0")
        worker.full_crew()
        listening = [
            (process.pid, found.laddr)
            for process in worker.tree()
            for found in process.net_connections()
            if found.status == psutil.CONN_LISTEN
        ]
        assert listening == [(worker.pid, ("127.0.0.1", port_of(worker)))]

    def test_the_variable_and_the_address(self, workers: Workers) -> None:
        env = {"PGQUEUE_HEALTH_PORT": "0", "PGQUEUE_HEALTH_HOST": "127.0.0.2"}
        worker = workers.start("-c", "1", env=env)
        port = int(worker.wait_for_log(r"health_listening host=127\.0\.0\.2 port=(\d+)").group(1))
        eventually(
            lambda: workers.run("ping", "--port", str(port), "--host", "127.0.0.2").returncode == 0, ""
        )
        assert workers.run("ping", "--port", str(port)).returncode == 1

    def test_a_port_in_use_is_told_at_the_start(self, workers: Workers) -> None:
        with socket.create_server(("127.0.0.1", 0)) as taken:
            port = taken.getsockname()[1]
            done = workers.run("-A", "tests_app:app", "worker", "-c", "1", "--health-port", str(port))
        assert (done.returncode, done.stdout) == (1, "")
        assert done.stderr == (
            f"pgqueue: cannot listen on 127.0.0.1 port {port} for health checks: address already in use; "
            "choose another --health-port, or 0 for any free one, and a --health-host of this machine\n"
        )
        assert workers.processes() == []


class TestHangs:
    """The heartbeat goes on, the process exists: it must be seen all the same."""

    @pytest.mark.slow
    def test_within_the_documented_time_and_nobody_else(
        self, jobs: Jobs, saboteur: Saboteur, ledger: Ledger, gate: Gate
    ) -> None:
        workers = saboteur.workers
        idle = workers.start("-Q", "idle", "-c", "1", "--health-port", "0")
        busy = workers.start("-Q", "busy", "-c", "1", "--health-port", "0")
        victim = saboteur.start("-Q", "victim", "-c", "1")
        jobs.add("gated", gate.path, queue="busy")
        eventually(lambda: ledger.count() == 1, "the busy one is busy")
        for worker in (idle, busy):
            until(worker, 200, 200, "it has started")
        beats = heartbeat(jobs, victim)
        saboteur.make("claims_hang")
        began = time.monotonic()
        while states(victim)[0] == 200:
            assert states(idle) == (200, 200)
            assert states(busy) == (200, 200)
            assert time.monotonic() - began < CLAIM_PATIENCE + 30, "the hang is not seen"
            time.sleep(0.2)
        took = time.monotonic() - began
        assert took > CLAIM_PATIENCE - 5, "a slow claim is no hang"
        said = ask(port_of(victim), "/live").document
        assert any("a claim is due for" in why for why in said["why"])
        assert said["last_beat_ago"] < 15
        assert heartbeat(jobs, victim) >= beats + 3, "the heartbeat goes on, and says nothing"
        victim.wait_for_log(r"worker_not_live why=a claim is due for")
        eventually(
            lambda: workers.run("ping", "--queue", "victim").returncode == 1, "the heartbeat's words show it"
        )
        assert workers.run("ping", "--queue", "idle").returncode == 0
        assert workers.run("ping", "--queue", "busy").returncode == 0
        saboteur.undo("claims_hang")
        until(victim, 200, 200, "it goes on")
        victim.wait_for_log("worker_live_again")
        assert jobs.finished(jobs.add("echo", 1, queue="victim"))["worker_id"] == victim.id
        assert "worker_not_live" not in idle.log + busy.log

    def test_a_hang_among_long_jobs_shows_once_an_executor_is_free(
        self, jobs: Jobs, saboteur: Saboteur, ledger: Ledger, gate: Gate
    ) -> None:
        worker = saboteur.start("-c", "1", CLAIM_PATIENCE=1.0, READY_PATIENCE=0.5)
        held = jobs.add("gated", gate.path)
        eventually(lambda: ledger.count() == 1, "it runs")
        saboteur.make("claims_hang")
        let_pass(2.5)
        assert states(worker) == (200, 200), "nobody wants a claim"
        gate.open()
        worker.wait_for_log("worker_not_live why=a claim is due for")  # nobody has asked in between
        until(worker, 503, 503, "an executor is free and gets nothing")
        saboteur.undo("claims_hang")
        until(worker, 200, 200, "it goes on")
        assert jobs.finished(held)["attempt"] == 1

    def test_a_maintenance_loop_that_hangs(self, jobs: Jobs, saboteur: Saboteur) -> None:
        worker = saboteur.start("-c", "1", "--heartbeat", "0.3", "--lease", "1", BEAT_PATIENCE=2.0)
        saboteur.make("maintenance_hangs")
        assert jobs.finished(jobs.add("echo", 1))["worker_id"] == worker.id, "claims go on"
        said = until(worker, 503, 503, "no heartbeat").document
        assert any("no heartbeat for" in why for why in said["why"])
        saboteur.undo("maintenance_hangs")
        until(worker, 200, 200, "it beats again")

    def test_a_fork_server_that_hangs(self, saboteur: Saboteur) -> None:
        worker = saboteur.start("-c", "1", CREW_PATIENCE=2.0)
        (executor,) = worker.full_crew()
        with frozen(worker.fork_server):
            executor.kill()
            # Its death is reported by the fork server, which does not: so it counts until then.
            let_pass(0.5)
            assert states(worker)[0] == 200
        saboteur.make("executors_die")
        worker.wait_for_log("executor_died")
        until(worker, 200, 503, "the next ones die at once")
        with frozen(worker.fork_server):
            said = until(worker, 503, 503, "nobody starts another, and none dies").document
            assert any("no executor for" in why for why in said["why"])
        saboteur.undo("executors_die")
        until(worker, 200, 200, "it has an executor again")

    def test_executors_that_die_again_and_again(self, jobs: Jobs, saboteur: Saboteur) -> None:
        worker = saboteur.start("-c", "2", CREW_PATIENCE=2.0)
        saboteur.make("executors_die")
        for executor in worker.full_crew():
            executor.kill()
        said = until(worker, 200, 503, "none is up").document
        assert (said["executors"], said["why"]) == (0, ["no executor is up"])
        began = time.monotonic()
        while time.monotonic() - began < 3:
            assert states(worker) == (200, 503)
            time.sleep(0.05)
        assert worker.log.count("executor_died") >= 8
        saboteur.undo("executors_die")
        until(worker, 200, 200, "they live")
        assert jobs.finished(jobs.add("echo", 1))["state"] == "succeeded"

    def test_a_frozen_supervisor_does_not_answer(self, jobs: Jobs, saboteur: Saboteur) -> None:
        worker = saboteur.start("-c", "1", CLAIM_PATIENCE=3.5)
        port = port_of(worker)
        with frozen(psutil.Process(worker.pid)):
            began = time.monotonic()
            done = saboteur.workers.run("ping", "--port", str(port))
            assert (done.returncode, done.stdout) == (1, "")
            assert done.stderr == (
                f"pgqueue: 127.0.0.1 port {port} has not answered within 2 s; "
                f"start the worker with --health-port {port}, or look whether it is frozen\n"
            )
            let_pass(max(0.0, BLIND + 1 - (time.monotonic() - began)))
            waiting = socket.create_connection(("127.0.0.1", port))
            waiting.sendall(b"GET /live HTTP/1.1\r\n\r\n")
        with waiting:
            # The first thing it does when it goes on: its last claim is long ago, and says nothing.
            assert b" 200 OK" in waiting.makefile("rb").readline()
        until(worker, 200, 200, "it goes on")
        assert jobs.finished(jobs.add("echo", 1))["state"] == "succeeded"
        assert "worker_not_live" not in worker.log


class TestDatabase:
    """Restarting workers does not mend a database: live, and not ready."""

    def test_away(self, place: Place, gate: Gate) -> None:
        worker = place.workers.start("-c", "2", "--health-port", "0")
        until(worker, 200, 200, "it has started")
        place.server.stop(signal.SIGQUIT)
        said = until(worker, 200, 503, "the database is away").document
        assert said["database"] == "away"
        assert any("the database is away for" in why for why in said["why"])
        assert said["database_away_for"] is not None
        done = place.workers.run("ping", "--port", str(port_of(worker)))
        assert done.returncode == 0, done.stderr
        assert "is live: 2 of 2 executors" in done.stdout
        assert "database away" in done.stdout
        done = place.workers.run("ping", "--port", str(port_of(worker)), "--ready")
        assert done.returncode == 1
        assert "is not ready: the database is away for" in done.stderr
        assert place.workers.run("ping").returncode == 4
        place.server.start()
        said = until(worker, 200, 200, "it is back").document
        assert said["database"] == "ok"

    def test_away_while_every_executor_is_busy(self, place: Place, gate: Gate) -> None:
        # Nothing is claimed then: the heartbeat finds out.
        worker = place.workers.start("-c", "1", "--health-port", "0", "--heartbeat", "0.3", "--lease", "1")
        job = place.jobs.add("gated", gate.path)
        eventually(lambda: place.workers.ledger.count() == 1, "it runs")
        until(worker, 200, 200, "it works")
        place.server.stop(signal.SIGQUIT)
        until(worker, 200, 503, "the database is away")
        place.server.start()
        until(worker, 200, 200, "it is back")
        gate.open()
        assert place.jobs.finished(job)["attempt"] == 1

    def test_starting_without_one(self, place: Place) -> None:
        place.server.stop(signal.SIGINT)
        worker = place.workers.start("-c", "1", "--health-port", "0", ready=False)
        said = until(worker, 200, 503, "it waits for its database").document
        assert said["why"] == ["it is not registered yet", "no executor is up"]
        place.server.start()
        until(worker, 200, 200, "it has started")

    @pytest.mark.slow
    def test_its_claims_server_process_is_frozen(self, place: Place) -> None:
        # The heartbeat has its own: it goes on, and says nothing.
        worker = place.workers.start("-c", "1", "--health-port", "0")
        until(worker, 200, 200, "it has started")
        beats = heartbeat(place.jobs, worker)
        with frozen(place.server.backend("pgqueue claim", place.jobs.dsn)):
            said = until(worker, 200, 503, "its claim is not answered").document
            assert any("a claim is due for" in why or "away" in why for why in said["why"])
            eventually(lambda: heartbeat(place.jobs, worker) > beats, "the heartbeat goes on")
            until(worker, 200, 200, "it has given that connection up and taken another")
        assert place.jobs.finished(place.jobs.add("echo", 1))["state"] == "succeeded"
        assert "worker_not_live" not in worker.log

    @pytest.mark.slow
    @pytest.mark.timeout(180)
    def test_the_whole_server_is_frozen_for_longer_than_a_hang_may_last(self, place: Place) -> None:
        worker = place.workers.start("-c", "1", "--health-port", "0")
        until(worker, 200, 200, "it has started")
        postmaster = place.server.postmaster
        with frozen(postmaster, *postmaster.children(recursive=True)):
            began = time.monotonic()
            until(worker, 200, 503, "it is not answered")
            while time.monotonic() - began < CLAIM_PATIENCE + 15:
                assert states(worker) == (200, 503)
                time.sleep(0.2)
        until(worker, 200, 200, "it is answered again")
        assert place.jobs.finished(place.jobs.add("echo", 1))["state"] == "succeeded"
        assert "worker_not_live" not in worker.log


@dataclass
class Crowd:
    """Asks a health port all the time, politely and otherwise, until it is stopped.

    Slowly enough that a worker which is kept waiting for a CPU never has more connections than it holds: the
    oldest would be dropped.
    """

    port: int
    answers: Counter[int] = field(default_factory=Counter)
    failed: list[str] = field(default_factory=list)
    rude: int = 0
    done: threading.Event = field(default_factory=threading.Event)

    def __enter__(self) -> Crowd:
        self._threads = [
            threading.Thread(target=self._until_done, args=(each,))
            for each in (self._ask, self._ask, self._talk_nonsense, self._reset)
        ]
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.done.set()
        for thread in self._threads:
            thread.join()

    def _until_done(self, act: Callable[[], None]) -> None:
        while not self.done.wait(0.01):
            act()

    def _ask(self) -> None:
        try:
            self.answers[ask(self.port, "/ready").status] += 1
        except (OSError, http.client.HTTPException) as error:
            self.failed.append(repr(error))

    def _talk_nonsense(self) -> None:
        self.rude += 1
        with suppress(OSError), socket.create_connection(("127.0.0.1", self.port), timeout=10) as line:
            line.sendall(os.urandom(5000) if self.rude % 2 else b"GET /live")
            if self.rude % 2:
                line.recv(100)

    def _reset(self) -> None:
        with suppress(OSError), socket.create_connection(("127.0.0.1", self.port), timeout=10) as line:
            line.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            line.sendall(b"GET /live HTTP/1.1\r\n\r\n")


def test_a_crowd_of_probes_does_not_disturb_the_work(jobs: Jobs, workers: Workers, ledger: Ledger) -> None:
    worker = workers.start("-c", "2", "--health-port", "0")
    until(worker, 200, 200, "it has started")
    with Crowd(port_of(worker)) as crowd:
        many = jobs.add_many("work", [(0.005, index) for index in range(1_200)])
        assert jobs.ends(many) == Counter(succeeded=1_200)
        eventually(lambda: sum(crowd.answers.values()) >= 100 and crowd.rude >= 50, "a crowd")
    assert crowd.failed == []
    assert set(crowd.answers) == {200}
    assert ledger.runs() == dict.fromkeys(many, 1)
    assert "Traceback" not in worker.log
    assert [line for line in worker.log.splitlines() if " INFO " not in line] == []
    assert worker.stop() == 0
    assert "stale_acks=0" in worker.log


def test_a_thousand_silent_connections_do_not_stop_the_work(jobs: Jobs, workers: Workers) -> None:
    worker = workers.start("-c", "2", "--health-port", "0")
    until(worker, 200, 200, "it has started")
    port = port_of(worker)
    lines = []
    try:
        for _ in range(1_000):
            line = socket.socket()
            line.setblocking(False)
            line.connect_ex(("127.0.0.1", port))
            lines.append(line)
        many = jobs.add_many("echo", [(index,) for index in range(200)])
        assert jobs.ends(many) == Counter(succeeded=200)
        assert ask(port, "/live").status == 200
        supervisor = psutil.Process(worker.pid)
        eventually(lambda: supervisor.num_fds() < 60, "they are dropped")
    finally:
        for line in lines:
            line.close()
    assert "Traceback" not in worker.log


# `pgqueue ping`, which asks the database.


@dataclass(frozen=True)
class Said:
    """What the command said."""

    status: object
    out: str
    err: str


Ping = Callable[..., Said]


@pytest.fixture
def ping(db: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Ping:
    """Runs the command in this process."""
    monkeypatch.setattr("pgqueue.cli.main.ignore_stop_signals", lambda: None)

    def run(*arguments: str, **environment: str) -> Said:
        monkeypatch.setenv("PGQUEUE_DSN", db)
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        monkeypatch.setattr(sys, "argv", ["pgqueue", "ping", *arguments])
        with pytest.raises(SystemExit) as exit:
            main()
        said = capsys.readouterr()
        return Said(exit.value.code, said.out, said.err)

    return run


def register(
    jobs: Jobs, name: str, *queues: str, ago: float = 0, fenced: bool = False, **said: object
) -> None:
    """A worker's row, as its heartbeat leaves it."""
    stats = {"last_claim_ago": 0.5, "claim_due_for": 0.5, "executors": 2, "draining": False} | said
    jobs.sql(
        "insert into pgqueue.workers (id, host, pid, queues, pool, concurrency, version, heartbeat_at,"
        " fenced, stats) values (%s, %s, 7, %s, 'prefork', 2, '1',"
        " clock_timestamp() - make_interval(secs => %s), %s, %s::jsonb)",
        name,
        name.partition(":")[0],
        list(queues),
        ago,
        fenced,
        json.dumps(stats),
    )


class TestPing:
    def test_nobody(self, ping: Ping) -> None:
        said = ping()
        assert (said.status, said.out) == (1, "")
        assert said.err == (
            "pgqueue: no worker is registered; start one with `pgqueue -A module:attribute worker`\n"
        )

    def test_a_table_of_all(self, ping: Ping, jobs: Jobs) -> None:
        register(jobs, "web:1:a", "mail", "low", last_claim_ago=None)
        register(jobs, "web:2:b", ago=99)
        said = ping()
        assert (said.status, said.err) == (0, "")
        head, first, second = (line.split("  ") for line in said.out.splitlines())
        assert [word.strip() for word in head if word] == [
            *("id", "state", "queues", "last beat", "last claim", "executors", "running"),
        ]
        assert [word.strip() for word in first if word.strip()][:3] == ["web:1:a", "ready", "mail,low"]
        assert [word.strip() for word in second if word.strip()] == [
            *("web:2:b", "silent", "(all)", "99 s ago", "0.5 s before", "2/2", "0"),
        ]

    def test_the_clock_is_the_databases(self, ping: Ping, jobs: Jobs) -> None:
        register(jobs, "web:1:a", ago=-3600)  # its clock, or ours, was wrong
        said = ping("--json")
        assert said.status == 0
        assert json.loads(said.out)["workers"][0]["beat_ago"] == 0.0

    def test_who_is_not_live(self, ping: Ping, jobs: Jobs) -> None:
        register(jobs, "web:1:a", ago=40)
        register(jobs, "web:2:b", fenced=True, ago=50)
        register(jobs, "web:3:c", claim_due_for=40.0, ago=3)
        said = ping()
        assert said.status == 1
        assert said.err == (
            "pgqueue: no worker is live: web:3:c is stuck, with a claim due for 40 s (limit 30 s), "
            "and 2 more; restart it\n"
        )
        assert ping("--max-age", "60").status == 0
        assert ping("--max-age", "60", "--host", "elsewhere").status == 1
        assert ping(PGQUEUE_LEASE="60").status == 0

    def test_filters(self, ping: Ping, jobs: Jobs) -> None:
        register(jobs, "web:1:a", "mail")
        register(jobs, "db:2:b", "low", draining=True)
        assert [ping(*flags).status for flags in (("--queue", "mail"), ("--queue", "low"))] == [0, 0]
        assert [ping(*flags, "--ready").status for flags in (("--queue", "mail"), ("--queue", "low"))] == [
            0,
            1,
        ]
        assert [ping("--host", host).status for host in ("web", "db", "we")] == [0, 0, 1]
        assert [ping("--worker", name).status for name in ("web:1:a", "web:1")] == [0, 1]
        said = ping("--queue", "high")
        assert said.err == (
            "pgqueue: no worker that serves queue high among 2 is registered; "
            "start one with `pgqueue -A module:attribute worker` -Q high, or without -Q\n"
        )

    def test_json(self, ping: Ping, jobs: Jobs) -> None:
        register(jobs, "web:1:a", "mail")
        document = json.loads(ping("--json").out)
        (worker,) = document["workers"]
        assert document["ok"] is True
        assert worker.pop("beat_ago") < 30
        assert worker.pop("started_at")
        assert worker == {
            "id": "web:1:a",
            "state": "ready",
            "live": True,
            "ready": True,
            "host": "web",
            "pid": 7,
            "queues": ["mail"],
            "last_claim_ago": 0.5,
            "claim_due_for": 0.5,
            "executors": 2,
            "concurrency": 2,
            "running": 0,
            "version": "1",
        }
        said = ping("--queue", "low", "--json")
        assert (said.status, json.loads(said.out)) == (1, {"ok": False, "workers": []})
        assert said.err.count("\n") == 1

    def test_a_name_that_steers_a_terminal(self, ping: Ping, jobs: Jobs) -> None:
        register(jobs, "web\x1b[2J:1:a", ago=99)
        said = ping()
        assert "\x1b" not in said.out + said.err
        assert "\\x1b[2J" in said.err

    def test_waiting_for_one(self, ping: Ping, jobs: Jobs) -> None:
        timer = threading.Timer(1.0, register, (jobs, "web:1:a", "mail"))
        timer.start()
        try:
            assert ping("--queue", "mail", "--wait", "60").status == 0
        finally:
            timer.join()
        began = time.monotonic()
        assert ping("--queue", "low", "--wait", "0.7").status == 1
        assert time.monotonic() - began >= 0.7

    def test_no_database(self, ping: Ping) -> None:
        said = ping("--wait", "0.2", PGQUEUE_DSN="")
        assert said.status == 2
        assert "no database: pass --dsn" in said.err

    def test_a_database_that_is_not_there(self, workers: Workers) -> None:
        nowhere = {"PGQUEUE_DSN": "postgresql://nobody@127.0.0.1:1/nothing"}
        done = workers.run("ping", "--wait", "0.6", env=nowhere)
        assert (done.returncode, done.stdout) == (4, "")
        assert done.stderr.startswith("pgqueue: cannot reach the database: ")
        assert done.stderr.count("\n") == 1

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (["--port", "80", "--queue", "mail"], "ask the database; leave out --port"),
            (["--port", "80", "--max-age", "9"], "ask the database; leave out --port"),
            (["--port", "0"], "0 is not in the range"),
            (["--queue", "a b"], "a queue name is 1 to 63"),
            (["--max-age", "0"], "0.0 is not in the range"),
            (["--wait", "-1"], "-1.0 is not in the range"),
            (["extra"], "unexpected extra argument"),
        ],
    )
    def test_wrong_usage(self, ping: Ping, arguments: list[str], message: str) -> None:
        said = ping(*arguments)
        assert (said.status, said.out) == (2, "")
        assert message in said.err

    def test_a_real_worker(
        self, jobs: Jobs, workers: Workers, ledger: Ledger, gate: Gate, ping: Ping
    ) -> None:
        worker = workers.start("-c", "1", "--heartbeat", "0.3", "--lease", "1", "--health-port", "0")
        assert ping("--ready", "--wait", "60", "--queue", "default", "--worker", worker.id).status == 0
        jobs.add("gated", gate.path)
        eventually(lambda: ledger.count() == 1, "it is busy")
        let_pass(1.5)
        assert ping("--ready", "--max-age", "1").status == 0, "busy for longer than the limit"
        port = str(port_of(worker))
        said = ping("--port", port, "--ready", "--json")
        assert (said.status, json.loads(said.out)["running"]) == (0, 1)
        worker.send(signal.SIGTERM)
        worker.wait_for_log("worker_stopping")
        eventually(lambda: ping("--ready").status == 1, "it drains")
        assert "is draining; start another one" in ping("--ready").err
        assert ping().status == 0
        assert ping("--port", port).status == 0
        assert "is not ready: it is draining; look at its log" in ping("--port", port, "--ready").err
        gate.open()
        assert worker.wait() == 0
        assert ping().status == 1
        assert "does not answer: connection refused" in ping("--port", port).err

    def test_a_port_needs_no_database_and_no_application(self, workers: Workers) -> None:
        worker = workers.start("-c", "1", "--health-port", "0")
        env = {"PGQUEUE_DSN": None, "PGQUEUE_APP": "broken_app:app"}
        port = str(port_of(worker))
        done = workers.run("ping", "--port", port, "--wait", "30", "--ready", env=env)
        assert (done.returncode, done.stderr) == (0, "")
        assert done.stdout.startswith(
            f"{worker.id} is live and ready: 1 of 1 executors, running 0, last claim"
        )
