"""What the drivers of Python peers have in common: command line, producers, clocks. Standard library only.

A driver is a program; the harness runs it in the peer's own environment, with this folder on PYTHONPATH.
It gives `main` a class like `Driver`, with clients like `Client` or `AsyncClient`. `benchmarks/peer.py` says
what each subcommand has to do.

Producers: C clients are C connections, in as many processes as there are CPUs (or C, if that is less), as
threads or as coroutines of each. They are connected and have made one call each before the clock starts.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import contextlib
import json
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Protocol

BATCH = 1_000
"""Jobs per call of a bulk enqueue."""

ORDERS = "CREATE TABLE IF NOT EXISTS bench_orders (id bigint GENERATED ALWAYS AS IDENTITY, note text)"
ORDER = "INSERT INTO bench_orders (note) VALUES ('paid')"
STAMPING_CLIENTS = 4


class Unsupported(Exception):
    """The peer cannot do this; the text says why."""


class Client(Protocol):
    """One connection of a producer. Each call returns after the commit."""

    def single(self) -> object: ...
    def bulk(self, jobs: int, text: str | None) -> object: ...
    def transaction(self) -> object: ...
    def stamp(self, nanoseconds: int) -> object: ...
    def close(self) -> object: ...


class AsyncClient(Protocol):
    """The same as coroutines."""

    async def single(self) -> object: ...
    async def bulk(self, jobs: int, text: str | None) -> object: ...
    async def transaction(self) -> object: ...
    async def stamp(self, nanoseconds: int) -> object: ...
    async def close(self) -> object: ...


class Driver(Protocol):
    """What a peer's driver.py has to offer. Where it is asynchronous, `connect` is a coroutine function.

    `connect` is called once for each of the `clients` that this process has; they may share what the clients
    of a real application would share.
    """

    clients: int

    asynchronous: bool

    def setup(self) -> None: ...
    def connect(self) -> Any: ...
    def worker(self, options: argparse.Namespace) -> None: ...


def url() -> str:
    """Where the peer's database is."""
    return os.environ["BENCH_URL"]


def text_of(size: int) -> str | None:
    """So many bytes of text that does not compress; None for 0."""
    return base64.b85encode(os.urandom(size * 4 // 5 + 4)).decode()[:size] if size else None


_stamps = -1


def record_stamp(nanoseconds: int) -> None:
    """The body of the job `stamp`: how long ago that was goes into $BENCH_STAMPS."""
    global _stamps
    now = time.time_ns()
    if _stamps < 0:
        _stamps = os.open(os.environ["BENCH_STAMPS"], os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    os.write(_stamps, f"{now - nanoseconds}\n".encode())


def main(driver: Driver) -> None:
    """Run the subcommand that the command line names."""
    parser = argparse.ArgumentParser()
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("setup")
    fill = commands.add_parser("fill")
    fill.add_argument("--jobs", type=int, required=True)
    fill.add_argument("--size", type=int, default=0)
    enqueue = commands.add_parser("enqueue")
    enqueue.add_argument("--mode", choices=("single", "bulk", "transaction"), required=True)
    enqueue.add_argument("--clients", type=int, default=1)
    enqueue.add_argument("--seconds", type=float, default=3)
    produce = commands.add_parser("produce")
    produce.add_argument("--rate", type=float, required=True)
    produce.add_argument("--seconds", type=float, required=True)
    worker = commands.add_parser("worker")
    worker.add_argument("--concurrency", type=int, required=True)
    worker.add_argument("--history", choices=("on", "off"), default="on")
    worker.add_argument("--pool", default=None)
    options = parser.parse_args()
    if options.command == "setup":
        driver.setup()
        print("{}")
    elif options.command == "worker":
        driver.worker(options)
    else:
        print(json.dumps(_produce(driver, options)))


def serve(processes: int, run: Callable[[Callable[[], None]], None]) -> None:
    """`run(ready)` in so many processes, forked before anything is connected; SIGTERM goes to all of them.

    `ready` is to be called by each when it serves; after the last one the line goes out.
    """
    reading, writing = os.pipe()

    def ready() -> None:
        os.write(writing, b".")

    children: list[int] = []
    for _ in range(processes - 1):
        if (child := os.fork()) == 0:
            signal.signal(signal.SIGINT, signal.SIG_IGN)
            run(ready)
            os._exit(0)
        children.append(child)

    def announce() -> None:
        for _ in range(processes):
            os.read(reading, 1)
        print("ready", flush=True)

    threading.Thread(target=announce, daemon=True).start()
    try:
        run(ready)
    finally:
        for child in children:
            with contextlib.suppress(ProcessLookupError):
                os.kill(child, signal.SIGTERM)
        for child in children:
            os.waitpid(child, 0)


def _produce(driver: Driver, options: argparse.Namespace) -> dict[str, Any]:
    try:
        if options.command == "fill":
            return _fill(driver, options.jobs, text_of(options.size))
        if options.command == "produce":
            return _open_loop(driver, options.rate, options.seconds)
        return _closed_loop(driver, options.mode, options.clients, options.seconds)
    except Unsupported as reason:
        return {"unsupported": str(reason)}


def _fill(driver: Driver, jobs: int, text: str | None) -> dict[str, Any]:
    driver.clients = 1
    batches = [min(BATCH, jobs - done) for done in range(0, jobs, BATCH)]
    if driver.asynchronous:
        return {"jobs": jobs, "seconds": asyncio.run(_fill_async(driver, batches, text))}
    with contextlib.closing(driver.connect()) as client:
        started = time.perf_counter()
        for batch in batches:
            client.bulk(batch, text)
        return {"jobs": jobs, "seconds": time.perf_counter() - started}


async def _fill_async(driver: Driver, batches: Sequence[int], text: str | None) -> float:
    client = await driver.connect()
    started = time.perf_counter()
    for batch in batches:
        await client.bulk(batch, text)
    seconds = time.perf_counter() - started
    await client.close()
    return seconds


def _call(client: Any, mode: str, jobs: int = BATCH) -> Any:
    if mode == "bulk":
        return client.bulk(jobs, None)
    return client.single() if mode == "single" else client.transaction()


def _connected(driver: Driver, count: int, mode: str) -> list[Any]:
    """So many clients that have made one call each: the first may connect, and prepare."""
    clients = [driver.connect() for _ in range(count)]
    for client in clients:
        _call(client, mode, 1)
    return clients


async def _connected_async(driver: Driver, count: int, mode: str) -> list[Any]:
    clients = [await driver.connect() for _ in range(count)]
    for client in clients:
        await _call(client, mode, 1)
    return clients


def _closed_loop(driver: Driver, mode: str, clients: int, seconds: float) -> dict[str, Any]:
    processes = min(clients, os.cpu_count() or 1)
    shares = [clients // processes + (n < clients % processes) for n in range(processes)]
    context = multiprocessing.get_context("fork")
    barrier, results = context.Barrier(processes), context.SimpleQueue()

    def run(share: int) -> None:
        driver.clients = share
        loop = _loop_async if driver.asynchronous else _loop_threads
        try:
            results.put(loop(driver, mode, share, seconds, barrier.wait))
        except Unsupported as reason:
            results.put(str(reason))
        except BaseException as error:
            barrier.abort()
            results.put(error)
            raise

    family = [context.Process(target=run, args=(share,)) for share in shares]
    for process in family:
        process.start()
    found = [results.get() for _ in family]
    for process in family:
        process.join()
    for each in found:
        if isinstance(each, BaseException):
            raise each
        if isinstance(each, str):
            raise Unsupported(each)
    calls = sum(each[0] for each in found)
    took = max(each[2] for each in found) - min(each[1] for each in found)
    kind = "coroutines" if driver.asynchronous else "threads"
    return {
        "jobs": calls * (BATCH if mode == "bulk" else 1),
        "seconds": took,
        "client_side": f"{processes} processes × {shares[0]} {kind}",
    }


def _loop_threads(
    driver: Driver, mode: str, share: int, seconds: float, start: Callable[[], object]
) -> tuple[int, float, float]:
    clients = _connected(driver, share, mode)
    done = [0] * share
    start()
    begun = time.monotonic()
    deadline = begun + seconds

    def loop(n: int) -> None:
        client, calls = clients[n], 0
        while time.monotonic() < deadline:
            _call(client, mode)
            calls += 1
        done[n] = calls

    _in_threads(loop, share)
    ended = time.monotonic()
    for client in clients:
        client.close()
    return sum(done), begun, ended


def _in_threads(loop: Callable[[int], None], count: int) -> None:
    """Each of so many in a thread of its own; what goes wrong in one is raised here."""
    with ThreadPoolExecutor(count) as threads:
        for each in [threads.submit(loop, n) for n in range(count)]:
            each.result()


def _loop_async(
    driver: Driver, mode: str, share: int, seconds: float, start: Callable[[], object]
) -> tuple[int, float, float]:
    async def loop(client: Any, deadline: float) -> int:
        calls = 0
        while time.monotonic() < deadline:
            await _call(client, mode)
            calls += 1
        return calls

    async def everything() -> tuple[int, float, float]:
        clients = await _connected_async(driver, share, mode)
        start()
        begun = time.monotonic()
        calls = await asyncio.gather(*(loop(client, begun + seconds) for client in clients))
        ended = time.monotonic()
        for client in clients:
            await client.close()
        return sum(calls), begun, ended

    return asyncio.run(everything())


def _slots(n: int, clients: int, rate: float, seconds: float) -> Iterator[float]:
    """Seconds after the start at which a client is to make its calls."""
    return (slot / rate for slot in range(n, int(rate * seconds), clients))


def _open_loop(driver: Driver, rate: float, seconds: float) -> dict[str, Any]:
    clients = max(1, min(STAMPING_CLIENTS, int(rate)))
    driver.clients = clients
    behind = [0.0] * clients
    done = [0] * clients

    def threads() -> None:
        connected = _connected(driver, clients, "single")
        start = time.monotonic() + 0.1

        def loop(n: int) -> None:
            for offset in _slots(n, clients, rate, seconds):
                if (early := start + offset - time.monotonic()) > 0:
                    time.sleep(early)
                behind[n] = max(behind[n], time.monotonic() - start - offset)
                connected[n].stamp(time.time_ns())
                done[n] += 1

        _in_threads(loop, clients)
        for client in connected:
            client.close()

    async def coroutines() -> None:
        connected = await _connected_async(driver, clients, "single")
        start = time.monotonic() + 0.1

        async def loop(n: int) -> None:
            for offset in _slots(n, clients, rate, seconds):
                if (early := start + offset - time.monotonic()) > 0:
                    await asyncio.sleep(early)
                behind[n] = max(behind[n], time.monotonic() - start - offset)
                await connected[n].stamp(time.time_ns())
                done[n] += 1

        await asyncio.gather(*(loop(n) for n in range(clients)))
        for client in connected:
            await client.close()

    begun = time.monotonic()
    if driver.asynchronous:
        asyncio.run(coroutines())
    else:
        threads()
    took = time.monotonic() - begun
    return {"jobs": sum(done), "seconds": took, "behind_ms": max(behind) * 1000}
