"""Celery's driver; see benchmarks/lib/celery_peer.py."""

import celery_peer

if __name__ == "__main__":
    celery_peer.main()
