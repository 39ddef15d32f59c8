"""Stands between clients and a server: keeps answers back, refuses connections, leads elsewhere."""

from __future__ import annotations

import contextlib
import socket
import struct
import threading
from collections.abc import Callable
from typing import Any
from urllib.parse import urlsplit, urlunsplit


class Relay:
    """Passes on what clients and a server say to each other.

    Attributes:
        dsn: Its address.
        target: Where new connections lead.
        is_silent: The server's answers after the log-in are kept back, for as long as the connection lives.
        refusals: So many new connections are answered with this error instead.
    """

    def __init__(self, dsn: str, port: int = 0) -> None:
        self.target = self._address(dsn)
        self.is_silent = False
        self.refusals: list[tuple[str, str]] = []
        self.connections = 0
        self._listener = socket.create_server(("127.0.0.1", port))
        self.port: int = self._listener.getsockname()[1]
        self._sockets: list[socket.socket] = []
        self._threads: list[threading.Thread] = []
        url = urlsplit(dsn)
        user = url.netloc.rpartition("@")[0]
        netloc = f"{user}@127.0.0.1:{self.port}"
        self.dsn = urlunsplit(url._replace(netloc=netloc, query="sslmode=disable&gssencmode=disable"))

    @staticmethod
    def _address(dsn: str) -> tuple[str, int]:
        url = urlsplit(dsn)
        return url.hostname or "127.0.0.1", url.port or 5432

    def lead_to(self, dsn: str) -> None:
        """New connections go there; those there are break."""
        self.target = self._address(dsn)
        self.cut()

    def cut(self) -> None:
        for each in self._sockets:
            with contextlib.suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)

    def __enter__(self) -> Relay:
        self._run(self._accept)
        return self

    def __exit__(self, *_: object) -> None:
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self.cut()
        for thread in self._threads:
            thread.join(5)
        for each in self._sockets:
            each.close()

    def _run(self, target: Callable[..., None], *arguments: Any) -> None:
        thread = threading.Thread(target=target, args=arguments, daemon=True)
        self._threads.append(thread)
        thread.start()

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            self._sockets.append(client)
            self.connections += 1
            if self.refusals:
                self._refuse(client, *self.refusals.pop(0))
                continue
            try:
                server = socket.create_connection(self.target)
            except OSError:
                client.close()
                continue
            self._sockets.append(server)
            self._run(self._pump, client, server, False)
            self._run(self._pump, server, client, self.is_silent)

    @staticmethod
    def _refuse(client: socket.socket, sqlstate: str, message: str) -> None:
        """Answer the startup message as a server does that takes no connections now."""
        client.recv(65536)
        fields = f"SFATAL\0VFATAL\0C{sqlstate}\0M{message}\0\0".encode()
        client.sendall(b"E" + struct.pack("!i", len(fields) + 4) + fields)
        client.close()

    @staticmethod
    def _pump(source: socket.socket, sink: socket.socket, until_ready: bool) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(65536):
                sink.sendall(data)
                if until_ready and data[-6:-1] == b"Z\x00\x00\x00\x05":
                    while source.recv(65536):
                        pass
        for each in (source, sink):
            with contextlib.suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)
