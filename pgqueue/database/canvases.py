"""What people do with canvases: find them, look at one, cancel what is left of one."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from typing import Any

from pgqueue.database.jobs import Answer
from pgqueue.database.session import Session
from pgqueue.job import check_id

_SINCE = "0011"


@dataclass(frozen=True, slots=True)
class FoundCanvas:
    """One line of a list: its state, and how many of its jobs have ended how; `left`: those that have not."""

    id: str
    state: str
    jobs: int
    succeeded: int
    dead: int
    cancelled: int
    expired: int
    left: int
    enqueued_at: datetime
    enqueued_by: str
    ended_at: datetime | None


@dataclass(frozen=True, slots=True)
class CancelledCanvas:
    """What a cancel has done: to jobs that waited, and to those that run and are told to end."""

    answer: Answer
    cancelled: int
    requested: int


def list_canvases(session: Session, *, state: str | None = None, limit: int = 50) -> list[FoundCanvas]:
    """The last enqueued first."""
    with session.transaction_since(_SINCE, "finding canvases needs"):
        return [FoundCanvas(**row) for row in session.run("list_canvases", state=state, limit=limit)]


def show_canvas(session: Session, canvas_id: str, *, limit: int = 50) -> dict[str, Any] | None:
    """Its line of the list, why it has failed as `reason`, `error` and `fault` (the id of the job), and as
    `members` the first of its jobs, those that have failed and those that have not ended before the others;
    None if it is unknown.
    """
    canvas_id = check_id(canvas_id)
    with session.transaction_since(_SINCE, "finding canvases needs"):
        rows = session.run("show_canvas", id=canvas_id)
        if not rows:
            return None
        (end,) = session.run("find_canvas", id=canvas_id, value=False)
        members = session.run("show_canvas_jobs", id=canvas_id, limit=limit)
    why = {"reason": end["reason"], "error": end["error_message"], "fault": end["fault"]}
    return {**rows[0], **why, "members": members}


def cancel_canvas(
    session: Session, canvas_id: str, *, by: str | None = None, reason: str | None = None
) -> CancelledCanvas:
    """Cancel what is left of a canvas.

    Args:
        by: Who asks for it, noted in the audit log beside the database role.
        reason: Why, noted there too.
    """
    canvas_id = check_id(canvas_id)
    with session.transaction_since(_SINCE, "cancelling a canvas needs"):
        (row,) = session.run("cancel_canvas", id=canvas_id, actor=by, reason=reason)
        nodes = session.run("list_canvas_jobs", id=canvas_id)
    ids: str | None = "{" + ",".join(node["id"] for node in nodes) + "}"
    while ids is not None:  # after the commit, each in its own: see revision 0011
        with session.transaction():
            ids = session.run("settle_canvases", ids=ids)[0]["left_over"]
    return CancelledCanvas(**row)
