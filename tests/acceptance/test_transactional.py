"""Tasks whose effects commit together with their job's end: written once, or not at all, whatever happens."""

from __future__ import annotations

import os
import signal
from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest
from psycopg.conninfo import make_conninfo

from pgqueue import ConfigError, PgQueue, TaskContext
from tests.acceptance.conftest import Shared, own_queue
from tests.acceptance.workers import Jobs, Workers, eventually

APP = "transact_app:app"
TABLES = (
    "create table if not exists effects (job uuid, attempt int, note text)",
    "create table if not exists once (id int unique deferrable initially deferred)",
)


def add(jobs: Jobs, task: str, *args: object, **options: Any) -> str:
    return jobs.add(f"transact_app.{task}", *args, **options)


def effects(jobs: Jobs, job: str) -> list[tuple[int, str]]:
    """What others see of the job's effects: attempt and note."""
    rows = jobs.sql("select attempt, note from effects where job = %s order by attempt, note", job)
    return [(row["attempt"], row["note"]) for row in rows]


def sessions(jobs: Jobs) -> list[dict[str, Any]]:
    """Open connections of transactional runs."""
    return jobs.sql(
        "select pid, state from pg_stat_activity "
        "where application_name = 'pgqueue transaction' and datname = current_database()"
    )


@pytest.fixture
def jobs(jobs: Jobs) -> Iterator[Jobs]:
    for table in TABLES:
        jobs.sql(table)
    yield jobs
    jobs.sql("drop table effects, once")


@pytest.fixture(scope="module")
def kept(postgres: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Shared]:
    """Two prefork executors."""
    with own_queue(postgres, tmp_path_factory.mktemp("shared")) as (jobs, workers):
        for table in TABLES:
            jobs.sql(table)
        worker = workers.start("-c", "2", app=APP)
        worker.full_crew()
        jobs.finished(add(jobs, "write"))
        yield Shared(jobs, workers, worker)


@pytest.fixture
def shared(kept: Shared) -> Iterator[Shared]:
    """That worker. Its executors find their connections broken after each test."""
    yield kept
    for session in sessions(kept.jobs):
        kept.jobs.sql("select pg_terminate_backend(%s, 5000)", session["pid"])


@pytest.fixture(params=["write", "awrite"])
def writes(request: pytest.FixtureRequest) -> str:
    return str(request.param)


class TestEffects:
    @pytest.mark.parametrize("pool", ["prefork", "threads", "asyncio", "solo"])
    def test_commit_with_the_jobs_end_in_every_pool(
        self, jobs: Jobs, workers: Workers, writes: str, pool: str
    ) -> None:
        flags = () if pool == "solo" else ("-c", "2")
        workers.start("--pool", pool, *flags, app=APP)
        ids = [add(jobs, writes) for _ in range(20)]
        assert jobs.ends(ids) == Counter(succeeded=20)
        assert [effects(jobs, job) for job in ids] == [[(1, "")]] * 20
        row = jobs.finished(ids[0])
        assert row["result"] == "written"
        assert row["started_at"] < row["finished_at"]
        assert row["claimed_at"] <= row["started_at"]

    def test_nobody_sees_them_before(self, shared: Shared, writes: str) -> None:
        job = add(shared.jobs, writes, 1.0)
        eventually(lambda: shared.ledger.of(job), "it has written")
        assert effects(shared.jobs, job) == []
        shared.jobs.finished(job)
        assert effects(shared.jobs, job) == [(1, "")]

    def test_the_supervisor_sends_no_ack(self, shared: Shared) -> None:
        """One transaction for the effect and the end: both rows carry its number."""
        job = add(shared.jobs, "write")
        shared.jobs.finished(job)
        (row,) = shared.jobs.sql(
            "select e.xmin::text as effect, f.xmin::text as ended from effects e "
            "join pgqueue.finished_jobs f on f.id = e.job where e.job = %s",
            job,
        )
        assert row["effect"] == row["ended"]
        assert "ack_stale" not in shared.worker.log

    def test_of_a_session(self, shared: Shared) -> None:
        job = add(shared.jobs, "write_by_session")
        assert shared.jobs.finished(job)["result"] == 2, "what it left is flushed at the end"
        assert effects(shared.jobs, job) == [(1, "first"), (1, "left"), (1, "second")]

    def test_of_an_async_session(self, shared: Shared) -> None:
        job = add(shared.jobs, "awrite_by_session")
        shared.jobs.finished(job)
        assert effects(shared.jobs, job) == [(1, "first"), (1, "left")]

    @pytest.mark.parametrize("factory", ["plain", "async", "none"])
    def test_of_a_session_from_a_factory_of_one_kind(
        self, jobs: Jobs, workers: Workers, factory: str
    ) -> None:
        workers.start("-c", "1", app=APP, env={"FACTORY": factory})
        makes = {"plain": "write_by_session", "async": "awrite_by_session"}
        ids = {kind: add(jobs, task) for kind, task in makes.items()}
        connections = [add(jobs, task) for task in ("write", "awrite")]
        assert jobs.ends(connections) == Counter(succeeded=2), "who needs no session needs no factory"
        for kind, job in ids.items():
            if kind == factory:
                jobs.finished(job)
                assert len(effects(jobs, job)) > 1
            else:
                assert "self.session" in jobs.dead(job)["error_message"]
                assert "sessionmaker()" in jobs.dead(job)["error_message"]
                assert effects(jobs, job) == []

    def test_a_session_can_be_had_again_and_again(self, shared: Shared) -> None:
        ids = [add(shared.jobs, task) for task in ("write_by_session", "awrite_by_session") for _ in range(5)]
        assert shared.jobs.ends(ids) == Counter(succeeded=10)

    def test_of_a_run_that_fails_are_gone_although_its_session_has_committed(self, shared: Shared) -> None:
        job = add(shared.jobs, "fail_by_session")
        assert shared.jobs.dead(job)["error_message"] == "after the session's commit"
        assert effects(shared.jobs, job) == []

    @pytest.mark.parametrize(
        ("how", "reason", "error"),
        [
            ("fail", "not_retryable", "ValueError"),
            ("retry", "retries_exhausted", "ConnectionError"),
            ("reject", "rejected", "Reject"),
            ("commit", "not_retryable", "psycopg.ProgrammingError"),
            ("swallowed", "not_retryable", "psycopg.errors.InFailedSqlTransaction"),
            ("deferred", "not_retryable", "psycopg.errors.UniqueViolation"),
            ("close", "not_retryable", "psycopg.OperationalError"),
        ],
    )
    def test_of_a_run_that_fails_are_gone(self, shared: Shared, how: str, reason: str, error: str) -> None:
        job = add(shared.jobs, "fail", how)
        dead = shared.jobs.dead(job)
        assert (dead["reason"], dead["error_class"].rsplit(".")[-1]) == (reason, error.rsplit(".")[-1])
        assert effects(shared.jobs, job) == []
        after = add(shared.jobs, "write")
        shared.jobs.finished(after)

    def test_a_commit_in_sql_is_an_error_that_says_the_way_out(self, shared: Shared) -> None:
        dead = shared.jobs.dead(add(shared.jobs, "fail", "SQL commit"))
        assert "the task has ended its transaction by a COMMIT" in dead["error_message"]

    @pytest.mark.parametrize("task", ["enqueue", "aenqueue"])
    @pytest.mark.parametrize("by", ["connection", "session"])
    def test_jobs_enqueued_in_it_are_part_of_it(self, shared: Shared, task: str, by: str) -> None:
        other = shared.jobs.finished(add(shared.jobs, task, by))["result"]
        shared.jobs.finished(other)
        assert effects(shared.jobs, other) == [(1, "")]

    @pytest.mark.parametrize("by", ["connection", "session"])
    def test_jobs_enqueued_in_it_are_gone_with_it(self, shared: Shared, by: str) -> None:
        dead = shared.jobs.dead(add(shared.jobs, "enqueue", by, True))
        other = dead["error_message"]
        assert shared.jobs.sql("select from pgqueue.all_jobs where id = %s", other) == []


class TestTheTransaction:
    def test_what_is_set_up(self, shared: Shared) -> None:
        first, second = (shared.jobs.finished(add(shared.jobs, "settings"))["result"] for _ in range(2))
        assert first["transaction_isolation"] == "read committed"
        assert first["limit"] == 30.0, "capped, unless somebody says otherwise"
        assert first["idle_in_transaction_session_timeout"] == "30s"
        assert second["application_name"] == "pgqueue transaction"

    def test_the_connection_is_kept(self, jobs: Jobs, workers: Workers) -> None:
        workers.start("-c", "1", app=APP)
        pids = {jobs.finished(add(jobs, "settings"))["result"]["pid"] for _ in range(3)}
        assert len(pids) == 1

    def test_the_body_chooses_the_isolation_level(self, shared: Shared) -> None:
        job = add(shared.jobs, "serializable")
        assert shared.jobs.finished(job)["result"] == "serializable"
        assert len(effects(shared.jobs, job)) == 1

    def test_a_worker_without_such_jobs_opens_none(self, jobs: Jobs, workers: Workers) -> None:
        workers.start("-c", "2", app=APP)
        jobs.finished(add(jobs, "call_directly"))
        assert sessions(jobs) == []

    def test_elsewhere_there_is_none(self, shared: Shared) -> None:
        dead = shared.jobs.dead(add(shared.jobs, "not_transactional"))
        assert dead["error_message"] == "self.connection needs @app.task(bind=True, transactional=True)"
        said = shared.jobs.finished(add(shared.jobs, "call_directly"))["result"]
        assert "called directly it has no transaction" in said


class TestEnds:
    def test_a_lost_connection_counts_as_a_crash(self, shared: Shared) -> None:
        job = add(shared.jobs, "lose_connection", 2)
        shared.jobs.until(job, "scheduled")
        shared.jobs.make_due(job)
        eventually(lambda: len(shared.jobs.failures(job)) == 2, "it was cut off again")
        shared.jobs.make_due(job)
        assert shared.jobs.finished(job)["crashes"] == 2
        assert effects(shared.jobs, job) == [(3, "")]
        assert {row["kind"] for row in shared.jobs.failures(job)} == {"crashed"}
        assert {row["error_class"] for row in shared.jobs.failures(job)} == {"psycopg.errors.AdminShutdown"}

    def test_one_that_loses_it_each_time_is_buried(self, shared: Shared) -> None:
        job = add(shared.jobs, "lose_connection", 99)
        for crashes in (1, 2):
            eventually(lambda n=crashes: len(shared.jobs.failures(job)) == n, "a crash")  # type: ignore[misc]
            shared.jobs.make_due(job)
        assert shared.jobs.dead(job)["reason"] == "crashed"
        assert effects(shared.jobs, job) == []

    def test_a_dead_process_leaves_nothing_behind(self, jobs: Jobs, workers: Workers) -> None:
        workers.start("-c", "2", app=APP)
        job = add(jobs, "die", 1)
        jobs.until(job, "scheduled")
        eventually(lambda: not sessions(jobs), "the server ends its transaction")
        jobs.make_due(job)
        assert jobs.finished(job)["crashes"] == 1
        assert effects(jobs, job) == [(2, "")]

    def test_a_killed_process_whose_server_is_busy(self, jobs: Jobs, workers: Workers) -> None:
        worker = workers.start("-c", "1", app=APP)
        job = add(jobs, "wait_in_database")
        eventually(lambda: workers.ledger.of(job), "it to start")
        eventually(lambda: any(row["state"] == "active" for row in sessions(jobs)), "it waits in the server")
        os.kill(worker.executors[0].pid, signal.SIGKILL)
        eventually(lambda: not sessions(jobs), "the server's end is told", 1.5)
        assert effects(jobs, job) == []

    def test_soft_limit_in_a_query(self, shared: Shared) -> None:
        job = add(shared.jobs, "too_slow")
        assert shared.jobs.dead(job)["error_class"].endswith("SoftTimeLimitExceeded")
        assert effects(shared.jobs, job) == []
        shared.jobs.finished(add(shared.jobs, "write"))

    def test_cancelled(self, shared: Shared) -> None:
        job = add(shared.jobs, "write", 60)
        eventually(lambda: shared.ledger.of(job), "it to start")
        assert PgQueue("client", dsn=shared.jobs.dsn).AsyncResult(job).cancel() == "requested"
        assert shared.jobs.finished(job)["state"] == "cancelled"
        assert effects(shared.jobs, job) == []

    def test_a_job_taken_away_meanwhile(self, shared: Shared, writes: str) -> None:
        """Its run is rolled back, and says so."""
        job = add(shared.jobs, writes, 1.0)
        eventually(lambda: shared.ledger.of(job), "it to start")
        shared.jobs.sql("update pgqueue.jobs set attempt = attempt + 1 where id = %s", job)
        shared.worker.wait_for_log(f"ack_stale count=1 .* jobs={job}")
        assert effects(shared.jobs, job) == []
        shared.jobs.sql("delete from pgqueue.jobs where id = %s", job)

    def test_no_connection_to_be_had(self, jobs: Jobs, workers: Workers, writes: str) -> None:
        """The job is given back, and no retry burned; it runs when there is one again."""
        for right in (
            "create role few login password 'few' connection limit 3",
            "grant all on effects to few",
            "grant usage on schema pgqueue to few",
            "grant all on all tables in schema pgqueue to few",
            "grant all on all sequences in schema pgqueue to few",
            "grant execute on all functions in schema pgqueue to few",
        ):
            jobs.sql(right)
        try:
            dsn = make_conninfo(jobs.dsn, user="few", password="few")
            worker = workers.start("-c", "1", app=APP, env={"PGQUEUE_DSN": dsn})
            job = add(jobs, writes)
            worker.wait_for_log(f"transaction_not_begun job={job} attempt=2 error=.*too many connections")
            jobs.sql("alter role few connection limit 4")
            row = jobs.finished(job)
            assert (row["retries"], row["crashes"]) == (0, 0)
            assert row["attempt"] > 2
            assert len(effects(jobs, job)) == 1
            assert worker.stop() == 0
        finally:
            jobs.sql("drop owned by few")
            jobs.sql("drop role few")


class TestDefinition:
    def test_contradictions(self) -> None:
        app = PgQueue("t")
        with pytest.raises(ConfigError) as caught:
            app.task(bind=True, transactional=True, history=False)(lambda self: None)
        assert "transactional needs history" in str(caught.value)
        with pytest.raises(ConfigError) as caught:
            app.task(transactional=True)(lambda: None)
        assert "transactional needs bind=True: the transaction is on self.connection" in str(caught.value)

    def test_as_a_default_it_leaves_alone_what_it_does_not_fit(self) -> None:
        app = PgQueue("t", task_defaults={"transactional": True})

        @app.task
        def plain() -> None: ...

        @app.task(bind=True)
        def bound(self: TaskContext) -> None: ...

        @app.task(bind=True, time_limit=5)
        def short(self: TaskContext) -> None: ...

        @app.task(bind=True, soft_time_limit=60)
        def soft(self: TaskContext) -> None: ...

        assert (plain.transactional, plain.history, plain.time_limit) == (False, True, None)
        assert (bound.transactional, bound.history, bound.time_limit) == (True, True, 30.0)
        assert (short.time_limit, soft.time_limit) == (5, 120)

        app = PgQueue("t", task_defaults={"history": False})
        assert app.task(bind=True, transactional=True)(lambda self: None).history
        assert not app.task(name="other")(lambda: None).history

    def test_a_session_factory_that_is_none(self) -> None:
        with pytest.raises(ConfigError, match="session_factory must be what makes sessions, like SQLAlchemy"):
            PgQueue("t", session_factory="postgresql://")  # type: ignore[arg-type]
