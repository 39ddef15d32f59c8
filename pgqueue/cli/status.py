"""How a command ends: its exit statuses, and the signals that ask it to."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from enum import IntEnum
from typing import Final, NoReturn

import click

from pgqueue.errors import AppNotLoaded, ConfigError, DatabaseUnavailable, PgQueueError, SchemaMismatch
from pgqueue.worker.signals import STOP_SIGNALS, stop_signals


class ExitStatus(IntEnum):
    """What a supervisor (systemd, Kubernetes, a script) can tell apart: one number per thing to do next."""

    DONE = 0
    """Done; for a worker: it was asked to stop, and finished and acked all it had."""
    FAILED = 1
    """Failed; one line on stderr says what."""
    USAGE = 2
    """An option, a setting or the DSN is wrong: trying again does not help."""
    INTERRUPTED = 3
    """A worker had to kill running jobs, or could not ack everything; they run again."""
    UNREACHABLE = 4
    """The database cannot be reached, or refused the login: try again later."""
    SCHEMA = 5
    """The schema is missing, or at a revision this release does not work with: migrate, or upgrade."""
    APP = 6
    """The application of a worker cannot be imported: mend it."""
    BUG = 70
    """An exception nobody expected; the traceback is on stderr. EX_SOFTWARE of sysexits.h."""
    CTRL_C = 130
    """Interrupted by Ctrl-C: 128 and the signal's number, as a shell says it."""


SUMMARY: Final = """\b
Exit status:
  0    done
  1    failed; one line on stderr says what
  2    wrong usage: an option, a setting or the DSN
  3    a worker had to kill running jobs when it stopped; they run again
  4    the database cannot be reached
  5    the schema is missing or at another revision: pgqueue migrate
  6    the application cannot be imported
  70   a bug in pgqueue; the traceback is on stderr
  130  Ctrl-C"""
"""For the end of --help."""

_MEANINGS: Final = (
    (click.UsageError, ExitStatus.USAGE),
    (ConfigError, ExitStatus.USAGE),
    (DatabaseUnavailable, ExitStatus.UNREACHABLE),
    (SchemaMismatch, ExitStatus.SCHEMA),
    (AppNotLoaded, ExitStatus.APP),
    (click.exceptions.Abort, ExitStatus.CTRL_C),
    (click.ClickException, ExitStatus.FAILED),
    (PgQueueError, ExitStatus.FAILED),
)
"""The first that fits counts."""


def status_of(error: BaseException) -> ExitStatus:
    """The exit status of a command that ended with this exception."""
    return next((status for kind, status in _MEANINGS if isinstance(error, kind)), ExitStatus.BUG)


@contextmanager
def leaving_when_asked() -> Iterator[None]:
    """While a worker only gets ready, a request to stop ends the process at once, as done.

    Also as process 1 of a container, for which the kernel drops signals without a handler.
    """

    def leave(*_: object) -> NoReturn:
        raise SystemExit(ExitStatus.DONE)

    before = {number: signal.signal(number, leave) for number in stop_signals()}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def ignore_stop_signals() -> None:
    """The end is decided: a late signal must not change the exit status."""
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
