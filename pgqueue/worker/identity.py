"""Who a supervisor is in the database. It changes when it finds itself fenced."""

from __future__ import annotations

import os
import secrets
import socket
from dataclasses import dataclass, field


def new_worker_id() -> str:
    """host:pid:random, readable in history long after the worker is gone, and never used twice."""
    return f"{socket.gethostname()[:63]}:{os.getpid()}:{secrets.token_hex(4)}"


@dataclass(slots=True)
class Identity:
    """The name a supervisor claims and acks under.

    Attributes:
        id: The current name.
        former: Names it was fenced under; jobs claimed under them may still be running.
    """

    id: str = field(default_factory=new_worker_id)
    former: list[str] = field(default_factory=list)

    def renew(self) -> str:
        """Take a fresh name."""
        self.former.append(self.id)
        self.id = new_worker_id()
        return self.id
