"""The driver of both Celery peers: they differ in the broker that BENCH_URL names.

Settings, all from Celery's guide: late acks, and tasks whose process died go back to the queue; no results; a
deep prefetch, as its chapter on optimizing advises for many short tasks; no events, no gossip, no mingle, and
a log without the two lines per task. `apply_async` with a producer of its own for each client.
"""

from __future__ import annotations

import argparse
import mmap
import os

import driving
from billiard.process import current_process
from celery import Celery
from celery.signals import worker_ready
from kombu import Connection, Producer

app = Celery("bench", broker=os.environ["BENCH_URL"])
app.conf.update(
    task_acks_late=True,
    task_reject_on_worker_lost=True,
    task_ignore_result=True,
    task_default_queue="bench",
    worker_prefetch_multiplier=64,
    worker_disable_rate_limits=True,
    worker_redirect_stdouts=False,
    broker_connection_retry_on_startup=True,
)

_slots: memoryview | None = None
_slot = 0


@app.task(name="noop")
def noop(text: str | None = None) -> None:
    global _slots, _slot
    if _slots is None:
        with open(os.environ["BENCH_COUNTER"], "r+b") as file:
            _slots = memoryview(mmap.mmap(file.fileno(), 0)).cast("Q")
        # A process that takes the place of one that died takes its number too.
        _slot = current_process().index
    _slots[_slot] += 1


@app.task(name="stamp")
def stamp(nanoseconds: int) -> None:
    driving.record_stamp(nanoseconds)


class Client:
    """A connection with a producer, and with RabbitMQ another one whose publishes are confirmed."""

    def __init__(self) -> None:
        self._connections: list[Connection] = []
        self._plain = self._producer()
        is_amqp = app.conf.broker_url.startswith("amqp")
        self._confirmed = self._producer(confirm_publish=True) if is_amqp else self._plain

    def _producer(self, **options: object) -> Producer:
        connection = app.connection_for_write(transport_options=options)
        self._connections.append(connection)
        return app.amqp.Producer(connection.default_channel, auto_declare=False)

    def single(self) -> None:
        noop.apply_async(producer=self._confirmed)

    def bulk(self, jobs: int, text: str | None) -> None:
        arguments = () if text is None else (text,)
        # One pipeline for Redis. For RabbitMQ publish after publish, which nobody confirms: Celery would wait
        # for each answer, as it does in `single`.
        with self._plain.batch(jobs):
            for _ in range(jobs):
                noop.apply_async(arguments, producer=self._plain)

    def transaction(self) -> None:
        raise driving.Unsupported("the queue is not in the database")

    def stamp(self, nanoseconds: int) -> None:
        stamp.apply_async((nanoseconds,), producer=self._confirmed)

    def close(self) -> None:
        # The broker answers this after everything that was sent before it.
        for connection in self._connections:
            connection.close()


class Driver:
    asynchronous = False

    def setup(self) -> None:
        with app.connection_for_write() as connection:
            for queue in app.amqp.queues.values():
                queue(connection.default_channel).declare()

    def connect(self) -> Client:
        return Client()

    def worker(self, options: argparse.Namespace) -> None:
        worker_ready.connect(lambda **_: print("ready", flush=True), weak=False)
        quiet = ["--loglevel", "WARNING", "--without-gossip", "--without-mingle", "--without-heartbeat"]
        concurrency = ["--pool", "prefork", "--concurrency", str(options.concurrency)]
        app.worker_main(["--quiet", "worker", *concurrency, *quiet])


def main() -> None:
    driving.main(Driver())
