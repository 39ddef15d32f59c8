"""The application of the acceptance tests: bodies that do one thing each and note it in the ledger."""

from __future__ import annotations

import asyncio
import ctypes
import json
import os
import subprocess
import sys
import time
from datetime import UTC, datetime, timedelta
from typing import Any, NoReturn

from pgqueue import PgQueue, TaskContext

app = PgQueue(
    "tests",
    task_routes={
        "tests_app.fails_routed": {"dead_letter_queue": "of_the_route"},
        "tests_app.glob_*": {"dead_letter_queue": "of_the_glob"},
    },
)


def note(event: str, context: TaskContext, **facts: Any) -> None:
    """Append a line to the ledger: one write, which no other process's write can split."""
    request = context.request
    line = {
        "event": event,
        "job": request.id,
        "attempt": request.attempt,
        "pid": os.getpid(),
        "at": time.time(),
    }
    line |= {"worker": request.worker, "retries": request.retries, **facts}
    file = os.open(os.environ["LEDGER"], os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    try:
        # On a line of its own also after one that a killed process could not finish.
        os.write(file, f"\n{json.dumps(line)}\n".encode())
    finally:
        os.close(file)


def wait_for(path: str) -> None:
    while not os.path.exists(path):
        time.sleep(0.005)


@app.task
def echo(value: Any) -> Any:
    return value


@app.task
def length(text: str) -> int:
    return len(text)


@app.task
async def echo_later(value: Any, seconds: float = 0.0) -> Any:
    await asyncio.sleep(seconds)
    return value


@app.task(bind=True)
async def fail_later(self: TaskContext) -> None:
    await asyncio.sleep(0)
    raise LookupError("in a coroutine")


@app.task(bind=True)
def mark(self: TaskContext, label: Any = None) -> None:
    note("start", self, label=label)


@app.task(bind=True)
def work(self: TaskContext, seconds: float, label: Any = None) -> str:
    note("start", self, label=label)
    time.sleep(seconds)
    note("end", self, label=label)
    return "worked"


@app.task(bind=True)
def gated(self: TaskContext, path: str, label: Any = None) -> str:
    """Ends when the test opens the gate."""
    note("start", self, label=label)
    wait_for(path)
    note("end", self, label=label)
    return "through the gate"


@app.task(bind=True)
def facts(self: TaskContext) -> dict[str, Any]:
    request = self.request
    return {
        "id": request.id,
        "attempt": request.attempt,
        "queue": request.queue,
        "priority": request.priority,
        "worker": request.worker,
        "headers": dict(request.headers),
        "pid": os.getpid(),
    }


# Ends of the process.


@app.task(bind=True)
def die(self: TaskContext, how: str, until_attempt: int = 1_000) -> str:
    """Take the process down, in each attempt up to `until_attempt`."""
    note("start", self, label=how)
    if self.request.attempt > until_attempt:
        return "survived"
    if how == "exit":
        os._exit(0)
    if how == "kill":
        os.kill(os.getpid(), 9)
    ctypes.string_at(0)
    return "not reached"


@app.task(dead_letter_queue="crash_site")
def dies_with_a_place() -> None:
    os._exit(7)


# Odd results and odd errors.


@app.task
def odd_result(kind: str) -> Any:
    if kind == "large":
        return "x" * (1 << 20)
    if kind == "object":
        return object()
    if kind == "nan":
        return float("nan")
    if kind == "nul":
        return "a\x00b"
    if kind == "surrogate":
        return "\ud800"
    if kind == "deep":
        value: list[Any] = []
        for _ in range(5_000):
            value = [value]
        return value
    if kind == "endless":
        loop: list[Any] = []
        loop.append(loop)
        return loop
    if kind == "huge number":
        return 10**5_000
    raise AssertionError(kind)


class StrRaises(Exception):
    def __str__(self) -> str:
        raise ValueError("no words")


class StrExits(Exception):
    def __str__(self) -> str:
        raise SystemExit(9)

    __repr__ = __str__


class ReprRaises(Exception):
    def __repr__(self) -> str:
        raise ValueError("no words")


class StrIsNoText(Exception):
    def __str__(self) -> str:
        return 5  # type: ignore[return-value]


class NoModule(Exception):
    __module__ = None  # type: ignore[assignment]


class OddModule(Exception):
    __module__ = "a\x00b\ud800" + "m" * 5_000


class Unhashable(Exception):
    __hash__ = None  # type: ignore[assignment]

    def __eq__(self, other: object) -> bool:
        raise ValueError("no equals")


def _recurse() -> NoReturn:
    _recurse()


def _circle() -> NoReturn:
    first, second = ValueError("first"), ValueError("second")
    first.__cause__, second.__cause__ = second, first
    raise first


def _long_chain() -> NoReturn:
    error: BaseException = ValueError(0)
    for number in range(3_000):
        later = ValueError(number)
        later.__cause__ = error
        error = later
    raise error


@app.task
def hostile(kind: str) -> None:
    errors: dict[str, Any] = {
        "str raises": StrRaises,
        "str exits": StrExits,
        "str is no text": StrIsNoText,
        "repr raises": ReprRaises,
        "repr of an argument raises": lambda: ValueError(ReprRaises("x")),
        "fifty megabytes": lambda: ValueError("m" * (50 << 20)),
        "nul and surrogates": lambda: ValueError("a\x00b\ud800c\udfffd"),
        "system exit": lambda: SystemExit(3),
        "system exit zero": lambda: SystemExit(0),
        "keyboard interrupt": KeyboardInterrupt,
        "generator exit": GeneratorExit,
        "stop iteration": StopIteration,
        "cancelled": asyncio.CancelledError,
        "broken pipe": BrokenPipeError,
        "connection reset": ConnectionResetError,
        "no module": NoModule,
        "odd module": OddModule,
        "unhashable": Unhashable,
        "group": lambda: BaseExceptionGroup("both", [ValueError("a"), KeyboardInterrupt()]),
        "not an exception": lambda: "a string",
    }
    if kind == "recursion":
        _recurse()
    if kind == "circle":
        _circle()
    if kind == "long chain":
        _long_chain()
    raise errors[kind]()


@app.task
def looks_for_a_task(name: str) -> None:
    app.find_task(name)


@app.task
def enqueues_nonsense() -> None:
    app.send_task("tests_app.echo", [object()])


# Odd company.


@app.task
def prints(megabytes: int) -> str:
    line = "noise " * 170 + "\n"
    for _ in range(megabytes * 1_000):
        sys.stdout.write(line)
        sys.stderr.write(line)
    os.write(1, b"straight to the descriptor\n")
    return "printed"


@app.task
def closes_stdout() -> str:
    sys.stdout.close()
    return "closed"


@app.task
def starts_a_program() -> str:
    command = [sys.executable, "-c", "print('from a program')"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return done.stdout.strip()


@app.task(bind=True)
def leaves_a_grandchild(self: TaskContext, path: str) -> int:
    """Fork a process that keeps every descriptor of this one open until the gate opens."""
    pid = os.fork()
    if pid == 0:
        wait_for(path)
        os._exit(0)
    return pid


@app.task(bind=True)
def leaves_an_orphan(self: TaskContext, path: str) -> None:
    """Fork twice, as daemons do: what waits at the gate is no child of this process."""
    pid = os.fork()
    if pid == 0:
        if os.fork() == 0:
            wait_for(path)
        os._exit(0)
    os.waitpid(pid, 0)


@app.task(bind=True)
def dies_beside_a_grandchild(self: TaskContext, path: str) -> int:
    note("start", self)
    if self.request.attempt > 1:
        return self.request.attempt
    if os.fork() == 0:
        wait_for(path)
        os._exit(0)
    os._exit(5)


# Retries.


class Passing(Exception):
    pass


class PassingChild(Passing):
    pass


@app.task(bind=True, autoretry_for=(Passing,), retry_kwargs={"max_retries": 2, "countdown": 0})
def fails_until(self: TaskContext, attempt: int, child: bool = False) -> int:
    note("start", self)
    if self.request.attempt < attempt:
        raise (PassingChild if child else Passing)(f"attempt {self.request.attempt}")
    return self.request.attempt


@app.task(bind=True, autoretry_for=(Passing,), max_retries=3, default_retry_delay=100)
def fails_slowly(self: TaskContext) -> None:
    note("start", self)
    raise Passing("come back later")


@app.task(bind=True, autoretry_for=(Passing,), retry_backoff=40, retry_backoff_max=100, retry_jitter=False)
def backs_off(self: TaskContext) -> None:
    note("start", self)
    raise Passing("backing off")


@app.task(
    bind=True,
    autoretry_for=(Passing,),
    retry_backoff=10_000_000,
    retry_backoff_max=30_000_000,
    max_retries=5,
)
def backs_off_with_jitter(self: TaskContext) -> None:
    raise Passing("backing off")


@app.task(
    bind=True, autoretry_for=(Passing,), dont_autoretry_for=(PassingChild,), retry_kwargs={"countdown": 0}
)
def fails_but_not_as_child(self: TaskContext) -> None:
    note("start", self)
    raise PassingChild("not this one")


@app.task(bind=True, max_retries=1)
def asks_again(self: TaskContext, how: dict[str, Any], times: int = 1_000, seconds: float = 0.0) -> int:
    """self.retry(...) in each of the first `times` attempts."""
    note("start", self)
    time.sleep(seconds)
    if self.request.attempt > times:
        return self.request.attempt
    options: dict[str, Any] = dict(how)
    if "eta_in" in options:
        options["eta"] = datetime.now(UTC) + timedelta(seconds=options.pop("eta_in"))
    if "exc" in options:
        options["exc"] = Passing(options["exc"])
    try:
        raise LookupError("the reason")
    except Exception:
        self.retry(**options)


@app.task(bind=True, max_retries=0)
def swallows(self: TaskContext) -> str:
    """`except Exception` does not catch the wish to run again."""
    try:
        self.retry(countdown=0)
    except Exception:
        return "swallowed"


@app.task(bind=True, dead_letter_queue="of_the_task")
def fails_with_a_place(self: TaskContext) -> None:
    raise KeyError("no retry for this")


@app.task(bind=True)
def fails_routed(self: TaskContext) -> None:
    raise KeyError("no retry for this")


@app.task(bind=True)
def glob_fails(self: TaskContext) -> None:
    raise KeyError("no retry for this")


@app.task(bind=True)
def fails_unless(self: TaskContext, path: str) -> str:
    """Fails until the gate is open: a mistake that somebody mends."""
    note("start", self)
    if not os.path.exists(path):
        raise KeyError("not mended yet")
    return "mended"


@app.task(bind=True)
def chancy(self: TaskContext, label: Any, path: str = "", fatal: bool = False) -> None:
    """Short as a rule; waits at a gate or, the first time, dies."""
    note("start", self, label=label)
    if fatal and self.request.attempt == 1:
        os.kill(os.getpid(), 9)
    if path:
        wait_for(path)
    note("end", self, label=label)


@app.task(bind=True)
def two_gates(self: TaskContext, first: str, second: str) -> int:
    """The first attempt ends at the first gate, later ones at the second."""
    note("start", self)
    wait_for(first if self.request.attempt == 1 else second)
    note("end", self)
    return self.request.attempt
