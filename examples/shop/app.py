"""The shop's queue: what the web application and the worker both import.

`pgqueue -A shop.app:app worker` runs it. The database comes from `$PGQUEUE_DSN`: the one that holds the
orders, because an order and its jobs are one transaction.
"""

from __future__ import annotations

import os

from pgqueue import PgQueue

QUEUE_PREFIX = os.environ.get("SHOP_QUEUE_PREFIX", "")
"""Put before every queue's name, so that several shops can share one database."""

EMAIL, INVOICES, SHIPPING = (QUEUE_PREFIX + name for name in ("email", "invoices", "shipping"))

app = PgQueue(
    "shop",
    imports=("shop.tasks",),
    task_routes={
        "shop.tasks.send_email": {"queue": EMAIL, "dead_letter_queue": "failed_emails"},
        "shop.tasks.generate_invoice": {"queue": INVOICES},
        "shop.tasks.notify_shipping": {"queue": SHIPPING},
    },
)
