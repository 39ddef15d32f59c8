"""Recurring jobs with real workers and the real command."""

from __future__ import annotations

import json
from collections import Counter
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from pgqueue import PgQueue, ScheduleError, UnknownSchedule
from tests.acceptance.workers import Jobs, Workers, eventually

APP = "periodic_app:app"


def ticks(jobs: Jobs, name: str) -> list[datetime]:
    """The ticks whose jobs have succeeded, in their order."""
    rows = jobs.sql(
        "select headers ->> 'tick' as tick from pgqueue.finished_jobs"
        " where headers ->> 'schedule' = %s and state = 'succeeded' order by 1",
        name,
    )
    return [datetime.fromisoformat(row["tick"]) for row in rows]


def said(workers: Workers, *arguments: str) -> Any:
    done = workers.run("schedule", *arguments)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout) if "--json" in arguments else done.stdout


@pytest.fixture
def api(db: str) -> PgQueue:
    return PgQueue("operator", dsn=db)


@pytest.mark.parametrize("flags", [(), ("--no-listen",)])
def test_it_comes_with_any_number_of_workers(jobs: Jobs, workers: Workers, flags: tuple[str, ...]) -> None:
    for _ in range(3):
        workers.start("-c", "1", *flags, app=APP)
    eventually(lambda: len(ticks(jobs, "often")) >= 5, "five ticks")
    found = ticks(jobs, "often")
    assert found == [found[0] + timedelta(seconds=n) for n in range(len(found))], "each once, none left out"
    rows = jobs.sql("select result, headers, enqueued_at from pgqueue.finished_jobs")
    assert {row["result"][0] for row in rows} == {"hello"}
    for row in rows:
        tick = datetime.fromisoformat(row["headers"]["tick"])
        assert row["result"][1] == tick.isoformat()
        assert timedelta() <= row["enqueued_at"] - tick < timedelta(seconds=1)


def test_in_the_code_it_comes_as_long_as_a_worker_has_it(jobs: Jobs, workers: Workers) -> None:
    old = workers.start("-c", "1", app=APP)
    eventually(lambda: ticks(jobs, "often"), "it comes")
    workers.start("-c", "1", app=APP, env={"PERIODIC_EVERY": "0"})  # the next release, without it
    before = len(ticks(jobs, "often"))
    eventually(lambda: len(ticks(jobs, "often")) > before, "it comes while the old release runs")
    assert old.stop() == 0
    (found,) = said(workers, "list", "--json")
    assert (found["state"], found["next_tick"], found["workers"]) == ("not in code", None, 0)
    fired = found["fired"]
    third = workers.start("-c", "1", app=APP)  # rolled back
    eventually(lambda: said(workers, "list", "--json")[0]["fired"] > fired, "it comes again")
    done = workers.run("schedule", "remove", "often")
    assert done.returncode == 1
    assert "is in the code of a running worker; take it out there, or pause it" in done.stderr
    third.stop()
    assert said(workers, "remove", "often") == "schedule often: removed\n"
    assert "no schedules" in said(workers, "list")


def test_the_release_that_was_started_last_says_when(jobs: Jobs, workers: Workers) -> None:
    workers.start("-c", "1", app=APP, env={"PERIODIC_EVERY": "3600"})
    eventually(lambda: said(workers, "list", "--json"), "it is written down")
    workers.start("-c", "1", app=APP)
    eventually(lambda: len(ticks(jobs, "often")) >= 3, "it comes each second")
    assert len(said(workers, "list", "--json")) == 1


def test_one_that_is_added_while_workers_run(jobs: Jobs, workers: Workers) -> None:
    workers.start("-c", "1", app=APP, env={"PERIODIC_EVERY": "0"})
    added = said(
        workers, "add", "tea", "--task", "periodic_app.tell", "--every", "1s", "--args", '["tea"]',
        "--priority", "8", "--catch-up", "none", "--note", "thirsty", "--json",
    )  # fmt: skip
    assert (added["source"], added["state"], added["every"], added["priority"]) == (
        "database",
        "active",
        1,
        8,
    )
    assert 0 <= added["seconds"] <= 1
    eventually(lambda: len(ticks(jobs, "tea")) >= 2, "it comes", within=8)  # told, not found by chance

    assert said(workers, "pause", "tea") == "schedule tea: paused\n"
    assert said(workers, "pause", "tea") == "schedule tea: paused\n"
    (paused,) = said(workers, "list", "--json")
    assert (paused["state"], paused["next_tick"]) == ("paused", None)
    job = said(workers, "run-now", "tea", "--json")["id"]
    assert jobs.finished(job)["result"][0] == "tea"
    assert said(workers, "list", "--json")[0]["fired"] == paused["fired"]

    assert said(workers, "resume", "tea").startswith("schedule tea: next ")
    eventually(
        lambda: said(workers, "list", "--json")[0]["fired"] > paused["fired"], "it comes again", within=8
    )
    table = said(workers, "list")
    assert table.splitlines()[0].split() == [
        "name",
        "task",
        "when",
        "state",
        "next",
        "fired",
        "missed",
        "skipped",
    ]
    assert table.splitlines()[1].startswith("tea   periodic_app.tell  every 1 s  active  in ")
    said(workers, "remove", "tea")
    acts = jobs.sql("select action, reason, details from pgqueue.audit_log order by id")
    assert [act["action"] for act in acts] == [
        "add_schedule",
        "pause_schedule",
        "run_schedule",
        "resume_schedule",
        "remove_schedule",
    ]
    assert acts[0]["reason"] == "thirsty"
    assert all(act["details"]["schedule"] == "tea" and "@" in act["details"]["by"] for act in acts)
    assert acts[0]["details"]["after"]["every"] == 1
    assert acts[-1]["details"]["before"]["args"] == ["tea"]


def test_a_pause_outlives_workers(jobs: Jobs, workers: Workers) -> None:
    worker = workers.start("-c", "1", app=APP)
    eventually(lambda: ticks(jobs, "often"), "it comes")
    said(workers, "pause", "often")
    worker.stop()
    fired = said(workers, "list", "--json")[0]["fired"]
    workers.start("-c", "1", app=APP)
    jobs.finished(jobs.add("periodic_app.nap", 2.5))
    assert said(workers, "list", "--json")[0]["fired"] == fired


@pytest.mark.parametrize("catch_up", ["latest", "all"])
def test_what_was_missed_while_no_worker_ran(jobs: Jobs, workers: Workers, catch_up: str) -> None:
    env = {"PERIODIC_EVERY": "3600", "PERIODIC_CATCH_UP": catch_up}
    workers.start("-c", "1", app=APP, env=env).wait_for_log("schedule_written")
    workers.started[0].stop()
    jobs.sql("update pgqueue.schedules set last_tick = last_tick - interval '5 h', next_tick = null")
    workers.start("-c", "1", app=APP, env=env)
    wanted = {"latest": 1, "all": 5}[catch_up]
    eventually(lambda: len(ticks(jobs, "often")) == wanted, f"{wanted} jobs")
    assert said(workers, "list", "--json")[0]["missed"] == 5 - wanted


def test_jobs_that_take_longer_than_their_interval(jobs: Jobs, workers: Workers, api: PgQueue) -> None:
    for overlap in ("skip", "queue", "allow"):
        api.schedules.add(overlap, "periodic_app.nap", every=1, args=(1.4,), overlap=overlap)  # type: ignore[arg-type]
    workers.start("-c", "6", app=APP, env={"PERIODIC_EVERY": "0"})
    eventually(lambda: all(len(ticks(jobs, name)) >= 3 for name in ("skip", "queue", "allow")), "three each")
    runs = jobs.sql(
        "select a.headers ->> 'schedule' as name, count(*) as overlaps from pgqueue.finished_jobs a"
        " join pgqueue.finished_jobs b on a.headers ->> 'schedule' = b.headers ->> 'schedule'"
        " and a.id < b.id and a.finished_at > b.started_at group by 1"
    )
    assert [row["name"] for row in runs] == ["allow"]
    found = ticks(jobs, "queue")
    assert found == [found[0] + timedelta(seconds=n) for n in range(len(found))], "none is left out"
    stats = {each.name: each for each in api.schedules.list()}
    assert stats["skip"].skipped > 0
    assert stats["queue"].held
    assert "held" in said(workers, "list")


# The API and what the command says without workers.


def test_the_api(api: PgQueue, jobs: Jobs) -> None:
    @api.task(name="known")
    def known(day: datetime) -> None: ...

    noon = datetime(2026, 5, 6, 12, tzinfo=UTC)
    added = api.schedules.add(
        "nightly", known, cron="0 3 * * *", timezone="Asia/Seoul", args=(noon,), jitter=timedelta(minutes=5)
    )
    assert (added.task, added.args, added.jitter) == ("known", ["2026-05-06T12:00:00+00:00"], 300)
    assert added.next_tick is not None
    assert added.next_tick.hour == 18, "03:00 in Seoul"
    assert api.schedules.next("nightly", 2, after=noon) == [
        datetime(2026, 5, 6, 18, tzinfo=UTC),
        datetime(2026, 5, 7, 18, tzinfo=UTC),
    ]
    with pytest.raises(ScheduleError, match="there is a schedule 'nightly'; replace=True or --replace"):
        api.schedules.add("nightly", "t", every=60)
    before = added.created_at
    replaced = api.schedules.add("nightly", "t", every=60, replace=True, by="me", reason="more often")
    assert (replaced.every, replaced.cron, replaced.created_at) == (60, None, before)
    (act,) = jobs.sql("select * from pgqueue.audit_log where action = 'replace_schedule'")
    assert act["details"]["before"]["cron"] == "0 3 * * *"
    assert act["details"]["after"]["every"] == 60
    assert act["details"]["by"] == "me"
    job = api.schedules.run_now("nightly")
    live = jobs.live(job)
    assert live["headers"].keys() == {"schedule", "tick"}
    assert api.schedules.get("nightly").live_jobs == [job]
    api.schedules.pause("nightly")
    assert api.schedules.get("nightly").state == "paused"
    api.schedules.resume("nightly")
    api.schedules.remove("nightly")
    assert api.schedules.list() == []
    for call in (api.schedules.get, api.schedules.pause, api.schedules.resume, api.schedules.remove):
        with pytest.raises(UnknownSchedule, match="there is no schedule 'nightly'"):
            call("nightly")
    with pytest.raises(UnknownSchedule):
        api.schedules.run_now("nightly")
    with pytest.raises(ValueError, match="give one of cron and every"):
        api.schedules.add("nightly", "t")
    with pytest.raises(TypeError, match="day"):
        api.schedules.add("nightly", known, every=60)


def test_with_an_application_the_call_is_checked(workers: Workers, jobs: Jobs) -> None:
    def add(*more: str) -> Any:
        return workers.run("-A", APP, "schedule", "add", "x", "--every", "60", *more)

    wrong = add("--task", "periodic_app.nap")
    assert (wrong.returncode, "seconds" in wrong.stderr) == (2, True)
    unknown = add("--task", "periodic_app.nop")
    assert unknown.returncode == 1
    assert "no task 'periodic_app.nop' is registered" in unknown.stderr
    assert add("--task", "periodic_app.nap", "--args", "[1]").returncode == 0
    assert jobs.sql("select args from pgqueue.schedules") == [{"args": [1]}]


def test_next_needs_no_database(workers: Workers) -> None:
    done = workers.run(
        "schedule", "next", "--cron", "30 2 * * *", "--timezone", "Europe/Berlin", "-n", "3", "--json",
        env={"PGQUEUE_DSN": None},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert len(found) == 3
    assert Counter(each["local"][11:16] for each in found) == {"02:30": 3}


def test_a_schema_without_schedules(fresh_dsn: str) -> None:
    from pgqueue import SchemaMismatch
    from pgqueue.database.migrate import upgrade

    upgrade(fresh_dsn, revision="0004")
    with pytest.raises(
        SchemaMismatch, match="schedules need revision 0005 of the schema; run `pgqueue migrate`"
    ):
        PgQueue("x", dsn=fresh_dsn).schedules.list()
