"""What type checkers make of every public call; checked by test_typing.py, never run.

Each task below shows one shape of function; each `assert_type` is what an editor shows and what a caller may
rely on. The mistakes that checkers find are in mistakes.py.
"""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine, Iterator
from datetime import UTC, date, datetime, timedelta
from typing import Any, assert_type
from uuid import uuid4

import asyncpg
import django.db
import psycopg
import sqlalchemy
import sqlalchemy.ext.asyncio as sqlalchemy_asyncio
from sqlalchemy.orm import Session, sessionmaker

from pgqueue import (
    AsyncResult,
    Canvas,
    CanvasResult,
    JobOptions,
    PgQueue,
    Progress,
    Request,
    Signature,
    TaskContext,
    chain,
    chord,
    group,
)
from pgqueue.database.schedules import ScheduleStatus
from pgqueue.hooks import TaskFailed

app = PgQueue(
    "typing",
    dsn="postgresql://localhost/typing",
    imports=("typing.tasks",),
    task_defaults={"max_retries": 5, "retry_backoff": True},
    task_routes={"reports.*": {"queue": "reports", "priority": 3}},
    session_factory=sessionmaker(),
)


# The four shapes of a task: with a context or without, plain or `async def`.


@app.task
def plain(number: int, *, text: str = "") -> str:
    return text * number


@app.task(bind=True, autoretry_for=(ConnectionError,), retry_backoff=True, dead_letter_queue="lost")
def bound(self: TaskContext, number: int, text: str = "") -> str:
    assert_type(self.request, Request)
    assert_type(self.request.id, str)
    assert_type(self.request.attempt, int)
    assert_type(self.request.eta, datetime | None)
    assert_type(self.request.worker, str | None)
    assert_type(self.name, str)
    if not number:
        self.retry(countdown=5, exc=ValueError("not yet"))
    return text


@app.task(bind=True, transactional=True)
def transactional(self: TaskContext, number: int) -> None:
    session: Session = self.session
    connection: psycopg.Connection[tuple[int]] = self.connection
    connection.execute("SELECT 1")
    session.commit()
    plain.on(connection).delay(number)
    plain.on(session).delay(number)


@app.hook("task_failed")
def failed(event: TaskFailed) -> None:
    assert_type(event.request, Request)
    assert_type(event.error, BaseException)


@app.middleware
def around(context: TaskContext) -> Iterator[None]:
    assert_type(context.request.id, str)
    yield


def eagerly() -> None:
    with app.eager(propagate=True):
        assert_type(plain.delay(1).get(), str)


@app.task(pool="asyncio")
async def coroutine(number: int) -> list[int]:
    await asyncio.sleep(0)
    return [number]


@app.task(bind=True, queue="reports")
async def bound_coroutine(self: TaskContext, day: date) -> None: ...


@app.task(bind=False, name="reports.with_options", priority=9, expires=60, max_retries=None)
def with_options(day: date) -> dict[str, int]:
    return {}


@app.task()
def without_parameters() -> None: ...


def called_directly() -> None:
    assert_type(plain(1, text="a"), str)
    assert_type(bound(1, "a"), str)  # the context is not an argument of the call
    assert_type(with_options(date.today()), dict[str, int])
    to_be_awaited = coroutine(1), bound_coroutine(date.today())
    assert_type(to_be_awaited, tuple[Coroutine[Any, Any, list[int]], Coroutine[Any, Any, None]])


def enqueued() -> None:
    assert_type(plain.delay(1), AsyncResult[str])
    assert_type(bound.delay(1, text="a"), AsyncResult[str])
    assert_type(coroutine.delay(1), AsyncResult[list[int]])
    assert_type(bound_coroutine.delay(date.today()), AsyncResult[None])
    assert_type(with_options.delay(date.today()), AsyncResult[dict[str, int]])
    assert_type(without_parameters.delay(), AsyncResult[None])


def enqueued_with_options() -> None:
    assert_type(plain.apply_async((1,), {"text": "a"}), AsyncResult[str])
    assert_type(plain.apply_async([1], countdown=60, priority=9, queue="high"), AsyncResult[str])
    assert_type(bound.apply_async((1,), eta=datetime.now(UTC), expires=3600), AsyncResult[str])
    assert_type(bound.apply_async((1,), expires=datetime.now(UTC) + timedelta(hours=1)), AsyncResult[str])
    assert_type(coroutine.apply_async((1,), max_retries=-1, job_id=uuid4()), AsyncResult[list[int]])
    assert_type(plain.apply_async((1,), unique_key="order-1", on_conflict="raise"), AsyncResult[str])
    assert_type(plain.apply_async((1,), headers={"trace": ["a", 1]}, time_limit=5), AsyncResult[str])
    options: JobOptions = {"priority": 1, "queue": "low"}
    assert_type(plain.apply_async((1,), **options), AsyncResult[str])


async def enqueued_from_a_coroutine() -> None:
    assert_type(await plain.adelay(1, text="a"), AsyncResult[str])
    assert_type(await bound.adelay(1, "a"), AsyncResult[str])
    assert_type(await coroutine.adelay(1), AsyncResult[list[int]])
    assert_type(await coroutine.aapply_async((1,), countdown=5), AsyncResult[list[int]])


def in_the_callers_transaction(
    session: Session,
    alchemy: sqlalchemy.Connection,
    connection: psycopg.Connection[Any],
) -> None:
    assert_type(plain.on(django.db.connection).delay(1), AsyncResult[str])
    assert_type(plain.on(session).delay(1, text="a"), AsyncResult[str])
    assert_type(bound.on(alchemy).delay(1), AsyncResult[str])
    assert_type(coroutine.on(connection).delay(1), AsyncResult[list[int]])
    assert_type(plain.on(connection).apply_async((1,), priority=9), AsyncResult[str])
    assert_type(plain.apply_async((1,), connection=session), AsyncResult[str])
    assert_type(app.enqueue_many([plain.s(1), bound.s(2)], connection=alchemy), list[str])
    assert_type(app.send_task("reports.by_name", (1,), connection=connection), AsyncResult[Any])


async def in_the_callers_transaction_from_a_coroutine(
    session: sqlalchemy_asyncio.AsyncSession,
    alchemy: sqlalchemy_asyncio.AsyncConnection,
    connection: psycopg.AsyncConnection[Any],
    pg: asyncpg.Connection[asyncpg.Record],
) -> None:
    assert_type(await plain.on(session).adelay(1, text="a"), AsyncResult[str])
    assert_type(await bound.on(alchemy).adelay(1), AsyncResult[str])
    assert_type(await coroutine.on(connection).adelay(1), AsyncResult[list[int]])
    assert_type(await plain.on(pg).adelay(1), AsyncResult[str])
    assert_type(await plain.on(pg).aapply_async((1,), priority=9), AsyncResult[str])
    assert_type(await plain.aapply_async((1,), connection=pg), AsyncResult[str])
    assert_type(await app.aenqueue_many([plain.s(1)], connection=session), list[str])
    assert_type(await app.asend_task("reports.by_name", (1,), connection=alchemy), AsyncResult[Any])


def as_values() -> None:
    assert_type(plain.s(1), Signature[str])  # may be partial: checked when it is enqueued
    assert_type(plain.s().set(priority=9, countdown=5), Signature[str])
    assert_type(app.enqueue_many(plain.s(n) for n in range(10)), list[str])
    assert_type(plain.si(1, text="a"), Signature[str])
    assert_type(plain.s(1).delay(), AsyncResult[str])
    assert_type(plain.s()(1), str)
    assert_type(app.signature("reports.by_name", (1,), queue="reports"), Signature[Any])


def as_canvases(session: Session) -> None:
    assert_type(plain.s(1) | bound.s(), Canvas[Any])
    assert_type(chain(plain.s(1), bound.s()).delay(), CanvasResult[Any])
    assert_type(group(plain.s(n) for n in range(3)).apply_async().get(timeout=1), list[Any])
    assert_type(
        chord([plain.s(1), plain.s(2)], bound.si(1), on_member_failure="skip").delay(), CanvasResult[Any]
    )
    assert_type(group(plain.s(1)).on(session).delay(), CanvasResult[list[Any]])
    assert_type(chain(plain.s(1)).apply_async(connection=session, queue="a").children, list[AsyncResult[Any]])
    assert_type(plain.apply_async((1,), link=bound.s(), link_error=[plain.si(1)]), AsyncResult[str])
    assert_type(app.CanvasResult("a").progress, Progress | None)


async def as_async_canvases(connection: psycopg.AsyncConnection[Any]) -> None:
    assert_type(await chain(plain.s(1), bound.s()).adelay(), CanvasResult[Any])
    assert_type(await group(plain.s(1)).on(connection).adelay(), CanvasResult[list[Any]])
    assert_type(await (await group(plain.s(1)).aapply_async()).aget(), list[Any])


@app.task
@app.periodic(cron="0 9 * * *", timezone="Asia/Seoul", args=(1,), kwargs={"text": "a"}, queue="reports")
@app.periodic(every=timedelta(minutes=5), name="often", args=(1,), overlap="skip", catch_up="none", jitter=3)
def recurring(number: int, *, text: str = "") -> str:
    return text * number


def recurs() -> None:
    assert_type(recurring.delay(1, text="a"), AsyncResult[str])
    assert_type(app.schedules.add("s", recurring, every=60, args=(1,), replace=True), ScheduleStatus)
    assert_type(app.schedules.list(), list[ScheduleStatus])
    assert_type(app.schedules.next("s", 3), list[datetime])
    assert_type(app.schedules.run_now("s"), str)


def by_name() -> None:
    assert_type(app.send_task("reports.by_name", (1,), {"a": 2}, queue="high"), AsyncResult[Any])
    assert_type(app.AsyncResult(uuid4()), AsyncResult[Any])


def read_as_something_wider(job: AsyncResult[object]) -> None:
    assert_type(job.get(), object)


def results(job: AsyncResult[list[int]]) -> None:
    assert_type(job.id, str)
    assert_type(job.get(), list[int])
    assert_type(job.get(timeout=1.5), list[int])
    assert_type(job.ready(), bool)
    assert_type(job.successful(), bool)
    assert_type(job.failed(), bool)
    assert_type(job.traceback, str | None)
    read_as_something_wider(job)


async def results_in_a_coroutine(job: AsyncResult[list[int]]) -> None:
    assert_type(await job.aget(timeout=1), list[int])


def life() -> None:
    app.configure(dsn="postgresql://localhost/other", heartbeat=2.0)
    app.import_tasks()
    assert_type(sorted(app.tasks), list[str])
    app.close()
