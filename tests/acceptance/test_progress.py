"""How far a running job is: seen within a second or so, and no write for each call."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from pgqueue import PgQueue
from pgqueue.codec import clean_text
from pgqueue.job import Progress
from tests.acceptance.workers import Gate, Jobs, Workers, eventually

HALF = Progress(10_000, 20_000, clean_text("half of it, " + "\N{HANGUL SYLLABLE GA}" * 100, 200))


@pytest.mark.parametrize(
    ("pool", "task"),
    [("prefork", "reports"), ("threads", "reports"), ("asyncio", "reports"), ("asyncio", "reports_async")],
)
def test_what_a_job_says_is_seen(
    db: str, jobs: Jobs, workers: Workers, gate: Gate, pool: str, task: str
) -> None:
    workers.start("--pool", pool, "-c", "2", app="pools_app:app")
    client = PgQueue("client", dsn=db)
    try:
        result = client.AsyncResult(jobs.add(f"pools_app.{task}", gate.path))
        assert result.progress is None
        beats = jobs.sql("SELECT heartbeat FROM pgqueue.workers")[0]["heartbeat"]
        begun = time.monotonic()
        eventually(lambda: workers.ledger.of(result.id), "it to say half")
        eventually(lambda: result.progress == HALF, "half to be seen")
        gate.open()
        eventually(lambda: result.progress == Progress(20_000), "all to be seen")
        written = jobs.sql("SELECT heartbeat FROM pgqueue.workers")[0]["heartbeat"] - beats
        assert written <= (time.monotonic() - begun) / 0.8 + 2
        Path(gate.path + "-2").touch()
        jobs.finished(result.id)
        assert result.progress is None
        stats = "SELECT stats ? 'progress' AS told FROM pgqueue.workers"
        eventually(lambda: not jobs.sql(stats)[0]["told"], "the worker to forget it")
    finally:
        client.close()
