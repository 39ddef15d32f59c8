"""What happens after an order: an e-mail, an invoice, a call to the shipping service.

A job runs *at least* once: a worker that is killed after its effect and before its report runs the job
again. So each task can run twice for one order and the world looks as if it had run once:

- the e-mail's Message-ID is the order's, by which a mailbox knows that it has the message already;
- the invoice's file name is the order's, and the file is replaced in one step, by the same bytes;
- the shipment is PUT under the order's number.

Web processes import this module to enqueue and workers import it before they fork, so it is light, opens
nothing, and reads its settings when a task runs: `$SHOP_SMTP` (host:port), `$SHOP_INVOICES` (a folder),
`$SHOP_SHIPPING_URL`.
"""

from __future__ import annotations

import json
import os
import smtplib
from email.message import EmailMessage
from pathlib import Path
from urllib.error import HTTPError, URLError
from urllib.request import Request, urlopen

from sqlalchemy.orm import Session, selectinload

from pgqueue import TaskContext
from shop.app import app
from shop.models import Order, engine

SHOP_ADDRESS = "orders@shop.example"
TIMEOUT = 10  # seconds, of every call to another machine


class UndeliverableAddress(Exception):
    """The mail server refuses this recipient for good."""


class ShipmentRefused(Exception):
    """The shipping service does not take this order, and will not take it later."""


# The delays suit a demo: a real shop waits a minute, not a fifth of a second.
@app.task(
    bind=True,
    autoretry_for=(smtplib.SMTPException, OSError),
    retry_backoff=0.2,
    retry_backoff_max=2,
    max_retries=10,
)
def send_email(self: TaskContext, order_id: int, email: str) -> str:
    """Confirm the order by e-mail; returns the Message-ID.

    A 4xx reply and a broken connection leave as they are, are named in `autoretry_for`, and are retried
    with backoff. A 5xx reply is turned into an exception that is not: a dead letter at once, kept under
    `failed_emails`.
    """
    message = confirmation(load_order(order_id), email)
    host, port = os.environ["SHOP_SMTP"].rsplit(":", 1)
    # local_hostname: without it smtplib looks up our name in the DNS for every message.
    with smtplib.SMTP(host, int(port), local_hostname="shop.example", timeout=TIMEOUT) as server:
        try:
            server.send_message(message)
        except smtplib.SMTPRecipientsRefused as refused:
            code, reply = refused.recipients[email]
            if code >= 500:
                raise UndeliverableAddress(f"{email}: {code} {reply.decode(errors='replace')}") from refused
            raise
    return str(message["Message-ID"])


@app.task(bind=True)
def generate_invoice(self: TaskContext, order_id: int) -> str:
    """Write the order's invoice as a PDF; returns its path."""
    folder = Path(os.environ["SHOP_INVOICES"])
    path = folder / f"invoice-{order_id:06}.pdf"
    # Its own name per attempt: two runs of one job may overlap when a worker was believed dead.
    unfinished = folder / f".{path.name}.{self.request.id}.{self.request.attempt}"
    try:
        with unfinished.open("wb") as file:
            file.write(invoice(load_order(order_id)))
            file.flush()
            os.fsync(file.fileno())
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)
    return str(path)


@app.task(
    bind=True, autoretry_for=(URLError, TimeoutError), retry_backoff=0.2, retry_backoff_max=2, max_retries=20
)
def notify_shipping(self: TaskContext, order_id: int) -> str:
    """Order the parcel; returns its tracking code.

    A service that cannot be reached is retried by `autoretry_for`. One that says when to come back is taken
    at its word, with `self.retry`. Any other refusal is final.
    """
    order = load_order(order_id)
    parcel = {"customer": order.customer, "items": [[line.quantity, line.product] for line in order.lines]}
    request = Request(  # noqa: S310  (the URL is the operator's setting)
        f"{os.environ['SHOP_SHIPPING_URL']}/shipments/{order_id}",
        method="PUT",
        data=json.dumps(parcel).encode(),
        headers={"Content-Type": "application/json", "Idempotency-Key": self.request.id},
    )
    try:
        with urlopen(request, timeout=TIMEOUT) as response:  # noqa: S310
            return str(json.load(response)["tracking"])
    except HTTPError as error:
        with error:
            if error.code in (429, 503):
                raise self.retry(exc=error, countdown=float(error.headers.get("Retry-After", 1))) from error
            raise ShipmentRefused(f"order {order_id}: {error.code} {error.reason}") from error


def load_order(order_id: int) -> Order:
    """The order and its lines, read by number: a job carries the number, not a copy that can grow old."""
    with Session(engine()) as session:
        return session.get_one(Order, order_id, options=[selectinload(Order.lines)])


def confirmation(order: Order, email: str) -> EmailMessage:
    """The same message, Message-ID included, however often it is made."""
    lines = [f"{line.quantity} x {line.product}: {line.amount} EUR" for line in order.lines]
    message = EmailMessage()
    message["Message-ID"] = f"<order-{order.id}@shop.example>"
    message["From"] = SHOP_ADDRESS
    message["To"] = email
    message["Date"] = order.placed_at
    message["Subject"] = f"Your order {order.id}"
    message.set_content("\n".join([f"Thank you, {order.customer}.", "", *lines, f"Total: {order.total} EUR"]))
    return message


def invoice(order: Order) -> bytes:
    """The same PDF, to the byte, however often it is made."""
    from fpdf import FPDF  # slow to import, and only this task needs it

    pdf = FPDF()
    pdf.set_creation_date(order.placed_at)
    pdf.set_title(f"Invoice {order.id}")
    pdf.add_page()
    pdf.set_font("Helvetica", size=18)
    pdf.cell(text=f"Invoice for order {order.id}", new_x="LMARGIN", new_y="NEXT")
    pdf.set_font("Helvetica", size=11)
    pdf.cell(text=f"{order.customer} <{order.email}>", new_x="LMARGIN", new_y="NEXT")
    pdf.ln(6)
    with pdf.table(col_widths=(12, 60, 14, 14), text_align=("RIGHT", "LEFT", "RIGHT", "RIGHT")) as table:
        table.row(("Quantity", "Product", "Price", "Amount"))
        for line in order.lines:
            table.row((str(line.quantity), line.product, str(line.unit_price), str(line.amount)))
    pdf.ln(6)
    pdf.cell(text=f"Total: {order.total} EUR", new_x="LMARGIN", new_y="NEXT")
    return bytes(pdf.output())
