"""An application that minds its own signals, and whose import has left things behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from typing import Any

import biting_app

from pgqueue import PgQueue, TaskContext

heard = 0


def hear(*_: object) -> None:
    global heard
    heard += 1


for number in (signal.SIGUSR1, signal.SIGUSR2, signal.SIGALRM):
    signal.signal(number, hear)

if os.environ.get("ODD_IMPORT"):
    # What frameworks do at their import: a thread, handlers of their own, a helper that inherits everything.
    threading.Thread(target=time.sleep, args=(3_600,), daemon=True).start()
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, lambda *_: os._exit(9))
    if os.environ["ODD_IMPORT"] == "no fork":
        forks, fork = 0, os.fork

        def refuse() -> int:
            global forks
            forks += 1
            if forks in (2, 3):
                raise BlockingIOError("too many processes")
            return fork()

        os.fork = refuse
    if os.environ["ODD_IMPORT"] == "helper" and os.fork() == 0:
        while not os.path.exists(os.environ["HELPER_GATE"]):
            time.sleep(0.02)
        os._exit(0)

app = PgQueue("signals")
surroundings = app.task(biting_app.surroundings.function, name="signal_app.surroundings")


@app.task(bind=True)
def work(self: TaskContext, seconds: float) -> str:
    """Something of each kind that a signal can interrupt."""
    biting_app.note("start", self)
    time.sleep(seconds)
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        time.sleep(seconds)
        os.write(writer, b"x")
        os._exit(0)
    assert os.read(reader, 1) == b"x"
    os.waitpid(pid, 0)
    os.close(reader)
    os.close(writer)
    return "worked"


@app.task(bind=True)
def short(self: TaskContext, number: int) -> int:
    biting_app.note("start", self)
    return number


@app.task
def hears() -> dict[str, Any]:
    """Whether signals reach the handlers of the application, here and in a program."""
    program = [sys.executable, "-S", "-c", "import os, signal; os.kill(os.getpid(), signal.SIGTERM)"]
    return {"heard": heard, "terminated": subprocess.run(program, check=False).returncode}
