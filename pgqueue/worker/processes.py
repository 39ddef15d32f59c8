"""The processes of a worker: its fork server and its executors, as sockets and exit statuses.

Executors are children of the fork server, which reaps them and reports how they ended. An executor's death is
handed on only after all it had sent has been read: results that were on their way count.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import signal
import socket
import subprocess
import sys
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import msgspec

from pgqueue.errors import AppNotLoaded, ConfigError, PgQueueError
from pgqueue.hooks import HookName
from pgqueue.job import ClaimedJob
from pgqueue.worker.dispatcher import Executor, Slot
from pgqueue.worker.interrupts import CANCEL_SIGNAL
from pgqueue.worker.wire import (
    FORK,
    HOOK,
    MAX_FRAME,
    Board,
    Exited,
    Forked,
    Frames,
    FromExecutor,
    FromForkServer,
    Jobs,
    Loaded,
    LoadFailed,
    Outbox,
    RunHook,
    decode_from_executor,
    decode_from_fork_server,
    frame,
)

log = logging.getLogger("pgqueue.worker")

_READ = 1 << 18
HOOK_PATIENCE = 10.0
"""Seconds that a hook of the worker may take."""
_EXIT_PATIENCE = 1.0
"""Seconds between the end of an executor's channel and the news of its exit."""


@dataclass(slots=True, eq=False)
class _Line:
    """The supervisor's end of one executor's channel."""

    executor: Executor
    channel: socket.socket
    outbox: Outbox
    frames: Frames = field(default_factory=Frames)
    unsent: deque[memoryview] = field(default_factory=deque)


@dataclass(slots=True, eq=False)
class _RunningHook:
    """A process that was forked to run a hook."""

    ended: asyncio.Future[None]
    pid: int = 0

    def end(self) -> None:
        if not self.ended.done():
            self.ended.set_result(None)


class Owner(Protocol):
    """Who is told what happens to the processes."""

    def on_message(self, executor: Executor, messages: list[FromExecutor]) -> None:
        """An executor said something."""

    def on_exit(self, executor: Executor, how: str, *, unproven: bool) -> None:
        """An executor is gone; how it ended, in words. `unproven`: see `Exited`."""

    def on_lost_fork_server(self) -> None:
        """The fork server is gone, and its children with it."""


class Processes:
    """Starts, feeds, kills and counts the executors of one worker.

    Args:
        target: The application, as module:attribute.
        overrides: Settings that beat the application's own.
    """

    def __init__(self, target: str, overrides: Mapping[str, Any]) -> None:
        self.owner: Owner
        self._target = target
        self._overrides = json.dumps(dict(overrides))
        self._loop = asyncio.get_running_loop()
        self._lines: dict[int, _Line] = {}
        self._next_index = 0
        self._control: socket.socket | None = None
        self._control_frames = Frames()
        self._server: subprocess.Popen[bytes] | None = None
        self._watch: int | None = None
        self._loaded: asyncio.Future[Loaded] | None = None
        self._hooks: frozenset[str] = frozenset()
        self._running_hooks: dict[int, _RunningHook] = {}
        self.proven_until = 0.0

    async def start(self) -> Loaded:
        """Start the fork server; returns what it has to say about the application.

        Raises:
            AppNotLoaded: The application cannot be imported.
            ConfigError: It can, but the overrides do not fit its own settings.
        """
        ours, theirs = socket.socketpair()
        ours.setblocking(False)
        self._control = ours
        self._control_frames = Frames()
        self._loaded = self._loop.create_future()
        program = [sys.executable, "-m", "pgqueue.worker.forkserver"]
        arguments = [*program, str(theirs.fileno()), str(os.getpid()), self._target, self._overrides]
        with theirs:
            # It keeps the terminal for the pool that is there for debuggers, and else lets go of it.
            self._server = subprocess.Popen(arguments, pass_fds=[theirs.fileno()])  # noqa: ASYNC220
        self._loop.add_reader(ours, self._read_control, ours)
        if hasattr(os, "pidfd_open"):
            # What the application forks at its import may hold the other end of the socket open.
            with contextlib.suppress(OSError):
                self._watch = os.pidfd_open(self._server.pid)
                self._loop.add_reader(self._watch, self._server_ended, ours)
        loaded = await self._loaded
        self._hooks = frozenset(loaded.hooks)
        return loaded

    @property
    def server_pid(self) -> int | None:
        """The fork server's process, from its start until it has been waited for."""
        return self._server.pid if self._server is not None else None

    def fork(self, pool: str, slots: int) -> None:
        """Ask for one more executor; it reports itself ready."""
        if self._control is None:
            return
        ours, theirs = socket.socketpair()
        descriptor = Board.create(slots)
        self._next_index += 1
        index = self._next_index
        try:
            boards = Board.map(descriptor, slots)
            request = FORK.pack(index, pool.encode(), slots)
            socket.send_fds(self._control, [request], [theirs.fileno(), descriptor])
        except OSError:
            ours.close()  # the fork server is gone: its end of file is on the way
            return
        finally:
            theirs.close()
            os.close(descriptor)
        ours.setblocking(False)
        executor = Executor(index, pool)
        for number, board in enumerate(boards):
            board.proven_until = self.proven_until
            executor.slots.append(Slot(executor, number, board))
        line = _Line(executor, ours, Outbox(boards))
        self._lines[index] = line
        self._loop.add_reader(ours, self._read, line)

    async def run_hook(self, name: HookName, worker: str) -> None:
        """Have the application told, in a process of its own; returns when it has been, or takes too long."""
        if name not in self._hooks or self._control is None:
            return
        self._next_index += 1
        index = self._next_index
        ours, theirs = socket.socketpair()
        with ours, theirs:
            ours.sendall(frame(RunHook(name, worker)))
            try:
                socket.send_fds(self._control, [FORK.pack(index, HOOK.encode(), 0)], [theirs.fileno()])
            except OSError:
                return
            hook = self._running_hooks[index] = _RunningHook(self._loop.create_future())
            try:
                async with asyncio.timeout(HOOK_PATIENCE):
                    await hook.ended
            except TimeoutError:
                log.error("hook_killed hook=%s seconds=%g", name, HOOK_PATIENCE)
                if hook.pid:
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(hook.pid, signal.SIGKILL)
            finally:
                self._running_hooks.pop(index, None)

    def count(self, pool: str) -> int:
        """Executors of this pool asked for and not gone."""
        return sum(line.executor.pool == pool for line in self._lines.values())

    def send(self, slot: Slot, jobs: list[ClaimedJob]) -> None:
        """Send jobs to a slot; what does not fit into the socket follows when it can."""
        line = self._lines.get(slot.executor.index)
        if line is None:
            return
        data = frame(Jobs(jobs, slot.number))
        if len(data) > MAX_FRAME:
            if len(jobs) > 1:
                for job in jobs:
                    self.send(slot, [job])
                return
            data = frame(Jobs([_without_payload(jobs[0], len(data))], slot.number))
        if line.unsent:
            line.unsent.append(memoryview(data))
            return
        try:
            sent = line.channel.send(data)
        except BlockingIOError:
            sent = 0
        except OSError:
            return  # it has just died: its exit is on the way
        if sent < len(data):
            line.unsent.append(memoryview(data)[sent:])
            self._loop.add_writer(line.channel, self._write, line)

    def prove(self, until: float) -> None:
        """Tell all executors until when nobody takes this worker's jobs."""
        self.proven_until = until
        for line in self._lines.values():
            for slot in line.executor.slots:
                slot.board.proven_until = until

    def retire(self, executor: Executor) -> None:
        """Let an executor without jobs leave."""
        executor.retiring = True
        line = self._lines.get(executor.index)
        if line is not None:
            with contextlib.suppress(OSError):
                line.channel.shutdown(socket.SHUT_WR)

    def tell_cancelled(self, executor: Executor) -> None:
        """Have an executor look at its boards: a job it runs is cancelled."""
        if executor.pid:
            with contextlib.suppress(ProcessLookupError):
                os.kill(executor.pid, CANCEL_SIGNAL)

    def kill(self, executor: Executor) -> None:
        """Kill an executor at once."""
        if executor.pid:
            with contextlib.suppress(ProcessLookupError):
                os.kill(executor.pid, signal.SIGKILL)

    async def stop(self) -> None:
        """Close everything; waits for the fork server to leave, and with it whoever is left of its
        children.
        """
        for line in list(self._lines.values()):
            self.kill(line.executor)
            self._close(line)
        self._lines.clear()
        self._drop_control()
        server = self._server
        if server is not None:
            if self._loaded is not None and (self._loaded.cancelled() or not self._loaded.done()):
                server.kill()  # still importing the application: it would not notice before it is done
            try:
                await asyncio.to_thread(server.wait, 5)
            except subprocess.TimeoutExpired:
                server.kill()
                await asyncio.to_thread(server.wait)
            self._server = None

    def _read(self, line: _Line) -> None:
        try:
            data = line.channel.recv(_READ)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        if not data:
            self._loop.remove_reader(line.channel)  # its exit status is on the way
            self._loop.call_later(_EXIT_PATIENCE, self._cut_off, line)
            return
        self._hand_on(line, data)

    def collect(self) -> None:
        """Hand on the results that wait behind a job that goes on for longer than one of a chunk should."""
        for line in list(self._lines.values()):
            self._look_into_outbox(line, line.outbox.stuck())

    def _look_into_outbox(self, line: _Line, data: bytes) -> None:
        if data:
            self._hand_on(line, data, Frames())

    def _cut_off(self, line: _Line) -> None:
        """Kill an executor that cannot say any more how its job ends: a task has closed its channel."""
        if self._lines.get(line.executor.index) is line:
            log.error("executor_cut_off pid=%d", line.executor.pid)
            self.kill(line.executor)

    def _hand_on(self, line: _Line, data: bytes, frames: Frames | None = None) -> None:
        if line.executor.garbled:
            return
        messages: list[FromExecutor] = []
        try:
            for payload in (frames or line.frames).feed(data):
                messages.append(decode_from_executor(payload))  # those before the fault count
        except (ValueError, msgspec.DecodeError) as error:
            # A task wrote to a descriptor that is not its own: what this executor says from here on cannot
            # be trusted.
            line.executor.garbled = True
            log.error("executor_garbled pid=%d error=%s", line.executor.pid, error)
            self.kill(line.executor)
        self.owner.on_message(line.executor, messages)

    def _write(self, line: _Line) -> None:
        rest = line.unsent.popleft()
        try:
            rest = rest[line.channel.send(rest) :]
        except BlockingIOError:
            pass
        except OSError:
            line.unsent.clear()
            rest = rest[:0]
        if rest:
            line.unsent.appendleft(rest)
        if not line.unsent:
            self._loop.remove_writer(line.channel)

    def _read_control(self, control: socket.socket) -> None:
        try:
            data = control.recv(_READ)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        if data:
            self._take_in(data)
            return
        self._lost_server()

    def _server_ended(self, control: socket.socket) -> None:
        """The fork server's process has ended; what it had sent still counts."""
        if self._control is control:
            with contextlib.suppress(OSError):
                while data := control.recv(_READ):
                    self._take_in(data)
            self._lost_server()

    def _take_in(self, data: bytes) -> None:
        for payload in self._control_frames.feed(data):
            self._hear(decode_from_fork_server(payload))

    def _lost_server(self) -> None:
        self._drop_control()
        loaded, self._loaded = self._loaded, None
        if loaded is not None and not loaded.done():
            loaded.set_exception(
                AppNotLoaded(f"the process that imports {self._target} ended before it was done")
            )
            return
        if loaded is not None and (loaded.cancelled() or loaded.exception() is not None):
            return  # who started it knows
        for hook in self._running_hooks.values():
            hook.end()
        for line in list(self._lines.values()):
            self._exit(line, "lost its fork server")
        self.owner.on_lost_fork_server()

    def _hear(self, message: FromForkServer) -> None:
        if isinstance(message, Loaded):
            if self._loaded is not None and not self._loaded.done():
                self._loaded.set_result(message)
        elif isinstance(message, LoadFailed):
            if self._loaded is not None and not self._loaded.done():
                self._loaded.set_exception(_why_not_loaded(self._target, message))
        elif isinstance(message, Forked):
            line = self._lines.get(message.index)
            if line is not None:
                line.executor.pid = message.pid
            elif message.index in self._running_hooks:
                self._running_hooks[message.index].pid = message.pid
        elif isinstance(message, Exited):
            line = self._lines.get(message.index)
            if line is not None:
                self._exit(line, _how(message), unproven=message.unproven)
            elif message.index in self._running_hooks:
                self._running_hooks.pop(message.index).end()

    def _exit(self, line: _Line, how: str, *, unproven: bool = False) -> None:
        with contextlib.suppress(
            OSError
        ):  # nothing more has arrived; a grandchild may hold the other end open
            while data := line.channel.recv(_READ):
                self._hand_on(line, data)
        self._look_into_outbox(line, line.outbox.unsent)
        self._close(line)
        self._lines.pop(line.executor.index, None)
        self.owner.on_exit(line.executor, how, unproven=unproven)
        for slot in line.executor.slots:
            slot.board.close()
        line.outbox.close()

    def _close(self, line: _Line) -> None:
        self._loop.remove_reader(line.channel)
        self._loop.remove_writer(line.channel)
        line.channel.close()

    def _drop_control(self) -> None:
        control, self._control = self._control, None
        if control is not None:
            self._loop.remove_reader(control)
            control.close()
        watch, self._watch = self._watch, None
        if watch is not None:
            self._loop.remove_reader(watch)
            os.close(watch)


def _why_not_loaded(target: str, failed: LoadFailed) -> PgQueueError:
    if failed.settings:
        return ConfigError(failed.message)
    return AppNotLoaded(f"cannot load {target}: {failed.message}\n{failed.traceback}".rstrip())


def _without_payload(job: ClaimedJob, size: int) -> ClaimedJob:
    """The job in a form that can be sent, and that the executor refuses as it should."""
    why = f"too large to run: {size:,} bytes, at most {MAX_FRAME:,}"
    task = job.task[:1_000]
    return msgspec.structs.replace(job, task=task, args=json.dumps(why), kwargs="{}", headers="{}")


def _how(message: Exited) -> str:
    if message.status >= 0:
        return f"executor {message.pid} exited with status {message.status}"
    try:
        name = signal.Signals(-message.status).name
    except ValueError:
        name = f"signal {-message.status}"
    return f"executor {message.pid} was killed by {name}"
