"""The store of examples/from_celery: on Celery, on pgqueue, and the recipe that makes one of the other.

The same orders go through both, over HTTP, with the workers of each: Celery's with a broker in a folder, so
that nothing has to be installed for it.
"""

from __future__ import annotations

import contextlib
import filecmp
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import jsonschema
import psutil
import psycopg
import pytest
import yaml

from pgqueue.cli.main import cli
from tests.acceptance.test_compose import SCHEMA
from tests.acceptance.workers import PACKAGE, eventually, living
from tests.unit.test_docs import blocks, parse

EXAMPLE = PACKAGE / "examples" / "from_celery"
PAGE = PACKAGE / "docs" / "moving-from-celery.md"


def copy_of(store: str, folder: Path) -> Path:
    """One of the two, without what running it has left there."""
    target = folder / store
    shutil.copytree(
        EXAMPLE / store, target, ignore=shutil.ignore_patterns("__pycache__", ".*_cache", "*.pdf")
    )
    return target


def block_of_the_page(language: str, words: str) -> str:
    """The first code block in this language with these words in it."""
    found = blocks(PAGE.read_text(encoding="utf-8"), language)
    return next(block for block in found if words in block)


def follow_recipe(store: Path) -> None:
    """Do to the store what the page says, in the shell."""
    place = {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}", "MOVE": str(EXAMPLE)}
    done = subprocess.run(
        ["bash", "-euc", block_of_the_page("sh", "celery-to-pgqueue.sed")],
        cwd=store,
        env=place,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr


def test_the_recipe_makes_one_of_the_other(tmp_path: Path) -> None:
    made = copy_of("before", tmp_path)
    follow_recipe(made)
    wanted = copy_of("after", tmp_path)
    files = {path.relative_to(wanted).as_posix() for path in wanted.rglob("*") if path.is_file()}
    assert {path.relative_to(made).as_posix() for path in made.rglob("*") if path.is_file()} == files
    _, different, unreadable = filecmp.cmpfiles(made, wanted, sorted(files), shallow=False)
    assert different + unreadable == []
    assert len(files) > 6


@pytest.mark.parametrize(
    ("celery", "pgqueue"),
    [
        ("from celery import shared_task", "from .queue_app import queue_app"),
        ("from celery import Celery", "from pgqueue import PgQueue"),
        ("from celery import Task, chain, chord", "from pgqueue import TaskContext, chain, chord"),
        ("from celery.canvas import Signature, group", "from pgqueue import Signature, group"),
        ("from celery import Task, group, shared_task",
         "from pgqueue import TaskContext, group\nfrom .queue_app import queue_app"),
        ("from celery import group, signature", "from celery import group, signature"),
        ("from celery.result import AsyncResult", "from pgqueue import AsyncResult"),
        ("from celery.exceptions import Reject", "from pgqueue import Reject"),
        ("@shared_task(bind=True, acks_late=True)", "@queue_app.task(bind=True)"),
        ("@celery_app.task(acks_late=True, bind=True)", "@queue_app.task(bind=True)"),
        ('@shared_task(serializer="json", track_started=True)', "@queue_app.task()"),
        ('@shared_task(serializer="json", bind=True)', "@queue_app.task(bind=True)"),
        ('@shared_task(max_retries=5, serializer="json")', "@queue_app.task(max_retries=5)"),
        ("def send(self: Task, order: int) -> None:", "def send(self: TaskContext, order: int) -> None:"),
        ("send.apply_async((1,), task_id=key)", "send.apply_async((1,), job_id=key)"),
        ('celery_app.AsyncResult(key).revoke(terminate=True, signal="SIGKILL")',
         "queue_app.AsyncResult(key).cancel()"),
        ("job.revoke()", "job.cancel()"),
        ("celery_app.GroupResult.restore(key)", "queue_app.CanvasResult(key)"),
        ("log(self.request.hostname)", "log(self.request.worker)"),
        ("celery>=5.6", "pgqueue"),
        ("celery[redis,msgpack]==5.7.0", "pgqueue"),
        ("celery-types", "celery-types"),
        ("flower==2.0", ""),
    ],
)  # fmt: skip
def test_a_line_by_search_and_replace(celery: str, pgqueue: str) -> None:
    script = str(EXAMPLE / "celery-to-pgqueue.sed")
    done = subprocess.run(
        ["sed", "-E", "-f", script],
        input=f"{celery}\n",
        capture_output=True,
        text=True,
        check=True,
        timeout=20,
    )
    assert done.stdout.rstrip("\n") == pgqueue


def test_every_rule_is_tried(tmp_path: Path) -> None:
    """A rule without which the tests and the store come out the same is one that nobody has seen working."""
    script = (EXAMPLE / "celery-to-pgqueue.sed").read_text()
    rules = [line for line in script.splitlines() if line and not line.startswith("#")]
    own = Path(__file__).read_text()
    cases = re.findall(r"^        \(['\"](.+?)['\"],(?: ['\"]|$)", own, re.MULTILINE)
    store = [
        path.read_text() for path in copy_of("before", tmp_path).rglob("*") if path.suffix in (".py", ".txt")
    ]
    lines = "\n".join([*cases, *store])

    def come_out(rules: list[str]) -> str:
        command = ["sed", "-E", "\n".join(rules)]
        return subprocess.run(
            command, input=lines, capture_output=True, text=True, check=True, timeout=20
        ).stdout

    whole = come_out(rules)
    idle = [rule for nth, rule in enumerate(rules) if come_out(rules[:nth] + rules[nth + 1 :]) == whole]
    assert idle == []
    assert len(rules) >= 15


@pytest.mark.parametrize("store", ["before", "after"])
def test_its_compose_file_follows_the_specification(store: str) -> None:
    document = yaml.safe_load((EXAMPLE / store / "docker-compose.yml").read_text())
    jsonschema.validate(document, SCHEMA, cls=jsonschema.Draft202012Validator)
    lines = [service.get("command", "").split() for service in document["services"].values()]
    ours = [line[1:] for line in lines if line[:1] == ["pgqueue"]]
    for line in ours:
        parse(cli, line)
    assert len(ours) == (2 if store == "after" else 0)


class Processes:
    """Programs of a store, which are gone with it."""

    def __init__(self, folder: Path, environment: dict[str, str]) -> None:
        self._folder = folder
        self._environment = environment
        self._started: list[subprocess.Popen[bytes]] = []
        self.logs: list[Path] = []

    def start(self, *command: str) -> None:
        log = self._folder.parent / f"{self._folder.name}-{len(self._started)}.log"
        self.logs.append(log)
        with log.open("wb") as output:
            self._started.append(
                subprocess.Popen(
                    [sys.executable, "-m", *command],
                    cwd=self._folder,
                    env=self._environment,
                    stdin=subprocess.DEVNULL,
                    stdout=output,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,
                )
            )

    def run(self, *command: str) -> str:
        done = subprocess.run(
            [sys.executable, "-m", *command],
            cwd=self._folder,
            env=self._environment,
            check=True,
            capture_output=True,
            text=True,
            timeout=60,
        )
        return done.stdout

    def close(self) -> None:
        """Ask them to stop, the last started first; kill what does not."""
        family: list[psutil.Process] = []
        for process in reversed(self._started):
            with contextlib.suppress(psutil.NoSuchProcess):
                family += psutil.Process(process.pid).children(recursive=True)
            process.send_signal(signal.SIGTERM)
        late = []
        for process in self._started:
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                late.append(process.args)
                process.kill()
                process.wait()
        for log in self.logs:
            print(f"--- {log.name}\n{log.read_text(errors='replace')[-8000:]}")
        for each in living(family):
            with contextlib.suppress(psutil.NoSuchProcess):
                each.kill()
        assert late == [], "did not stop"


@dataclass
class Store:
    """A running one."""

    folder: Path
    url: str
    processes: Processes
    on_pgqueue: bool

    def call(self, method: str, path: str, body: Any = None) -> Any:
        answer = httpx.request(method, f"{self.url}{path}", json=body, timeout=20)
        assert answer.is_success, f"{method} {path}: {answer.status_code} {answer.text}"
        return answer.json()

    def order(self, **order: Any) -> Any:
        return self.call("POST", "/orders", order)

    def ended(self, job: str, what: str = "jobs") -> Any:
        """What the web application says of a job, delivery or report, once it has ended."""

        def look() -> Any:
            found = self.call("GET", f"/{what}/{job}")
            return found if found["ready"] else None

        return eventually(look, f"{what}: {job} ends")

    def requeue_fault(self, canvas: str) -> str:
        """Do what an operator of pgqueue types; the id of the job at fault."""
        shown = self.processes.run("pgqueue.cli.main", "canvas", "show", canvas, "--json")
        fault: str = json.loads(shown)["fault"]
        self.processes.run("pgqueue.cli.main", "dead", "requeue", fault)
        return fault


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port: int = listener.getsockname()[1]
        return port


def on_celery(processes: Processes) -> None:
    app = ("celery", "-A", "store.celery_app")
    processes.start(*app, "worker", "-c", "2", "-Q", "celery,pdf", "-l", "INFO", "--without-mingle")
    processes.start(*app, "beat", "-l", "INFO", "--max-interval", "1", "-s", "schedule.db")


def on_pgqueue(processes: Processes) -> None:
    processes.run("pgqueue.cli.main", "migrate")
    app = ("pgqueue.cli.main", "-A", "store.queue_app:queue_app")
    processes.start(*app, "worker", "-c", "2", "-Q", "default,pdf")


def environment_of(folder: Path, dsn: str) -> dict[str, str]:
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(("PGQUEUE_", "PG"))}
    broker = folder / "broker"
    url = dsn.replace("postgresql://", "postgresql+psycopg://")
    for each in ("invoices", "tills", "broker/messages", "broker/control"):
        (folder / each).mkdir(parents=True)
    return inherited | {
        "PYTHONPATH": str(PACKAGE),
        "DATABASE_URL": url,
        "PGQUEUE_DSN": dsn,
        "BROKER_URL": "filesystem://",
        "BROKER_OPTIONS": json.dumps(
            {
                "data_folder_in": str(broker / "messages"),
                "data_folder_out": str(broker / "messages"),
                "control_folder": str(broker / "control"),
                "polling_interval": 0.1,
            }
        ),
        "RESULT_BACKEND": f"db+{url}",  # file:// empties a result before it writes it
        "INVOICES": str(folder / "invoices"),
        "TILLS": str(folder / "tills"),
        "ADD_UP_EVERY": "1",
    }


@contextlib.contextmanager
def running(folder: Path, dsn: str, workers: Callable[[Processes], None]) -> Iterator[Store]:
    """The store with its web application and its workers."""
    processes = Processes(folder, environment_of(folder.parent, dsn))
    try:
        processes.run("store.database")
        workers(processes)
        port = free_port()
        processes.start("uvicorn", "store.web:web", "--port", str(port), "--log-level", "warning")
        url = f"http://127.0.0.1:{port}"

        def answers() -> bool:
            with contextlib.suppress(httpx.HTTPError):
                return httpx.get(f"{url}/totals").is_success
            return False

        eventually(answers, "the web application answers")
        yield Store(folder, url, processes, on_pgqueue=workers is on_pgqueue)
    finally:
        processes.close()


@pytest.fixture(params=["before", "after", "before, by the recipe"])
def store(request: pytest.FixtureRequest, tmp_path: Path, fresh_dsn: str) -> Iterator[Store]:
    name, _, moved = request.param.partition(", ")
    folder = copy_of(name, tmp_path)
    if moved:
        follow_recipe(folder)
    workers = on_celery if request.param == "before" else on_pgqueue
    with running(folder, fresh_dsn, workers) as store:
        yield store


@pytest.mark.timeout(180)
def test_the_same_orders_go_through_both(store: Store) -> None:
    order = store.order(email="busy.ann@example.org", cents=4200)
    other = store.order(email="bob@example.org", cents=100)
    ends = {name: store.ended(job) for name, job in order["jobs"].items()}
    assert all(end["successful"] for end in ends.values()), ends
    delivery = store.ended(order["delivery"], "deliveries")
    assert (delivery["successful"], delivery["result"]) == (True, True), delivery
    # Retried: by itself after an error that autoretry_for names, and, in a chain, by self.retry().
    assert store.call("GET", f"/orders/{order['id']}") == {
        "emails": [["busy.ann@example.org", 1]],
        "reserved": 1,
        "paid": True,
        "shipped": True,
    }
    assert ends["email"]["result"] == f"order {order['id']} confirmed to busy.ann@example.org"
    # In a queue of its own.
    assert Path(ends["invoice"]["result"]).read_bytes().startswith(b"%PDF")

    assert all(store.ended(job)["successful"] for job in other["jobs"].values())
    assert store.ended(other["delivery"], "deliveries")["successful"]
    assert store.call("GET", f"/orders/{other['id']}")["emails"] == [["bob@example.org", 0]]

    # Failed.
    refund = store.ended(store.call("POST", f"/orders/{order['id']}/refund")["job"])
    assert (refund["failed"], refund["successful"]) == (True, False)
    assert f"order {order['id']} was never paid" in refund["result"]

    # A chord.
    for name, cents in (("north", 100), ("south", 23)):
        (store.folder.parent / "tills" / f"{name}.txt").write_text(str(cents))
    made = store.call("POST", "/reports", ["north", "south"])["report"]
    assert store.ended(made, "reports")["result"] == "tills 123, orders 4300"

    # Again and again.
    eventually(lambda: store.call("GET", "/totals") >= 2, "two totals")


@pytest.mark.timeout(180)
def test_members_that_fail_in_both(store: Store) -> None:
    """A step of a chain, and a member of a chord. pgqueue goes on where it was; Celery begins anew."""
    tills = store.folder.parent / "tills"
    (tills / "north.txt").write_text("100")
    order = store.order(email="bob@example.org", cents=4200, card="expired")
    made = store.call("POST", "/reports", ["north", "south"])["report"]
    delivery, report = store.ended(order["delivery"], "deliveries"), store.ended(made, "reports")
    assert (delivery["failed"], report["failed"]) == (True, True)
    # The id of a chain is its own here, the last task's there.
    assert store.call("GET", f"/jobs/{order['delivery']}")["ready"] is not store.on_pgqueue
    assert f"the card of order {order['id']} has expired" in delivery["result"]
    assert "No such file" in report["result"]

    def seen() -> dict[str, Any]:
        found: dict[str, Any] = store.call("GET", f"/orders/{order['id']}")
        return {name: found[name] for name in ("reserved", "paid", "shipped")}

    assert seen() == {"reserved": 1, "paid": False, "shipped": False}

    store.call("PUT", f"/orders/{order['id']}/card?card=good")
    (tills / "south.txt").write_text("23")
    if store.on_pgqueue:
        store.requeue_fault(order["delivery"])
        assert store.ended(order["delivery"], "deliveries")["result"] is True
        assert seen() == {"reserved": 1, "paid": True, "shipped": True}
        store.requeue_fault(made)
        assert store.ended(made, "reports")["result"] == "tills 123, orders 4200"
    else:
        (store.folder / "anew.py").write_text(
            f"from store.tasks import deliver\nprint(deliver({order['id']}).delay().id)\n"
        )
        anew = store.processes.run("anew").strip()
        assert store.ended(anew, "deliveries")["result"] is True
        assert seen() == {"reserved": 2, "paid": True, "shipped": True}
        again = store.call("POST", "/reports", ["north", "south"])["report"]
        assert store.ended(again, "reports")["result"] == "tills 123, orders 4200"
        # Who has kept the old ids never hears of it.
        assert store.ended(order["delivery"], "deliveries")["failed"]
        assert store.ended(made, "reports")["failed"]


def test_an_order_that_is_rolled_back_has_no_jobs(tmp_path: Path, fresh_dsn: str) -> None:
    """What moving is for."""
    folder = copy_of("after", tmp_path)
    processes = Processes(folder, environment_of(tmp_path, fresh_dsn))
    processes.run("store.database")
    processes.run("pgqueue.cli.main", "migrate")
    lost = (
        "from store.tasks import deliver, send_email\nfrom store.database import Order, Session\n"
        "with Session.begin() as session:\n"
        "    session.add(order := Order(email='a@b.c', cents=1, card='good'))\n    session.flush()\n"
        "    send_email.on(session).delay(order.id, order.email)\n"
        "    deliver(order.id).on(session).delay()\n"
    )
    (folder / "kept.py").write_text(lost)
    (folder / "lost.py").write_text(f"{lost}    raise SystemExit(0)\n")
    with psycopg.connect(fresh_dsn, autocommit=True) as connection:
        count = "select (select count(*) from orders), (select count(*) from pgqueue.jobs)"
        processes.run("lost")
        assert connection.execute(count).fetchone() == (0, 0)
        processes.run("kept")
        assert connection.execute(count).fetchone() == (1, 4)


def test_what_is_left_in_the_old_queue_is_handed_on_once(tmp_path: Path, fresh_dsn: str) -> None:
    old, new = copy_of("before", tmp_path), copy_of("after", tmp_path)
    environment = environment_of(tmp_path, fresh_dsn)
    (old / "enqueue.py").write_text(
        "from store.database import Order, Session\nfrom store.tasks import send_email, write_invoice\n"
        "from store.celery_app import celery_app\n"
        "with Session.begin() as session:\n"
        "    session.add(Order(email='a@b.c', cents=1, card='good'))\n"
        "mail = send_email.delay(1, 'a@b.c')\n"
        "send_email.apply_async((1, 'a@b.c'), task_id=mail.id)  # delivered twice\n"
        "later = write_invoice.apply_async(kwargs={'order_id': 1}, countdown=1)\n"
        "open('ids', 'w').write(f'{mail.id} {later.id}')\n"
    )
    (new / "store" / "forward.py").write_text(block_of_the_page("python", "# store/forward.py"))
    shutil.copy(old / "store" / "settings.py", new / "store")
    before, after = Processes(old, environment), Processes(new, environment)
    before.run("store.database")
    before.run("enqueue")
    ids = (old / "ids").read_text().split()
    try:
        on_pgqueue(after)
        command = block_of_the_page("sh", "store.forward").split()
        after.start(*command, "--without-mingle", "-l", "INFO")
        with psycopg.connect(fresh_dsn, autocommit=True) as connection:

            def states() -> list[Any]:
                return connection.execute(
                    "select id::text, state, queue from pgqueue.all_jobs where task <> 'store.tasks.add_up'"
                    " order by id = %s desc",
                    [ids[0]],
                ).fetchall()

            wanted = [(ids[0], "succeeded", "default"), (ids[1], "succeeded", "pdf")]
            eventually(lambda: states() == wanted, "both jobs have run")
            log = after.logs[-1]
            eventually(
                lambda: log.read_text().count("store.tasks.send_email[") >= 4, "both messages are handed on"
            )
            assert states() == wanted
            assert connection.execute("select count(*) from emails").fetchone() == (1,)
    finally:
        after.close()
