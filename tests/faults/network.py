"""Networks that misbehave: a server and its clients in network namespaces with a wire between them (root
only), and a small proxy for what needs no root.

Nothing leaves the namespaces: they have no other route. The test itself reaches the server by a Unix socket.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import os
import secrets
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Literal
from urllib.parse import quote, urlsplit, urlunsplit

import pytest

from tests.faults.proxy import Proxy
from tests.servers import Server, own_server

CLONE_NEWNET = 0x40000000
TRANSACTION_ENDED = (b"C\0\0\0\x0bCOMMIT\0", b"Z\0\0\0\x05I")
"""What a server says of a COMMIT, and at the end of any transaction."""


def require(program: str, package: str) -> None:
    """Skip the test unless it runs as root and has this program."""
    if os.geteuid() != 0 or shutil.which(program) is None:
        pytest.skip(f"needs {program} and root: apt-get install {package}, and run as root")


def _run(*command: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, f"{' '.join(command)}: {done.stderr}"


class Network:
    """A namespace for the server, and one for each client, with a wire of its own."""

    def __init__(self, clients: int = 1) -> None:
        mark = secrets.token_hex(3)
        self.server = f"pgq-{mark}-server"
        self.clients = [f"pgq-{mark}-{number}" for number in range(clients)]
        self.addresses = [f"192.0.2.{4 * number + 1}" for number in range(clients)]
        try:
            for name in (self.server, *self.clients):
                _run("ip", "netns", "add", name)
                _run("ip", "-n", name, "link", "set", "lo", "up")
            for number, name in enumerate(self.clients):
                wire = f"wire{number}"
                end = ("type", "veth", "peer", "name", "wire", "netns", name)
                _run("ip", "-n", self.server, "link", "add", wire, *end)
                for where, device, host in ((self.server, wire, 1), (name, "wire", 2)):
                    address = f"192.0.2.{4 * number + host}/30"
                    _run("ip", "-n", where, "address", "add", address, "dev", device)
                    _run("ip", "-n", where, "link", "set", device, "up")
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        for name in (self.server, *self.clients):
            subprocess.run(["ip", "netns", "delete", name], capture_output=True)

    @contextlib.contextmanager
    def inside(self, name: str) -> Iterator[None]:
        """What is started, or connected, in this block belongs to that namespace."""
        libc = ctypes.CDLL(None, use_errno=True)
        before = os.open("/proc/thread-self/ns/net", os.O_RDONLY)
        there = os.open(f"/run/netns/{name}", os.O_RDONLY)
        try:
            assert libc.setns(there, CLONE_NEWNET) == 0, os.strerror(ctypes.get_errno())
            try:
                yield
            finally:
                assert libc.setns(before, CLONE_NEWNET) == 0, os.strerror(ctypes.get_errno())
        finally:
            os.close(there)
            os.close(before)

    def rule(self, where: str, *rule: str) -> None:
        """Append to the rules for packets that arrive in this namespace."""
        _run("ip", "netns", "exec", where, "iptables", "-w", "-A", "INPUT", *rule)

    def lose(self, client: int, way: Literal["both", "to server", "from server"], *match: str) -> None:
        """Let packets between the server and a client vanish."""
        if way != "from server":
            self.rule(self.server, "-i", f"wire{client}", *match, "-j", "DROP")
        if way != "to server":
            self.rule(self.clients[client], "-i", "wire", *match, "-j", "DROP")

    def reset(self, client: int) -> None:
        """Answer each packet to the server with RST."""
        rule = ("-i", f"wire{client}", "-p", "tcp", "-j", "REJECT", "--reject-with", "tcp-reset")
        self.rule(self.server, *rule)

    def heal(self) -> None:
        for name in (self.server, *self.clients):
            _run("ip", "netns", "exec", name, "iptables", "-w", "-F")


class RemoteServer:
    """A PostgreSQL server inside a network.

    Attributes:
        server: Its address is a Unix socket: not part of the network.
    """

    def __init__(self, network: Network, server: Server, sockets: Path) -> None:
        self.network = network
        self.server = server
        self._by_wire = server.dsn
        server.dsn = _by_socket(server.dsn, sockets)

    def seen_from(self, client: int, dsn: str) -> str:
        """The URL of a database by the client's wire."""
        parts = urlsplit(self._by_wire)
        login = parts.netloc.rpartition("@")[0]
        netloc = f"{login}@{self.network.addresses[client]}:{parts.port}"
        return urlunsplit(parts._replace(netloc=netloc, path=urlsplit(dsn).path))

    def start(self) -> None:
        with self.network.inside(self.network.server):
            self.server.start()


def _by_socket(dsn: str, sockets: Path) -> str:
    parts = urlsplit(dsn)
    login = parts.netloc.rpartition("@")[0]
    query = f"host={quote(str(sockets), safe='')}&port={parts.port}"
    return urlunsplit(parts._replace(netloc=f"{login}@", query=query))


@contextlib.contextmanager
def remote_server(clients: int = 1) -> Iterator[RemoteServer]:
    """A server that is reached by a network of its own; skips where that cannot be made."""
    require("ip", "iproute2")
    require("iptables", "iptables")
    folder = Path(tempfile.mkdtemp(prefix="pgqueue-network-"))
    network = Network(clients)
    try:
        folder.chmod(0o777)  # for the user that Postgres runs as
        rules = folder / "pg_hba.conf"
        rules.write_text("local all all scram-sha-256\nhost all all all scram-sha-256\n")
        settings = {
            "listen_addresses": ",".join(["127.0.0.1", *network.addresses]),
            "unix_socket_directories": str(folder),
            "hba_file": str(rules),
        }
        with contextlib.ExitStack() as stack:
            with network.inside(network.server):
                server = stack.enter_context(own_server(settings))
            yield RemoteServer(network, server, folder)
    finally:
        network.close()
        shutil.rmtree(folder, ignore_errors=True)


class LossyProxy(Proxy):
    """Forwards connections as they come, but for what is to go wrong.

    Attributes:
        delay: Seconds each packet takes, each way.
        lose_every: The connection breaks before the answer of each so manieth transaction; 0: never.
        lost: How many answers were lost so.
    """

    def __init__(self, dsn: str) -> None:
        self._writers: set[asyncio.StreamWriter] = set()
        self._ended = 0
        self.delay = 0.0
        self.lose_every = 0
        self.lost = 0
        super().__init__(dsn)

    def cut(self) -> int:
        """Break every connection there is; returns how many."""

        async def cut() -> int:
            for writer in self._writers:
                writer.transport.abort()
            return len(self._writers) // 2

        return self._run(cut())

    async def _forward(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writers = {writer}
        self._writers.add(writer)
        try:
            there, to_there = await asyncio.open_connection(*self._upstream)
            writers.add(to_there)
            self._writers.add(to_there)
            ways = (self._one_way(reader, to_there, False), self._one_way(there, writer, True))
            tasks = [asyncio.ensure_future(way) for way in ways]
            try:
                await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            finally:
                for each in tasks:
                    each.cancel()
                await asyncio.gather(*tasks, return_exceptions=True)
        finally:
            for each_writer in writers:
                each_writer.transport.abort()
            self._writers -= writers

    async def _one_way(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, back: bool) -> None:
        """Until one side ends; the other then ends too."""
        loop = asyncio.get_running_loop()
        on_the_way: asyncio.Queue[tuple[float, bytes]] = asyncio.Queue()

        async def deliver() -> None:
            while True:
                at, data = await on_the_way.get()
                await asyncio.sleep(max(at - loop.time(), 0))
                if not data:
                    return
                writer.write(data)
                await writer.drain()

        delivery = asyncio.ensure_future(deliver())
        try:
            while data := await reader.read(1 << 16):
                if back and any(word in data for word in TRANSACTION_ENDED):
                    self._ended += 1
                    if self.lose_every and self._ended % self.lose_every == 0:
                        self.lost += 1
                        return
                on_the_way.put_nowait((loop.time() + self.delay, data))
            on_the_way.put_nowait((loop.time() + self.delay, b""))
            await delivery
        finally:
            delivery.cancel()
            await asyncio.gather(delivery, return_exceptions=True)
