"""What a worker says about queues that may never get their turn."""

from __future__ import annotations

import pytest

from tests.acceptance.workers import Workers


@pytest.mark.parametrize(
    ("queues", "said"),
    [
        ("high,normal,low", ["queues=normal,low behind=high"]),
        ("high:3,normal:1", []),
        ("high", []),
    ],
)
def test_strict_order_is_said_once(db: str, workers: Workers, queues: str, said: list[str]) -> None:
    worker = workers.start("-Q", queues, "-c", "1")
    worker.full_crew()
    worker.stop()
    lines = [line for line in worker.log.splitlines() if "queues_may_starve" in line]
    assert [line.partition("queues_may_starve ")[2] for line in lines] == said
