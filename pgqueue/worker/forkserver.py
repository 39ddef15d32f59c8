"""The fork server: imports the application once, then forks executors from that clean state.

It has no connection, no loop and no thread of its own, so there is nothing a fork could break. It dies with
its supervisor, and its children with it (on Linux the kernel sees to both; elsewhere they see the end of
their channel).

Talks over one socket: each request is a `FORK` of a few bytes with the child's descriptors, an executor's
channel and board, or the channel of a process that runs hooks; the answers are frames of `wire`.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import json
import logging
import os
import selectors
import signal
import socket
import sys
import threading
import traceback
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

import msgspec

from pgqueue.app import PgQueue
from pgqueue.config import LOG_FORMAT
from pgqueue.errors import ConfigError, PgQueueError
from pgqueue.loading import load_app
from pgqueue.task import Task
from pgqueue.worker.executor import become_executor, run_hook
from pgqueue.worker.signals import stay_when_asked_to_stop
from pgqueue.worker.wire import (
    FORK,
    HOOK,
    Board,
    Exited,
    Forked,
    Loaded,
    LoadFailed,
    TaskFacts,
    clock,
    frame,
)

_PR_SET_PDEATHSIG = 1
LOOK_EVERY = 0.1
"""Seconds between looks at exclusive jobs, where there are such tasks."""


def die_with_parent(parent: int) -> None:
    """Be killed when the parent process ends; leaves at once if it already has.

    The kernel's signal fires when the *thread* that forked us ends, so parents fork from their main thread.
    """
    if sys.platform == "linux":
        import ctypes

        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)


@dataclass
class _Child:
    index: int
    boards: list[Board]
    unproven: bool = False


class ForkServer:
    """Serves the requests of one supervisor until it closes the socket."""

    def __init__(self, app: PgQueue, control: socket.socket) -> None:
        self._app = app
        self._control = control
        self._children: dict[int, _Child] = {}
        self._look_every = LOOK_EVERY if any(task.exclusive for task in app.tasks.values()) else None

    def serve(self) -> None:
        """Fork on request and report exits."""
        wake_reader, wake_writer = socket.socketpair()
        wake_writer.setblocking(False)
        signal.signal(signal.SIGCHLD, lambda *_: None)
        signal.set_wakeup_fd(wake_writer.fileno(), warn_on_full_buffer=False)
        with (
            self._control,
            wake_reader,
            wake_writer,
            _without_wakeups(),  # before its descriptor is closed, whatever ends this
            selectors.DefaultSelector() as selector,
        ):
            selector.register(self._control, selectors.EVENT_READ)
            selector.register(wake_reader, selectors.EVENT_READ)
            inherited = (wake_reader, wake_writer, selector)
            while True:
                for key, _ in selector.select(self._look_every if self._children else None):
                    if key.fileobj is wake_reader:
                        wake_reader.recv(4096)
                    elif not self._answer(inherited):
                        return
                self._reap()
                if self._look_every is not None:
                    self._kill_unproven()

    def _answer(self, inherited: Iterable[socket.socket | selectors.BaseSelector]) -> bool:
        """Fork one child; False when the supervisor is gone.

        Args:
            inherited: What the child has no use for.
        """
        request, descriptors, _, _ = socket.recv_fds(self._control, FORK.size, 2)
        if not request:
            return False
        for descriptor in descriptors:
            os.set_inheritable(descriptor, False)  # they come inheritable; not for programs that tasks start
        channel = socket.socket(fileno=descriptors[0])
        index, name, slots = FORK.unpack(request)
        kind = name.rstrip(b"\0").decode()
        server = os.getpid()
        # Before the fork: the child seals them, and then nobody else can map them.
        boards = Board.map(descriptors[1], slots) if slots and self._look_every is not None else []
        for board in boards[:1]:
            board.keep_from_children()
        try:
            with warnings.catch_warnings():
                # Of threads that the application started; main() has said it once, in our own words.
                warnings.simplefilter("ignore", DeprecationWarning)
                pid = os.fork()
        except OSError:  # too many processes: no reason to take the other executors down
            traceback.print_exc()
            channel.close()
            for descriptor in descriptors[1:]:
                os.close(descriptor)
            self._send(Exited(index, 0, os.EX_OSERR))
            return True
        if pid == 0:
            signal.set_wakeup_fd(-1)
            die_with_parent(server)
            self._control.close()
            for each in inherited:
                each.close()
            if kind == HOOK:
                run_hook(self._app, channel)
            become_executor(self._app, channel, descriptors[1], kind, slots)
        channel.close()
        self._children[pid] = _Child(index, boards)
        for descriptor in descriptors[1:]:
            os.close(descriptor)
        self._send(Forked(index, pid))
        return True

    def _reap(self) -> None:
        for pid, child in list(self._children.items()):
            found, status = os.waitpid(pid, os.WNOHANG)
            if found:
                del self._children[pid]
                self._send(Exited(child.index, pid, os.waitstatus_to_exitcode(status), child.unproven))

    def _kill_unproven(self) -> None:
        """Kill whoever runs an exclusive job that others may take now: the supervisor is frozen, or cannot
        reach the database.
        """
        now = clock()
        for pid, child in self._children.items():
            if not child.unproven and any(board.runs_too_long(now) for board in child.boards):
                child.unproven = True
                os.kill(pid, signal.SIGKILL)  # not waited for yet, so the pid is still its own

    def _send(self, message: msgspec.Struct) -> None:
        self._control.sendall(frame(message))


@contextlib.contextmanager
def _without_wakeups() -> Iterator[None]:
    try:
        yield
    finally:
        signal.set_wakeup_fd(-1)


def facts_of(task: Task[..., Any]) -> TaskFacts:
    """What a supervisor needs to know of a task."""
    return TaskFacts(
        dead_letter_queue=task.dead_letter_queue,
        max_crashes=task.max_crashes,
        runs_once=task.runs_once,
        history=task.history,
        time_limit=task.time_limit,
        time_limit_policy=task.policy.numbers() if task.policy.retries_time_limit else None,
        pool=task.pool,
    )


def main(descriptor: int, parent: int, target: str, overrides: str) -> None:
    """Import `target` (module:attribute) and serve the supervisor at the other end of `descriptor`.

    `overrides`: a JSON object of settings that beat the application's own.
    """
    die_with_parent(parent)
    stay_when_asked_to_stop()  # the terminal's Ctrl-C goes to the whole group
    os.set_inheritable(descriptor, False)  # who else holds it would hide our death from the supervisor
    control = socket.socket(fileno=descriptor)
    misfit = False
    try:
        app = load_app(target)
        in_use = "config" in vars(app)
        try:
            app.configure(**json.loads(overrides))
        except ConfigError:
            misfit = not in_use  # a used application refuses any settings: that is its own mistake
            raise
        app.import_tasks()
        stay_when_asked_to_stop()  # whatever the application has made of these signals
        facts = {name: facts_of(task) for name, task in app.tasks.items()}
        config = app.config
        schedules = [asdict(schedule) for schedule in app.schedules.in_code()]
        if config.pool != "solo":
            with open(os.devnull) as nothing:
                os.dup2(nothing.fileno(), 0)
        # Does nothing if the application has set up its own.
        logging.basicConfig(level=config.log_level, format=LOG_FORMAT)
    except BaseException as error:
        known = isinstance(error, PgQueueError)  # it says by itself what is wrong, and where
        message = str(error) if known else f"{type(error).__name__}: {error}"
        control.sendall(frame(LoadFailed(message, "" if known else traceback.format_exc(), misfit)))
        return
    if threading.active_count() > 1:
        names = ", ".join(thread.name for thread in threading.enumerate()[1:])
        warnings.warn(
            f"importing {target} started threads ({names}); they do not exist in the executors", stacklevel=1
        )
    if any(task.transactional for task in app.tasks.values()):
        importlib.import_module("pgqueue.database.transaction")  # once for all of them
    gc.collect()
    gc.freeze()  # the children share these pages until a collection touches them
    control.sendall(frame(Loaded(facts, asdict(config), app.hooks.names, schedules)))
    with contextlib.suppress(BrokenPipeError, ConnectionResetError):
        ForkServer(app, control).serve()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], sys.argv[4])
