"""Transactional tasks. Each effect is a row of `effects`, made by the user's code."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from typing import Any

import psycopg
from sqlalchemy import Uuid
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncSession, async_sessionmaker
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column, sessionmaker
from tests_app import note

from pgqueue import PgQueue, Reject, TaskContext

INSERT = "INSERT INTO effects (job, attempt, note) VALUES (%s, %s, %s)"


def make_session(bind: Any, **options: Any) -> Any:
    """Of the kind that fits."""
    return (AsyncSession if isinstance(bind, AsyncConnection) else Session)(bind, **options)


FACTORIES = {"by kind": make_session, "plain": sessionmaker(), "async": async_sessionmaker(), "none": None}
app = PgQueue("transact", session_factory=FACTORIES[os.environ.get("FACTORY", "by kind")])


def effect(self: TaskContext, note: str = "") -> tuple[str, int, str]:
    return self.request.id, self.request.attempt, note


@app.task(bind=True, transactional=True)
def write(self: TaskContext, seconds: float = 0.0) -> str:
    self.connection.execute(INSERT, effect(self))
    note("start", self)
    time.sleep(seconds)
    return "written"


@app.task(bind=True, transactional=True)
async def awrite(self: TaskContext, seconds: float = 0.0) -> str:
    await self.connection.execute(INSERT, effect(self))
    note("start", self)
    await asyncio.sleep(seconds)
    return "written"


class Base(DeclarativeBase):
    pass


class Effect(Base):
    __tablename__ = "effects"
    job: Mapped[str] = mapped_column(Uuid(as_uuid=False), primary_key=True)
    note: Mapped[str] = mapped_column(primary_key=True)
    attempt: Mapped[int]


def row(self: TaskContext, note: str) -> Effect:
    return Effect(job=self.request.id, attempt=self.request.attempt, note=note)


@app.task(bind=True, transactional=True)
def write_by_session(self: TaskContext) -> int:
    """Commits twice, and leaves a third write to pgqueue."""
    self.session.add(row(self, "first"))
    self.session.commit()
    self.session.add(row(self, "rolled back"))
    self.session.rollback()
    self.session.add(row(self, "second"))
    self.session.commit()
    self.session.add(row(self, "left"))
    rows = self.connection.execute("SELECT note FROM effects WHERE job = %s", [self.request.id]).fetchall()
    return len(rows)


@app.task(bind=True, transactional=True)
async def awrite_by_session(self: TaskContext) -> None:
    self.session.add(row(self, "first"))
    await self.session.commit()
    self.session.add(row(self, "left"))


@app.task(bind=True, transactional=True)
def fail_by_session(self: TaskContext) -> None:
    self.session.add(row(self, "committed"))
    self.session.commit()
    raise ValueError("after the session's commit")


@app.task(
    bind=True, transactional=True, autoretry_for=(ConnectionError,), max_retries=1, default_retry_delay=0
)
def fail(self: TaskContext, how: str) -> None:
    self.connection.execute(INSERT, effect(self))
    if how == "retry":
        raise ConnectionError("try again")
    if how == "reject":
        raise Reject("not this one")
    if how == "commit":
        self.connection.commit()
    if how == "SQL commit":
        self.connection.execute("COMMIT")
        return
    if how == "swallowed":
        try:
            self.connection.execute("SELECT 1/0")
        except psycopg.Error:
            return
    if how == "deferred":
        self.connection.execute("INSERT INTO once VALUES (1), (1)")
        return
    if how == "close":
        self.connection.close()
        return
    raise ValueError(how)


@app.task(bind=True, transactional=True)
def enqueue(self: TaskContext, by: str, fails: bool = False) -> str:
    """Enqueue another one in this transaction."""
    through = self.connection if by == "connection" else self.session
    other = write.on(through).delay()
    if fails:
        raise ValueError(other.id)
    return other.id


@app.task(bind=True, transactional=True)
async def aenqueue(self: TaskContext, by: str) -> str:
    through = self.connection if by == "connection" else self.session
    return (await write.on(through).adelay()).id


@app.task(bind=True, transactional=True)
def settings(self: TaskContext) -> dict[str, Any]:
    """What the body finds set up."""
    names = ("transaction_isolation", "idle_in_transaction_session_timeout", "application_name")
    self.connection.row_factory = psycopg.rows.dict_row
    found = {name: self.connection.execute(f"SHOW {name}").fetchone()[name] for name in names}
    return {**found, "pid": self.connection.info.backend_pid, "limit": self.task.time_limit}


@app.task(bind=True, transactional=True)
def serializable(self: TaskContext) -> str:
    self.connection.execute("SET TRANSACTION ISOLATION LEVEL SERIALIZABLE")
    self.connection.execute(INSERT, effect(self))
    (level,) = self.connection.execute("SHOW transaction_isolation").fetchone()
    return str(level)


@app.task(bind=True, transactional=True)
def lose_connection(self: TaskContext, times: int) -> str:
    """Have the server end the connection, in the first so many attempts."""
    self.connection.execute(INSERT, effect(self))
    if self.request.attempt <= times:
        self.connection.execute("SELECT pg_terminate_backend(pg_backend_pid())")
    return "survived"


@app.task(bind=True, transactional=True)
def die(self: TaskContext, times: int) -> str:
    """Die in the first so many attempts, holding a lock that the next one wants."""
    self.connection.execute("SELECT pg_advisory_xact_lock(1)")
    self.connection.execute(INSERT, effect(self))
    if self.request.attempt <= times:
        os.kill(os.getpid(), signal.SIGKILL)
    return "survived"


@app.task(bind=True, transactional=True, soft_time_limit=0.5)
def too_slow(self: TaskContext) -> None:
    self.connection.execute(INSERT, effect(self))
    self.connection.execute("SELECT pg_sleep(60)")


@app.task(bind=True, transactional=True)
def wait_in_database(self: TaskContext) -> None:
    self.connection.execute(INSERT, effect(self))
    note("start", self)
    self.connection.execute("SELECT pg_sleep(60)")


@app.task(bind=True)
def not_transactional(self: TaskContext) -> None:
    self.connection.execute("SELECT 1")


@app.task
def call_directly() -> str:
    try:
        write()
    except RuntimeError as error:
        return str(error)
    return "it ran"
