"""Waiting for a socket in the event loop, without a clock: psycopg's own waits look up ten times a second."""

from __future__ import annotations

import asyncio


async def ready(descriptor: int, *, to_write: bool = False) -> bool:
    """Wait until there is something to read or, with `to_write`, room to write; returns whether it is to
    read.
    """
    loop = asyncio.get_running_loop()
    found: asyncio.Future[bool] = loop.create_future()

    def tell(to_read: bool) -> None:
        if not found.done():
            found.set_result(to_read)

    loop.add_reader(descriptor, tell, True)
    if to_write:
        loop.add_writer(descriptor, tell, False)
    try:
        return await found
    finally:
        loop.remove_reader(descriptor)
        if to_write:
            loop.remove_writer(descriptor)
