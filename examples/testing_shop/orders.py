"""Orders, and placing one: the order and its jobs are one transaction."""

from __future__ import annotations

from datetime import timedelta

from sqlalchemy import func, select
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column


class Base(DeclarativeBase):
    """The shop's tables."""


class Order(Base):
    """An order."""

    __tablename__ = "orders"

    id: Mapped[int] = mapped_column(primary_key=True)
    email: Mapped[str]
    amount: Mapped[int]
    state: Mapped[str] = mapped_column(default="new")


class Report(Base):
    """What was sold, written every evening."""

    __tablename__ = "reports"

    id: Mapped[int] = mapped_column(primary_key=True)
    orders: Mapped[int]


REMIND_AFTER = timedelta(days=3)


def place_order(session: Session, email: str, amount: int) -> Order:
    """Add an order and what follows from it; the caller commits both, or neither."""
    from testing_shop.tasks import charge, remind, send_mail

    if amount <= 0:
        raise ValueError(f"an amount must be above 0, got {amount}")
    order = Order(email=email, amount=amount)
    session.add(order)
    session.flush()
    charge.on(session).delay(order.id)
    send_mail.on(session).apply_async((order.id,), priority=9, tags=["order"])
    remind.on(session).apply_async((order.id,), countdown=REMIND_AFTER.total_seconds())
    return order


def count_orders(session: Session) -> int:
    """How many there are."""
    return session.scalar(select(func.count()).select_from(Order)) or 0
