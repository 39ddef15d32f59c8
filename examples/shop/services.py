"""The world outside the shop: a mail server and a shipping service that misbehave as real ones do.

    python -m shop.services FOLDER [--down]

The mail server delivers into the Maildir `FOLDER/mail`. It greylists some recipients (451 the first time,
welcome the second) and knows of no `nobody@`. The shipping service is busy (503, with Retry-After) when some
orders first come; with `--down` it refuses connections until SIGUSR1. It writes
`FOLDER/shipments/<order>.json`.

Both keep what they did in files, so that an audit can look at the effects without asking the queue.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import signal
import socket
import threading
import zlib
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from aiosmtpd.handlers import Mailbox
from aiosmtpd.smtp import SMTP, Envelope, Session

GREYLISTED = 4
"""One recipient in so many is greylisted."""
BUSY = 8
"""One order in so many finds the shipping service busy at first."""


def picked(key: str, one_in: int) -> bool:
    """Whether fate picks this key; the same answer in every run."""
    return zlib.crc32(key.encode()) % one_in == 0


class Mailroom(Mailbox):
    """Delivers into a Maildir, after the refusals a real server has for its callers."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self._seen: set[str] = set()

    async def handle_RCPT(
        self, server: SMTP, session: Session, envelope: Envelope, address: str, options: list[str]
    ) -> str:
        if address.startswith("nobody@"):
            return "550 5.1.1 no such mailbox"
        if picked(address, GREYLISTED) and address not in self._seen:
            self._seen.add(address)
            return "451 4.7.1 greylisted, try again later"
        envelope.rcpt_tos.append(address)
        return "250 2.1.5 ok"


class MailServer:
    """An SMTP server on a free port of 127.0.0.1, in a thread with an event loop of its own."""

    def __init__(self, folder: Path) -> None:
        self.mailroom = Mailroom(folder)
        # Named TCP, because asyncio sets TCP_NODELAY only then; without it every greeting takes 40 ms.
        self._socket = socket.socket(socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_TCP)
        self._socket.bind(("127.0.0.1", 0))
        self._loop = asyncio.new_event_loop()
        self._stopping = asyncio.Event()
        self._thread = threading.Thread(target=self._run, name="mail", daemon=True)

    @property
    def address(self) -> str:
        return "{}:{}".format(*self._socket.getsockname())

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        self._loop.call_soon_threadsafe(self._stopping.set)
        self._thread.join()

    def _run(self) -> None:
        with asyncio.Runner(loop_factory=lambda: self._loop) as runner:
            runner.run(self._serve())

    async def _serve(self) -> None:
        server = await self._loop.create_server(self._session, sock=self._socket)
        await self._stopping.wait()
        server.close()

    def _session(self) -> SMTP:
        return SMTP(
            self.mailroom, hostname="mail.example", ident="mail", loop=self._loop, enable_SMTPUTF8=True
        )


class ShippingService:
    """An HTTP server on a free port of 127.0.0.1; it refuses connections until `open()`."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._server = _ShippingServer(folder)
        self._thread = threading.Thread(target=self._server.serve_forever, name="shipping", daemon=True)

    @property
    def url(self) -> str:
        return "http://{}:{}".format(*self._server.server_address[:2])

    def open(self) -> None:
        """Answer from now on; it may be open already."""
        if not self._thread.is_alive():
            # The port has been ours since __init__; only now does it listen.
            self._server.server_activate()
            self._thread.start()

    def close(self) -> None:
        if self._thread.is_alive():
            self._server.shutdown()
            self._thread.join()
        self._server.server_close()


class _ShippingServer(ThreadingHTTPServer):
    request_queue_size = 128

    def __init__(self, folder: Path) -> None:
        super().__init__(("127.0.0.1", 0), _ShippingHandler, bind_and_activate=False)
        self.server_bind()
        self.folder = folder
        self.seen: set[str] = set()


class _ShippingHandler(BaseHTTPRequestHandler):
    server: _ShippingServer
    disable_nagle_algorithm = True

    def do_PUT(self) -> None:
        """Take a parcel under its order's number; taking it again changes nothing."""
        order_id = self.path.removeprefix("/shipments/")
        body = self.rfile.read(int(self.headers["Content-Length"]))
        if not order_id.isdigit():
            return self._answer(404, {"error": "no such page"})
        if picked(order_id, BUSY) and order_id not in self.server.seen:
            self.server.seen.add(order_id)
            return self._answer(503, {"error": "busy"}, {"Retry-After": "1"})
        shipment = {"order": int(order_id), "tracking": f"PG{int(order_id):08}", "parcel": json.loads(body)}
        (self.server.folder / f"{order_id}.json").write_text(json.dumps(shipment))
        return self._answer(200, shipment)

    def _answer(self, status: int, body: object, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Type", "application/json")
        self.end_headers()
        self.wfile.write(json.dumps(body).encode())

    def log_message(self, format: str, *arguments: Any) -> None:
        """Say nothing: the shipments are the record."""


def main() -> None:
    """Run both until SIGTERM."""
    parser = argparse.ArgumentParser(description="A mail server and a shipping service for the shop.")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--down", action="store_true", help="refuse to ship until SIGUSR1")
    arguments = parser.parse_args()
    # Blocked before any thread starts, so that only sigwait below sees it.
    awaited = [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1]
    signal.pthread_sigmask(signal.SIG_BLOCK, awaited)
    mail, shipping = MailServer(arguments.folder / "mail"), ShippingService(arguments.folder / "shipments")
    mail.start()
    if not arguments.down:
        shipping.open()
    print(f"smtp {mail.address} shipping {shipping.url}", flush=True)
    while signal.sigwait(awaited) == signal.SIGUSR1:
        shipping.open()
    mail.stop()


if __name__ == "__main__":
    main()
