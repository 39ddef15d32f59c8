"""The signals that ask a worker to stop."""

from __future__ import annotations

import signal
from typing import Final

STOP_SIGNALS: Final = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT)


def stop_signals() -> list[signal.Signals]:
    """Those of `STOP_SIGNALS` to listen to: SIGHUP not where it is ignored (nohup)."""
    return [
        number
        for number in STOP_SIGNALS
        if number != signal.SIGHUP or signal.getsignal(number) is not signal.SIG_IGN
    ]


def stay(*_: object) -> None:
    """A handler that does nothing."""


def stay_when_asked_to_stop() -> None:
    """In a child of the supervisor, which decides when it ends.

    Handlers, not SIG_IGN: what is ignored stays ignored in programs that a task starts.
    """
    for number in stop_signals():
        signal.signal(number, stay)
