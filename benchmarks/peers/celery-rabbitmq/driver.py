"""Celery's driver; see benchmarks/lib/celery_peer.py."""

from celery_peer import main

if __name__ == "__main__":
    main()
