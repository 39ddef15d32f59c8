"""What `pgqueue worker` does with jobs: runs them in order, at their time, and survives the odd ones."""

from __future__ import annotations

import re
from collections import Counter
from datetime import UTC, datetime, timedelta
from typing import Any

import psutil
import psycopg
import pytest

from tests.acceptance.conftest import Shared
from tests.acceptance.workers import Gate, Jobs, Ledger, Workers, eventually


def seconds_between(earlier: datetime, later: datetime) -> float:
    return (later - earlier).total_seconds()


class TestResults:
    def test_history_has_the_result_the_times_and_the_worker(self, shared: Shared) -> None:
        job = shared.jobs.add("work", 0.2, headers={"trace": "abc"})
        row = shared.jobs.finished(job)
        assert (row["state"], row["result"], row["result_error"]) == ("succeeded", "worked", None)
        assert (row["attempt"], row["retries"], row["crashes"], row["rescues"]) == (1, 0, 0, 0)
        assert (row["queue"], row["priority"], row["headers"]) == ("default", 5, {"trace": "abc"})
        assert row["worker_id"] == shared.worker.id
        assert row["enqueued_at"] <= row["claimed_at"] <= row["started_at"] <= row["finished_at"]
        assert seconds_between(row["started_at"], row["finished_at"]) >= 0.2
        (note,) = shared.ledger.of(job)
        assert abs(row["started_at"].timestamp() - note["at"]) < 5

    def test_a_bound_task_sees_its_job(self, shared: Shared) -> None:
        job = shared.jobs.add("facts", priority=8, headers={"a": [1, {"b": None}]})
        seen = shared.jobs.finished(job)["result"]
        pid = seen.pop("pid")
        assert pid in [each.pid for each in shared.worker.executors]
        assert seen == {
            "id": job,
            "attempt": 1,
            "queue": "default",
            "priority": 8,
            "worker": shared.worker.id,
            "headers": {"a": [1, {"b": None}]},
        }

    @pytest.mark.parametrize(
        "value",
        [
            None,
            "",
            'Grüße, 世界 🎉 \u2028 \u007f \\ " \\u0000',
            {"ключ": ["é", "e\u0301", "\U0001f469\u200d\U0001f680"]},
            [1, 2.5, True, None, {"a": {"b": []}}],
            2**63,
            -(2**200),
            -0.5,
        ],
        ids=repr,
    )
    def test_values_come_back_as_they_went(self, shared: Shared, value: Any) -> None:
        row = shared.jobs.finished(shared.jobs.add("echo", value))
        assert row["result"] == value
        assert row["result_error"] is None

    @pytest.mark.parametrize("size", [8_000, 9_000, 100 << 10, 900 << 10])
    def test_large_arguments_arrive_whole(self, shared: Shared, size: int) -> None:
        text = "".join(chr(32 + index % 90) for index in range(size))
        echoed = shared.jobs.add("echo", text)
        measured = shared.jobs.add("length", text)
        assert shared.jobs.finished(echoed)["result"] == text
        assert shared.jobs.finished(measured)["result"] == size

    def test_large_arguments_among_many_small_ones(self, shared: Shared) -> None:
        # So many that the task counts as short and its jobs travel in chunks; the large ones travel alone.
        texts = ["x" * (20_000 if index % 17 == 0 else index) for index in range(600)]
        jobs = shared.jobs.add_many("length", [(text,) for text in texts])
        assert shared.jobs.ends(jobs) == Counter(succeeded=600)
        rows = shared.jobs.sql(
            "select id::text as id, result, attempt from pgqueue.finished_jobs where id = any(%s::uuid[])",
            jobs,
        )
        found = {row["id"]: row["result"] for row in rows}
        assert [found[job] for job in jobs] == [len(text) for text in texts]

    @pytest.mark.parametrize(
        ("kind", "why"),
        [
            ("large", "at most 1,048,576 bytes"),
            ("object", "the result"),
            ("nan", "the result"),
            ("nul", "the result"),
            ("surrogate", "the result"),
            ("deep", "the result"),
            ("endless", "the result"),
            ("huge number", "the result"),
        ],
    )
    def test_a_result_that_cannot_be_stored_does_not_fail_the_job(
        self, shared: Shared, kind: str, why: str
    ) -> None:
        row = shared.jobs.finished(shared.jobs.add("odd_result", kind))
        assert (row["state"], row["result"]) == ("succeeded", None)
        assert why in row["result_error"]
        assert len(row["result_error"]) < 1_100

    def test_coroutines_run(self, shared: Shared) -> None:
        assert shared.jobs.finished(shared.jobs.add("echo_later", "soon", 0.05))["result"] == "soon"
        letter = shared.jobs.dead(shared.jobs.add("fail_later"))
        assert (letter["reason"], letter["error_class"]) == ("not_retryable", "LookupError")


class TestOrder:
    def test_queues_are_strict_then_priorities_then_the_order_of_enqueueing(
        self, jobs: Jobs, workers: Workers, ledger: Ledger
    ) -> None:
        expected: list[Any] = []
        plan = [("normal", 9), ("high", 0), ("high", 5), ("normal", 5), ("high", 9), ("normal", 0)]
        for round_ in range(5):
            for queue, priority in plan:
                label: list[Any] = [queue, priority, round_]
                jobs.add("mark", label, queue=queue, priority=priority)
                expected.append(label)
        expected.sort(key=lambda label: (label[0] != "high", -label[1], label[2]))
        workers.start("-Q", "high,normal", "-c", "1")
        eventually(lambda: ledger.count() == len(expected), "all jobs run")
        assert ledger.labels() == expected

    def test_other_queues_are_left_alone(self, jobs: Jobs, workers: Workers) -> None:
        strange = jobs.add("echo", 1, queue="strange")
        ours = jobs.add("echo", 2, queue="high")
        workers.start("-Q", "high,normal", "-c", "1")
        jobs.finished(ours)
        assert jobs.live(strange)["state"] == "ready"
        assert jobs.live(strange)["attempt"] == 0

    def test_an_urgent_job_goes_before_a_thousand_that_wait(
        self, jobs: Jobs, workers: Workers, ledger: Ledger, gate: Gate
    ) -> None:
        workers.start("-Q", "high,normal", "-c", "1")
        first = jobs.add("gated", gate.path, "first", queue="normal")
        jobs.until(first, "running")
        jobs.add_many("mark", [("normal",)] * 1_000, queue="normal")
        urgent = jobs.add("mark", "urgent", queue="high")
        gate.open()
        jobs.finished(urgent)
        assert ledger.labels().index("urgent") < 500

    def test_weights_share_the_worker(self, jobs: Jobs, workers: Workers, ledger: Ledger) -> None:
        heavy = jobs.add_many("work", [(0.002, "heavy")] * 400, queue="heavy")
        light = jobs.add_many("work", [(0.002, "light")] * 400, queue="light")
        workers.start("-Q", "heavy:3,light:1", "-c", "1")
        assert jobs.ends(heavy + light) == Counter(succeeded=800)
        # While both had jobs: three of four were heavy, give or take what a fair draw may do.
        labels = ledger.labels()
        both = labels[: max(index for index, label in enumerate(labels) if label == "heavy") + 1]
        share = both.count("light") / len(both)
        assert 0.1 < share < 0.45, f"{share:.2f} of the jobs came from the queue with a quarter of the weight"
        assert "light" in labels[:100]

    def test_a_worker_without_a_list_serves_a_queue_that_appears_later(
        self, jobs: Jobs, workers: Workers
    ) -> None:
        workers.start("-c", "1", "--poll-interval", "60", all_queues=True)
        for number in range(3):
            job = jobs.add("echo", number, queue=f"new-{number}")
            row = jobs.finished(job, within=20)
            assert seconds_between(row["enqueued_at"], row["claimed_at"]) < 10

    def test_a_job_waits_for_no_other_while_a_slot_is_free(
        self, jobs: Jobs, workers: Workers, gate: Gate
    ) -> None:
        workers.start("-c", "2")
        quick = jobs.add_many("mark", [(index,) for index in range(300)])
        jobs.ends(quick)  # now the worker takes many at a time
        mixed = [jobs.add("gated", gate.path)]
        with jobs.connection.transaction():
            mixed += jobs.add_many("mark", [(index,) for index in range(200)])
        jobs.wait(mixed[1:])
        assert jobs.live(mixed[0])["state"] == "running"


class TestTimes:
    @pytest.mark.parametrize("how", ["countdown", "eta"])
    def test_a_job_runs_at_its_time_and_not_before(self, shared: Shared, how: str) -> None:
        jobs = shared.jobs
        (clock,) = jobs.sql("select clock_timestamp() as now")
        eta = clock["now"] + timedelta(seconds=1.5)
        options: dict[str, Any] = {"eta": eta} if how == "eta" else {"countdown": 1.5}
        job = jobs.add("mark", **options)
        waiting = jobs.live(job)
        assert waiting["state"] == "scheduled"
        row = jobs.finished(job)
        assert row["eta"] == waiting["eta"] >= eta
        assert row["claimed_at"] >= row["eta"]
        assert seconds_between(row["eta"], row["claimed_at"]) < 10

    def test_a_time_in_the_past_is_now(self, shared: Shared) -> None:
        job = shared.jobs.add("echo", 1, eta=datetime(1990, 1, 1, tzinfo=UTC))
        assert shared.jobs.finished(job)["state"] == "succeeded"

    def test_many_at_the_same_moment(self, shared: Shared) -> None:
        # More than one batch of the promotion, all with one eta.
        jobs = shared.jobs
        (clock,) = jobs.sql("select clock_timestamp() as now")
        eta = clock["now"] + timedelta(seconds=1)
        many = jobs.add_many("echo", [(index,) for index in range(1_200)], eta=eta)
        assert jobs.ends(many) == Counter(succeeded=1_200)

    def test_an_expired_job_ends_without_running(self, jobs: Jobs, workers: Workers, ledger: Ledger) -> None:
        late = jobs.add("mark", "late", expires=0.001)
        in_time = jobs.add("mark", "in time", expires=3_600)
        too_far = jobs.add("mark", "too far", countdown=0.5, expires=0.1)
        eventually(lambda: jobs.sql("select pg_sleep(0.01), true as slept"), "the first expires")
        workers.start("-c", "1")
        row = jobs.finished(late)
        assert (row["state"], row["result"], row["started_at"]) == ("expired", None, None)
        assert jobs.finished(in_time)["state"] == "succeeded"
        assert jobs.finished(too_far)["state"] == "expired"
        assert ledger.labels() == ["in time"]


# Each is what somebody with psql, or an old version, might leave in the table.
BAD_ROWS: dict[str, tuple[dict[str, object], str]] = {
    "args are an object": ({"args": "{}"}, "bad_payload"),
    "args are a string": ({"args": '"text"'}, "bad_payload"),
    "args are null": ({"args": "null"}, "bad_payload"),
    "kwargs are an array": ({"kwargs": "[]"}, "bad_payload"),
    "kwargs are a number": ({"kwargs": "7"}, "bad_payload"),
    "too many args": ({"args": "[1, 2, 3]"}, "bad_payload"),
    "too few args": ({"args": "[]"}, "bad_payload"),
    "a wrong type": ({"args": "[12]", "task": "tests_app.length"}, "bad_payload"),
    "an unknown keyword": ({"kwargs": '{"no such": 1}'}, "bad_payload"),
    "a keyword that is a number": ({"kwargs": '{"": 1}'}, "bad_payload"),
    "a number of 5,000 digits": ({"args": "[" + "9" * 5_000 + "]"}, "bad_payload"),
    "a nested number of 5,000 digits": ({"args": '[[{"a": ' + "9" * 5_000 + "}]]"}, "bad_payload"),
    "6,000 levels of arrays": ({"args": "[" * 6_000 + "]" * 6_000}, "bad_payload"),
    "1,000 levels of objects": ({"args": "[" + '{"a":' * 1_000 + "1" + "}" * 1_000 + "]"}, "bad_payload"),
    "an unknown task": ({"task": "tests_app.no_such_task"}, "unknown_task"),
    "an empty task": ({"task": ""}, "unknown_task"),
    "a task of blanks": ({"task": " \n\t"}, "unknown_task"),
    "a task of 5,000 characters": ({"task": "t" * 5_000}, "unknown_task"),
    "a task from elsewhere": ({"task": "os.system", "args": '["true"]'}, "unknown_task"),
}
# Odd, but there is something to run.
ODD_ROWS: dict[str, dict[str, object]] = {
    "an infinite eta": {"state": "ready", "eta": "infinity"},
    "an eta before all time": {"state": "ready", "eta": "-infinity"},
    "an eta after the year 9999": {"state": "ready", "eta": "12345-06-07"},
    "a claim time before all time": {"claimed_at": "-infinity"},
    "headers that are no object": {"headers": "[1]"},
    "headers that are deep": {"headers": '{"a": ' + "[" * 6_000 + "]" * 6_000 + "}"},
    "headers with a large number": {"headers": '{"a": ' + "9" * 5_000 + "}"},
    "headers of a megabyte": {"headers": '{"a": "' + "h" * (1 << 20) + '"}'},
    "an expiry for ever": {"expires_at": "infinity"},
    "an enqueue time before all time": {"enqueued_at": "-infinity"},
    "negative counts": {"attempt": -5, "retries": -5, "crashes": -5, "max_retries": -77},
    "a large attempt": {"attempt": 10**9 - 1},
}


class TestBadRows:
    def test_each_bad_row_is_one_dead_letter_and_its_batch_runs(
        self, jobs: Jobs, workers: Workers, ledger: Ledger
    ) -> None:
        good, bad, odd = [], {}, {}
        for name, (columns, _) in BAD_ROWS.items():
            bad[name] = jobs.add_row(**({"task": "tests_app.echo", "args": "[1]"} | columns))
            good += jobs.add_many("mark", [(name,)])
        for name, columns in ODD_ROWS.items():
            odd[name] = jobs.add_row(**({"task": "tests_app.echo", "args": "[1]"} | columns))
            good += jobs.add_many("mark", [(name,)])
        worker = workers.start("-c", "2")
        executors = {each.pid for each in worker.full_crew()}
        assert jobs.ends(good) == Counter(succeeded=len(good))
        assert set(ledger.runs().values()) == {1}
        wrong = {}
        for name, job in bad.items():
            letter = jobs.dead(job)
            if (
                letter["reason"] != BAD_ROWS[name][1]
                or not letter["error_message"]
                or len(jobs.failures(job)) != 1
            ):
                wrong[name] = (letter["reason"], letter["error_class"], letter["error_message"][:200])
        assert wrong == {}
        # The letter keeps what was written, so that it can be mended.
        assert jobs.dead(bad["args are a string"])["args"] == "text"
        assert {name: jobs.finished(job)["result"] for name, job in odd.items()} == dict.fromkeys(odd, 1)
        assert {each.pid for each in worker.executors} == executors, "an executor died"
        assert "Traceback" not in worker.log

    def test_a_scheduled_row_for_the_end_of_time_waits(self, jobs: Jobs, workers: Workers) -> None:
        never = jobs.add_row(task="tests_app.echo", args="[1]", state="scheduled", eta="infinity")
        soon = jobs.add("echo", 2, countdown=0.3)
        long_ago = jobs.add_row(task="tests_app.echo", args="[3]", state="scheduled", eta="1969-07-20")
        worker = workers.start("-c", "1")
        assert jobs.finished(soon)["result"] == 2
        assert jobs.finished(long_ago, within=20)["result"] == 3
        assert jobs.live(never)["state"] == "scheduled"
        assert "Traceback" not in worker.log

    def test_two_applications_do_not_know_each_others_tasks(self, jobs: Jobs, workers: Workers) -> None:
        other = workers.start("-Q", "other", "-c", "1", app="other_app:app")
        ours = workers.start("-Q", "default", "-c", "1")
        right = [jobs.add("other_app.greet", "you", queue="other"), jobs.add("echo", 1)]
        wrong = [jobs.add("other_app.greet", "you"), jobs.add("echo", 1, queue="other")]
        assert [jobs.finished(job)["result"] for job in right] == ["hello you", 1]
        letters = [jobs.dead(job) for job in wrong]
        assert [letter["reason"] for letter in letters] == ["unknown_task"] * 2
        assert "other_app.greet" in letters[0]["error_message"]
        assert [letter["worker_id"] for letter in letters] == [ours.id, other.id]


class TestHostileTasks:
    @pytest.mark.parametrize(
        ("kind", "class_", "message"),
        [
            ("str raises", "tests_app.StrRaises", r"\(StrRaises.__str__ raised ValueError\)"),
            ("str exits", "tests_app.StrExits", r"\(StrExits.__str__ raised SystemExit\)"),
            ("str is no text", "tests_app.StrIsNoText", r"\(StrIsNoText.__str__ raised TypeError\)"),
            ("repr raises", "tests_app.ReprRaises", ""),
            ("repr of an argument raises", "ValueError", ""),
            ("fifty megabytes", "ValueError", r"m+… \d+ bytes cut …m+"),
            ("nul and surrogates", "ValueError", "a\ufffdb\ufffdc\ufffdd"),
            ("system exit", "SystemExit", "3"),
            ("system exit zero", "SystemExit", "0"),
            ("keyboard interrupt", "KeyboardInterrupt", ""),
            ("generator exit", "GeneratorExit", ""),
            ("stop iteration", "StopIteration", ""),
            ("cancelled", r"asyncio.exceptions.CancelledError", ""),
            ("broken pipe", "BrokenPipeError", ""),
            ("connection reset", "ConnectionResetError", ""),
            ("recursion", "RecursionError", "maximum recursion depth"),
            ("circle", "ValueError", "first"),
            ("long chain", "ValueError", "2999"),
            ("no module", "NoModule", ""),
            ("odd module", "a\ufffdb\ufffdm+", ""),
            ("unhashable", "tests_app.Unhashable", ""),
            ("group", "BaseExceptionGroup", "both"),
            ("not an exception", "TypeError", "must derive from BaseException"),
        ],
    )
    def test_whatever_is_raised_is_one_dead_letter(
        self, shared: Shared, kind: str, class_: str, message: str
    ) -> None:
        before = {each.pid for each in shared.worker.full_crew()}
        job = shared.jobs.add("hostile", kind)
        letter = shared.jobs.dead(job)
        assert (letter["reason"], letter["attempt"], letter["crashes"]) == ("not_retryable", 1, 0)
        assert re.search(class_, letter["error_class"])
        assert re.search(message, letter["error_message"])
        assert len(letter["error_class"].encode()) <= 512
        assert len(letter["error_message"].encode()) <= 8 << 10
        assert len(letter["traceback"].encode()) <= 64 << 10
        assert len(shared.jobs.failures(job)) == 1
        assert {each.pid for each in shared.worker.executors} == before, "an executor died of it"

    def test_an_error_of_ours_that_the_body_raises_is_the_bodys(self, shared: Shared) -> None:
        # Not to be taken for a job whose own task or arguments are wrong.
        unknown = shared.jobs.dead(shared.jobs.add("looks_for_a_task", "no.such"))
        assert (unknown["reason"], unknown["error_class"]) == (
            "not_retryable",
            "pgqueue.errors.UnknownTask",
        )
        nonsense = shared.jobs.dead(shared.jobs.add("enqueues_nonsense"))
        assert (nonsense["reason"], nonsense["error_class"]) == (
            "not_retryable",
            "pgqueue.errors.PayloadError",
        )

    def test_a_task_that_prints_a_lot(self, jobs: Jobs, workers: Workers) -> None:
        worker = workers.start("-c", "1")
        loud = [jobs.add("prints", 3) for _ in range(2)]
        assert [jobs.finished(job)["result"] for job in loud] == ["printed"] * 2
        assert jobs.finished(jobs.add("closes_stdout"))["result"] == "closed"
        assert jobs.finished(jobs.add("echo", "still here"))["result"] == "still here"
        assert worker.stop() == 0
        assert worker.log_path.stat().st_size > 6_000_000

    def test_a_task_that_starts_a_program(self, shared: Shared) -> None:
        assert shared.jobs.finished(shared.jobs.add("starts_a_program"))["result"] == "from a program"

    def test_a_grandchild_that_keeps_every_descriptor_holds_nothing_up(
        self, jobs: Jobs, workers: Workers, gate: Gate
    ) -> None:
        worker = workers.start("-c", "1")
        pid = jobs.finished(jobs.add("leaves_a_grandchild", gate.path))["result"]
        assert jobs.finished(jobs.add("echo", "next"))["result"] == "next"
        # Its executor dies: that is seen although the grandchild holds the other end of every channel.
        job = jobs.add("dies_beside_a_grandchild", gate.path)
        jobs.until(job, "scheduled")
        jobs.make_due(job)
        assert jobs.finished(job)["result"] == 2
        assert worker.stop() == 0
        assert psutil.pid_exists(pid), "what a task leaves running is the task's own affair"
        gate.open()
        eventually(lambda: not workers.processes(), "the grandchildren leave")

    def test_no_session_stays_in_a_transaction(self, shared: Shared) -> None:
        shared.jobs.finished(shared.jobs.add("echo", 1))
        query = """select application_name, state from pg_stat_activity
                   where datname = current_database() and application_name like 'pgqueue %%'"""
        eventually(
            lambda: {row["state"] for row in shared.jobs.sql(query)} == {"idle"}, "all its sessions are idle"
        )
        names = {row["application_name"] for row in shared.jobs.sql(query)}
        assert names == {"pgqueue claim", "pgqueue maintenance", "pgqueue listen"}


def test_a_worker_has_three_connections_whatever_its_concurrency(jobs: Jobs, workers: Workers) -> None:
    workers.start("-c", "6")
    assert jobs.ends(jobs.add_many("echo", [(index,) for index in range(100)])) == Counter(succeeded=100)
    with psycopg.connect(jobs.dsn) as connection:
        row = connection.execute(
            """select count(*) from pg_stat_activity
               where datname = current_database() and application_name like 'pgqueue %'"""
        ).fetchone()
    assert row == (3,)
