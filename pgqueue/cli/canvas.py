"""`pgqueue canvas`: chains, groups and chords."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any, Final

import click
from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from pgqueue.cli.context import Context
from pgqueue.cli.inspect import show_found
from pgqueue.cli.options import json_option, limit_option, note_option, read_id, watch_option, who
from pgqueue.cli.output import clean, moment, plural, show, show_json, table, to_json
from pgqueue.cli.status import ExitStatus
from pgqueue.database import canvases
from pgqueue.database.session import open_session
from pgqueue.job import FINISHED_STATES

_STATES: Final = ("scheduled", "ready", "running", *FINISHED_STATES, "dead")


@click.group(
    epilog="""\b
Examples:
  pgqueue canvas list --state dead
  pgqueue canvas show 01890a5d-ac96-774b-bcce-b302099a8057
  pgqueue canvas cancel 01890a5d-ac96-774b-bcce-b302099a8057 --note 'order withdrawn'"""
)
def canvas() -> None:
    """Chains, groups and chords: find them, see one, cancel what is left of it."""


@canvas.command(
    "list",
    epilog="""\b
Examples:
  pgqueue canvas list
  pgqueue canvas list --state running --watch 2
  pgqueue canvas list --state dead --json | jq -r '.[].id'""",
)
@click.option("--state", type=click.Choice(_STATES), help="Only those that are in this state.")
@limit_option(50)
@watch_option
@json_option
@click.pass_obj
def list_command(context: Context, state: str | None, limit: int, watch: float | None, as_json: bool) -> None:
    """List canvases and how far they are, the last enqueued first."""
    show_found(
        context,
        lambda session: canvases.list_canvases(session, state=state, limit=limit),
        _table,
        watch=watch,
        as_json=as_json,
    )


@canvas.command(
    "show",
    epilog="""\b
Examples:
  pgqueue canvas show 01890a5d-ac96-774b-bcce-b302099a8057
  pgqueue canvas show 01890a5d-ac96-774b-bcce-b302099a8057 --limit 500 --json | jq '.members[].state'""",
)
@click.argument("canvas_id", callback=read_id, metavar="ID")
@limit_option(20)
@json_option
@click.pass_obj
def show_command(context: Context, canvas_id: str, limit: int, as_json: bool) -> int:
    """Show one canvas: how far it is, why it failed, and its jobs, those that failed first."""
    with open_session(context.database, schema=context.config.schema) as session:
        found = canvases.show_canvas(session, canvas_id, limit=limit)
    if found is None:
        click.echo(
            f"pgqueue: no canvas {canvas_id}: never committed, pruned, or in another database", err=True
        )
        return ExitStatus.FAILED
    if as_json:
        show_json(found)
    else:
        _show(found)
    return ExitStatus.DONE


@canvas.command(
    "cancel",
    epilog="""\b
Examples:
  pgqueue canvas cancel 01890a5d-ac96-774b-bcce-b302099a8057
  pgqueue canvas cancel 01890a5d-ac96-774b-bcce-b302099a8057 --note 'order withdrawn' --json""",
)
@click.argument("canvas_id", callback=read_id, metavar="ID")
@note_option
@json_option
@click.pass_obj
def cancel_command(context: Context, canvas_id: str, note: str | None, as_json: bool) -> int:
    """Cancel what is left of a canvas: jobs that wait will not run, those that run are told to end.

    Exit status: 1 if nothing was left of it.
    """
    with open_session(context.database, schema=context.config.schema) as session:
        done = canvases.cancel_canvas(session, canvas_id, by=who(), reason=note)
    if as_json:
        show_json(asdict(done))
    if done.answer == "too_late":
        click.echo(f"pgqueue: canvas {canvas_id} has ended, or there is none", err=True)
        return ExitStatus.FAILED
    if not as_json:
        told = f", {plural(done.requested, 'running job')} told to end" if done.requested else ""
        click.echo(f"canvas {canvas_id}: {plural(done.cancelled, 'job')} cancelled{told}")
    return ExitStatus.DONE


def _table(found: list[canvases.FoundCanvas]) -> RenderableType:
    if not found:
        return Text("no such canvas")
    counts = ("jobs", "succeeded", "dead", "cancelled", "expired", "left")
    rows = [
        (
            each.id,
            each.state,
            *(getattr(each, name) for name in counts),
            moment(each.enqueued_at),
            moment(each.ended_at) if each.ended_at else None,
        )
        for each in found
    ]
    return table(("id", "state", *counts, "enqueued", "ended"), rows, right=counts)


def _show(found: dict[str, Any]) -> None:
    grid = Table.grid(padding=(0, 2, 0, 0))
    grid.add_column(style="bold", no_wrap=True)
    grid.add_column(overflow="fold")
    for name, value in found.items():
        if name != "members" and value is not None:
            text = value if isinstance(value, str) else to_json(value)
            grid.add_row(Text(name.replace("_", " ")), Text(clean(text)))
    show(grid)
    rows = [
        (
            each["id"],
            each["task"],
            f"{each['state']} ({each['reason']})" if each["reason"] else each["state"],
            each["error"],
        )
        for each in found["members"]
    ]
    show(Text(""))
    show(table(("id", "task", "state", "error"), rows))
    if found["jobs"] > len(rows):
        show(Text(f"{len(rows)} of {found['jobs']} jobs; --limit shows more"))
