"""Celery's settings."""

from __future__ import annotations

import json
import os

broker_url = os.environ.get("BROKER_URL", "redis://localhost/0")
broker_transport_options = json.loads(os.environ.get("BROKER_OPTIONS", "{}"))
broker_connection_retry_on_startup = True
result_backend = os.environ.get("RESULT_BACKEND", "redis://localhost/1")
result_expires = 7 * 24 * 3600

imports = ("store.tasks",)
task_serializer = "json"
accept_content = ["json"]
task_acks_late = True
task_reject_on_worker_lost = True
task_track_started = True
task_routes = {"store.tasks.write_invoice": {"queue": "pdf"}}
task_soft_time_limit = 50
task_time_limit = 60
worker_prefetch_multiplier = 1
timezone = "Europe/Berlin"

beat_schedule = {
    "add-up": {"task": "store.tasks.add_up", "schedule": float(os.environ.get("ADD_UP_EVERY", "3600"))},
}
