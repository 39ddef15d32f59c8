"""The store's web application."""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI, HTTPException
from pydantic import BaseModel
from sqlalchemy import func, select

from .database import Email, Order, Session, Total
from .queue_app import queue_app
from .tasks import refund, send_email, ship, write_invoice

web = FastAPI()


class NewOrder(BaseModel):
    email: str
    cents: int


@web.post("/orders", status_code=201)
def place_order(new: NewOrder) -> dict[str, Any]:
    with Session.begin() as session:
        order = Order(email=new.email, cents=new.cents)
        session.add(order)
        session.flush()
        email = send_email.on(session).delay(order.id, order.email)
        invoice = write_invoice.on(session).delay(order.id)
        shipping = ship.on(session).apply_async((order.id,), countdown=1, expires=3600)
        return {"id": order.id, "jobs": {"email": email.id, "invoice": invoice.id, "shipping": shipping.id}}


@web.get("/orders/{order_id}")
def show_order(order_id: int) -> dict[str, Any]:
    with Session() as session:
        order = session.get(Order, order_id)
        if order is None:
            raise HTTPException(404)
        emails = session.scalars(select(Email).where(Email.order_id == order_id))
        return {"shipped": order.shipped, "emails": [[each.recipient, each.retries] for each in emails]}


@web.post("/orders/{order_id}/refund", status_code=202)
def refund_order(order_id: int) -> dict[str, str]:
    return {"job": refund.delay(order_id).id}


@web.get("/jobs/{job_id}")
def show_job(job_id: str) -> dict[str, Any]:
    job = queue_app.AsyncResult(job_id)
    result = job.result
    return {
        "ready": job.ready(),
        "successful": job.successful(),
        "failed": job.failed(),
        "result": str(result) if isinstance(result, BaseException) else result,
    }


@web.get("/totals")
def count_totals() -> int:
    with Session() as session:
        return session.scalar(select(func.count()).select_from(Total)) or 0
