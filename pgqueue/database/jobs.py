"""What people do with one job: look at it, cancel it, have it run now."""

from __future__ import annotations

from typing import Any, Literal

from pgqueue.database import dead
from pgqueue.database.session import Session
from pgqueue.job import check_id

Answer = Literal["cancelled", "requested", "too_late"]


def show_job(session: Session, job_id: str) -> dict[str, Any] | None:
    """Everything known of a job: its `state` and columns, its `failures` and what people did to it (`acts`),
    each oldest first; None if it is unknown.
    """
    job_id = check_id(job_id)
    with session.transaction():
        rows = session.run("show_job", id=job_id)
        if not rows:
            return None
        facts = {**rows[0]["job"], "state": rows[0]["state"]}
        return {
            **facts,
            "failures": session.run("list_failures", id=job_id),
            "acts": session.run("list_acts", id=job_id),
        }


def cancel_job(session: Session, job_id: str, *, by: str | None = None, reason: str | None = None) -> Answer:
    """Cancel a job: `cancelled` (it waited), `requested` (it runs, and is told), or `too_late`.

    Args:
        by: Who asks for it, noted in the audit log beside the database role.
        reason: Why, noted there too.
    """
    with session.transaction_since("0004", "cancelling needs"):
        (row,) = session.run("cancel_job", id=check_id(job_id), actor=by, reason=reason)
    answer: Answer = row["answer"]
    return answer


def retry_job(
    session: Session, job_id: str, *, by: str | None = None, reason: str | None = None
) -> str | None:
    """Have a job run now that is dead, or waits for its time or its retry; why it cannot, or None."""
    job_id = check_id(job_id)
    state = dead.find_state(session, job_id)
    if state == "dead":
        done = dead.requeue(session, [job_id], by=by, reason=reason)
        return done.refused[0].why if done.refused else None if done.ids else "somebody else has it just now"
    if state == "scheduled":
        with session.transaction():
            rows = session.run("run_now", id=job_id, by=by, reason=reason)
        if rows:
            session.wake([rows[0]["queue"]])
            return None
        state = dead.find_state(session, job_id)
    if state == "unknown":
        return "there is no such job: never committed, pruned, or in another database"
    if state in ("ready", "running"):
        return f"it is {state} already"
    return f"it has {state}; to do it once more, enqueue it anew"
