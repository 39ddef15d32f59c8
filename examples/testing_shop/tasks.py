"""What the shop does in the background."""

from __future__ import annotations

from sqlalchemy import func, select

from pgqueue import TaskContext
from testing_shop import mail
from testing_shop.app import app
from testing_shop.orders import Order, Report


@app.task(bind=True, transactional=True)
def charge(self: TaskContext, order_id: int) -> None:
    """Mark the order as paid, in one transaction with the job's end; then its invoice is due."""
    order = self.session.get(Order, order_id)
    order.state = "paid"
    invoice.on(self.session).delay(order_id)


@app.task
async def invoice(order_id: int) -> str:
    """Make an invoice."""
    return f"invoice-{order_id}.pdf"


@app.task(
    autoretry_for=(mail.MailError,),
    retry_kwargs={"max_retries": 2, "countdown": 600},
    dead_letter_queue="failed_mails",
)
def send_mail(order_id: int) -> None:
    """Confirm the order; try again in ten minutes, twice."""
    mail.send(f"customer of order {order_id}", "your order")


@app.task(bind=True, transactional=True, expires=7 * 86_400)
def remind(self: TaskContext, order_id: int) -> bool:
    """Remind the customer of an order that is not paid."""
    order = self.session.get(Order, order_id)
    if order.state == "paid":
        return False
    mail.send(order.email, "please pay")
    return True


@app.task(bind=True, transactional=True)
def close_day(self: TaskContext) -> int:
    """Count the orders."""
    count = self.session.scalar(select(func.count()).select_from(Order))
    self.session.add(Report(orders=count))
    return int(count)


app.periodic(cron="0 18 * * *", timezone="Europe/Berlin")(close_day)
