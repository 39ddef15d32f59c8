"""An order whose job enqueues others in every way there is: they belong to what it belongs to."""

from __future__ import annotations

from typing import Any

import psycopg

from pgqueue import PgQueue, TaskContext

app = PgQueue("orders")


@app.task(bind=True)
def step(self: TaskContext, name: str) -> list[Any]:
    return [name, self.request.correlation_id, list(self.request.tags)]


def _enqueue_others() -> None:
    step.delay("delay")
    app.enqueue_many([step.s("many 1"), step.s("many 2").set(tags=["t"])])
    app.send_task("orders_app.step", ["by name"])
    with psycopg.connect(app.dsn) as connection:
        step.on(connection).delay("on")
    step.apply_async(("another's",), correlation_id="order 43")
    step.apply_async(("nobody's",), correlation_id=None)
    step.apply_async(("in headers",), headers={"correlation_id": "order 44"})


@app.task
def place() -> None:
    _enqueue_others()


@app.task
async def aplace() -> None:
    await step.adelay("adelay")
    _enqueue_others()
