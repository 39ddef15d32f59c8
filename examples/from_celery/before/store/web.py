"""The store's web application."""

from __future__ import annotations

from typing import Any

from celery import chord
from celery.result import AsyncResult
from fastapi import FastAPI, HTTPException
from pydantic import BaseModel
from sqlalchemy import func, select

from .celery_app import celery_app
from .database import Email, Order, Reservation, Session, Total
from .tasks import deliver, read_till, refund, report, send_email, write_invoice

web = FastAPI()


class NewOrder(BaseModel):
    email: str
    cents: int
    card: str = "good"


@web.post("/orders", status_code=201)
def place_order(new: NewOrder) -> dict[str, Any]:
    with Session() as session:
        order = Order(email=new.email, cents=new.cents, card=new.card)
        session.add(order)
        session.commit()
        email = send_email.delay(order.id, order.email)
        invoice = write_invoice.delay(order.id)
        delivery = deliver(order.id).delay()
        jobs = {"email": email.id, "invoice": invoice.id}
        return {"id": order.id, "jobs": jobs, "delivery": delivery.id}


@web.get("/orders/{order_id}")
def show_order(order_id: int) -> dict[str, Any]:
    with Session() as session:
        order = session.get(Order, order_id)
        if order is None:
            raise HTTPException(404)
        emails = session.scalars(select(Email).where(Email.order_id == order_id))
        reserved = select(func.count()).where(Reservation.order_id == order_id)
        return {
            "emails": [[each.recipient, each.retries] for each in emails],
            "reserved": session.scalar(reserved),
            "paid": order.paid,
            "shipped": order.shipped,
        }


@web.put("/orders/{order_id}/card")
def change_card(order_id: int, card: str) -> None:
    with Session() as session:
        session.get_one(Order, order_id).card = card
        session.commit()


@web.post("/orders/{order_id}/refund", status_code=202)
def refund_order(order_id: int) -> dict[str, str]:
    return {"job": refund.delay(order_id).id}


@web.get("/jobs/{job_id}")
def show_job(job_id: str) -> dict[str, Any]:
    return end_of(celery_app.AsyncResult(job_id))


@web.get("/deliveries/{delivery_id}")
def show_delivery(delivery_id: str) -> dict[str, Any]:
    return end_of(celery_app.AsyncResult(delivery_id))


@web.post("/reports", status_code=202)
def make_report(tills: list[str]) -> dict[str, str]:
    return {"report": chord([read_till.s(name) for name in tills], report.s()).delay().id}


@web.get("/reports/{report_id}")
def show_report(report_id: str) -> dict[str, Any]:
    return end_of(celery_app.AsyncResult(report_id))


def end_of(job: AsyncResult[Any]) -> dict[str, Any]:
    ready = job.ready()  # first: a job may end between two looks
    result = job.result
    return {
        "ready": ready,
        "successful": job.successful(),
        "failed": job.failed(),
        "result": str(result) if isinstance(result, BaseException) else result,
    }


@web.get("/totals")
def count_totals() -> int:
    with Session() as session:
        return session.scalar(select(func.count()).select_from(Total)) or 0
