"""The shop's web application: `uvicorn shop.web:web`.

An order, its lines and its three jobs are one transaction. If anything in it fails, the card for instance,
none of them has ever existed; there is nothing to clean up and no window in which a worker could see half
an order.
"""

from __future__ import annotations

from decimal import Decimal
from uuid import UUID

from fastapi import FastAPI
from fastapi.responses import JSONResponse
from pydantic import BaseModel, Field
from sqlalchemy.orm import Session

from shop.bank import PaymentDeclined, charge
from shop.models import Order, OrderJob, OrderLine, engine
from shop.tasks import generate_invoice, notify_shipping, send_email

web = FastAPI(title="shop")


class NewLine(BaseModel):
    product: str
    quantity: int = Field(gt=0)
    unit_price: Decimal = Field(gt=0, max_digits=10, decimal_places=2)


class NewOrder(BaseModel):
    customer: str
    email: str
    card: str
    lines: list[NewLine] = Field(min_length=1)


class Receipt(BaseModel):
    """What became of an order, and the jobs that were enqueued with it: also those that were rolled back,
    so that anyone can see that they are gone.
    """

    order_id: int
    status: str
    jobs: dict[str, str]


@web.post("/orders", status_code=201, response_model=Receipt, responses={402: {"model": Receipt}})
def place_order(new: NewOrder) -> Receipt | JSONResponse:
    """Take an order: 201 if it is committed, 402 if the payment was declined and nothing is left of it."""
    jobs: dict[str, str] = {}
    try:
        with Session(engine()) as session, session.begin():
            order = Order(
                customer=new.customer,
                email=new.email,
                lines=[
                    OrderLine(line_no=number, **line.model_dump()) for number, line in enumerate(new.lines, 1)
                ],
            )
            session.add(order)
            session.flush()  # now the order has its number
            order_id = order.id
            jobs = {
                "send_email": send_email.on(session).delay(order_id, new.email).id,
                "generate_invoice": generate_invoice.on(session).delay(order_id).id,
                "notify_shipping": notify_shipping.on(session).delay(order_id).id,
            }
            order.jobs = [OrderJob(job_id=UUID(job_id), task=task) for task, job_id in jobs.items()]
            charge(new.card, order.total)  # last, as the step most likely to fail
    except PaymentDeclined:
        declined = Receipt(order_id=order_id, status="declined", jobs=jobs)
        return JSONResponse(declined.model_dump(), status_code=402)
    return Receipt(order_id=order_id, status="placed", jobs=jobs)
