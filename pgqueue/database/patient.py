"""psycopg connections that do not wait for ever for a server that has stopped answering.

A statement has a timeout on the server, but a server process that is frozen does not keep it, and neither
does a COMMIT that waits for a synchronous standby; its machine still answers keepalives. So the client has a
limit of its own, a little longer. It looks at the clock only when psycopg's wait comes back empty-handed,
every tenth of a second.
"""

from __future__ import annotations

from dataclasses import dataclass
from time import monotonic
from typing import Any, Final

import psycopg
from psycopg.abc import RV, PQGen
from psycopg.rows import TupleRow

from pgqueue.database.dsn import cut_short

ANSWER_PATIENCE: Final = 5.0
"""Seconds beyond its statement timeout after which a server that has not answered is given up."""

FIRST: Final = 10.0
"""Seconds for the first answer, before it is known how long a statement may take."""


@dataclass(slots=True)
class State:
    """What its pool knows of a connection.

    Attributes:
        is_pooled: There is a pooler in between: the session is not ours alone.
        cut_short: A commit since the flag was last cleared did not wait for its synchronous standbys.
    """

    is_pooled: bool = False
    cut_short: bool = False

    def on_notice(self, diagnostic: Any) -> None:
        self.cut_short = self.cut_short or cut_short(diagnostic)


class Connection(psycopg.Connection[TupleRow]):
    """A connection that breaks when an answer takes longer than `patience`.

    Attributes:
        patience: Seconds; None waits for ever.
        state: For the pool it is in.
    """

    patience: float | None = FIRST
    state: State

    def wait(self, gen: PQGen[RV], *args: Any, **kwargs: Any) -> RV:
        return super().wait(_bounded(gen, self), *args, **kwargs)


class AsyncConnection(psycopg.AsyncConnection[TupleRow]):
    """`Connection`, to be awaited."""

    patience: float | None = FIRST
    state: State

    async def wait(self, gen: PQGen[RV], *args: Any, **kwargs: Any) -> RV:
        return await super().wait(_bounded(gen, self), *args, **kwargs)


def _bounded(gen: PQGen[RV], connection: Connection | AsyncConnection) -> PQGen[RV]:
    """The same, until patience is at its end: then the connection is closed and OperationalError raised."""
    patience = connection.patience
    since = monotonic()
    try:
        wants = next(gen)
        while True:
            ready = yield wants
            if not ready and patience is not None and monotonic() - since >= patience:
                connection.pgconn.finish()
                raise psycopg.OperationalError(f"the server has not answered for {patience:g} s")
            wants = gen.send(ready)
    except StopIteration as end:
        result: RV = end.value
        return result
