"""The application of the workers."""

from __future__ import annotations

from pgqueue import PgQueue

queue_app = PgQueue(
    "store",
    imports=("store.tasks",),
    task_routes={"store.tasks.write_invoice": {"queue": "pdf"}},
)
queue_app.configure(soft_time_limit=50, time_limit=60, retention_finished=7)
