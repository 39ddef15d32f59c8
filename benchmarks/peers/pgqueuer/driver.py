"""PgQueuer's driver: a QueueManager on asyncpg in each process, coroutines in the process itself."""

from __future__ import annotations

import argparse
import asyncio
import signal
from collections.abc import Callable
from typing import Any

import asyncpg
import driving
import uvloop
from pgqueuer import PgQueuer
from pgqueuer.db import AsyncpgDriver
from pgqueuer.models import Job
from pgqueuer.queries import Queries

BATCH_SIZE = 1_000


class Client:
    """One connection."""

    def __init__(self, connection: asyncpg.Connection[Any]) -> None:
        self._connection = connection
        self._queries = Queries(AsyncpgDriver(connection))

    async def single(self) -> None:
        await self._queries.enqueue("noop", None)

    async def bulk(self, jobs: int, text: str | None) -> None:
        payload = None if text is None else text.encode()
        await self._queries.enqueue(["noop"] * jobs, [payload] * jobs, [0] * jobs)

    async def transaction(self) -> None:
        async with self._connection.transaction():
            await self._connection.execute(driving.ORDER)
            await self._queries.enqueue("noop", None)

    async def stamp(self, nanoseconds: int) -> None:
        await self._queries.enqueue("stamp", str(nanoseconds).encode())

    async def close(self) -> None:
        await self._connection.close()


class Driver:
    clients = 1
    asynchronous = True

    def setup(self) -> None:
        async def install() -> None:
            connection = await asyncpg.connect(driving.url())
            await Queries(AsyncpgDriver(connection)).install()
            await connection.execute(driving.ORDERS)
            await connection.close()

        asyncio.run(install())

    async def connect(self) -> Client:
        return Client(await asyncpg.connect(driving.url()))

    def worker(self, options: argparse.Namespace) -> None:
        driving.serve(options.concurrency, lambda ready: uvloop.run(_work(ready)))


async def _work(ready: Callable[[], None]) -> None:
    connection = await asyncpg.connect(driving.url())
    app = PgQueuer.from_asyncpg_connection(connection)

    @app.entrypoint("noop")
    async def noop(job: Job) -> None:
        pass

    @app.entrypoint("stamp")
    async def stamp(job: Job) -> None:
        driving.record_stamp(int(job.payload or b"0"))

    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, app.shutdown.set)
    asyncio.get_running_loop().call_later(0.2, ready)
    await app.run(batch_size=BATCH_SIZE)
    await connection.close()


if __name__ == "__main__":
    driving.main(Driver())
