"""The grants that docs/operations.md gives are enough for all that operators do."""

from __future__ import annotations

import re
import secrets
from collections.abc import Iterator
from contextlib import closing
from datetime import timedelta
from pathlib import Path
from urllib.parse import urlsplit, urlunsplit

import psycopg
import pytest

from pgqueue import PermissionDenied, PgQueue, chain
from pgqueue.database import jobs
from pgqueue.database.audit import ActFilter, list_acts
from pgqueue.database.doctor.examine import examine, fix, open_visit
from pgqueue.database.session import open_session
from pgqueue.job import DeadFilter, JobFilter, new_id
from tests.integration.test_audit import ACTS, bury

PAGE = Path(__file__).resolve().parents[2] / "docs" / "operations.md"


@pytest.fixture
def roles(db: str) -> Iterator[dict[str, str]]:
    """URLs of a worker's and an operator's role with the page's grants, and of one with none."""
    text = PAGE.read_text(encoding="utf-8")
    (grants,) = re.findall(r"### Privileges.*?```sql\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
    parts = urlsplit(db)
    made = {name: f"{name}_{secrets.token_hex(4)}" for name in ("worker", "operator", "visitor")}
    with psycopg.connect(db, autocommit=True) as connection:
        for role in made.values():
            connection.execute(f"create role {role} login password 'secret'".encode())
        sql = re.sub(r"\bTO (worker|operator)\b", lambda match: f"TO {made[match[1]]}", grants)
        connection.execute(sql.encode())
        try:
            netloc = f"{{}}:secret@{parts.hostname}:{parts.port}"
            yield {
                name: urlunsplit(parts._replace(netloc=netloc.format(role))) for name, role in made.items()
            }
        finally:
            for role in made.values():
                connection.execute(f"drop owned by {role}".encode())
                connection.execute(f"drop role {role}".encode())


def app_of(dsn: str) -> PgQueue:
    return PgQueue("shop", dsn=dsn)


@pytest.mark.parametrize("action", ACTS)
def test_an_operator_may_do_what_operators_do(db: str, roles: dict[str, str], action: str) -> None:
    with closing(app_of(db)) as owner, closing(app_of(roles["operator"])) as operator:
        with open_session(db) as session, open_session(roles["operator"]) as own:
            if action in ("requeue", "purge_dead_letter"):
                letter = bury(session, new_id())
                act = operator.dead_letters.requeue if action == "requeue" else operator.dead_letters.purge
                act([letter], by="ann")
            elif action in ("cancel", "run_now"):
                job = owner.send_task("t", countdown=60).id
                (jobs.cancel_job if action == "cancel" else jobs.retry_job)(own, job, by="ann")
            elif action in ("purge_queue", "move_job"):
                owner.send_task("t")
                if action == "purge_queue":
                    operator.queues.purge("default", by="ann")
                else:
                    operator.queues.move("default", "b", by="ann")
            else:
                ACTS[action](operator, own, {"by": "ann"})
            (noted,) = [each for each in list_acts(own, ActFilter(who="ann")) if each.action == action]
            assert noted.actor.startswith("operator_")


def test_an_operator_may_look_and_prune(db: str, roles: dict[str, str]) -> None:
    with closing(app_of(roles["operator"])) as operator, open_session(roles["operator"]) as session:
        assert jobs.list_jobs(session, JobFilter()) == []
        assert operator.queues.list() == operator.dead_letters.list() == operator.retention.list() == []
        operator.retention.set(task="t", finished=timedelta(days=365), by="ann")
        assert operator.retention.plan().empty
        assert operator.retention.prune(by="ann").days == 0
        assert operator.retention.remove(task="t", by="ann")


def test_an_operator_may_end_canvases_that_hang(db: str, roles: dict[str, str]) -> None:
    with closing(app_of(db)) as owner, psycopg.connect(db, autocommit=True) as connection:
        canvas = chain(owner.signature("t"), owner.signature("t")).delay()
        connection.execute("truncate pgqueue.jobs")
        with open_visit(roles["operator"]) as visit:
            (check,) = examine(visit, ["canvases"])
            fix(visit, check, by="ann")
        (finding,) = check.findings
        assert (finding.fixed, finding.refused, canvas.state) == (True, None, "cancelled")


def test_a_role_without_grants_is_told_what_it_lacks(roles: dict[str, str]) -> None:
    with closing(app_of(roles["visitor"])) as visitor:
        for call in (
            visitor.retention.list,
            visitor.queues.list,
            lambda: visitor.dead_letters.count(DeadFilter()),
        ):
            with pytest.raises(PermissionDenied, match="Privileges"):
                call()
