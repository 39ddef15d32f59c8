"""Mistakes that type checkers find, each line with mypy's code and pyright's rule; see test_typing.py."""
# ruff: noqa

from __future__ import annotations

from typing import Any

import psycopg

from pgqueue import AsyncResult, PgQueue, TaskContext, chain, group

app = PgQueue("typing")


@app.task
def plain(number: int, *, text: str = "") -> str:
    return text * number


@app.task(bind=True)
def bound(self: TaskContext, number: int) -> str:
    self.request.nothing  # error: attr-defined reportAttributeAccessIssue
    return str(number)


@app.task
async def coroutine(number: int) -> list[int]:
    return [number]


def arguments() -> None:
    plain("1")  # error: arg-type reportArgumentType
    plain.delay("1")  # error: arg-type reportArgumentType
    plain.delay()  # error: call-arg reportCallIssue
    plain.delay(1, 2)  # error: call-arg reportCallIssue
    plain.delay(1, txt="a")  # error: call-arg reportCallIssue
    bound.delay("1")  # error: arg-type reportArgumentType
    bound.delay(None, 1)  # error: call-arg reportCallIssue
    coroutine.delay(number="1")  # error: arg-type reportArgumentType


async def arguments_of_async_calls(connection: psycopg.AsyncConnection[Any]) -> None:
    await plain.adelay("1")  # error: arg-type reportArgumentType
    await plain.on(connection).adelay("1")  # error: arg-type reportArgumentType


def wrong_twin(connection: psycopg.Connection[Any]) -> None:
    plain.on(connection).adelay(1)  # error: attr-defined reportAttributeAccessIssue
    plain.on(connection).delay("1")  # error: arg-type reportArgumentType
    plain.on("a connection").delay(1)  # error: call-overload reportCallIssue


def wrong_async_twin(connection: psycopg.AsyncConnection[Any]) -> None:
    plain.on(connection).delay(1)  # error: attr-defined reportAttributeAccessIssue
    plain.apply_async((1,), connection=connection)  # error: arg-type reportArgumentType


def options() -> None:
    plain.apply_async((1,), task_id="a")  # error: call-arg reportCallIssue
    plain.apply_async((1,), priority="high")  # error: arg-type reportArgumentType
    plain.apply_async((1,), on_conflict="ignore")  # error: arg-type reportArgumentType
    plain.s(1).set(prority=1)  # error: call-arg reportCallIssue
    plain.si("a")  # error: arg-type reportArgumentType
    plain.si(1, 2)  # error: call-arg reportCallIssue
    chain(plain)  # error: arg-type reportArgumentType
    group(plain.s(1), on_member_failure="ignore")  # error: arg-type reportArgumentType
    chain(plain.s(1)).apply_async(task_id="a")  # error: call-arg reportCallIssue
    app.send_task("a", eta="tomorrow")  # error: arg-type reportArgumentType


def results(job: AsyncResult[str]) -> None:
    number: int = plain.delay(1).get()  # error: assignment reportAssignmentType
    job.get(timeout="soon")  # error: arg-type reportArgumentType
    narrower: AsyncResult[bool] = job  # error: assignment reportAssignmentType
    print(number, narrower)


def not_awaited() -> int:
    return len(coroutine(1))  # error: arg-type reportArgumentType


@app.task(bind=True)  # error: arg-type reportArgumentType
def bound_without_a_context(number: int) -> None: ...


@app.task(retry_backof=True)  # error: call-overload reportCallIssue
def misspelt_option() -> None: ...


@app.task(priority="high")  # error: call-overload reportArgumentType
def wrong_option() -> None: ...


app.enqueue_many([plain])  # error: list-item reportArgumentType
