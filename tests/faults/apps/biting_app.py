"""Bodies that harm the process they run in: one task each for errors, results and everything else."""

from __future__ import annotations

import asyncio
import ctypes
import gc
import importlib
import json
import locale
import multiprocessing
import os
import resource
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from typing import Any, NoReturn

from pgqueue import PgQueue, TaskContext
from pgqueue.errors import PayloadError, Retry, UnknownTask

app = PgQueue("biting")
left_open: list[Any] = []
dumps, write = json.dumps, os.write  # some of the bodies patch them


def note(event: str, context: TaskContext) -> None:
    request = context.request
    line = {"event": event, "job": request.id, "attempt": request.attempt, "pid": os.getpid()}
    file = os.open(os.environ["LEDGER"], os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    try:
        write(file, (dumps(line) + "\n").encode())
    finally:
        os.close(file)


@app.task(bind=True)
def good(self: TaskContext, label: Any = None) -> int:
    """What must go on whatever the others do."""
    note("start", self)
    return os.getpid()


# Errors.


class ClassRaises(Exception):
    @property
    def __class__(self) -> type:  # type: ignore[override]
        raise ValueError("no class")


class ClassExits(Exception):
    @property
    def __class__(self) -> type:  # type: ignore[override]
        raise SystemExit(5)


class ClassLies(Exception):
    @property
    def __class__(self) -> type:  # type: ignore[override]
        return Retry


class TracebackRaises(Exception):
    @property
    def __traceback__(self) -> Any:  # type: ignore[override]
        raise ValueError("no traceback")


class CauseRaises(Exception):
    @property
    def __cause__(self) -> Any:  # type: ignore[override]
        raise ValueError("no cause")


class OurTraceback(PayloadError):
    @property
    def __traceback__(self) -> Any:  # type: ignore[override]
        raise ValueError("no traceback")


class OurClass(UnknownTask):
    @property
    def __class__(self) -> type:  # type: ignore[override]
        raise ValueError("no class")


class EvilText(str):
    def encode(self, *args: Any, **kwargs: Any) -> NoReturn:  # type: ignore[override]
        raise ValueError("no bytes")

    def __str__(self) -> NoReturn:
        raise ValueError("no text")

    def __len__(self) -> NoReturn:
        raise ValueError("no length")

    splitlines = isprintable = __contains__ = __iter__ = isascii = __len__  # type: ignore[assignment]


class StrIsEvil(Exception):
    def __str__(self) -> str:
        return str.__new__(EvilText, "evil but text")


class StrIsSlow(Exception):
    def __str__(self) -> str:
        time.sleep(0.2)
        return "at last"


class NoNames(type):
    def __getattribute__(cls, name: str) -> NoReturn:
        raise ValueError("no names")

    def __eq__(cls, other: object) -> bool:
        raise ValueError("no equals")

    def __hash__(cls) -> int:
        raise ValueError("no hash")


class OddNames(type):
    def __getattribute__(cls, name: str) -> Any:
        return 5 if name in ("__name__", "__qualname__", "__module__") else super().__getattribute__(name)


Nameless = NoNames("Nameless", (Exception,), {})
OddlyNamed = OddNames("OddlyNamed", (Exception,), {})
LongNamed = type("N" * 100_000, (Exception,), {"__module__": "m\0" * 100_000})


def chain(length: int, link: str) -> BaseException:
    error: BaseException = ValueError("the first")
    for _ in range(length):
        later = ValueError("the last")
        setattr(later, link, error)
        error = later
    return error


def nested_groups(depth: int) -> BaseException:
    error: Exception = ValueError("the innermost")
    for _ in range(depth):
        error = ExceptionGroup("a group", [error])
    return error


def wide_group(width: int) -> BaseException:
    return ExceptionGroup("wide", [ValueError(number) for number in range(width)])


def retry_of(cause: BaseException) -> BaseException:
    return Retry(delay=0.0, cause=cause, max_retries=0)


ERRORS: dict[str, Callable[[], BaseException]] = {
    "its class raises": ClassRaises,
    "its class exits": ClassExits,
    "its class is another": ClassLies,
    "its traceback raises": TracebackRaises,
    "its cause raises": CauseRaises,
    "ours, its traceback raises": OurTraceback,
    "ours, its class raises": OurClass,
    "its text is evil": StrIsEvil,
    "its text takes long": StrIsSlow,
    "its class has no name": Nameless,
    "its class has odd names": OddlyNamed,
    "its class has a long name": LongNamed,
    "a chain of 100,000 causes": lambda: chain(100_000, "__cause__"),
    "a chain of 100,000 contexts": lambda: chain(100_000, "__context__"),
    "groups 5,000 deep": lambda: nested_groups(5_000),
    "a group of 20,000": lambda: wide_group(20_000),
    "a retry for something odd": lambda: retry_of(ClassRaises()),
    "a retry for something without a traceback": lambda: retry_of(TracebackRaises()),
    "a text of 50 MB": lambda: ValueError("\x00" * (50 << 20)),
}


@app.task(bind=True)
def fails(self: TaskContext, kind: str) -> None:
    note("start", self)
    raise ERRORS[kind]()


@app.task(bind=True, autoretry_for=(ClassRaises, Nameless), retry_kwargs={"max_retries": 1, "countdown": 0})
def fails_by_policy(self: TaskContext, kind: str) -> None:
    note("start", self)
    raise ERRORS[kind]()


@app.task(bind=True)
def fails_at_the_bottom(self: TaskContext, room: int) -> int:
    """Return or raise `room` frames above the limit of recursion: what is ours runs near it."""
    note("start", self)

    def dive(left: int) -> int:
        return dive(left - 1) if left else 0

    depth, frame = 0, sys._getframe()
    while (above := frame.f_back) is not None:
        depth, frame = depth + 1, above
    sys.setrecursionlimit(depth + room + 3)
    return dive(room * 2 + 5)  # deeper than the limit, by how much depends on Python's version


# Results.


class ListRaises(list[int]):
    def __iter__(self) -> Iterator[int]:
        raise ValueError("no items")

    __len__ = __getitem__ = __iter__  # type: ignore[assignment]


class DictRaises(dict[str, int]):
    def __iter__(self) -> Iterator[str]:
        raise ValueError("no keys")

    items = keys = values = __len__ = __getitem__ = __iter__  # type: ignore[assignment]


class Endless:
    def __iter__(self) -> Iterator[int]:
        while True:
            yield 0


class Exits:
    def __repr__(self) -> str:
        raise SystemExit(4)

    __str__ = __iter__ = __hash__ = __eq__ = __len__ = __bool__ = __repr__  # type: ignore[assignment]

    def __getattr__(self, name: str) -> NoReturn:
        raise SystemExit(4)


def generator() -> Iterator[int]:
    yield 1


RESULTS: dict[str, Callable[[], Any]] = {
    "fifty megabytes": lambda: "x" * (50 << 20),
    "a million numbers": lambda: list(range(1_000_000)),
    "a generator": generator,
    "a list that raises": lambda: ListRaises([1]),
    "a dict that raises": lambda: DictRaises(a=1),
    "something endless": Endless,
    "something that exits": Exits,
    "a list of what exits": lambda: [Exits()],
    "an error that raises": ClassRaises,
    "keys of all kinds": lambda: {1: 1, None: 2, 2.5: 3},
    "a tuple as a key": lambda: {(1, 2): 3},
    "the same key twice": lambda: {1: 1, "1": 2},
    "an evil text": lambda: EvilText("x"),
    # Once pydantic is there, a result may be one of its models: its class is asked for.
    "an error whose class exits": lambda: (importlib.import_module("pydantic"), ClassExits())[1],
    "an evil key": lambda: {EvilText("x"): 1},
    "a class": lambda: ClassRaises,
    "a module": lambda: sys,
    "a lock": threading.Lock,
    "bytes": lambda: b"\xff\x00",
    "infinity": lambda: [float("inf")],
    "sets in a set": lambda: {frozenset({1})},
    "a dict in a circle": lambda: (lambda it: it.update(it=it) or it)({}),
}


@app.task(bind=True)
def returns(self: TaskContext, kind: str) -> Any:
    note("start", self)
    return RESULTS[kind]()


# Everything else.


def close_standard_descriptors() -> None:
    for descriptor in range(3):
        os.close(descriptor)


def close_everything() -> None:
    os.closerange(3, 4_096)


def close_everything_and_open_others() -> None:
    os.closerange(3, 4_096)
    for _ in range(20):
        left_open.extend(socket.socketpair())


def close_everything_and_stay() -> None:
    os.closerange(3, 4_096)
    time.sleep(3_600)


def close_all_sockets() -> None:
    for each in gc.get_objects():
        if isinstance(each, socket.socket):
            each.close()


def write_into_everything(garbage: bytes = b"garbage of somebody else's") -> None:
    for descriptor in range(3, 64):
        try:
            os.write(descriptor, garbage)
        except OSError:
            continue


def write_zeros_into_everything() -> None:
    write_into_everything(bytes(64))


def remove_the_folder() -> None:
    folder = tempfile.mkdtemp()
    os.chdir(folder)
    os.rmdir(folder)


def ignore_signals() -> None:
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGCHLD, signal.SIGHUP, signal.SIGPIPE):
        signal.signal(number, signal.SIG_IGN)


def default_signals() -> None:
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGCHLD, signal.SIGHUP, signal.SIGPIPE):
        signal.signal(number, signal.SIG_DFL)


def block_signals() -> None:
    signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())


def leave_an_alarm() -> None:
    def ring(*_: object) -> NoReturn:
        raise TimeoutError("the alarm of a job that has ended")

    signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, 0.05)


def become_a_session() -> None:
    os.setsid()


def leave_threads() -> None:
    for _ in range(3):
        threading.Thread(target=time.sleep, args=(3_600,), daemon=False).start()


def leave_a_loop() -> None:
    loop = asyncio.new_event_loop()
    asyncio.set_event_loop(loop)
    threading.Thread(target=loop.run_forever, daemon=True).start()


def exit_in_a_thread() -> None:
    thread = threading.Thread(target=sys.exit, args=(3,))
    thread.start()
    thread.join()


def return_twice() -> None:
    os.fork()


def return_twice_from_a_loop() -> None:
    async def fork() -> None:
        os.fork()

    asyncio.run(fork())


def raise_in_the_other() -> None:
    if os.fork() == 0:
        raise ValueError("in the child only")


def exit_in_the_other() -> None:
    pid = os.fork()
    if pid == 0:
        sys.exit(7)
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    assert status == 7, status


def fork_and_fork() -> None:
    os.fork()
    os.fork()


def start_processes() -> None:
    for method in ("fork", "spawn"):
        context = multiprocessing.get_context(method)
        process = context.Process(target=os.getpid)
        process.start()
        process.join()
        assert process.exitcode == 0


def terminate_a_process() -> None:
    process = multiprocessing.get_context("fork").Process(target=time.sleep, args=(3_600,))
    process.start()
    process.terminate()
    process.join(20)
    exitcode = process.exitcode
    process.kill()
    process.join()
    assert exitcode == -signal.SIGTERM, exitcode


def fork_a_pool() -> None:
    with multiprocessing.get_context("fork").Pool(2) as pool:
        assert pool.map(abs, [-1, -2]) == [1, 2]


def lower_the_recursion_limit() -> None:
    depth, frame = 0, sys._getframe()
    while (above := frame.f_back) is not None:
        depth, frame = depth + 1, above
    sys.setrecursionlimit(depth + 5)


def trace() -> None:
    sys.settrace(lambda *_: None)
    sys.setprofile(lambda *_: None)


def trace_and_raise() -> None:
    def tracer(*_: object) -> NoReturn:
        raise ValueError("no frame without me")

    sys.settrace(tracer)


def patch_everything() -> None:
    def broken(*_: object, **__: object) -> NoReturn:
        raise ValueError("patched")

    for module, name in (
        (time, "time"),
        (time, "monotonic"),
        (json, "dumps"),
        (json, "loads"),
        (os, "read"),
        (os, "write"),
        (sys, "exit"),
        (warnings, "warn"),
        (sys, "excepthook"),
        (sys, "unraisablehook"),
    ):
        setattr(module, name, broken)


def leave_garbage_that_raises() -> None:
    class Garbage:
        def __del__(self) -> None:
            raise ValueError("in __del__")

    one, other = Garbage(), Garbage()
    one.other, other.other = other, one  # type: ignore[attr-defined]


def warn() -> None:
    warnings.warn("look out", RuntimeWarning, stacklevel=1)
    warnings.simplefilter("error")


def change_the_locale() -> None:
    for name in ("de_DE.UTF-8", "C.UTF-8", "C"):
        try:
            locale.setlocale(locale.LC_ALL, name)
        except locale.Error:
            continue
        break


def clear_the_environment() -> None:
    ledger = os.environ["LEDGER"], os.environ["ACCEPTANCE_MARK"]
    os.environ.clear()
    os.environ["LEDGER"], os.environ["ACCEPTANCE_MARK"] = ledger


class Mute:
    def __getattr__(self, name: str) -> NoReturn:
        raise ValueError("no streams here")


def replace_streams() -> None:
    sys.stdout = sys.stderr = Mute()  # type: ignore[assignment]


def run_out_of_memory() -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    with open("/proc/self/statm") as file:
        used = int(file.read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + (32 << 20), hard))
    try:
        bytearray(1 << 30)
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def stay_out_of_memory() -> None:
    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    with open("/proc/self/statm") as file:
        used = int(file.read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used, hard))
    left_open.append(bytearray(1 << 30))


def run_out_of_descriptors() -> None:
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (64, hard))
    mine = []
    try:
        while True:
            mine.append(open(os.devnull))  # noqa: SIM115
    finally:
        left_open.extend(mine[5:])  # the next jobs have a few


def abort() -> None:
    os.abort()


def crash_in_c() -> None:
    ctypes.string_at(0)


DEEDS = {
    deed.__name__: deed
    for deed in (
        close_standard_descriptors,
        close_everything,
        close_everything_and_open_others,
        close_everything_and_stay,
        close_all_sockets,
        write_into_everything,
        write_zeros_into_everything,
        remove_the_folder,
        ignore_signals,
        default_signals,
        block_signals,
        leave_an_alarm,
        become_a_session,
        leave_threads,
        leave_a_loop,
        exit_in_a_thread,
        return_twice,
        return_twice_from_a_loop,
        raise_in_the_other,
        exit_in_the_other,
        fork_and_fork,
        start_processes,
        terminate_a_process,
        fork_a_pool,
        lower_the_recursion_limit,
        trace,
        trace_and_raise,
        patch_everything,
        leave_garbage_that_raises,
        warn,
        change_the_locale,
        clear_the_environment,
        replace_streams,
        run_out_of_memory,
        stay_out_of_memory,
        run_out_of_descriptors,
        abort,
        crash_in_c,
    )
}


@app.task(bind=True)
def does(self: TaskContext, deed: str) -> str:
    note("start", self)
    DEEDS[deed]()
    return "done"


# What the process of a task looks like.


@app.task
def surroundings() -> dict[str, Any]:
    """Descriptors, threads and signals, in this process and in programs that it starts."""
    look = (
        "import json, os, signal\n"
        "lines = dict(line.split(':', 1) for line in open('/proc/self/status'))\n"
        "masks = {name: int(lines[name], 16) for name in ('SigBlk', 'SigIgn', 'SigCgt')}\n"
        "print(json.dumps({'masks': masks, 'descriptors': sorted(map(int, os.listdir('/proc/self/fd')))}))\n"
    )
    ours = {}
    for name in os.listdir("/proc/self/fd"):
        try:
            ours[name] = os.readlink(f"/proc/self/fd/{name}")
        except OSError:
            continue
    command = [sys.executable, "-S", "-c", look]
    program = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    careless = subprocess.run(command, capture_output=True, text=True, check=True, close_fds=False).stdout
    return {
        "pid": os.getpid(),
        "ours": ours,
        "threads": threading.active_count(),
        "tasks": len(os.listdir("/proc/self/task")),
        "mask": sorted(signal.pthread_sigmask(signal.SIG_BLOCK, [])),
        "wakeup": signal.set_wakeup_fd(-1),
        "program": json.loads(program),
        "careless": json.loads(careless),
    }
