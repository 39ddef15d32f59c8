"""What an application is told of by real workers, and what it wraps around its tasks."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Iterator
from typing import Any

import pytest

from pgqueue import ConfigError, PgQueue
from tests.acceptance.conftest import Shared, own_queue
from tests.acceptance.workers import APPS, Jobs, Workers, eventually

APP = "hooks_app:app"


def add(jobs: Jobs, task: str, *args: object, **options: Any) -> str:
    return jobs.add(f"hooks_app.{task}", *args, **options)


@pytest.fixture(scope="module", params=["prefork", "threads", "asyncio"])
def shared(
    request: pytest.FixtureRequest, postgres: Any, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Shared]:
    with own_queue(postgres, tmp_path_factory.mktemp(request.param)) as (jobs, workers):
        worker = workers.start("-c", "1", "--pool", request.param, app=APP)
        worker.full_crew()
        jobs.finished(add(jobs, "traced"))  # it also opens the connection that its enqueue takes
        eventually(lambda: workers.ledger.entries("ready"), "it is ready")
        yield Shared(jobs, workers, worker)


def events(shared: Shared, job: str) -> list[str]:
    """What was noted of the job, in order; a hook may come after the row."""
    ends = ("succeeded too", "failed")
    eventually(lambda: any(entry["event"] in ends for entry in of(shared, job)), "the last hook")
    return [entry["event"] for entry in of(shared, job)]


def of(shared: Shared, job: str) -> list[dict[str, Any]]:
    return [entry for entry in shared.ledger.entries() if entry["job"] == job]


AROUND = ["started", "enter outer", "enter inner", "leave outer"]


class TestTasks:
    @pytest.mark.parametrize("task", ["echo", "aecho"])
    def test_success(self, shared: Shared, task: str) -> None:
        job = add(shared.jobs, task, {"a": 1})
        assert shared.jobs.finished(job)["result"] == {"a": 1}
        assert events(shared, job) == [*AROUND, "succeeded", "succeeded too"]
        (told,) = [entry for entry in of(shared, job) if entry["event"] == "succeeded"]
        assert told["result"] == "{'a': 1}"
        assert 0 < told["took"] < 10

    def test_success_of_a_transaction_is_told_once_it_is_committed(
        self, jobs: Jobs, workers: Workers
    ) -> None:
        env = {"PGQUEUE_FAILPOINTS": "transaction_before_commit=raise@1"}
        worker = workers.start("-c", "1", app=APP, env=env)
        job = add(jobs, "charge")
        assert jobs.dead(job)["error_class"].endswith("FailpointReached")
        again = add(jobs, "charge")
        jobs.finished(again)
        assert worker.stop() == 0
        assert [e["job"] for e in workers.ledger.entries("succeeded")] == [again]
        assert [e["job"] for e in workers.ledger.entries("failed")] == [job]

    def test_retries_and_the_end(self, shared: Shared) -> None:
        job = add(shared.jobs, "fails", "retry")
        shared.jobs.dead(job)
        assert events(shared, job) == [*AROUND, "retried", *AROUND, "failed"]
        retried, failed = (e for e in of(shared, job) if e["event"] in ("retried", "failed"))
        assert (retried["error"], retried["delay"]) == ("ConnectionError('once more')", 0.0)
        assert (failed["error"], failed["reason"]) == ("ConnectionError", "retries_exhausted")

    def test_self_retry_tells_the_cause(self, shared: Shared) -> None:
        job = add(shared.jobs, "fails", "self.retry")
        shared.jobs.finished(job)
        assert events(shared, job).count("retried") == 1
        assert [e["error"] for e in of(shared, job) if e["event"] == "retried"] == ["ValueError('the cause')"]

    def test_a_snooze_is_neither(self, shared: Shared) -> None:
        job = add(shared.jobs, "fails", "snooze")
        shared.jobs.finished(job)
        assert events(shared, job) == [*AROUND, *AROUND, "succeeded", "succeeded too"]

    @pytest.mark.parametrize(
        ("task", "args", "reason"),
        [
            ("fails", ["reject"], "rejected"),
            ("typed", ["x"], "bad_payload"),
            ("nowhere", [], "unknown_task"),
            ("guarded", [], "not_retryable"),
        ],
    )
    def test_failures_of_all_kinds(self, shared: Shared, task: str, args: list[Any], reason: str) -> None:
        job = add(shared.jobs, task, *args)
        assert shared.jobs.dead(job)["reason"] == reason
        assert events(shared, job)[-1] == "failed"
        assert of(shared, job)[-1]["reason"] == reason

    def test_a_hook_that_raises_fails_nothing(self, shared: Shared) -> None:
        job = add(shared.jobs, "with_bad_hooks")
        assert shared.jobs.finished(job)["result"] == "fine"
        shared.worker.wait_for_log(
            r"hook_failed hook=task_started function=hooks_app.started error=Traceback"
        )
        assert "a hook that exits" in shared.worker.log


class TestMiddleware:
    @pytest.mark.parametrize("task", ["traced", "atraced"])
    def test_what_it_sets_is_there_in_the_body_and_not_after(self, shared: Shared, task: str) -> None:
        job = add(shared.jobs, task, headers={"trace": "t-1"})
        assert shared.jobs.finished(job)["result"] == "t-1"
        plain = add(shared.jobs, task)
        assert shared.jobs.finished(plain)["result"] == "None"

    def test_a_job_enqueued_in_it_carries_on_the_trace(self, shared: Shared) -> None:
        add(shared.jobs, "traced", headers={"trace": "t-2"})
        found = "select id from pgqueue.finished_jobs where task like '%%.echo' and headers ->> 'trace' = %s"
        eventually(lambda: shared.jobs.sql(found, "t-2"), "the next job runs")

    def test_it_may_translate_errors(self, shared: Shared) -> None:
        dead = shared.jobs.dead(add(shared.jobs, "fails", "translated"))
        assert (dead["error_class"], dead["error_message"]) == ("LookupError", "translated")

    def test_what_it_raises_before_fails_the_job(self, shared: Shared) -> None:
        dead = shared.jobs.dead(add(shared.jobs, "guarded"))
        assert (dead["error_class"], dead["error_message"]) == ("PermissionError", "not you")


class TestProcesses:
    def test_worker_and_children(self, jobs: Jobs, workers: Workers) -> None:
        worker = workers.start("-c", "2", app=APP)
        crew = {each.pid for each in worker.full_crew()}
        (ready,) = eventually(lambda: workers.ledger.entries("ready"), "it is told")
        assert ready["worker"] == worker.id
        assert ready["pid"] not in {worker.pid, worker.fork_server.pid, *crew}
        eventually(lambda: len(workers.ledger.entries("child")) == 2, "both children")
        assert {entry["pid"] for entry in workers.ledger.entries("child")} == crew
        assert workers.ledger.count("stopping") == 0
        assert worker.stop() == 0
        (stopping,) = workers.ledger.entries("stopping")
        assert stopping["worker"] == worker.id

    def test_one_that_takes_too_long_is_killed(self, jobs: Jobs, workers: Workers) -> None:
        worker = workers.start("-c", "1", "--shutdown-timeout", "30", app=APP, env={"SLOW_HOOK": "1"})
        eventually(lambda: workers.ledger.entries("ready"), "it is ready")
        assert worker.stop() == 0
        assert "hook_killed hook=worker_stopping seconds=10" in worker.log


class TestEnqueueing:
    @pytest.fixture
    def app(self, db: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[PgQueue]:
        monkeypatch.syspath_prepend(str(APPS))
        import hooks_app

        app: PgQueue = hooks_app.app
        app.configure(dsn=db)
        yield app
        app.close()
        del sys.modules["hooks_app"]

    def test_headers(self, app: PgQueue, jobs: Jobs) -> None:
        import hooks_app

        with jobs.connection.transaction():
            ids = [
                hooks_app.echo.delay(1).id,
                hooks_app.echo.apply_async((1,), headers={"own": 1}).id,
                *app.enqueue_many([hooks_app.echo.s(1)]),
                hooks_app.echo.on(jobs.connection).delay(1).id,
                app.send_task("elsewhere.task").id,
            ]
        headers = [jobs.live(job)["headers"] for job in ids]
        assert headers == [{"trace": "none"}, {"own": 1, "trace": "none"}, *[{"trace": "none"}] * 3]

    def test_awaited(self, app: PgQueue, jobs: Jobs) -> None:
        import hooks_app

        async def enqueue() -> list[str]:
            ids = [(await hooks_app.echo.adelay(1)).id, *await app.aenqueue_many([hooks_app.echo.s(1)])]
            await app.aclose()
            return ids

        assert [jobs.live(job)["headers"] for job in asyncio.run(enqueue())] == [{"trace": "none"}] * 2

    def test_what_it_raises_is_the_callers(self, app: PgQueue, jobs: Jobs) -> None:
        import hooks_app

        with pytest.raises(PermissionError, match="forbidden"):
            hooks_app.forbidden.delay()
        assert jobs.sql("select from pgqueue.jobs") == []


class TestDefinition:
    def test_mistakes(self) -> None:
        app = PgQueue("t")
        with pytest.raises(ConfigError, match=r"unknown hook 'task_faild' \(did you mean task_failed\?\)"):
            app.hook("task_faild")  # type: ignore[arg-type]
        with pytest.raises(ConfigError, match="decorates a plain function of one argument, got 5"):
            app.hook("task_failed")(5)  # type: ignore[type-var]

        async def coroutine(event: object) -> None: ...

        with pytest.raises(ConfigError, match="decorates a plain function"):
            app.hook("task_failed")(coroutine)
        with pytest.raises(ConfigError, match="decorates a generator function that takes a TaskContext"):
            app.middleware(lambda context: iter([None]))
