"""Bodies that harm the process they run in: their job ends once, and the worker runs the next ones.

One worker with one executor for all of them, so what one body leaves behind is there for the next. A job
whose process dies is buried at once (`--max-crashes 1`), so that a crash costs no second attempt here.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.acceptance.conftest import Shared, own_queue
from tests.acceptance.workers import eventually, gone
from tests.conftest import command

APPS = Path(__file__).with_name("apps")


@dataclass(frozen=True)
class Cage(Shared):
    """The worker of this module."""

    def add(self, task: str, *args: Any) -> str:
        return self.jobs.add(f"biting_app.{task}", *args)

    def goes_on(self) -> None:
        """The next jobs run, each once and all in one process."""
        jobs = [self.add("good", number) for number in range(5)]
        assert self.jobs.ends(jobs) == Counter(succeeded=5)
        assert {len(self.ledger.of(job)) for job in jobs} == {1}
        assert len({self.jobs.finished(job)["result"] for job in jobs}) <= 2

    def single(self) -> None:
        """No process is left beside the supervisor, its fork server and one executor."""
        mine = {self.worker.pid, self.worker.fork_server.pid}

        def others() -> list[str]:
            found = [each for each in self.workers.processes() if each.pid not in mine]
            # The helper of multiprocessing stays until its executor leaves.
            return [name for name in map(command, found) if "resource_tracker" not in name]

        eventually(lambda: len(others()) <= 1, "nobody but one executor is left", 15)

    def renew(self) -> None:
        """A fresh executor in place of one that carries what a body has left there."""
        for each in self.worker.executors:
            each.kill()
            gone([each])
        self.worker.full_crew()


@pytest.fixture(autouse=True)
def _no_leftovers() -> None:
    """Executors come and go here; `Workers.close` sees to what is left in the end."""


@pytest.fixture(scope="module")
def cage(postgres: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cage]:
    with own_queue(postgres, tmp_path_factory.mktemp("cage"), APPS) as (jobs, workers):
        worker = workers.start("-c", "1", "--max-crashes", "1", app="biting_app:app")
        cage = Cage(jobs, workers, worker)
        cage.goes_on()
        yield cage


ERRORS = {
    "its class raises": ("biting_app.ClassRaises", ""),
    "its class exits": ("biting_app.ClassExits", ""),
    "its class is another": ("biting_app.ClassLies", ""),
    "its traceback raises": ("biting_app.TracebackRaises", ""),
    "its cause raises": ("biting_app.CauseRaises", ""),
    "ours, its traceback raises": ("", ""),
    "ours, its class raises": ("biting_app.OurClass", ""),
    "its text is evil": ("biting_app.StrIsEvil", "evil but text"),
    "its text takes long": ("biting_app.StrIsSlow", "at last"),
    "its class has no name": ("Nameless", ""),
    "its class has odd names": ("5.OddlyNamed", ""),
    "its class has a long name": ("m", ""),
    "a chain of 100,000 causes": ("ValueError", "the last"),
    "a chain of 100,000 contexts": ("ValueError", "the last"),
    "groups 5,000 deep": ("ExceptionGroup", "a group"),
    "a group of 20,000": ("ExceptionGroup", "wide"),
    "a retry for something odd": ("biting_app.ClassRaises", ""),
    "a retry for something without a traceback": ("", ""),
    "a text of 50 MB": ("ValueError", "\N{REPLACEMENT CHARACTER}"),
}


@pytest.mark.parametrize("kind", ERRORS)
def test_an_error_that_bites_is_one_dead_letter(cage: Cage, kind: str) -> None:
    class_, message = ERRORS[kind]
    crew = {each.pid for each in cage.worker.full_crew()}
    job = cage.add("fails", kind)
    letter = cage.jobs.dead(job)
    assert letter["reason"] in ("not_retryable", "retries_exhausted")
    assert letter["attempt"] == len(cage.ledger.of(job)) == 1
    assert class_ in letter["error_class"]
    assert message in letter["error_message"]
    assert len(letter["error_class"].encode()) <= 512
    assert len(letter["traceback"].encode()) <= 64 << 10
    cage.goes_on()
    assert {each.pid for each in cage.worker.executors} == crew, "the executor died of it"


def test_an_error_without_a_name_is_retried_by_the_policy(cage: Cage) -> None:
    job = cage.add("fails_by_policy", "its class has no name")
    letter = cage.jobs.dead(job)
    assert (letter["reason"], letter["attempt"]) == ("retries_exhausted", 2)
    assert len(cage.ledger.of(job)) == 2


@pytest.mark.parametrize("room", [0, 1, 2, 3, 5, 8, 13, 21, 34])
def test_recursion_that_ends_near_the_bottom(cage: Cage, room: int) -> None:
    crew = {each.pid for each in cage.worker.full_crew()}
    letter = cage.jobs.dead(cage.add("fails_at_the_bottom", room))
    assert (letter["reason"], letter["error_class"]) == ("not_retryable", "RecursionError")
    cage.goes_on()
    assert {each.pid for each in cage.worker.executors} == crew, "the executor died of it"


RESULTS: dict[str, Any] = {
    # Stored as they are; None: not stored, and a note says why.
    "keys of all kinds": None,
    "a list that raises": [1],
    "a dict that raises": {"a": 1},
    "the same key twice": {"1": 2},
    "an evil text": None,
    "sets in a set": [[1]],
    "bytes": "/wA=",
}
NOT_STORED = [
    "fifty megabytes",
    "a million numbers",
    "a generator",
    "something endless",
    "something that exits",
    "a list of what exits",
    "an error that raises",
    "a tuple as a key",
    "an error whose class exits",
    "an evil key",
    "a class",
    "a module",
    "a lock",
    "infinity",
    "a dict in a circle",
]


@pytest.mark.parametrize("kind", [*RESULTS, *NOT_STORED])
def test_a_result_that_bites_does_not_fail_its_job(cage: Cage, kind: str) -> None:
    crew = {each.pid for each in cage.worker.full_crew()}
    job = cage.add("returns", kind)
    row = cage.jobs.finished(job)
    print(kind, repr(row["result"])[:200], row["result_error"])
    assert (row["state"], row["attempt"], len(cage.ledger.of(job))) == ("succeeded", 1, 1)
    assert (row["result"] is None) == (row["result_error"] is not None)
    assert len(row["result_error"] or "") <= 1_000
    if kind in NOT_STORED:
        assert row["result_error"] is not None
    cage.goes_on()
    assert {each.pid for each in cage.worker.executors} == crew, "the executor died of it"


DEEDS = {
    "close_standard_descriptors": "done",
    "close_everything": "crashed",
    "close_everything_and_open_others": "crashed",
    "close_everything_and_stay": "crashed",
    "close_all_sockets": "crashed",
    "write_into_everything": "crashed",
    "write_zeros_into_everything": "crashed",
    "remove_the_folder": "done",
    "ignore_signals": "done",
    "default_signals": "done",
    "block_signals": "done",
    "leave_an_alarm": "done",
    "become_a_session": "done",
    "leave_threads": "done",
    "leave_a_loop": "done",
    "exit_in_a_thread": "done",
    "return_twice": "done",
    "return_twice_from_a_loop": "done",
    "raise_in_the_other": "done",
    "exit_in_the_other": "done",
    "fork_and_fork": "done",
    "start_processes": "done",
    "terminate_a_process": "done",
    "fork_a_pool": "done",
    "lower_the_recursion_limit": "done",
    "trace": "done",
    "trace_and_raise": "anything",
    "patch_everything": "done",
    "leave_garbage_that_raises": "done",
    "warn": "done",
    "change_the_locale": "done",
    "clear_the_environment": "done",
    "replace_streams": "done",
    "run_out_of_memory": "MemoryError",
    "stay_out_of_memory": "MemoryError",
    "run_out_of_descriptors": "OSError",
    "abort": "crashed",
    "crash_in_c": "crashed",
}


@pytest.mark.parametrize("deed", DEEDS)
def test_a_body_that_bites_harms_its_own_job_only(cage: Cage, deed: str) -> None:
    job = cage.add("does", deed)
    try:
        _ends_once(cage, deed, job)
    finally:
        cage.renew()


def _ends_once(cage: Cage, deed: str, job: str) -> None:
    cage.jobs.ends([job])
    found = cage.jobs.sql("select result from pgqueue.finished_jobs where id = %s", job)
    letters = cage.jobs.sql(
        "select reason, error_class, error_message from pgqueue.dead_letters where id = %s", job
    )
    ends = [row["result"] for row in found]
    for row in letters:
        ends.append("crashed" if row["reason"] == "crashed" else row["error_class"])
    print(deed, ends, letters)
    assert len(ends) == 1
    assert DEEDS[deed] in ("anything", ends[0])
    runs = cage.ledger.of(job)
    assert len(runs) == 1
    if deed == "close_everything_and_open_others":
        # Its outcome was not written into what has taken the channel's place.
        assert f"job {job} has closed the descriptor of its executor's channel" in cage.worker.log
    cage.goes_on()
    if deed in ("return_twice", "return_twice_from_a_loop", "raise_in_the_other", "exit_in_the_other"):
        # The process that was asked runs the next job; the other one is gone.
        assert cage.jobs.finished(cage.add("good"))["result"] == runs[0]["pid"]
    cage.single()
