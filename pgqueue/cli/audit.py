"""`pgqueue audit`: who did what, when and why."""

from __future__ import annotations

from datetime import datetime, timedelta
from typing import Any

import click
from rich.console import RenderableType
from rich.text import Text

from pgqueue.cli.context import Context
from pgqueue.cli.inspect import show_found
from pgqueue.cli.options import Words, json_option, limit_option, read_id, read_since, watch_option
from pgqueue.cli.output import moment, table, to_json
from pgqueue.database.audit import Act, ActFilter, list_acts


def _read_id(ctx: click.Context, param: click.Parameter, value: str | None) -> str | None:
    return None if value is None else read_id(ctx, param, value)


@click.command(
    epilog="""\b
Examples:
  pgqueue audit --since 1d
  pgqueue audit --job 01890a5d-ac96-774b-bcce-b302099a8057
  pgqueue audit --action cancel --who ann@desk --json | jq '.[].reason'"""
)
@click.option("--job", "job_id", callback=_read_id, metavar="ID", help="Only what was done to this job.")
@click.option("--queue", type=Words(), metavar="NAME", help="Only what concerns this queue.")
@click.option("--schedule", type=Words(), metavar="NAME", help="Only what was done to this schedule.")
@click.option("--action", type=Words(), metavar="NAME", help="Only this: cancel, requeue, pause_queue, ….")
@click.option("--who", type=Words(), metavar="NAME", help="Only by this database role, or user@host.")
@click.option("--since", callback=read_since, metavar="AGO|TIME", help="Since 30m, 2h, 3d, or a time.")
@limit_option(50)
@watch_option
@json_option
@click.pass_obj
def audit(
    context: Context,
    /,
    since: datetime | timedelta | None,
    limit: int,
    watch: float | None,
    as_json: bool,
    **where: Any,
) -> None:
    """List what people did to jobs, queues, schedules and the schema, the latest first.

    Each act has the database role and the name that was given, why, and what was there before and after.
    """
    show_found(
        context,
        lambda session: list_acts(session, ActFilter(**where, since=since), limit=limit),
        _table,
        watch=watch,
        as_json=as_json,
    )


def _table(acts: list[Act]) -> RenderableType:
    if not acts:
        return Text("nobody did anything of that kind")
    rows = [
        (
            moment(act.at),
            act.by or act.actor,
            act.action,
            act.job_id or act.schedule or act.queue or act.details.get("task"),
            _change(act),
            act.reason or "",
        )
        for act in acts
    ]
    return table(("when", "who", "what", "to", "change", "why"), rows)


def _change(act: Act) -> str:
    """`state: ready → cancelled`: what differs, in few words."""
    before = act.before if isinstance(act.before, dict) else {}
    after = act.after if isinstance(act.after, dict) else {}
    words = []
    for name in dict.fromkeys([*before, *after]):
        if name in ("by", "actor", "reason"):  # of a pause: they stand in the row already
            continue
        old, new = (_word(side.get(name)) for side in (before, after))
        if old != new and new is not None:
            words.append(f"{name}: {old} → {new}" if old is not None else f"{name}: {new}")
    return ", ".join(words)


def _word(value: object) -> str | None:
    return value if value is None or isinstance(value, str) else to_json(value)
