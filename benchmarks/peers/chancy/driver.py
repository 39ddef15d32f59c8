"""chancy's driver: a worker in each process, asynchronous jobs in the worker's own loop."""

from __future__ import annotations

import argparse
import asyncio
import logging
from collections.abc import Callable
from typing import Any

import driving
import psycopg
from chancy import Chancy, Job, Queue, Worker, job
from psycopg.rows import dict_row

CONCURRENCY = 1_000
"""Jobs at a time in a worker. What is free is fetched at once; ends are written once a second."""


@job()
async def noop(*, text: str = "") -> None:
    """Nothing."""


@job()
async def stamp(*, nanoseconds: int) -> None:
    """How long ago it was enqueued goes into a file."""
    driving.record_stamp(nanoseconds)


def make_app(connections: int) -> Chancy:
    """The application, with so many connections; it logs only what goes wrong."""
    log = logging.getLogger("chancy")
    log.setLevel(logging.WARNING)
    return Chancy(
        driving.url(), min_connection_pool_size=connections, max_connection_pool_size=connections, log=log
    )


class Client:
    """The process's application, whose pool has a connection for each client, and one for transactions."""

    def __init__(self, app: Chancy, connection: psycopg.AsyncConnection[Any]) -> None:
        self._app = app
        self._connection = connection

    async def single(self) -> None:
        await self._app.push(noop.job)

    async def bulk(self, jobs: int, text: str | None) -> None:
        each: Job = noop.job if text is None else noop.job.with_kwargs(text=text)
        async for _ in self._app.push_many([each] * jobs, batch_size=jobs):
            pass

    async def transaction(self) -> None:
        async with self._connection.transaction(), self._connection.cursor(row_factory=dict_row) as cursor:
            await cursor.execute(driving.ORDER)
            await self._app.push_many_ex(cursor, [noop.job])

    async def stamp(self, nanoseconds: int) -> None:
        await self._app.push(stamp.job.with_kwargs(nanoseconds=nanoseconds))

    async def close(self) -> None:
        await self._connection.close()
        await self._app.pool.close()


class Driver:
    clients = 1
    asynchronous = True

    def setup(self) -> None:
        async def install() -> None:
            async with make_app(2) as app:
                await app.migrate()
                queue = Queue(
                    name="default",
                    concurrency=CONCURRENCY,
                    executor=Chancy.Executor.Async,
                    eager_polling=True,
                )
                await app.declare(queue, upsert=True)
            async with await psycopg.AsyncConnection.connect(driving.url()) as connection:
                await connection.execute(driving.ORDERS)

        asyncio.run(install())

    def __init__(self) -> None:
        self._app: Chancy | None = None

    async def connect(self) -> Client:
        if self._app is None:
            self._app = make_app(self.clients)
            await self._app.pool.open()
        return Client(self._app, await psycopg.AsyncConnection.connect(driving.url(), autocommit=True))

    def worker(self, options: argparse.Namespace) -> None:
        driving.serve(options.concurrency, lambda ready: asyncio.run(_work(ready)))


async def _work(ready: Callable[[], None]) -> None:
    async with make_app(10) as app, Worker(app) as worker:
        asyncio.get_running_loop().call_later(0.2, ready)
        await worker.wait_for_shutdown()


if __name__ == "__main__":
    driving.main(Driver())
