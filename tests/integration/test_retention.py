"""How long things are kept: by task, by queue and in general, and that pruning waits for nobody."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import UTC, date, datetime, timedelta
from typing import Any

import psycopg
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from psycopg.rows import dict_row

from pgqueue import PgQueue, SchemaMismatch
from pgqueue.database.migrate import check_drift, upgrade
from pgqueue.database.retention import General, Plan, Pruned, plan_pruning, prune
from pgqueue.database.session import Session, open_session
from tests.conftest import empty
from tests.integration.test_audit import bury

DAY = timedelta(days=1)
TIMES = {"finished_jobs": "finished_at", "failures": "failed_at"}
FINISHED = (
    "insert into pgqueue.finished_jobs (id, state, queue, task, args, kwargs, priority, attempt, retries,"
    " crashes, rescues, enqueued_at, enqueued_by, headers, finished_at, result)"
    " select pgqueue.uuid7(), 'succeeded', %s, %s, '[]', '{}', 5, 1, 0, 0, 0, now(), 'me',"
    ' \'{"correlation_id": "x"}\', %s, to_jsonb(repeat(md5(n::text), 10)) from generate_series(1, %s) as n'
)
NEVER = General(finished=30_000, failures=30_000, dead_letters=30_000, audit=30_000)


def general(**days: float) -> General:
    return General(**{**{name: getattr(NEVER, name) for name in General.__dataclass_fields__}, **days})


class History:
    """Days of history, in a database of their own, to fill and to look at."""

    def __init__(self, dsn: str) -> None:
        self.dsn = dsn
        self.app = PgQueue("shop", dsn=dsn)
        self.connection = psycopg.connect(dsn, autocommit=True, row_factory=dict_row)

    def close(self) -> None:
        self.app.close()
        self.connection.close()

    def sql(self, text: str, *parameters: object) -> list[dict[str, Any]]:
        cursor = self.connection.execute(text.encode(), parameters)
        return cursor.fetchall() if cursor.description else []

    def now(self) -> datetime:
        now: datetime = self.sql("select now() as now")[0]["now"]
        return now.astimezone(UTC)

    def day(self, ago: int) -> date:
        return (self.now() - ago * DAY).date()

    def clear(self) -> None:
        """As if nothing had ever been finished."""
        for parent in TIMES:
            for part in self.parts(parent):
                if datetime.strptime(part[-8:], "%Y%m%d").date() < self.day(1):
                    self.sql(f"drop table pgqueue.{part}")
        empty(self.dsn)

    def parts(self, parent: str = "finished_jobs") -> list[str]:
        rows = self.sql(
            "select c.relname from pg_inherits i join pg_class c on c.oid = i.inhrelid"
            " where i.inhparent = %s::regclass and c.relname ~ 'p\\d{8}$' order by 1",
            f"pgqueue.{parent}",
        )
        return [row["relname"] for row in rows]

    def old_parts(self, parent: str = "finished_jobs") -> list[str]:
        return [part for part in self.parts(parent) if part < f"{parent}_p{self.day(1):%Y%m%d}"]

    def add(self, ago: int, count: int = 1, *, task: str = "t", queue: str = "q", **columns: Any) -> None:
        """So many jobs that were finished, and so many failures, so many days ago."""
        day = self.day(ago)
        for parent in TIMES:
            name = f"{parent}_p{day:%Y%m%d}"
            if name not in self.parts(parent):
                self.sql(f"create table pgqueue.{name} (like pgqueue.{parent} including all)")
                self.sql(
                    f"alter table pgqueue.{parent} attach partition pgqueue.{name}"
                    f" for values from ('{day} 00:00+00') to ('{day + DAY} 00:00+00')"
                )
        at = datetime(day.year, day.month, day.day, 12, tzinfo=UTC)
        self.sql(FINISHED, queue, task, at, count)
        self.sql(
            "insert into pgqueue.failures (job_id, attempt, task, queue, kind, failed_at)"
            " select pgqueue.uuid7(), 1, %s, %s, 'failed', %s from generate_series(1, %s)",
            task, queue, at, count,
        )  # fmt: skip

    def left(self, parent: str = "finished_jobs") -> dict[tuple[int, str, str], int]:
        """How many rows there are by age in days, task and queue."""
        rows = self.sql(
            f"select current_date - ({TIMES[parent]} at time zone 'utc')::date as ago, task, queue,"
            f" count(*) as n from pgqueue.{parent} group by 1, 2, 3"
        )
        return {(row["ago"], row["task"], row["queue"]): row["n"] for row in rows}

    def step(self, days: float, *, what: str = "finished", blocks: int = 500) -> list[dict[str, Any]]:
        return self.sql(
            "select * from pgqueue.prune_history(%s, %s * interval '1 day', %s)", what, days, blocks
        )

    def leftovers(self) -> list[str]:
        """Copies that took no day's place."""
        rows = self.sql("select relname from pg_class where relname ~ '_kept_\\d{8}$' and relkind = 'r'")
        return [row["relname"] for row in rows]

    @contextmanager
    def session(self) -> Iterator[Session]:
        with open_session(self.dsn) as session:
            yield session

    def prune(self, settings: General) -> Pruned:
        with self.session() as session:
            return prune(session, settings)

    def plan(self, settings: General) -> Plan:
        with self.session() as session:
            return plan_pruning(session, settings)


@pytest.fixture(scope="module")
def own(postgres: Any) -> Iterator[History]:
    database = postgres.create_database()
    try:
        upgrade(database.dsn)
        history = History(database.dsn)
        # The server's day is the one that partitions are cut by.
        history.sql(f"alter database {database.name} set timezone = 'UTC'")
        history.sql("set timezone = 'UTC'")
        yield history
        history.close()
    finally:
        postgres.drop_database(database)


@pytest.fixture
def history(own: History) -> History:
    own.clear()
    return own


def until_waiting(history: History, other: psycopg.Connection) -> None:
    """Until the other session waits for a lock."""
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        found = history.sql(
            "select wait_event_type as waits from pg_stat_activity where pid = %s", other.info.backend_pid
        )
        if found[0]["waits"] == "Lock":
            return
        time.sleep(0.01)
    pytest.fail("it does not wait")


RULES = st.dictionaries(
    st.tuples(st.sampled_from(["task", "queue"]), st.sampled_from(["a", "b"])),
    st.sampled_from([0, 1, 3, 10, 20]),
    max_size=4,
)
ROWS = st.lists(
    st.tuples(st.sampled_from([2, 3, 5, 9, 12, 25]), st.sampled_from("abc"), st.sampled_from("abc")),
    max_size=12,
)


class TestWhatStays:
    @settings(
        max_examples=60,
        deadline=None,
        suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
    )
    @given(rules=RULES, rows=ROWS, days=st.sampled_from([1, 4, 11]))
    def test_what_is_past_its_own_retention_goes_and_nothing_else(
        self, own: History, rules: Mapping[tuple[str, str], int], rows: list[tuple[int, str, str]], days: int
    ) -> None:
        """Against the rule said in Python: task, else queue, else general, by whole days."""
        history = own
        history.clear()
        for ago, task, queue in rows:
            history.add(ago, task=task, queue=queue)
        for (scope, name), keep in rules.items():
            history.app.retention.set(**{scope: name}, finished=keep, failures=keep)  # type: ignore[arg-type]
        planned = history.plan(general(finished=days, failures=days))
        done = history.prune(general(finished=days, failures=days))
        now = history.now()
        expected: dict[tuple[int, str, str], int] = {}
        for ago, task, queue in rows:
            end = datetime.combine(history.day(ago) + DAY, datetime.min.time(), UTC)
            keep = rules.get(("task", task), rules.get(("queue", queue), days))
            whole = now - end >= max([days, *rules.values()]) * DAY
            if not whole and now - end - timedelta(hours=1) < keep * DAY:
                expected[ago, task, queue] = expected.get((ago, task, queue), 0) + 1
        for parent in TIMES:
            assert history.left(parent) == expected
        gone = len(rows) - sum(expected.values())
        assert sum(day.rows or 0 for day in planned.days if day.goes == "rows") == done.rows <= 2 * gone
        assert history.plan(general(finished=days, failures=days)).empty
        assert history.leftovers() == []

    def test_dead_letters_by_rule(self, history: History) -> None:
        with history.session() as session:
            for n, (task, ago) in enumerate(
                [("old", 10), ("old", 1), ("kept", 10), ("brief", 2), ("brief", 0)]
            ):
                letter = bury(session, f"00000000-0000-7000-8000-{n:012}")
                history.sql(
                    "update pgqueue.dead_letters set task = %s, died_at = now() - %s * interval '1 day'"
                    " where id = %s", task, ago, letter,
                )  # fmt: skip
        history.app.retention.set(task="kept", dead_letters=365)
        history.app.retention.set(task="brief", dead_letters=timedelta(days=1))
        history.app.retention.set(queue="email", dead_letters=300)  # the queue of all of them
        history.app.retention.remove(queue="email")
        assert history.plan(general(dead_letters=7)).dead_letters == 2
        assert history.prune(general(dead_letters=7)).dead_letters == 2
        left = history.sql("select task, count(*) as n from pgqueue.dead_letters group by task order by task")
        assert [(row["task"], row["n"]) for row in left] == [("brief", 1), ("kept", 1), ("old", 1)]

    def test_rows_outside_of_the_days(self, history: History) -> None:
        """They are in the default partition, row by row."""
        history.app.retention.set(task="kept", finished=365)
        for task in ("kept", "other"):
            history.sql(FINISHED, "q", task, history.now() - 20 * DAY, 1)
        history.prune(general(finished=7))
        assert [key[1] for key in history.left()] == ["kept"]

    def test_a_day_of_which_nothing_stays_leaves_no_table(self, history: History) -> None:
        history.add(10, 3, task="other")
        history.add(11, 3, task="kept")
        history.app.retention.set(task="kept", finished=365)
        history.prune(general(finished=7))
        assert history.old_parts() == [f"finished_jobs_p{history.day(11):%Y%m%d}"]
        assert set(history.left()) == {(11, "kept", "q")}

    def test_disk_comes_free_where_only_a_little_stays(self, history: History) -> None:
        history.add(10, 2000, task="other")
        history.add(10, 10, task="kept")
        (part,) = history.old_parts()

        def size() -> int:
            found: int = history.sql("select pg_total_relation_size(%s) as size", f"pgqueue.{part}")[0][
                "size"
            ]
            return found

        before = size()
        history.app.retention.set(task="kept", finished=365)
        history.prune(general(finished=7))
        assert size() < before / 5
        assert history.left() == {(10, "kept", "q"): 10}
        plan = history.sql(
            "explain select * from pgqueue.finished_jobs where finished_at < now() - interval '9 days'"
            " and headers ->> 'correlation_id' = 'x' and id = %s", "00000000-0000-7000-8000-000000000000"
        )  # fmt: skip
        assert "Index" in str(plan), "the new table has the indexes"
        check_drift(history.dsn)


class TestSteps:
    def test_what_stays_is_there_after_each_step(self, history: History) -> None:
        history.add(10, 1500, task="other")
        history.add(10, 300, task="kept", queue="q2")
        history.add(10, 1500, task="other", queue="brief")
        history.app.retention.set(task="kept", finished=365)
        steps = 0
        while answer := history.step(7, blocks=11):
            steps += 1
            assert history.left()[10, "kept", "q2"] == 300
            (row,) = answer
            assert row["removed"] + row["kept"] > 0 or row["blocks_left"] == 0
        assert steps > 10
        assert history.left() == {(10, "kept", "q2"): 300}

    def test_a_step_that_is_rolled_back_is_taken_again(self, history: History) -> None:
        history.add(10, 500, task="other")
        history.add(10, 500, task="kept")
        history.app.retention.set(task="kept", finished=365)
        while True:
            with psycopg.connect(history.dsn) as connection:
                connection.execute("select pgqueue.prune_history('finished', '7 days', 20)")
                connection.rollback()
            if not history.step(7, blocks=20):
                break
        assert history.left() == {(10, "kept", "q"): 500}

    def test_a_new_rule_in_the_middle_starts_anew(self, history: History) -> None:
        history.add(10, 800, task="one")
        history.add(10, 800, task="two")
        history.add(10, 800, task="three")
        history.app.retention.set(task="one", finished=365)
        for _ in range(5):
            assert history.step(7, blocks=10)
        history.app.retention.set(task="two", finished=365)
        while history.step(7, blocks=10):
            pass
        assert history.left() == {(10, "one", "q"): 800, (10, "two", "q"): 800}

    @pytest.mark.parametrize("in_time", ["before", "after"])
    def test_a_new_rule_beside_the_first_step_starts_anew(self, history: History, in_time: str) -> None:
        """Neither sees what the other has not committed."""
        history.add(10, 800, task="one")
        history.add(10, 800, task="two")
        history.app.retention.set(task="one", finished=365)
        with psycopg.connect(history.dsn) as first, psycopg.connect(history.dsn, autocommit=True) as second:
            rule = "select pgqueue.set_retention('task', 'two', '365 days')"
            step = "select * from pgqueue.prune_history('finished', '7 days', 10)"
            first.execute((rule if in_time == "before" else step).encode())
            if in_time == "before":
                assert second.execute(step.encode()).fetchall() == [], "it leaves the day alone"
                first.commit()
            else:
                waiting = threading.Thread(target=lambda: second.execute(rule.encode()))
                waiting.start()
                until_waiting(history, second)
                first.commit()
                waiting.join()
        while history.step(7, blocks=10):
            pass
        assert history.left() == {(10, "one", "q"): 800, (10, "two", "q"): 800}

    def test_a_day_that_is_rewritten_in_the_middle_is_walked_anew(self, history: History) -> None:
        history.add(10, 900, task="other")
        history.add(10, 900, task="kept")
        history.app.retention.set(task="kept", finished=365)
        (part,) = history.old_parts()
        history.sql(f"delete from pgqueue.{part} where task = 'other' and ctid < '(20,0)'")
        for _ in range(4):
            assert history.step(7, blocks=10)
        history.sql(f"vacuum full pgqueue.{part}")
        while history.step(7, blocks=10):
            pass
        assert history.left() == {(10, "kept", "q"): 900}

    def test_a_copy_that_somebody_drops_is_made_anew(self, history: History) -> None:
        history.add(10, 300, task="other")
        history.add(10, 300, task="kept")
        history.app.retention.set(task="kept", finished=365)
        assert history.step(7, blocks=5)
        (copy,) = history.leftovers()
        history.sql(f"drop table pgqueue.{copy}")
        while history.step(7, blocks=5):
            pass
        assert history.left() == {(10, "kept", "q"): 300}

    def test_a_step_is_short_where_results_are_long(self, history: History) -> None:
        """They are stored beside the table, whose blocks say little then."""
        history.add(10, 200, task="kept")
        (part,) = history.old_parts()
        history.sql(
            f"update pgqueue.{part} set result = to_jsonb((select string_agg(md5(n::text || g::text), '')"
            " from generate_series(1, 1000) as g)) from (select generate_series(1, 1) as n) as one"
        )
        history.app.retention.set(task="kept", finished=365)
        (sizes,) = history.sql(
            "select pg_relation_size(t) as own, pg_table_size(t) as whole from to_regclass(%s) as t",
            f"pgqueue.{part}",
        )
        assert sizes["whole"] > 20 * sizes["own"]
        steps = 0
        while answer := history.step(7, blocks=40):
            steps += 1
            assert answer[0]["kept"] < 100
        assert steps > 5
        assert history.left() == {(10, "kept", "q"): 200}

    def test_a_walk_that_is_done_is_not_done_again_by_who_keeps_more(self, history: History) -> None:
        history.add(10, 50, task="other")
        history.add(10, 50, task="kept")
        history.app.retention.set(task="kept", finished=365)
        while history.step(7):
            pass
        history.sql("update pgqueue.retention_walks set walked_at = now() - interval '1 day'")
        for days in (30, 9, 7, 30):
            assert history.step(days) == []

    def test_walkers_that_are_set_differently_do_not_share_a_walk(self, history: History) -> None:
        """One copies what the other would delete in place: together they would lose what both keep."""
        history.add(10, 900, task="brief")
        history.add(10, 900, task="rest")
        history.add(10, 900, task="kept")
        history.app.retention.set(task="brief", finished=3)
        history.app.retention.set(task="kept", finished=365)
        ended = set()
        while len(ended) < 2:
            for days in (30, 7):
                if not history.step(days, blocks=10):
                    ended.add(days)
        assert history.left() == {(10, "kept", "q"): 900}

    def test_two_at_once(self, history: History) -> None:
        """One holds a step open: the other takes another day, and none while that one ends a day."""
        for ago in (10, 11):
            history.add(ago, 300, task="other")
            history.add(ago, 300, task="kept")
        history.app.retention.set(task="kept", finished=365)
        with psycopg.connect(history.dsn) as connection:
            connection.execute("select pgqueue.prune_history('finished', '7 days', 10)")
            (row,) = history.step(7, blocks=10)
            assert row["part"].endswith(f"{history.day(10):%Y%m%d}")
            connection.commit()
            connection.execute("select pgqueue.prune_history('finished', '7 days')")
            assert history.step(7, blocks=10) == []
        while history.step(7):
            pass
        assert history.left() == {(10, "kept", "q"): 300, (11, "kept", "q"): 300}

    def test_a_step_reads_its_blocks_only(self, history: History) -> None:
        history.add(10, 100)
        (part,) = history.old_parts()
        history.sql("set enable_seqscan = off")
        try:
            plan = history.sql(
                f"explain delete from pgqueue.{part} where ctid >= '(5,0)'::tid and ctid < '(9,0)'::tid"
                " and task = 't'"
            )
        finally:
            history.sql("reset enable_seqscan")
        assert "Tid Range Scan" in str(plan)


class TestNobodyWaits:
    """Somebody has read all of history and has not ended the transaction."""

    @pytest.fixture
    def reader(self, history: History) -> Iterator[psycopg.Connection]:
        for ago in (10, 11, 40):
            history.add(ago, 300, task="other")
            history.add(ago, 30, task="kept")
        history.app.retention.set(task="kept", finished=20, failures=20)
        with psycopg.connect(history.dsn) as connection:
            connection.execute("select count(*) from pgqueue.finished_jobs")
            connection.execute("select count(*) from pgqueue.failures")
            yield connection

    def test_acks_and_enqueues_go_on(self, history: History, reader: psycopg.Connection) -> None:
        """They may wait 20 ms for a lock; a table that is about to be locked would cost them 200."""
        stop, failed, count = threading.Event(), [], 0

        def work() -> None:
            nonlocal count
            with psycopg.connect(history.dsn, autocommit=True) as connection:
                connection.execute("set lock_timeout = '20ms'")
                while not stop.is_set():
                    try:
                        connection.execute("select pgqueue.enqueue('t')")
                        connection.execute(FINISHED.encode(), ["q", "t", datetime.now(UTC), 1])
                        connection.execute(
                            "select from pgqueue.finished_jobs where id = pgqueue.uuid7()"
                            " and finished_at > now() - interval '1 hour'"
                        )
                        count += 1
                    except psycopg.errors.LockNotAvailable as error:
                        failed.append(error)

        worker = threading.Thread(target=work)
        worker.start()
        try:
            for _ in range(5):
                done = history.prune(general(finished=7, failures=7))
                history.sql("select pgqueue.make_partitions(16)")
        finally:
            stop.set()
            worker.join()
        assert failed == []
        assert count > 20
        assert done.days == 0
        assert len(done.in_use) == 2
        assert not [part for part in history.parts() if part > f"finished_jobs_p{history.day(-14):%Y%m%d}"]
        reader.rollback()
        done = history.prune(general(finished=7, failures=7))
        assert (done.days, done.in_use) == (2, [])
        assert {key: n for key, n in history.left().items() if key[1] != "t"} == {
            (10, "kept", "q"): 30,
            (11, "kept", "q"): 30,
        }
        assert history.sql("select pgqueue.make_partitions(16) as made")[0]["made"] == 4

    def test_short_transactions_all_the_time_are_no_reason(self, history: History) -> None:
        """They overlap, so that there is always one, but none that lasts."""
        history.add(40, 3)
        stop = threading.Event()

        def hold(offset: float) -> None:
            with psycopg.connect(history.dsn) as connection:
                stop.wait(offset)
                while not stop.is_set():
                    connection.execute("select count(*) from pgqueue.finished_jobs")
                    stop.wait(0.1)
                    connection.rollback()

        holders = [threading.Thread(target=hold, args=(n * 0.025,)) for n in range(4)]
        for holder in holders:
            holder.start()
        try:
            assert history.prune(general(finished=7, failures=7)).days == 2
        finally:
            stop.set()
            for holder in holders:
                holder.join()

    def test_whoever_ends_soon_is_no_reason(self, history: History) -> None:
        history.add(40, 3)
        with psycopg.connect(history.dsn) as connection:
            connection.execute("select count(*) from pgqueue.finished_jobs")
            ending = threading.Timer(0.02, connection.rollback)
            ending.start()
            (row,) = history.sql("select pgqueue.in_use(array['pgqueue.finished_jobs'::regclass]) as used")
            ending.join()
        assert row["used"] is False


class TestRules:
    def test_a_year_is_of_days(self, history: History) -> None:
        """Compared as intervals a year is 360 days, and what is past it would go too early."""
        history.sql("select pgqueue.set_retention('task', 'a', '1 year', '1 month', '30 hours')")
        days = {rule.what: rule.days for rule in history.app.retention.list()}
        assert days == {"finished": 365.25, "failures": 30, "dead_letters": 1.25}
        history.app.retention.set(task="b", finished=36_500)

    @pytest.mark.parametrize("name", ["50%off", "it's", 'a"b', "{a,b}", "back\\slash", "%s %(x)s"])
    def test_a_name_may_be_anything(self, history: History, name: str) -> None:
        history.add(10, 5, task=name)
        history.add(10, 5, task="other", queue=name)
        history.add(10, 5, task="other")
        for scope in ("task", "queue"):
            history.sql("select pgqueue.set_retention(%s, %s, '365 days')", scope, name)
        assert [day.rows for day in history.plan(general(finished=7)).days] == [5]
        assert history.prune(general(finished=7)).rows == 5
        assert sum(history.left().values()) == 10

    def test_they_are_listed_changed_and_removed(self, history: History) -> None:
        retention = history.app.retention
        retention.set(task="shop.invoice", finished=timedelta(days=365), by="ann", reason="tax law")
        retention.set(task="shop.invoice", failures=30, finished=400)
        retention.set(queue="clicks", finished=0)
        assert [(rule.scope, rule.name, rule.what, rule.days) for rule in retention.list()] == [
            ("queue", "clicks", "finished", 0),
            ("task", "shop.invoice", "failures", 30),
            ("task", "shop.invoice", "finished", 400),
        ]
        assert retention.remove(queue="clicks", by="bob")
        assert not retention.remove(queue="clicks")
        acts = history.sql("select * from pgqueue.audit_trail order by id")
        assert [act["action"] for act in acts] == ["set_retention"] * 3 + ["remove_retention"]
        assert (acts[0]["by"], acts[0]["reason"], acts[0]["details"]) == (
            "ann",
            "tax law",
            {"task": "shop.invoice"},
        )
        assert acts[1]["before"] == {"finished": "365 days"}
        assert acts[1]["after"] == {"finished": "400 days", "failures": "30 days"}
        assert (acts[3]["queue"], acts[3]["before"]) == ("clicks", {"finished": "00:00:00"})

    def test_pruning_by_hand_is_an_act(self, history: History) -> None:
        history.add(10, 3)
        history.app.retention.set(task="x", finished=365)
        with history.session() as session:
            prune(session, general(finished=7), by="ann", reason="the disk is full")
        (act,) = history.sql("select * from pgqueue.audit_trail where action = 'prune'")
        assert (act["by"], act["reason"], act["details"]["rows"]) == ("ann", "the disk is full", 3)

    @pytest.mark.parametrize(
        ("sql", "says"),
        [
            ("set_retention('tasks', 'a', '1 day')", "scope must be task or queue, got 'tasks'"),
            ("set_retention('task', '', '1 day')", "name must have 1 to 255 characters"),
            ("set_retention('task', 'a')", "give finished, failures or dead_letters"),
            ("set_retention('task', 'a', '-1 day')", "must be from 0 to 36500 days"),
            ("set_retention('task', 'a', dead_letters => '101 years')", "must be from 0 to 36500 days"),
            ("prune_history('jobs', '1 day')", "what must be finished or failures"),
            ("prune_history('finished', '-1 day')", "general 0 or more"),
            ("prune_history('finished', '1 day', 0)", "blocks at least 1"),
        ],
    )
    def test_wrong_input(self, history: History, sql: str, says: str) -> None:
        with pytest.raises(psycopg.errors.InvalidParameterValue, match=says):
            history.sql(f"select pgqueue.{sql}")

    def test_an_older_schema_says_what_it_lacks(self, fresh_dsn: str) -> None:
        upgrade(fresh_dsn, revision="0009")
        app = PgQueue("shop", dsn=fresh_dsn)
        with pytest.raises(SchemaMismatch, match="0010"):
            app.retention.list()
        with pytest.raises(SchemaMismatch, match="0010"):
            app.retention.prune()
