"""The application of the workers."""

from __future__ import annotations

from celery import Celery

celery_app = Celery("store")
celery_app.config_from_object("store.settings")
