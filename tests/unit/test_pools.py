"""Which pools a worker needs, and which tasks each of them claims."""

from __future__ import annotations

from pgqueue.worker.claimer import TaskFilter
from pgqueue.worker.pools import filters
from pgqueue.worker.wire import TaskFacts

TASKS = {
    "a": TaskFacts(),
    "b": TaskFacts(pool="threads"),
    "c": TaskFacts(pool="asyncio"),
    "d": TaskFacts(pool="prefork"),
}


def test_one_pool_claims_everything() -> None:
    (own,) = filters("prefork", {"a": TASKS["a"], "d": TASKS["d"]}).items()
    assert own == ("prefork", TaskFilter())
    assert own[1].has("whatever")
    assert own[1].takes_the_rest
    assert own[1].parameters() == {"tasks": None, "but": False}


def test_each_pool_claims_its_own_and_the_workers_the_rest() -> None:
    found = filters("prefork", TASKS)
    assert list(found) == ["prefork", "asyncio", "threads"]
    for task, pool in {
        "a": "prefork",
        "b": "threads",
        "c": "asyncio",
        "d": "prefork",
        "?": "prefork",
    }.items():
        assert [name for name, each in found.items() if each.has(task)] == [pool]
    assert [name for name, each in found.items() if each.takes_the_rest] == ["prefork"]
    assert found["prefork"].parameters() == {"tasks": ["b", "c"], "but": True}
    assert found["threads"].parameters() == {"tasks": ["b"], "but": False}


def test_a_task_that_asks_for_the_workers_own_pool_needs_no_other() -> None:
    assert list(filters("asyncio", {"c": TASKS["c"]})) == ["asyncio"]


def test_where_a_debugger_is_everything_runs() -> None:
    assert filters("solo", TASKS) == {"solo": TaskFilter()}
