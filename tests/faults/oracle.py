"""The judge of the fault suite: it knows what was asked for from the producers' logs, what ran from the
ledger that task bodies write, and how states changed from a trigger; the queue's own word counts last.

The invariants, after healing and draining:

1. every acknowledged enqueue ends in exactly one of finished, dead; an order that is there has its job
2. no job that nobody enqueued, none of a transaction that was rolled back
3. every finished job ran
4. a transactional task has one effect, of the run that counts, if it has succeeded; else none
5. a job is started at most once for each time it was claimed
6. state changes follow the diagram, attempts only grow, and what history holds is the result of the very
   attempt and worker it names
7. two runs of a job overlap only after the earlier one's worker or process was given up
8. drained in time, without an operator
9. no process, connection or lock is left
"""

from __future__ import annotations

import time
from collections import Counter, defaultdict
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psycopg
from psycopg.rows import dict_row

from tests.acceptance.workers import whole_lines

Row = dict[str, Any]

TRANSACTIONAL = ("faults_app.charge", "faults_app.acharge", "faults_app.charge_carelessly")

SET_UP = """
create table orders (label text primary key);
create table effects (job uuid, attempt int);
create schema oracle;
create table oracle.changes (
    n bigint generated always as identity, at timestamptz not null default clock_timestamp(), job uuid,
    act text, state_before text, state_after text, attempt_after int
);
create function oracle.note() returns trigger language plpgsql security definer as $$
begin
    insert into oracle.changes (job, act, state_before, state_after, attempt_after)
    values (coalesce(new.id, old.id), tg_op, old.state, new.state, new.attempt);
    return null;
end $$;
create trigger oracle_note after insert or update of state, attempt, worker_id or delete on pgqueue.jobs
    for each row execute function oracle.note();
"""
"""What the oracle adds to a scene's database."""

ALLOWED = {
    ("INSERT", None, "ready"),
    ("INSERT", None, "scheduled"),
    ("UPDATE", "ready", "running"),  # claim
    ("UPDATE", "scheduled", "ready"),  # promotion
    ("UPDATE", "running", "scheduled"),  # retry
    ("UPDATE", "running", "ready"),  # release, rescue
    ("DELETE", "running", None),  # finish, bury
    ("DELETE", "ready", None),  # an id that was used before, found out in the same transaction
    ("DELETE", "scheduled", None),
}
"""The state diagram of docs/how-it-works.md."""


_ENDS = """
select id::text as id, 'finished' as place, args ->> 0 as label, attempt, worker_id, state,
    result #>> '{}' as result, task
from pgqueue.finished_jobs
union all select id::text, 'dead', args ->> 0, attempt, worker_id, reason, null, task
from pgqueue.dead_letters
union all select id::text, 'live', args ->> 0, attempt, worker_id, state, null, task from pgqueue.jobs
"""


@dataclass
class Verdict:
    """What a scene came to.

    Attributes:
        jobs: Acknowledged enqueues.
        lost: Of these, how many did not end in exactly one place.
        duplicated: Jobs whose body ran to its end more than once.
        stale: Acks that were refused because their run was no longer the job's.
        broken: What went against the invariants, in words; empty when all is well.
    """

    jobs: int = 0
    lost: int = 0
    duplicated: int = 0
    stale: int = 0
    recovery: float = 0.0
    slowest: float = 0.0
    broken: list[str] = field(default_factory=list)


def read_lines(path: Path) -> list[Any]:
    """The whole lines of a log of JSON values."""
    return whole_lines(path.read_text()) if path.exists() else []


def drained(dsn: str, within: float) -> bool:
    """Whether no live job is left, waiting for it."""
    deadline = time.monotonic() + within
    while True:
        try:
            with psycopg.connect(dsn, autocommit=True, connect_timeout=5) as connection:
                row = connection.execute("select exists (select from pgqueue.jobs)").fetchone()
                if row is not None and not row[0]:
                    return True
        except psycopg.OperationalError:
            pass
        if time.monotonic() > deadline:
            return False
        time.sleep(0.05)


def judge(dsn: str, producer_logs: list[Path], ledger: Path) -> Verdict:
    """Hold the database against the logs, once everything has come to rest."""
    said = _what_producers_said(producer_logs)
    runs = _Runs(read_lines(ledger))
    with psycopg.connect(dsn, autocommit=True, row_factory=dict_row) as connection:
        ends = connection.execute(_ENDS).fetchall()
        orders = {row["label"] for row in connection.execute("select label from orders")}
        effects = connection.execute("select job::text as job, attempt from effects").fetchall()
        changes = connection.execute("select *, job::text as job from oracle.changes order by n").fetchall()
        fenced = {
            row["id"]: row["fenced"] for row in connection.execute("select id, fenced from pgqueue.workers")
        }
    verdict = Verdict(jobs=len(said.acked), slowest=said.percentile(0.99))
    _judge_ends(verdict, said, ends, orders)
    _judge_runs(verdict, ends, runs, fenced)
    _judge_effects(verdict, ends, effects)
    _judge_changes(verdict, changes, runs)
    return verdict


@dataclass
class _Said:
    attempted: set[str] = field(default_factory=set)
    acked: set[str] = field(default_factory=set)
    rolled_back: set[str] = field(default_factory=set)
    seconds: list[float] = field(default_factory=list)

    def percentile(self, part: float) -> float:
        ordered = sorted(self.seconds)
        return ordered[min(int(len(ordered) * part), len(ordered) - 1)] if ordered else 0.0


def _what_producers_said(logs: list[Path]) -> _Said:
    said = _Said()
    for path in logs:
        for event, label, seconds, _ in read_lines(path):
            if event == "attempt":
                said.attempted.add(label)
            elif event == "acked":
                said.acked.add(label)
                said.seconds.append(seconds)
            elif event == "rolled back":
                said.rolled_back.add(label)
    return said


class _Runs:
    """The ledger, by job."""

    def __init__(self, lines: list[Row]) -> None:
        self.starts: Counter[tuple[str, int]] = Counter()
        self.spans: dict[str, dict[int, list[Any]]] = defaultdict(dict)
        self.completed: Counter[str] = Counter()
        for line in lines:
            key = line["job"], line["attempt"]
            if line["event"] == "start":
                self.starts[key] += 1
                self.spans[line["job"]][line["attempt"]] = [line["at"], None, line["worker"], line["pid"]]
            else:
                span = self.spans[line["job"]].get(line["attempt"])
                if span is not None:
                    span[1] = line["at"]
                if line["event"] == "end":
                    self.completed[line["job"]] += 1


def _judge_ends(verdict: Verdict, said: _Said, ends: list[Row], orders: set[str]) -> None:
    places: dict[str, list[str]] = defaultdict(list)
    ids: Counter[str] = Counter()
    for end in ends:
        places[end["label"]].append(end["place"])
        ids[end["id"]] += 1
    for label in sorted(said.acked):
        if len(places[label]) != 1 or places[label] == ["live"]:
            verdict.lost += 1
            verdict.broken.append(f"1: {label} was acknowledged and is {places[label] or 'nowhere'}")
    for label, found in sorted(places.items()):
        if label not in said.attempted:
            verdict.broken.append(f"2: {label} is {found} and nobody enqueued it")
        if label not in said.acked and len(found) > 1:
            verdict.broken.append(f"1: {label} is in {found}")
    verdict.broken += [f"2: {label} was rolled back" for label in said.rolled_back & places.keys()]
    verdict.broken += [f"1: order {label} has no job" for label in orders - places.keys()]
    verdict.broken += [f"1: job {job} is in {count} places" for job, count in ids.items() if count > 1]


def _judge_runs(verdict: Verdict, ends: list[Row], runs: _Runs, fenced: dict[str, bool]) -> None:
    verdict.duplicated = sum(count > 1 for count in runs.completed.values())
    for end in ends:
        job = end["id"]
        if end["place"] == "finished" and end["state"] == "succeeded":
            if not runs.spans[job]:
                verdict.broken.append(f"3: {end['label']} has finished and never ran")
            if end["result"] != f"{end['label']}/{end['attempt']}/{end['worker_id']}":
                verdict.broken.append(f"6: {end['label']} was ended with the result of another run: {end}")
    for (job, attempt), count in runs.starts.items():
        if count > 1:
            verdict.broken.append(f"5: job {job}, attempt {attempt} was started {count} times")
    for job, spans in runs.spans.items():
        for (earlier, first), (later, second) in zip(
            sorted(spans.items()), sorted(spans.items())[1:], strict=False
        ):
            overlap = first[1] is not None and second[0] < first[1] - 0.001
            if overlap and fenced.get(first[2], True) is False:
                verdict.broken.append(
                    f"7: attempts {earlier} and {later} of job {job} overlap, and worker {first[2]} lives"
                )


def _judge_effects(verdict: Verdict, ends: list[Row], effects: list[Row]) -> None:
    found: dict[str, list[int]] = defaultdict(list)
    for effect in effects:
        found[effect["job"]].append(effect["attempt"])
    for end in ends:
        of_job = found.pop(end["id"], [])
        succeeded = end["place"] == "finished" and end["state"] == "succeeded"
        if of_job != ([end["attempt"]] if succeeded and end["task"] in TRANSACTIONAL else []):
            verdict.broken.append(f"4: {end['label']} has effects of the attempts {of_job}: {end}")
    verdict.broken += [f"4: job {job} is nowhere and has effects" for job in found]


def _judge_changes(verdict: Verdict, changes: list[Row], runs: _Runs) -> None:
    attempts: dict[str, int] = {}
    claims: Counter[str] = Counter()
    for change in changes:
        what = change["act"], change["state_before"], change["state_after"]
        job = change["job"]
        if what not in ALLOWED and what[1] != what[2]:
            verdict.broken.append(f"6: job {job} went from {what[1]} to {what[2]} ({what[0]})")
        after = change["attempt_after"]
        if after is not None:
            claimed = what == ("UPDATE", "ready", "running")
            before = attempts.get(job, 0)
            if after != before + (1 if claimed else 0) and change["act"] != "INSERT":
                verdict.broken.append(f"6: job {job} went from attempt {before} to {after} ({what[1:]})")
            attempts[job] = after
            # Counted apart from the latest attempt: an enqueue that is repeated after the job has ended
            # inserts its row, with attempt 0, and takes it away again.
            claims[job] += claimed
    for job, spans in runs.spans.items():
        if spans and max(spans) > claims[job]:
            verdict.broken.append(f"5: job {job} ran as attempt {max(spans)}, claimed {claims[job]} times")
