"""What travels between a supervisor, its fork server and its executors, and the board they share.

Frames are a four-byte length and MessagePack, over a socket pair. Job arguments pass through as the JSON text
that the database sent; only the executor decodes them.

An executor has one slot or several, each with jobs of its own, numbered from one, and a board of its own.

What became of a job is told before the slot's next one starts: by the socket, or, when the rest of a chunk of
short jobs follows at once, by writing it into the outbox, shared memory that outlives the process. It is sent
with the chunk's last result at the latest. What stays there, behind a job that turned out long or in a
process that died, the supervisor reads for itself; it knows by the number what it has heard already.

The board is 320 bytes of shared memory per slot. The executor writes the number of the job it starts; the
supervisor reads it, so a crash costs only the job that was running and a stall is seen without asking. To
take jobs back, the supervisor writes a range of numbers that must not start any more. Each side writes its
own cell before it reads the other's: either the executor sees the range, or the supervisor sees that the job
has started. Nobody has to answer, so jobs come back even from an executor that is stuck in C code.

For tasks whose runs must never overlap the board also says until when the worker can prove that it is alive:
the supervisor puts it forward with each heartbeat, and the fork server, which needs neither the database nor
the supervisor for it, kills an executor that is still in such a job then.
"""

from __future__ import annotations

import contextlib
import math
import mmap
import os
import struct
import sys
import tempfile
import time
from collections.abc import Iterator
from typing import Any

import msgspec

from pgqueue.job import ClaimedJob, Progress

HEADER = 4
MAX_FRAME = 64 << 20
_F_SEAL_FUTURE_WRITE = 0x10

if sys.platform == "linux":

    def clock() -> float:
        """Seconds that also count while the machine sleeps, the same in all processes of this machine."""
        return time.clock_gettime(time.CLOCK_BOOTTIME)
else:
    clock = time.monotonic


class Jobs(msgspec.Struct, array_like=True, tag="jobs"):
    """Supervisor to executor: run these in that slot, in this order."""

    jobs: list[ClaimedJob]
    slot: int = 0


class RunHook(msgspec.Struct, array_like=True, tag="hook"):
    """Supervisor to a process that was forked for it: tell the hooks of this name."""

    name: str
    worker: str


class Ready(msgspec.Struct, array_like=True, tag="ready"):
    """Executor to supervisor: waiting for jobs."""

    pid: int


class Succeeded(msgspec.Struct, array_like=True, tag="ok", gc=False):
    """Executor to supervisor. Times are `clock()`; `result` is JSON text or None.

    `acked`: the database knows already.
    """

    number: int
    started: float
    finished: float
    result: str | None = None
    result_error: str | None = None
    acked: bool = False
    slot: int = 0


class Failed(msgspec.Struct, array_like=True, tag="failed", gc=False):
    """Executor to supervisor: the run failed. `delay` is None when the job is dead, and `reason` says why.

    `reason` "crashed": it was cut off, and counts as a crash.
    """

    number: int
    started: float
    finished: float
    error_class: str
    error_message: str
    traceback: str
    delay: float | None = None
    max_retries: int | None = None
    reason: str = ""
    dead_letter_queue: str | None = None
    slot: int = 0


class Snoozed(msgspec.Struct, array_like=True, tag="snoozed", gc=False):
    """Executor to supervisor: run it again after `delay` seconds, and nothing was wrong."""

    number: int
    started: float
    finished: float
    delay: float
    slot: int = 0


class Cancelled(msgspec.Struct, array_like=True, tag="cancelled", gc=False):
    """Executor to supervisor: the run has ended because somebody wanted it cancelled."""

    number: int
    started: float
    finished: float
    slot: int = 0


class Released(msgspec.Struct, array_like=True, tag="released", gc=False):
    """Executor to supervisor: nothing of the run is there, and nothing was wrong with it.

    `uncertain`: or it has ended, and the database knows.
    """

    number: int
    uncertain: bool = False
    slot: int = 0


class Stale(msgspec.Struct, array_like=True, tag="stale", gc=False):
    """Executor to supervisor: nothing of the run is there, because the job is somebody else's."""

    number: int
    slot: int = 0


class Tired(msgspec.Struct, array_like=True, tag="tired"):
    """Executor to supervisor: has grown beyond the limit, to `memory` KiB, and starts nothing more."""

    memory: int


class Skipped(msgspec.Struct, array_like=True, tag="skipped", gc=False):
    """Executor to supervisor: not started, because it was taken back."""

    number: int
    slot: int = 0


class TaskFacts(msgspec.Struct, array_like=True):
    """What a supervisor needs to know of a task without importing it.

    Attributes:
        max_crashes: None for the worker's.
        runs_once: A run that may have begun is not repeated when its process or its worker is lost.
        history: What succeeds is kept.
        time_limit: Seconds after which a run is killed; None or 0 for never.
        pool: What it asks to run in; None for the worker's own.
        time_limit_policy: The numbers of the `RetryPolicy` for what was killed so; None: it is dead.
    """

    dead_letter_queue: str | None = None
    max_crashes: int | None = None
    runs_once: bool = False
    history: bool = True
    time_limit: float | None = None
    time_limit_policy: dict[str, Any] | None = None
    pool: str | None = None


class Loaded(msgspec.Struct, array_like=True, tag="loaded"):
    """Fork server to supervisor: the application is imported. `config`: the fields of its `Config`.

    `hooks`: names of those it has. `schedules`: those in its code, see `put_schedules.sql`.
    """

    tasks: dict[str, TaskFacts]
    config: dict[str, Any]
    hooks: list[str] = []
    schedules: list[dict[str, Any]] = []


class LoadFailed(msgspec.Struct, array_like=True, tag="load_failed"):
    """Fork server to supervisor: the application could not be imported.

    `settings`: it could, but what the worker was given beside it does not fit.
    """

    message: str
    traceback: str
    settings: bool = False


class Forked(msgspec.Struct, array_like=True, tag="forked"):
    """Fork server to supervisor: the executor asked for is this process."""

    index: int
    pid: int


class Exited(msgspec.Struct, array_like=True, tag="exited"):
    """Fork server to supervisor: an executor is gone; `status` as `os.waitstatus_to_exitcode` gives it.

    `unproven`: it was killed in an exclusive job, when the worker could not prove any more that it is alive.
    """

    index: int
    pid: int
    status: int
    unproven: bool = False


Ended = Succeeded | Failed | Snoozed | Cancelled | Released | Stale
FromExecutor = Ready | Ended | Tired | Skipped
FromForkServer = Loaded | LoadFailed | Forked | Exited

FORK = struct.Struct("=I8sH")
"""Supervisor to fork server, with the child's channel and, for an executor, its board: its index, its pool or
`HOOK`, and its slots."""
HOOK = "hook"

_encoder = msgspec.msgpack.Encoder()
_decode_jobs = msgspec.msgpack.Decoder(Jobs).decode
_decode_hook = msgspec.msgpack.Decoder(RunHook).decode
_decode_from_executor = msgspec.msgpack.Decoder(FromExecutor).decode
_decode_from_fork_server = msgspec.msgpack.Decoder(FromForkServer).decode


def frame(message: msgspec.Struct) -> bytearray:
    """The message with its length in front."""
    buffer = bytearray(HEADER)
    _encoder.encode_into(message, buffer, HEADER)
    buffer[:HEADER] = (len(buffer) - HEADER).to_bytes(HEADER, "big")
    return buffer


class Frames:
    """Cuts a byte stream into frames."""

    def __init__(self) -> None:
        self._parts: list[bytes] = []
        self._missing = 0

    def feed(self, data: bytes) -> Iterator[bytes]:
        """The payloads completed by `data`; ValueError when the stream is not ours."""
        if self._parts:
            self._parts.append(data)
            if len(data) < self._missing:
                self._missing -= len(data)
                return
            data = b"".join(self._parts)
            self._parts = []
        start, end = 0, len(data)
        missing = HEADER
        while end - start >= HEADER:
            payload = start + HEADER
            length = int.from_bytes(data[start:payload], "big")
            if length > MAX_FRAME:
                raise ValueError(f"a frame is at most {MAX_FRAME} bytes, got one of {length}")
            if end - payload < length:
                missing = HEADER + length
                break
            start = payload + length
            yield data[payload:start]
        if start < end:
            self._parts = [data[start:]]
            self._missing = missing - (end - start)


def decode_jobs(payload: bytes) -> Jobs:
    """What an executor reads."""
    return _decode_jobs(payload)


def decode_hook(payload: bytes) -> RunHook:
    """What a process that was forked for a hook reads."""
    return _decode_hook(payload)


def decode_from_executor(payload: bytes) -> FromExecutor:
    """What a supervisor reads from an executor."""
    message: FromExecutor = _decode_from_executor(payload)
    return message


def decode_from_fork_server(payload: bytes) -> FromForkServer:
    """What a supervisor reads from its fork server."""
    message: FromForkServer = _decode_from_fork_server(payload)
    return message


class Outbox:
    """Frames of an executor that are told and not sent yet, in memory that its supervisor sees too.

    The length is written after the frames, and they are only written over once it was zero: what the
    supervisor finds below the length is whole, except while the executor begins anew, which the round shows.
    """

    SIZE = 1 << 15
    _LENGTH, _ROUND = range(2)
    _FRAMES = 16
    ROOM = SIZE - _FRAMES

    def __init__(self, boards: list[Board]) -> None:
        """Behind these boards, in the same memory: each mapping would keep a descriptor open."""
        self._memory = boards[0].memory
        start = len(boards) * Board.SIZE
        self._bytes = memoryview(self._memory)[start : start + self.SIZE]
        self._cells = self._bytes[: self._FRAMES].cast("Q")
        self._frames = self._bytes[self._FRAMES :]
        self._seen = self._told = (0, 0)

    def put(self, data: bytes | bytearray) -> bool:
        """Executor: add a frame; False if there is no room for it."""
        cells = self._cells
        length = cells[self._LENGTH]
        end = length + len(data)
        if end > self.ROOM:
            return False
        self._frames[length:end] = data
        cells[self._LENGTH] = end
        return True

    @property
    def unsent(self) -> bytes:
        """What was put since the last `clear`; when the executor is gone it may have sent some of it."""
        return bytes(self._frames[: self._cells[self._LENGTH]])

    def clear(self) -> None:
        """Executor: all has been sent."""
        cells = self._cells
        if cells[self._LENGTH]:
            cells[self._LENGTH] = 0
            cells[self._ROUND] += 1

    def stuck(self) -> bytes:
        """Supervisor: what was there the last time this was asked too; each only once."""
        cells = self._cells
        before, self._seen = self._seen, (cells[self._ROUND], cells[self._LENGTH])
        if before != self._seen or self._told == self._seen:
            return b""
        data = self.unsent
        if (cells[self._ROUND], cells[self._LENGTH]) != self._seen:
            return b""
        self._told = self._seen
        return data

    def close(self) -> None:
        """Let go of it."""
        self._frames.release()
        self._cells.release()
        self._bytes.release()
        del self._memory


class Board:
    """The memory that one slot of an executor shares with its supervisor; see the module's text."""

    SIZE = 320
    _STARTED, _FROM, _UPTO, _EXCLUSIVE, _UNTIL, _CANCELLED, _VERSION, _BACKEND = range(8)
    _PROGRESS = 64
    _FACTS = struct.Struct("=QddH")

    def __init__(self, memory: mmap.mmap, slot: int = 0) -> None:
        self.memory = memory
        start = slot * self.SIZE
        self._bytes = memoryview(memory)[start : start + self.SIZE]
        self._cells = self._bytes.cast("Q")

    @classmethod
    def map(cls, descriptor: int, slots: int = 1) -> list[Board]:
        """The boards of an executor's slots, on shared memory that `create` has made for so many."""
        memory = mmap.mmap(descriptor, slots * cls.SIZE + Outbox.SIZE)
        return [cls(memory, slot) for slot in range(slots)]

    @staticmethod
    def create(slots: int = 1) -> int:
        """A descriptor of fresh shared memory for so many boards and an outbox; the caller closes it."""
        if hasattr(os, "memfd_create"):
            descriptor = os.memfd_create("pgqueue-board", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        else:
            with tempfile.TemporaryFile() as file:
                descriptor = os.dup(file.fileno())
        os.ftruncate(descriptor, slots * Board.SIZE + Outbox.SIZE)
        return descriptor

    @staticmethod
    def seal(descriptor: int) -> None:
        """Executor: from here on only the two mappings can write, not a task that writes into every
        descriptor it finds.
        """
        if sys.platform == "linux":
            import fcntl

            with contextlib.suppress(OSError):  # before Linux 5.1
                fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, _F_SEAL_FUTURE_WRITE)

    def keep_from_children(self) -> None:
        """Executors forked from here on have no business with this one's boards."""
        if hasattr(mmap, "MADV_DONTFORK"):
            self.memory.madvise(mmap.MADV_DONTFORK)

    def close(self) -> None:
        """Let go of it; with the last board of an executor the memory is unmapped."""
        self._cells.release()
        self._bytes.release()
        del self.memory

    def start(self, number: int) -> bool:
        """Executor: mark job `number` as started; False if it was taken back and must not run."""
        cells = self._cells
        cells[self._STARTED] = number
        return not cells[self._FROM] <= number < cells[self._UPTO]

    def claim_exclusive(self, number: int, now: float) -> bool:
        """Executor: job `number` must not run when others may take it; False if they may already."""
        self._cells[self._EXCLUSIVE] = number
        return now < self.proven_until

    @property
    def proven_until(self) -> float:
        """On `clock()`: until then nobody takes this worker's jobs."""
        return self._cells[self._UNTIL] / 1e9

    @proven_until.setter
    def proven_until(self, until: float) -> None:
        self._cells[self._UNTIL] = int(until * 1e9)

    @property
    def cancelled(self) -> int:
        """The number of the job that somebody wants cancelled, 0 for none."""
        return self._cells[self._CANCELLED]

    @cancelled.setter
    def cancelled(self, number: int) -> None:
        self._cells[self._CANCELLED] = number

    @property
    def backend(self) -> int:
        """Process id of the server's end of the transaction that is open here, 0 for none."""
        return self._cells[self._BACKEND]

    @backend.setter
    def backend(self, pid: int) -> None:
        self._cells[self._BACKEND] = pid

    def report(self, number: int, progress: Progress) -> None:
        """Executor: the run of job `number` has come so far."""
        note = (progress.note or "").encode()[: self.SIZE - self._PROGRESS - self._FACTS.size]
        total = math.nan if progress.total is None else progress.total
        version = self._cells[self._VERSION] | 1  # odd while it is being written
        self._cells[self._VERSION] = version
        self._FACTS.pack_into(self._bytes, self._PROGRESS, number, progress.done, total, len(note))
        start = self._PROGRESS + self._FACTS.size
        self._bytes[start : start + len(note)] = note
        self._cells[self._VERSION] = version + 1

    @property
    def progress(self) -> tuple[int, Progress] | None:
        """Supervisor: how far the run of which job has come; None if it has not said so, or says so now."""
        version = self._cells[self._VERSION]
        if version == 0 or version & 1:
            return None
        number, done, total, length = self._FACTS.unpack_from(self._bytes, self._PROGRESS)
        start = self._PROGRESS + self._FACTS.size
        note = bytes(self._bytes[start : start + length]).decode(errors="ignore")
        if self._cells[self._VERSION] != version:
            return None
        return number, Progress(done, None if math.isnan(total) else total, note or None)

    def runs_too_long(self, now: float) -> bool:
        """Fork server: others may take the exclusive job that is running here."""
        cells = self._cells
        exclusive = cells[self._EXCLUSIVE]
        return 0 < exclusive == cells[self._STARTED] and now >= self.proven_until

    @property
    def started(self) -> int:
        """The number of the job started last, 0 before the first."""
        return self._cells[self._STARTED]

    def recall(self, upto: int) -> int:
        """Supervisor: nothing below `upto` may start any more; returns the first number that certainly has
        not.

        Numbers between the job that was running and the one returned may have started: they stay with the
        executor, which reports them as skipped if they had not.
        """
        cells = self._cells
        before = cells[self._STARTED]
        cells[self._UPTO] = upto
        cells[self._FROM] = before + 1
        return cells[self._STARTED] + 1
