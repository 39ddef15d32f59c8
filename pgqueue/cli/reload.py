"""`pgqueue worker --reload`: for development, start the worker anew whenever a Python file changes.

This process only watches. The worker is a child with the same command line, which drains as ever before the
next one starts; an application that cannot be imported is waited for until somebody mends it.
"""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterable, Sequence
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from types import FrameType
from typing import Final

import click

from pgqueue.cli.status import ExitStatus
from pgqueue.worker.forkserver import die_with_parent
from pgqueue.worker.signals import stop_signals

log = logging.getLogger("pgqueue.worker")

LOOK_EVERY: Final = 0.2
"""Seconds between two looks at whether the worker still lives."""
MENDABLE: Final = (ExitStatus.APP, ExitStatus.USAGE)
"""What a worker ended with that a change of the code can mend."""
SHOWN: Final = 3
"""Changed files that are named in the log."""


def worker_command(arguments: Sequence[str]) -> list[str]:
    """The command of the worker itself, made from the arguments of ours."""
    own = [each for each in arguments if each != "--reload"]
    return [sys.executable, "-m", "pgqueue.cli.main", *own]


def watched_folders(target: str) -> list[Path]:
    """The current directory and, where it is elsewhere, the package of the application; imports nothing."""
    here = Path.cwd()
    folders = [here]
    package = target.partition(":")[0].partition(".")[0]
    try:
        spec = find_spec(package)
    except (ImportError, ValueError):
        spec = None
    if spec is not None and spec.origin:
        folder = Path(spec.origin).resolve().parent
        installed = folder.name in ("site-packages", "dist-packages")
        if folder.is_dir() and not installed and not folder.is_relative_to(here.resolve()):
            folders.append(folder)
    return folders


def run_reloading(target: str, command: Sequence[str]) -> int:
    """Run the command until it is asked to stop, again after each change; the exit status of the last worker.

    Raises:
        UsageError: watchfiles is not installed.
    """
    try:
        import watchfiles
    except ImportError:
        raise click.UsageError('--reload needs watchfiles: pip install "pgqueue[reload]"') from None

    child = Child(command)
    child.listen()
    is_python = watchfiles.PythonFilter()
    looks = watchfiles.watch(
        *watched_folders(target),
        watch_filter=None,  # ours: a log that grows all the time must not keep us from looking at the worker
        rust_timeout=int(LOOK_EVERY * 1000),
        yield_on_timeout=True,
        stop_event=child.stopping,
        raise_interrupt=False,
        ignore_permission_denied=True,
    )
    for number, changes in enumerate(looks):
        changed = sorted({path for change, path in changes if is_python(change, path)})
        if number == 0:  # from here on no change is missed
            child.start()
        elif changed:
            log.info("worker_reloading changed=%s", _named(changed))
            child.stop()
            child.start()
        elif (status := child.ended()) is not None and status not in MENDABLE:
            return status
    return child.last()


class Child:
    """The worker process, of which there is one at a time.

    Attributes:
        stopping: Set when we are asked to stop; no other worker is started then.
    """

    def __init__(self, command: Sequence[str]) -> None:
        self._command = list(command)
        self._process: subprocess.Popen[bytes] | None = None
        self._told = False
        self._asked: list[int] = []
        self.stopping = threading.Event()

    def listen(self) -> None:
        """Hand signals that ask to stop on to the worker, which decides what they mean."""
        for number in stop_signals():
            signal.signal(number, self._hear)

    def start(self) -> None:
        if self.stopping.is_set():
            return
        self._told = False
        die_with_us = partial(die_with_parent, os.getpid())
        # Compiled code is told from newer by the second and the size, which two quick changes may share.
        environment = {**os.environ, "PYTHONDONTWRITEBYTECODE": "1"}
        self._process = subprocess.Popen(self._command, env=environment, preexec_fn=die_with_us)
        for number in self._asked:  # while there was none yet to hear it
            self._process.send_signal(number)

    def stop(self) -> None:
        """Let it drain; returns when it has ended."""
        if self._process is not None:
            self._process.send_signal(signal.SIGTERM)
            self._process.wait()

    def ended(self) -> int | None:
        """The exit status of a worker that has ended by itself; None while it runs."""
        if self._process is None or self._process.poll() is None:
            return None
        status = _status(self._process.returncode)
        if status in MENDABLE and not self._told:
            self._told = True
            log.warning("worker_awaits_change status=%d", status)
        return status

    def last(self) -> int:
        """Wait for the end of a worker that was asked to stop; its exit status."""
        if self._process is None or (self._told and self._process.poll() is not None):
            return ExitStatus.DONE  # asked to stop while there was nothing that ran
        code = self._process.wait()
        # Ended by the signal itself, or by Ctrl-C: it had not begun to listen, there was nothing to finish.
        return ExitStatus.DONE if code < 0 or code == ExitStatus.CTRL_C else code

    def _hear(self, number: int, frame: FrameType | None) -> None:
        self._asked.append(number)
        self.stopping.set()
        if self._process is not None:
            self._process.send_signal(number)


def _named(paths: Iterable[str]) -> str:
    names = [os.path.relpath(path) for path in paths]
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + more


def _status(code: int) -> int:
    """As a shell says it: 128 and the signal's number."""
    return 128 - code if code < 0 else code
