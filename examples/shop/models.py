"""The shop's tables: orders, their lines, and which jobs were enqueued with them.

They live in schema `$SHOP_SCHEMA` (`shop` unless set) of the queue's own database. Nothing connects at
import.
"""

from __future__ import annotations

import os
from datetime import datetime
from decimal import Decimal
from functools import cache
from uuid import UUID

import psycopg
from sqlalchemy import (
    BigInteger,
    DateTime,
    Engine,
    ForeignKey,
    Identity,
    MetaData,
    Numeric,
    create_engine,
    func,
)
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column, relationship
from sqlalchemy.schema import CreateSchema


class Base(DeclarativeBase):
    metadata = MetaData(schema="shop")


class Order(Base):
    __tablename__ = "orders"

    id: Mapped[int] = mapped_column(BigInteger, Identity(), primary_key=True)
    customer: Mapped[str]
    email: Mapped[str]
    placed_at: Mapped[datetime] = mapped_column(DateTime(timezone=True), server_default=func.now())
    lines: Mapped[list[OrderLine]] = relationship(order_by="OrderLine.line_no")
    jobs: Mapped[list[OrderJob]] = relationship()

    @property
    def total(self) -> Decimal:
        return sum((line.amount for line in self.lines), Decimal(0))


class OrderLine(Base):
    __tablename__ = "order_lines"

    order_id: Mapped[int] = mapped_column(ForeignKey(Order.id), primary_key=True)
    line_no: Mapped[int] = mapped_column(primary_key=True)
    product: Mapped[str]
    quantity: Mapped[int]
    unit_price: Mapped[Decimal] = mapped_column(Numeric(10, 2))

    @property
    def amount(self) -> Decimal:
        return self.quantity * self.unit_price


class OrderJob(Base):
    """A job that was enqueued with an order; committed with both, or not at all."""

    __tablename__ = "order_jobs"

    job_id: Mapped[UUID] = mapped_column(primary_key=True)
    order_id: Mapped[int] = mapped_column(ForeignKey(Order.id), index=True)
    task: Mapped[str]


@cache
def engine() -> Engine:
    """This process's connections, opened when first used: a worker forks after its imports, and a
    connection must not cross a fork.
    """
    return make_engine(os.environ["PGQUEUE_DSN"], schema=os.environ.get("SHOP_SCHEMA", "shop"))


def make_engine(dsn: str, *, schema: str) -> Engine:
    """An engine on any libpq DSN, whose tables are those of `schema`."""
    return create_engine(
        "postgresql+psycopg://",
        creator=lambda: psycopg.connect(dsn, connect_timeout=10),
        isolation_level="READ COMMITTED",
        execution_options={"schema_translate_map": {"shop": schema}},
    )


def create_tables(dsn: str, *, schema: str) -> None:
    """Make the schema and its tables, in one transaction."""
    made_for_this = make_engine(dsn, schema=schema)
    try:
        with made_for_this.begin() as connection:
            connection.execute(CreateSchema(schema, if_not_exists=True))
            Base.metadata.create_all(connection)
    finally:
        made_for_this.dispose()
