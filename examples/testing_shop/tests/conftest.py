"""The shop's tables go into the tests' database, beside the queue: so orders and jobs are one transaction."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from sqlalchemy import Engine, create_engine
from sqlalchemy.orm import Session

from pgqueue.testing import QueueDatabase
from testing_shop import mail
from testing_shop.orders import Base


@pytest.fixture(scope="session")
def engine(pgqueue_database: QueueDatabase) -> Iterator[Engine]:
    """The shop's database, with its tables."""
    engine = create_engine(pgqueue_database.sqlalchemy_url)
    Base.metadata.create_all(engine)
    yield engine
    engine.dispose()


@pytest.fixture
def session(engine: Engine) -> Iterator[Session]:
    """A session on empty tables."""
    with Session(engine) as session:
        for table in reversed(Base.metadata.sorted_tables):
            session.execute(table.delete())
        session.commit()
        yield session


@pytest.fixture
def mails(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The mails that were sent."""
    sent: list[str] = []
    monkeypatch.setattr(mail, "send", lambda to, subject: sent.append(f"{to}: {subject}"))
    return sent
