"""Placing orders, and what follows."""

from __future__ import annotations

from datetime import datetime, timedelta
from zoneinfo import ZoneInfo

import pytest
from sqlalchemy import select
from sqlalchemy.orm import Session

from pgqueue import DeadFilter
from pgqueue.testing import QueueTester
from testing_shop.orders import REMIND_AFTER, Order, Report, count_orders, place_order
from testing_shop.tasks import charge, close_day, invoice, remind, send_mail


def test_an_order_and_its_jobs_are_one_transaction(session: Session, pgqueue_app: QueueTester) -> None:
    with session.begin():
        order = place_order(session, "ann@example.org", 20)
        pgqueue_app.assert_not_enqueued(send_mail)  # nobody else sees it before the commit
        pgqueue_app.assert_enqueued(send_mail, args=(order.id,), connection=session)

    pgqueue_app.assert_enqueued(charge, args=(order.id,), count=1)
    pgqueue_app.assert_enqueued(send_mail, kwargs={"order_id": order.id}, priority=9, tags=["order"])
    pgqueue_app.assert_enqueued(remind, eta=REMIND_AFTER)


def test_no_order_no_jobs(session: Session, pgqueue_app: QueueTester) -> None:
    with pytest.raises(ValueError, match="above 0"), session.begin():
        place_order(session, "ann@example.org", 20)
        place_order(session, "bob@example.org", 0)
    assert count_orders(session) == 0
    assert pgqueue_app.enqueued() == []


def test_an_order_is_charged_and_confirmed(
    session: Session, pgqueue_app: QueueTester, mails: list[str]
) -> None:
    with session.begin():
        order = place_order(session, "ann@example.org", 20)
    drained = pgqueue_app.drain()
    assert drained.counts == {"succeeded": 3}
    assert drained.left == {"scheduled": 1}  # the reminder
    assert mails == [f"customer of order {order.id}: your order"]
    assert session.scalar(select(Order.state)) == "paid"
    (run,) = drained.of(invoice)  # an `async def` task, which the charge has enqueued
    assert run.result == f"invoice-{order.id}.pdf"


def test_a_reminder_is_due_after_three_days(
    session: Session, pgqueue_app: QueueTester, mails: list[str]
) -> None:
    with session.begin():
        session.add(order := Order(email="ann@example.org", amount=20))
        session.flush()
        remind.on(session).apply_async((order.id,), countdown=REMIND_AFTER.total_seconds())
    assert pgqueue_app.drain().runs == []
    pgqueue_app.travel(days=3)
    assert pgqueue_app.drain().of(remind)[0].result is True
    assert mails == ["ann@example.org: please pay"]


def test_a_reminder_that_comes_too_late_is_not_sent(
    session: Session, pgqueue_app: QueueTester, mails: list[str]
) -> None:
    remind.apply_async((1,), countdown=REMIND_AFTER.total_seconds())
    pgqueue_app.travel(days=8, ticks=False)
    assert pgqueue_app.drain().counts == {"expired": 1}
    assert mails == []


def test_a_mail_is_tried_again(
    session: Session, pgqueue_app: QueueTester, monkeypatch: pytest.MonkeyPatch
) -> None:
    send_mail.delay(1)
    assert pgqueue_app.drain().counts == {"retried": 1}
    pgqueue_app.travel(minutes=9)
    assert pgqueue_app.drain().runs == []
    pgqueue_app.travel(minutes=1)
    monkeypatch.setattr("testing_shop.mail.send", lambda to, subject: None)
    assert pgqueue_app.drain().counts == {"succeeded": 1}


def test_a_mail_that_cannot_be_sent_becomes_a_dead_letter(session: Session, pgqueue_app: QueueTester) -> None:
    job = send_mail.delay(1)
    drained = pgqueue_app.drain(until=timedelta(hours=1))
    assert [run.end for run in drained.runs] == ["retried", "retried", "dead"]
    assert job.failed()
    (letter,) = pgqueue_app.app.dead_letters.list(DeadFilter(queue="failed_mails"))
    assert letter.reason == "retries_exhausted"


def test_the_day_is_closed_at_six(session: Session, pgqueue_app: QueueTester) -> None:
    tomorrow = datetime.now(ZoneInfo("Europe/Berlin")) + timedelta(days=1)
    pgqueue_app.travel_to(tomorrow.replace(hour=17, minute=59), ticks=False)
    assert pgqueue_app.drain(until=timedelta(minutes=2)).of(close_day)[0].result == 0
    with session.begin():
        session.add(Order(email="ann@example.org", amount=20))
    pgqueue_app.drain(until=timedelta(days=2))
    assert list(session.scalars(select(Report.orders).order_by(Report.id))) == [0, 1, 1]
