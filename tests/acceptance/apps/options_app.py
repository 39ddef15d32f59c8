"""Tasks that differ in one option each."""

from __future__ import annotations

import os
import signal
import time

from tests_app import note, wait_for

from pgqueue import PgQueue, Reject, Snooze, TaskContext

app = PgQueue("options")


@app.task(bind=True)
def rejects(self: TaskContext) -> None:
    try:
        raise Reject("the customer is gone")
    except Exception:
        note("swallowed", self)


@app.task(bind=True)
def snoozes(self: TaskContext, times: int) -> int:
    note("start", self)
    if self.request.attempt <= times:
        raise Snooze(0.05)
    return self.request.retries


@app.task(bind=True, autoretry_for=(OSError,), max_retries=None, default_retry_delay=0)
def fails_often(self: TaskContext, times: int) -> int:
    if self.request.retries < times:
        raise OSError(f"failure {self.request.retries}")
    return self.request.retries


@app.task(autoretry_for=(OSError,), dont_autoretry_for=(FileNotFoundError,), default_retry_delay=0)
def spares(missing: bool) -> None:
    raise FileNotFoundError if missing else PermissionError


@app.task(autoretry_for=(OSError,), max_retries=None, default_retry_delay=0.1)
def fails_always() -> None:
    raise OSError("again")


@app.task(ignore_result=True)
def silent() -> str:
    return "nobody wants to know"


@app.task(history=False)
def forgotten(fails: bool = False) -> str:
    if fails:
        raise ValueError("but failures are kept")
    return "gone"


@app.task(bind=True, max_crashes=2)
def dies(self: TaskContext) -> None:
    note("start", self)
    os.kill(os.getpid(), signal.SIGKILL)


@app.task(bind=True, on_crash="dead_letter")
def dies_once(self: TaskContext) -> None:
    note("start", self)
    os.kill(os.getpid(), signal.SIGKILL)


@app.task(bind=True, on_crash="dead_letter")
def must_not_run_twice(self: TaskContext, path: str) -> str:
    note("start", self)
    wait_for(path)
    return "ran once"


@app.task(bind=True, autoretry_for=(OSError,), on_crash="dead_letter", default_retry_delay=0)
def fails_once(self: TaskContext) -> int:
    time.sleep(0.01)
    if not self.request.retries:
        raise OSError("an error is no crash")
    return self.request.attempt
