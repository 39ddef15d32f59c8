"""The queue of a small shop. It is in the database that has the orders: $PGQUEUE_DSN."""

from __future__ import annotations

from sqlalchemy.orm import sessionmaker

from pgqueue import PgQueue

app = PgQueue("testing_shop", imports=("testing_shop.tasks",), session_factory=sessionmaker())
