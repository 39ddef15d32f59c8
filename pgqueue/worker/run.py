"""Run one worker in this process, from flags to exit: its signals, and its duties as process 1.

Signals set a flag and wake the loop, from the first moment to the last: also while the application is being
imported or the database is not there yet, when stopping means to leave at once.
"""

from __future__ import annotations

import asyncio
import logging
import os
import signal
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from pgqueue.config import Config
from pgqueue.errors import AppNotLoaded
from pgqueue.worker.processes import Processes
from pgqueue.worker.signals import STOP_SIGNALS, stop_signals
from pgqueue.worker.supervisor import Supervisor, unless_set
from pgqueue.worker.wire import clock

SAME_REQUEST = 0.5
"""Seconds within which a second signal is the first one once more: `timeout` and closing terminals signal a
process by itself and then with its group."""
REAP_AGAIN = 0.5
"""Seconds until the next look, when a child that somebody else waits for is in the way."""


def run_worker(
    target: str,
    *,
    version: str,
    flags: Mapping[str, Any],
    queues: Sequence[str] = (),
    weights: Mapping[str, float] | None = None,
) -> bool:
    """Serve until SIGTERM, SIGINT, SIGHUP or SIGQUIT; returns whether every running job could finish.

    Args:
        target: The application, as module:attribute.
        flags: Settings that beat the application's own; None means not given.
        queues: What to serve; empty for every queue there is.
        weights: None to serve `queues` strictly in their order.

    Raises:
        AppNotLoaded: The application cannot be imported.
        ConfigError: It can, but the flags do not fit its own settings.
        PgQueueError: The worker could not start; the message says why.
    """
    overrides = {name: value for name, value in flags.items() if value is not None}
    # Held back until the loop listens: a handler that raises would leave a half-made loop behind.
    signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    return asyncio.run(_serve(target, version, overrides, queues, weights))


async def _serve(
    target: str,
    version: str,
    overrides: Mapping[str, Any],
    queues: Sequence[str],
    weights: Mapping[str, float] | None,
) -> bool:
    requests = StopRequests()
    requests.listen()
    processes = Processes(target, overrides)
    if os.getpid() == 1:
        Reaper(lambda: processes.server_pid).start()
    try:
        try:
            loaded = await unless_set(requests.event, processes.start())
        except AppNotLoaded:
            # A signal to the whole group may have ended the fork server before we heard of it.
            if await unless_set(requests.event, asyncio.sleep(0.2, True)):
                raise
            loaded = None
        if loaded is None:
            return True
        config = Config(**loaded.config)
        logging.getLogger().setLevel(config.log_level)
        supervisor = Supervisor(processes, loaded, config, version=version, queues=queues, weights=weights)
        requests.hand_to(supervisor.stop)
        return await supervisor.run()
    finally:
        await processes.stop()
        requests.ignore_more()


class StopRequests:
    """What signals ask of this worker: to stop, and perhaps at once.

    Attributes:
        event: Set by the first request.
    """

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._asked_at: float | None = None
        self._at_once = False
        self.event = asyncio.Event()
        self._stop: Callable[[bool], None] | None = None
        self._heard: list[signal.Signals] = []

    def listen(self) -> None:
        """Take over the signals, also those that were held back."""
        self._heard = stop_signals()
        for number in self._heard:
            self._loop.add_signal_handler(number, self._hear, number)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)

    def ignore_more(self) -> None:
        """From here on the end is decided, and a late signal must not change it."""
        for number in self._heard:
            self._loop.remove_signal_handler(number)
            signal.signal(number, signal.SIG_IGN)

    def hand_to(self, stop: Callable[[bool], None]) -> None:
        """Call `stop` for requests, also for one that has come, with whether not to wait for running jobs."""
        self._stop = stop
        if self.event.is_set():
            stop(self._at_once)

    def _hear(self, number: signal.Signals) -> None:
        now = clock()
        if number == signal.SIGQUIT or (self._asked_at is not None and now - self._asked_at >= SAME_REQUEST):
            self._at_once = True
        if self._asked_at is None:
            self._asked_at = now
        self.event.set()
        if self._stop is not None:
            self._stop(self._at_once)


class Reaper:
    """What the kernel expects of process 1: waiting for the orphans it is handed, or they stay as zombies.

    Args:
        ours: The pid of the child that somebody else waits for; its exit status is left alone.
    """

    def __init__(self, ours: Callable[[], int | None]) -> None:
        self._ours = ours
        self._loop = asyncio.get_running_loop()

    def start(self) -> None:
        """Look whenever a child ends, and now: what ended before was not heard."""
        self._loop.add_signal_handler(signal.SIGCHLD, self.reap)
        self.reap()

    def reap(self) -> None:
        """Wait for every orphan that has ended."""
        while True:
            try:
                # Only a look: the child stays to be waited for.
                found = os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
            except ChildProcessError:
                return
            if found is None:
                return
            if found.si_pid == self._ours():
                self._loop.call_later(REAP_AGAIN, self.reap)
                return
            os.waitpid(found.si_pid, 0)
