"""What the store does in the background."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from celery import Task, chain
from celery.exceptions import SoftTimeLimitExceeded
from fpdf import FPDF
from sqlalchemy import func, select

from .celery_app import celery_app
from .database import Email, Order, Reservation, Session, Total


class WarehouseBusy(Exception):
    """It asks to be called again."""


class CardDeclined(Exception):
    """The customer has to say another one."""


@celery_app.task(bind=True, autoretry_for=(ConnectionError,), retry_backoff=True, max_retries=5)
def send_email(self: Task[Any, Any], order_id: int, recipient: str) -> str:
    if recipient.startswith("busy.") and self.request.retries == 0:
        raise ConnectionError("the mail server is busy")
    with Session() as session:
        session.add(Email(order_id=order_id, recipient=recipient, retries=self.request.retries))
        session.commit()
    return f"order {order_id} confirmed to {recipient}"


@celery_app.task
def write_invoice(order_id: int) -> str:
    with Session() as session:
        order = session.get_one(Order, order_id)
        text = f"Order {order.id}: {order.cents / 100:.2f} EUR"
    try:
        return str(print_pdf(order_id, text))
    except SoftTimeLimitExceeded:
        return "too slow"


@celery_app.task
def reserve(order_id: int) -> int:
    with Session() as session:
        session.add(Reservation(order_id=order_id))
        session.commit()
    return order_id


@celery_app.task
def charge(order_id: int) -> int:
    with Session() as session:
        order = session.get_one(Order, order_id)
        if order.card == "expired":
            raise CardDeclined(f"the card of order {order_id} has expired")
        order.paid = True
        session.commit()
    return order_id


@celery_app.task(bind=True, max_retries=20, default_retry_delay=1)
def ship(self: Task[Any, Any], order_id: int) -> bool:
    try:
        call_warehouse(order_id, calls=self.request.retries)
    except WarehouseBusy as busy:
        raise self.retry(exc=busy, countdown=1) from busy
    with Session() as session:
        session.get_one(Order, order_id).shipped = True
        session.commit()
    return True


def deliver(order_id: int) -> chain:
    return chain(reserve.s(order_id), charge.s(), ship.s().set(countdown=1, expires=3600))


@celery_app.task
def refund(order_id: int) -> None:
    raise LookupError(f"order {order_id} was never paid")


@celery_app.task(ignore_result=True)
def add_up() -> None:
    with Session() as session:
        count, cents = session.execute(select(func.count(), func.coalesce(func.sum(Order.cents), 0))).one()
        session.add(Total(orders=count, cents=cents))
        session.commit()


@celery_app.task
def read_till(name: str) -> int:
    return int((Path(os.environ.get("TILLS", ".")) / f"{name}.txt").read_text())


@celery_app.task
def report(tills: list[int]) -> str:
    with Session() as session:
        paid = session.scalar(select(func.sum(Order.cents)).where(Order.paid)) or 0
    return f"tills {sum(tills)}, orders {paid}"


def print_pdf(order_id: int, text: str) -> Path:
    document = FPDF()
    document.add_page()
    document.set_font("helvetica", size=16)
    document.cell(text=text)
    path = Path(os.environ.get("INVOICES", ".")) / f"invoice-{order_id}.pdf"
    document.output(str(path))
    return path


def call_warehouse(order_id: int, calls: int) -> None:
    if calls == 0:
        raise WarehouseBusy(f"order {order_id}: call again")
