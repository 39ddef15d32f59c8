"""Run one worker in this process, from flags to exit."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping, Sequence
from typing import Any

from pgqueue.config import Config
from pgqueue.worker.prefork import Prefork
from pgqueue.worker.supervisor import Supervisor


def run_worker(
    target: str,
    *,
    version: str,
    flags: Mapping[str, Any],
    queues: Sequence[str] = (),
    weights: Mapping[str, float] | None = None,
) -> bool:
    """Serve until SIGTERM or SIGINT; returns whether every running job could finish.

    Args:
        target: The application, as module:attribute.
        flags: Settings that beat the application's own; None means not given.
        queues: What to serve; empty for every queue there is.
        weights: None to serve `queues` strictly in their order.

    Raises:
        PgQueueError: The worker could not start; the message says why.
    """
    return asyncio.run(
        _serve(target, version, {k: v for k, v in flags.items() if v is not None}, queues, weights)
    )


async def _serve(
    target: str,
    version: str,
    overrides: Mapping[str, Any],
    queues: Sequence[str],
    weights: Mapping[str, float] | None,
) -> bool:
    processes = Prefork(target, overrides)
    try:
        loaded = await processes.start()
        config = Config(**loaded.config)
        logging.getLogger().setLevel(config.log_level)
        supervisor = Supervisor(processes, loaded, config, version=version, queues=queues, weights=weights)
        return await supervisor.run()
    finally:
        await processes.stop()
