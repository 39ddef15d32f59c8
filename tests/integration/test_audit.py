"""Jobs are found by what they belong to, and every act of a person is written down."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from typing import Any

import psycopg
import pytest

from pgqueue import PgQueue, SchemaMismatch
from pgqueue.database import jobs
from pgqueue.database.audit import ActFilter, list_acts
from pgqueue.database.migrate import upgrade
from pgqueue.database.session import Session, open_session
from pgqueue.job import DeadFilter, JobFilter, new_id
from tests.integration.test_dead_letters import LETTER


@pytest.fixture
def app(db: str) -> Iterator[PgQueue]:
    app = PgQueue("shop", dsn=db)
    yield app
    app.close()


@pytest.fixture
def session(db: str) -> Iterator[Session]:
    with open_session(db) as session:
        yield session


def found(session: Session, **where: Any) -> list[str]:
    return [job.id for job in jobs.list_jobs(session, JobFilter(**where))]


class TestFinding:
    def test_by_what_they_belong_to(self, app: PgQueue, session: Session) -> None:
        one = app.send_task("a", correlation_id="order 1", tags=["vip", "eu", "vip"]).id
        two = app.send_task("a", correlation_id="order 2", tags=("vip",), headers={"trace": "x"}).id
        three = app.send_task("b", headers={"correlation_id": "order 1"}, queue="other").id
        none = app.send_task("b").id
        app.AsyncResult(one).cancel()
        # Newest first, by id: which of two ids of the same millisecond is greater is chance.
        assert found(session) == sorted([none, three, two, one], reverse=True)
        assert found(session, correlation_id="order 1") == sorted([three, one], reverse=True)
        assert found(session, tags=("vip",)) == sorted([two, one], reverse=True)
        assert found(session, tags=("eu", "vip")) == [one]
        assert found(session, task="b", queue="other") == [three]
        assert found(session, state="cancelled") == [one]
        (job,) = jobs.list_jobs(session, JobFilter(correlation_id="order 2"))
        assert (job.tags, job.correlation_id, job.state) == (["vip"], "order 2", "ready")
        role = session.execute("select session_user as me", {})[0]["me"]
        assert job.enqueued_by == role
        assert len(found(session, enqueued_by=role)) == 4
        assert found(session, enqueued_by="nobody") == []

    def test_since(self, app: PgQueue, session: Session) -> None:
        old, new = app.send_task("a").id, app.send_task("a").id
        session.execute(
            "update pgqueue.jobs set enqueued_at = now() - interval '2 days' where id = %(id)s returning id",
            {"id": old},
        )
        assert found(session, since=timedelta(hours=1)) == [new]
        assert found(session, since=datetime.now(UTC) - timedelta(days=3)) == sorted([new, old], reverse=True)

    def test_headers_may_hold_anything(self, app: PgQueue, session: Session) -> None:
        """What SQL puts there is shown, and keeps no job from ending."""
        for headers in ('{"tags": [1, 2]}', '{"tags": 7}', '{"tags": "vip", "correlation_id": {"a": 1}}'):
            session.execute("select pgqueue.enqueue('t', headers => %(h)s)::text as id", {"h": headers})
        strange = {"correlation_id": secrets.token_hex(5_000), "tags": [["x"] * 3]}
        long = app.send_task("t", headers=strange).id
        # Which of two ids of one millisecond is the larger is chance.
        seen = sorted(repr(job.tags) for job in jobs.list_jobs(session, JobFilter(task="t")))
        assert seen == sorted(map(repr, ([["x"] * 3], "vip", 7, [1, 2])))
        assert app.AsyncResult(long).cancel() == "cancelled"

    def test_the_bulk_way_and_sql(self, app: PgQueue, session: Session) -> None:
        @app.task(name="note")
        def note(n: int) -> None: ...

        ids = app.enqueue_many([note.s(n).set(correlation_id="batch", tags=["x"]) for n in range(3)])
        (row,) = session.execute(
            "select pgqueue.enqueue('note', headers => %(headers)s)::text as id",
            {"headers": '{"correlation_id": "batch"}'},
        )
        assert sorted(found(session, correlation_id="batch")) == sorted([*ids, row["id"]])

    @pytest.mark.parametrize(
        ("condition", "index"),
        [
            ("correlation_id = 'order 7'", "correlation_id"),
            ("""tags @> '["vip"]'""", "tags"),
            ("tags ? 'vip'", "tags"),
        ],
    )
    def test_history_has_an_index_on_it(self, session: Session, condition: str, index: str) -> None:
        session.connection.execute(
            "insert into pgqueue.finished_jobs (id, state, queue, task, args, kwargs, priority, attempt,"
            " retries, crashes, rescues, enqueued_at, enqueued_by, headers)"
            " select pgqueue.uuid7(), 'succeeded', 'q', 't', '[]', '{}', 5, 1, 0, 0, 0, now(), 'me',"
            " jsonb_build_object('correlation_id', 'order ' || n, 'tags', jsonb_build_array('t' || n))"
            " from generate_series(1, 20000) as n"
        )
        session.connection.execute("analyze pgqueue.finished_jobs")
        plan = session.connection.execute(
            f"explain select * from pgqueue.all_jobs where {condition}".encode()
        )
        text = "\n".join(row["QUERY PLAN"] for row in plan.fetchall())
        today = datetime.now(UTC).strftime("finished_jobs_p%Y%m%d")
        assert f"{today}_{index}" in text
        assert f"Seq Scan on {today}" not in text

    def test_an_older_schema_says_what_it_lacks(self, fresh_dsn: str) -> None:
        upgrade(fresh_dsn, revision="0008")
        with open_session(fresh_dsn) as session, pytest.raises(SchemaMismatch, match="0009"):
            jobs.list_jobs(session, JobFilter())


def bury(session: Session, job_id: str) -> str:
    letter = {**LETTER, "id": job_id}
    names, values = ", ".join(letter), ", ".join(f"%({name})s" for name in letter)
    session.connection.execute(
        f"insert into pgqueue.dead_letters ({names}) values ({values})".encode(), letter
    )
    return job_id


ACTS: dict[str, Callable[[PgQueue, Session, dict[str, Any]], object]] = {
    "cancel": lambda app, session, who: jobs.cancel_job(session, app.send_task("t").id, **who),
    "run_now": lambda app, session, who: jobs.retry_job(session, app.send_task("t", countdown=60).id, **who),
    "requeue": lambda app, session, who: app.dead_letters.requeue([bury(session, new_id())], **who),
    "purge_dead_letter": lambda app, session, who: (
        bury(session, new_id()),
        app.dead_letters.purge(DeadFilter(), **who),
    ),
    "purge_queue": lambda app, session, who: (app.send_task("t"), app.queues.purge("default", **who)),
    "move_job": lambda app, session, who: (app.send_task("t"), app.queues.move("default", "b", **who)),
    "pause_queue": lambda app, session, who: app.queues.pause("a", **who),
    "resume_queue": lambda app, session, who: (app.queues.pause("a"), app.queues.resume("a", **who)),
    "add_schedule": lambda app, session, who: app.schedules.add("s", "t", cron="@daily", **who),
    "replace_schedule": lambda app, session, who: (
        app.schedules.add("s", "t", cron="@daily"),
        app.schedules.add("s", "t", cron="@hourly", replace=True, **who),
    ),
    "pause_schedule": lambda app, session, who: (
        app.schedules.add("s", "t", cron="@daily"),
        app.schedules.pause("s", **who),
    ),
    "resume_schedule": lambda app, session, who: (
        app.schedules.add("s", "t", cron="@daily"),
        app.schedules.pause("s"),
        app.schedules.resume("s", **who),
    ),
    "remove_schedule": lambda app, session, who: (
        app.schedules.add("s", "t", cron="@daily"),
        app.schedules.remove("s", **who),
    ),
    "run_schedule": lambda app, session, who: (
        app.schedules.add("s", "t", cron="@daily"),
        app.schedules.run_now("s", **who),
    ),
}


@pytest.mark.parametrize("action", ACTS)
def test_an_act_says_who_why_and_what_changed(app: PgQueue, session: Session, action: str) -> None:
    ACTS[action](app, session, {"by": "ann", "reason": "because"})
    (act,) = [each for each in list_acts(session, ActFilter()) if each.action == action]
    role = session.execute("select session_user as me", {})[0]["me"]
    assert (act.actor, act.by, act.reason) == (role, "ann", "because")
    assert act.job_id or act.queue or act.schedule
    one_sided = {"add_schedule": "after", "pause_queue": "after", "resume_queue": "before"}
    one_sided |= {"remove_schedule": "before", "purge_dead_letter": "before", "run_schedule": "job_id"}
    sides = [one_sided[action]] if action in one_sided else ["before", "after"]
    assert all(getattr(act, side) for side in sides)
    (row,) = session.execute(
        "select action, by, reason, before, after, schedule from pgqueue.audit_trail where action = %(a)s",
        {"a": action},
    )
    assert row == {name: getattr(act, name) for name in row}


def test_a_migration_is_an_act(fresh_dsn: str) -> None:
    upgrade(fresh_dsn, revision="0001", by="ann")
    upgrade(fresh_dsn, by="bob")
    upgrade(fresh_dsn, by="cid")
    with open_session(fresh_dsn) as session:
        bob, ann = list_acts(session, ActFilter(action="migrate"))
    assert (ann.by, ann.before, ann.after) == ("ann", {"revision": None}, {"revision": "0001"})
    assert (bob.by, bob.before) == ("bob", {"revision": "0001"})


def test_acts_are_found(app: PgQueue, session: Session) -> None:
    app.queues.pause("a", by="ann")
    app.queues.pause("b", by="bob")
    app.schedules.add("s", "t", cron="@daily", by="ann")
    job = app.send_task("t", queue="a").id
    jobs.cancel_job(session, job, by="ann")

    def actions(**where: Any) -> list[str]:
        return [act.action for act in list_acts(session, ActFilter(**where))]

    assert actions() == ["cancel", "add_schedule", "pause_queue", "pause_queue"]
    assert actions(who="bob") == ["pause_queue"]
    assert actions(who=psycopg.conninfo.conninfo_to_dict(app.dsn).get("user")) == actions()
    assert actions(queue="a") == ["cancel", "pause_queue"]
    assert actions(schedule="s") == ["add_schedule"]
    assert actions(job_id=job) == actions(action="cancel") == ["cancel"]
    assert actions(since=timedelta(hours=1)) == actions()
    assert actions(since=datetime.now(UTC) + timedelta(hours=1)) == []
    assert [act.action for act in list_acts(session, ActFilter(), limit=1)] == ["cancel"]
