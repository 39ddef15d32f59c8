"""procrastinate's driver: a worker in each process, asynchronous tasks on psycopg's pool."""

from __future__ import annotations

import argparse
import asyncio
from collections.abc import Callable
from typing import Any

import driving
import procrastinate
import psycopg
from procrastinate import PsycopgConnector

CONCURRENCY = 30
"""Jobs at a time in a process: each is fetched, and ended, in a transaction of its own."""


def make_app(connections: int) -> procrastinate.App:
    """The application, with so many connections."""
    connector = PsycopgConnector(conninfo=driving.url(), min_size=connections, max_size=connections)
    app = procrastinate.App(connector=connector)

    @app.task(name="noop")
    async def noop(text: str = "") -> None:
        pass

    @app.task(name="stamp")
    async def stamp(nanoseconds: int) -> None:
        driving.record_stamp(nanoseconds)

    return app


class Client:
    """The process's application, whose pool has a connection for each client, and one for transactions."""

    def __init__(self, app: procrastinate.App, connection: psycopg.AsyncConnection[Any]) -> None:
        self._app = app
        self._noop, self._stamp = app.tasks["noop"], app.tasks["stamp"]
        self._connection = connection

    async def single(self) -> None:
        await self._noop.defer_async()

    async def bulk(self, jobs: int, text: str | None) -> None:
        arguments = {} if text is None else {"text": text}
        await self._noop.batch_defer_async(*([arguments] * jobs))

    async def transaction(self) -> None:
        async with self._connection.transaction():
            await self._connection.execute(driving.ORDER)
            await self._noop.configure(connection=self._connection).defer_async()

    async def stamp(self, nanoseconds: int) -> None:
        await self._stamp.defer_async(nanoseconds=nanoseconds)

    async def close(self) -> None:
        await self._connection.close()
        # Nothing is left to close for those that come after the first.
        await self._app.close_async()


class Driver:
    clients = 1
    asynchronous = True

    def setup(self) -> None:
        async def install() -> None:
            async with make_app(1).open_async() as app:
                await app.schema_manager.apply_schema_async()
            async with await psycopg.AsyncConnection.connect(driving.url()) as connection:
                await connection.execute(driving.ORDERS)

        asyncio.run(install())

    def __init__(self) -> None:
        self._app: procrastinate.App | None = None

    async def connect(self) -> Client:
        if self._app is None:
            self._app = make_app(self.clients)
            await self._app.open_async()
        return Client(self._app, await psycopg.AsyncConnection.connect(driving.url(), autocommit=True))

    def worker(self, options: argparse.Namespace) -> None:
        delete = "successful" if options.history == "off" else "never"
        driving.serve(options.concurrency, lambda ready: asyncio.run(_work(ready, delete)))


async def _work(ready: Callable[[], None], delete: str) -> None:
    async with make_app(CONCURRENCY + 1).open_async() as app:
        asyncio.get_running_loop().call_later(0.2, ready)
        await app.run_worker_async(concurrency=CONCURRENCY, delete_jobs=delete)


if __name__ == "__main__":
    driving.main(Driver())
