"""The demo's child processes: started with a log each, watched, and stopped in order, whatever happens.

A child runs in a session of its own, so Ctrl-C at the terminal reaches only the demo, which then stops them
in the right order. Should the demo itself be killed, a *keeper* process sees the end of its pipe, stops the
children and removes the folder.
"""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any

START_TIMEOUT = 60
STOP_TIMEOUT = 40  # a worker may drain for 25 seconds
LOG_TAIL = 20  # lines

# Told "+pid" and "-pid" as children come and go. End of input without "done": the demo was killed.
_KEEPER = """
import os, shutil, signal, sys, time
children = []
for line in sys.stdin:
    if line == "done\\n":
        sys.exit()
    children = [int(line)] + children if line[0] == "+" else [pid for pid in children if pid != -int(line)]

def tell(sent):
    for pid in children[:]:
        try:
            os.killpg(pid, sent)
        except OSError:
            children.remove(pid)

deadline = time.monotonic() + 10
tell(signal.SIGTERM)
while children and time.monotonic() < deadline:
    time.sleep(0.05)
    tell(0)
tell(signal.SIGKILL)
shutil.rmtree(sys.argv[1], ignore_errors=True)
"""


class ChildFailed(Exception):
    """A child ended, or did not come up; the message carries the end of its log."""


class Children:
    """Starts child processes that log into `folder`, and guards them against this process's sudden death.

    Args:
        folder: Where they run and log; removed by the keeper if this process is killed.
        environment: Of every child, beside this process's own.
    """

    def __init__(self, folder: Path, environment: Mapping[str, str]) -> None:
        self.environment = dict(environment)
        self._folder = folder
        self._started: list[Child] = []

    def __enter__(self) -> Children:
        self._keeper = subprocess.Popen(
            [sys.executable, "-c", _KEEPER, str(self._folder)],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            cwd="/",
            start_new_session=True,
        )
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for child in reversed(self._started):
            child.stop()
        self._tell_keeper("done")
        with contextlib.suppress(BrokenPipeError):
            self._keeper.communicate()

    def start(self, name: str, *arguments: str) -> Child:
        """Run `python *arguments`; its output goes to a log in the folder that has its name."""
        log = self._folder / f"{name.replace(' ', '-')}.log"
        with log.open("wb") as output:
            process = subprocess.Popen(
                [sys.executable, *arguments],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                cwd=self._folder,
                env=self.environment,
                start_new_session=True,
            )
        self._tell_keeper(f"+{process.pid}")
        child = Child(name, process, log, on_end=lambda: self._tell_keeper(f"-{process.pid}"))
        self._started.append(child)
        return child

    def check(self) -> None:
        """Raise ChildFailed if one has ended."""
        for child in self._started:
            child.check()

    def _tell_keeper(self, line: str) -> None:
        # Somebody may have killed the keeper; the demo goes on without.
        if self._keeper.stdin is not None:
            with contextlib.suppress(BrokenPipeError):
                self._keeper.stdin.write(f"{line}\n".encode())
                self._keeper.stdin.flush()


class Child:
    """One child process."""

    def __init__(
        self, name: str, process: subprocess.Popen[bytes], log: Path, *, on_end: Callable[[], None]
    ) -> None:
        self.name = name
        self.log = log
        self._process = process
        self._on_end = on_end
        self._stopped = False
        self._exit_status: int | None = None

    def check(self) -> None:
        """Raise ChildFailed if it has ended though nobody stopped it."""
        code = self._process.poll()
        if code is not None and not self._stopped:
            raise ChildFailed(self.with_log(f"the {self.name} {how_it_ended(code)}"))

    def await_line(self, pattern: str, pause: Callable[[float], None]) -> tuple[str, ...]:
        """The groups of `pattern` in its log, once they are there."""
        deadline = time.monotonic() + START_TIMEOUT
        while not (found := re.search(pattern, self.log.read_text(errors="replace"))):
            self.check()
            if time.monotonic() > deadline:
                raise ChildFailed(
                    self.with_log(f"the {self.name} did not come up in {START_TIMEOUT} seconds")
                )
            pause(0.02)
        return found.groups()

    def send(self, number: signal.Signals) -> None:
        """Signal it."""
        self._process.send_signal(number)

    def stop(self) -> int | None:
        """SIGTERM, wait, and SIGKILL what is left of its session; its exit status, None if it did not stop
        in time.
        """
        if not self._stopped:
            self._stopped = True
            self._process.terminate()
            try:
                self._exit_status = self._process.wait(STOP_TIMEOUT)
            except subprocess.TimeoutExpired:
                self._exit_status = None
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
            self._on_end()
        return self._exit_status

    def drained(self) -> None:
        """Stop it; ChildFailed unless it says that all went well."""
        code = self.stop()
        if code is None:
            raise ChildFailed(self.with_log(f"the {self.name} did not stop within {STOP_TIMEOUT} seconds"))
        if code != 0:
            raise ChildFailed(self.with_log(f"the {self.name} was told to stop and {how_it_ended(code)}"))

    def with_log(self, message: str) -> str:
        """The message, followed by the end of the log."""
        lines = self.log.read_text(errors="replace").splitlines()[-LOG_TAIL:]
        return "\n".join(
            [f"{message}; the end of its log:" if lines else f"{message}; its log is empty", *lines]
        )


def how_it_ended(code: int) -> str:
    """An exit status of `subprocess` in words."""
    return (
        f"ended with exit status {code}"
        if code >= 0
        else f"was ended by signal {-code} ({signal.strsignal(-code)})"
    )


class Interrupted(Exception):
    """SIGINT, SIGTERM or SIGHUP came.

    Attributes:
        signal: Its number.
    """

    def __init__(self, signal_number: int) -> None:
        super().__init__(signal.strsignal(signal_number))
        self.signal = signal_number


class Interruptions:
    """Holds signals back until `pause()`, so that nothing is interrupted half-started or half-stopped."""

    def __init__(self) -> None:
        self._came: int | None = None
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Interruptions:
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            self._before[number] = signal.signal(number, self._note)
        if self._before[signal.SIGHUP] is signal.SIG_IGN:  # nohup
            signal.signal(signal.SIGHUP, signal.SIG_IGN)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def pause(self, seconds: float) -> None:
        """Sleep; Interrupted if a signal came before or comes meanwhile."""
        deadline = time.monotonic() + seconds
        while self._came is None and (left := deadline - time.monotonic()) > 0:
            time.sleep(min(left, 0.05))
        if self._came is not None:
            raise Interrupted(self._came)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self._came = number
