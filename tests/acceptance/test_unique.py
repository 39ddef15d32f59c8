"""Unique keys while a worker runs the jobs that have them."""

from __future__ import annotations

from tests.acceptance.workers import Gate, Jobs, Ledger, Workers, eventually


def test_until_the_end_a_running_job_has_the_key(
    jobs: Jobs, workers: Workers, ledger: Ledger, gate: Gate
) -> None:
    workers.start("-c", "2")
    first = jobs.add("gated", gate.path, "first", unique_key="a")
    eventually(lambda: ledger.count() == 1, "it runs")
    assert jobs.add("gated", gate.path, "second", unique_key="a") == first
    gate.open()
    assert jobs.finished(first)["unique_key"] == "a"
    third = jobs.add("gated", gate.path, "third", unique_key="a")
    assert third != first
    jobs.finished(third)


def test_until_the_start_another_may_have_it_as_soon_as_it_runs(
    jobs: Jobs, workers: Workers, ledger: Ledger, gate: Gate
) -> None:
    options = {"unique_key": "a", "unique_until": "start"}
    first = jobs.add("gated", gate.path, "first", **options)
    assert jobs.add("gated", gate.path, "again", **options) == first
    workers.start("-c", "1")
    eventually(lambda: ledger.count() == 1, "it runs")
    second = jobs.add("gated", gate.path, "second", **options)
    assert second != first
    assert jobs.add("gated", gate.path, "third", **options) == second, "it waits, with the key"
    gate.open()
    jobs.finished(first)
    jobs.finished(second)
    assert [entry["label"] for entry in ledger.entries("start")] == ["first", "second"]
