"""An application that names a module of tasks which is not there."""

from __future__ import annotations

from pgqueue import PgQueue

app = PgQueue("lost tasks", imports=("no_such_tasks",))
