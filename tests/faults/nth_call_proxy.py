"""A proxy in front of Postgres that counts what a program asks and breaks the n-th call.

A call is a connection being made, one statement, the end of a COPY, or a notification on its way to who
listens. The proxy reads as much of the wire protocol (version 3, without encryption) as it needs to tell them
apart, so the driver and the server are the real ones: a refused statement is replaced by one that the server
itself refuses, and the answer of a call whose connection is lost *after* it took effect is waited for.
"""

from __future__ import annotations

import asyncio
import contextlib
import re
import struct
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Literal, TypeVar

import pgqueue.database.queries
from pgqueue.database.queries import query
from tests.faults.proxy import Proxy

T = TypeVar("T")
How = Literal["cut before", "cut after", "late", "57P01", "40001", "53100", "57014", "55P03"]
SQLSTATES: tuple[How, ...] = ("57P01", "40001", "53100", "57014", "55P03")
LATE = 0.3
"""Seconds an answer is held back."""

_CANCEL_REQUEST = 80877102
_MESSAGE = struct.Struct("!ci")


@dataclass(frozen=True)
class Fault:
    """Break the `nth` call (from 1) of the connections of one `kind`.

    Attributes:
        kind: As in `application_name`, without `pgqueue`; None for any.
        how: `cut before`: the connection breaks, the server never hears of the call. `cut after`: the call
            takes effect, its answer is lost with the connection. `late`: the answer comes 300 ms late. A
            code: the server refuses the call with it.
        after: Count only from where these calls have come by, one after the other.
    """

    kind: str | None
    nth: int
    how: How
    after: tuple[str, ...] = ()

    def __str__(self) -> str:
        after = f" after {', '.join(self.after)}" if self.after else ""
        return f"{self.kind or 'any'} #{self.nth}{after} {self.how}"


class NthCallProxy(Proxy):
    """Reads what passes, and breaks one call of it.

    Attributes:
        hit: What the fault broke, as `kind: call`; None while it has not.
        calls: How often each call came by since the last `arm`, also as `kind: call`.
    """

    def __init__(self, dsn: str) -> None:
        self._fault: Fault | None = None
        self._count = 0
        self._awaited: list[str] = []
        self.hit: str | None = None
        self.calls: Counter[str] = Counter()
        super().__init__(dsn, limit=1 << 20)

    def arm(self, fault: Fault | None) -> None:
        """Count anew, and break the call that `fault` names; None only counts."""

        async def arm() -> None:
            self._fault, self._count, self.hit = fault, 0, None
            self._awaited = list(fault.after) if fault is not None else []
            self.calls = Counter()

        self._run(arm())

    async def _forward(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await _Session(self, reader, writer).run(self._upstream)

    def strikes(self, kind: str, call: str) -> How | None:
        """Count a call; how to break it, if it is its turn."""
        self.calls[f"{kind}: {call}"] += 1
        fault = self._fault
        if fault is None or self.hit is not None or fault.kind not in (None, kind):
            return None
        if self._awaited:
            if call == self._awaited[0]:
                self._awaited.pop(0)
            return None
        self._count += 1
        if self._count < fault.nth:
            return None
        self.hit = f"{kind}: {call}"
        return fault.how


class _Broken(Exception):
    """The fault has struck: this session is over."""


class _Session:
    """One connection of the program, and its counterpart at the server."""

    def __init__(
        self, proxy: NthCallProxy, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        self._proxy = proxy
        self._from_client, self._to_client = reader, writer
        self._from_server: asyncio.StreamReader
        self._to_server: asyncio.StreamWriter
        self._back: asyncio.Future[None]
        self._kind = "?"
        self._statements: dict[bytes, str] = {}
        self._is_lost = False
        self._held_until = 0.0

    async def run(self, upstream: tuple[str, int]) -> None:
        try:
            self._from_server, self._to_server = await asyncio.open_connection(*upstream, limit=1 << 20)
        except OSError:
            self._to_client.close()
            return
        self._back = asyncio.ensure_future(self._backward())
        try:
            await self._forward()
        except (_Broken, OSError, EOFError):
            pass
        finally:
            # The server first: it hears of the end of the connection when the program does, or before.
            for writer in (self._to_server, self._to_client):
                writer.close()
            self._back.cancel()
            await asyncio.gather(self._back, return_exceptions=True)

    async def _forward(self) -> None:
        length, code = struct.unpack("!ii", await self._from_client.readexactly(8))
        body = await self._from_client.readexactly(length - 8)
        start = struct.pack("!ii", length, code) + body
        if code == _CANCEL_REQUEST:
            self._to_server.write(start)
            await self._to_server.drain()
            return
        words = body.split(b"\0")
        said = dict(zip(words[::2], words[1::2], strict=False))
        name = said.get(b"application_name", b"?").decode()
        self._kind = name.removeprefix("pgqueue ") if name != "pgqueue" else "client"
        await self._call("connect", [start])

        waiting: list[bytes] = []
        label = ""
        while True:
            kind, message = await self._next()
            waiting.append(message)
            if kind == b"P":
                target, text = message[5:].split(b"\0")[:2]
                self._statements[target] = label = _named(text)
            elif kind == b"B":
                target = message[5:].split(b"\0")[1]
                label = self._statements.get(target, "?")
            elif kind == b"Q":
                label = _named(message[5:-1])
            elif kind == b"c":
                label = "end of COPY"
            elif kind in b"pdXH" or (kind == b"S" and len(waiting) == 1):
                label = ""  # nothing of its own: a password, COPY's data, goodbye
            if kind in b"EQc" or (kind == b"S" and len(waiting) > 1):
                await self._call(label, waiting)
                waiting, label = [], ""
            elif kind in b"pdXHS":
                await self._send(waiting)
                waiting = []

    async def _next(self) -> tuple[bytes, bytes]:
        head = await self._from_client.readexactly(5)
        kind, length = _MESSAGE.unpack(head)
        return kind, head + await self._from_client.readexactly(length - 4)

    async def _send(self, messages: list[bytes]) -> None:
        self._to_server.write(b"".join(messages))
        await self._to_server.drain()

    async def _call(self, label: str, messages: list[bytes]) -> None:
        how = self._proxy.strikes(self._kind, label)
        if how is None:
            await self._send(messages)
        elif how == "late":
            self._held_until = asyncio.get_running_loop().time() + LATE
            await self._send(messages)
        elif how == "cut before":
            raise _Broken
        elif how == "cut after":
            await self._lose_answer(messages)
        elif how == "57P01" or label == "connect":
            await self._end_session(how)
        elif label == "end of COPY":
            await self._send([_message(b"f", b"injected\0")])  # CopyFail: the server refuses it with 57014
        else:
            await self._send(_refused(messages, how))

    async def _lose_answer(self, messages: list[bytes]) -> None:
        """Let the call take effect, and lose the connection before its answer arrives."""
        self._is_lost = True
        await self._send(messages)
        if messages[-1][:1] == b"E":
            # Outside a transaction the Sync is what commits. In a pipeline something else follows.
            kind, message = await self._next()
            if kind == b"S":
                await self._send([message])
        self._to_server.write_eof()
        await asyncio.wait([self._back])  # the server has done all it was told, and hung up
        raise _Broken

    async def _end_session(self, sqlstate: str) -> None:
        """What a server says that ends a session: FATAL, and the connection is closed."""
        self._is_lost = True
        self._to_server.close()
        text = f"SFATAL\0VFATAL\0C{sqlstate}\0Mterminating connection due to administrator command\0\0"
        self._to_client.write(_message(b"E", text.encode()))
        await self._to_client.drain()
        raise _Broken

    async def _backward(self) -> None:
        buffer = b""
        while data := await self._from_server.read(1 << 16):
            if self._is_lost:
                continue
            late = self._held_until - asyncio.get_running_loop().time()
            if late > 0:
                await asyncio.sleep(late)
            if self._kind == "listen":
                buffer = await self._watch_notifications(buffer + data)
            else:
                self._to_client.write(data)
                await self._to_client.drain()
        if not self._is_lost:
            self._to_client.close()  # the server has hung up; the program's side ends with it

    async def _watch_notifications(self, buffer: bytes) -> bytes:
        while len(buffer) >= 5:
            kind, length = _MESSAGE.unpack(buffer[:5])
            if len(buffer) <= length:
                break
            message, buffer = buffer[: length + 1], buffer[length + 1 :]
            how = self._proxy.strikes(self._kind, "notification") if kind == b"A" else None
            if how == "late":
                await asyncio.sleep(LATE)
            elif how is not None and how != "cut after":
                self._hang_up()
                return b""
            self._to_client.write(message)
            await self._to_client.drain()
            if how == "cut after":
                self._hang_up()
                return b""
        return buffer

    def _hang_up(self) -> None:
        self._is_lost = True
        self._to_server.close()
        self._to_client.close()


def _message(kind: bytes, body: bytes) -> bytes:
    return _MESSAGE.pack(kind, len(body) + 4) + body


def _refused(messages: list[bytes], sqlstate: str) -> list[bytes]:
    """The same kind of messages, with a statement that the server refuses with this code."""
    text = f"do $$ begin raise exception 'injected' using errcode = '{sqlstate}'; end $$".encode()
    if messages[-1][:1] == b"Q":
        return [_message(b"Q", text + b"\0")]
    refused = [
        _message(b"P", b"\0" + text + b"\0" + struct.pack("!h", 0)),
        _message(b"B", b"\0\0" + struct.pack("!hhh", 0, 0, 0)),
        _message(b"E", b"\0" + struct.pack("!i", 0)),
    ]
    return refused + [message for message in messages if message[:1] == b"S"]


def _named(text: bytes) -> str:
    """The name of a statement of `sql/`, or its first two words."""
    found = _our_statements().get(_squeezed(text.decode()))
    return found or " ".join(re.findall(r"\w+", text.decode())[:2])


@cache
def _our_statements() -> dict[str, str]:
    folder = Path(pgqueue.database.queries.__file__).with_name("sql")
    return {_squeezed(query(file.stem, style="numeric").text): file.stem for file in folder.glob("*.sql")}


def _squeezed(text: str) -> str:
    return " ".join(text.split())


@contextlib.contextmanager
def proxied(dsn: str) -> Iterator[NthCallProxy]:
    """A proxy in front of `dsn`, gone after the block."""
    with NthCallProxy(dsn) as proxy:
        yield proxy
