"""Hooks and middleware that note what they are told."""

from __future__ import annotations

import asyncio
import json
import os
import time
from collections.abc import Iterator
from contextvars import ContextVar
from typing import Any

from pgqueue import PgQueue, Reject, Snooze, TaskContext
from pgqueue.hooks import (
    BeforeEnqueue,
    ChildStarted,
    TaskFailed,
    TaskRetried,
    TaskStarted,
    TaskSucceeded,
    WorkerReady,
    WorkerStopping,
)

app = PgQueue("hooks")
trace: ContextVar[str] = ContextVar("trace", default="none")


def note(event: str, job: str | None = None, **facts: Any) -> None:
    """Append a line to the ledger."""
    line = {"event": event, "job": job, "pid": os.getpid(), **facts}
    with open(os.environ["LEDGER"], "ab", buffering=0) as file:
        file.write(f"\n{json.dumps(line)}\n".encode())


@app.hook("task_started")
def started(event: TaskStarted) -> None:
    note("started", event.request.id, attempt=event.request.attempt)
    if event.request.task.endswith("with_bad_hooks"):
        raise SystemExit("a hook that exits")


@app.hook("task_succeeded")
def succeeded(event: TaskSucceeded) -> None:
    note("succeeded", event.request.id, result=repr(event.result), took=event.seconds)


@app.hook("task_succeeded")
def succeeded_too(event: TaskSucceeded) -> None:
    note("succeeded too", event.request.id)


@app.hook("task_retried")
def retried(event: TaskRetried) -> None:
    note("retried", event.request.id, error=repr(event.error), delay=event.delay)


@app.hook("task_failed")
def failed(event: TaskFailed) -> None:
    note("failed", event.request.id, error=type(event.error).__name__, reason=event.reason)


@app.hook("worker_ready")
def ready(event: WorkerReady) -> None:
    note("ready", worker=event.worker)


@app.hook("worker_stopping")
def stopping(event: WorkerStopping) -> None:
    note("stopping", worker=event.worker)
    if os.environ.get("SLOW_HOOK"):
        time.sleep(60)


@app.hook("child_started")
def child(event: ChildStarted) -> None:
    note("child", of=event.pid, pool=event.pool)


@app.hook("before_enqueue")
def add_trace(event: BeforeEnqueue) -> None:
    event.headers["trace"] = trace.get()
    if event.task.endswith("forbidden"):
        raise PermissionError(event.task)


@app.middleware
def outer(context: TaskContext) -> Iterator[None]:
    note("enter outer", context.request.id)
    token = trace.set(str(context.request.headers.get("trace")))
    try:
        yield
    except KeyError as error:
        raise LookupError("translated") from error
    finally:
        trace.reset(token)
        note("leave outer", context.request.id)


@app.middleware
def inner(context: TaskContext) -> Iterator[None]:
    if context.name.endswith("guarded"):
        raise PermissionError("not you")
    note("enter inner", context.request.id)
    yield


@app.task
def echo(value: object) -> object:
    return value


@app.task
async def aecho(value: object) -> object:
    await asyncio.sleep(0.01)
    return value


@app.task(bind=True, transactional=True)
def charge(self: TaskContext) -> str:
    self.connection.execute("SELECT 1")
    return "charged"


@app.task
def traced() -> str:
    """The trace that the middleware has set, and a job that goes on with it."""
    echo.delay("next")
    return trace.get()


@app.task
async def atraced() -> str:
    await asyncio.sleep(0)
    return trace.get()


@app.task(bind=True, autoretry_for=(ConnectionError,), max_retries=1, default_retry_delay=0)
def fails(self: TaskContext, how: str) -> None:
    if how == "retry":
        raise ConnectionError("once more")
    if how == "self.retry" and not self.request.retries:
        self.retry(exc=ValueError("the cause"), countdown=0)
    if how == "reject":
        raise Reject("no")
    if how == "snooze" and self.request.attempt == 1:
        raise Snooze(0)
    if how == "translated":
        raise KeyError("k")


@app.task
def typed(number: int) -> None: ...


@app.task
def guarded() -> None: ...


@app.task
def forbidden() -> None: ...


@app.task
def with_bad_hooks() -> str:
    return "fine"
