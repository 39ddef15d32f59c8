"""`pgqueue schedule`: recurring jobs, seen and changed at run time."""

from __future__ import annotations

import json
from datetime import datetime
from typing import Any, get_args

import click
from rich.console import Group, RenderableType
from rich.text import Text

from pgqueue.app import PgQueue
from pgqueue.cli.context import Context
from pgqueue.cli.enqueue import read_json
from pgqueue.cli.inspect import show_found
from pgqueue.cli.options import Duration, Words, json_option, note_option, watch_option, who
from pgqueue.cli.output import clean, duration, moment, show_json, table
from pgqueue.cli.status import ExitStatus
from pgqueue.cron import find_zone
from pgqueue.database.schedules import ScheduleStatus, list_schedules
from pgqueue.errors import ScheduleError
from pgqueue.schedule import CatchUp, Overlap
from pgqueue.schedules import next_ticks

_name = click.argument("name", type=Words())
_cron = click.option("--cron", metavar="EXPRESSION", help="Five fields, as in '0 9 * * MON-FRI', or @daily.")
_every = click.option("--every", type=Duration(), metavar="TIME", help="Instead: every 30s, 15m, 2h or 1d.")
_timezone = click.option(
    "--timezone", default="UTC", show_default=True, metavar="ZONE", help="Whose wall clock --cron goes by."
)


@click.group(
    epilog="""\b
Examples:
  pgqueue schedule list
  pgqueue schedule add nightly --task shop.tasks.close_day --cron '0 3 * * *' --timezone Asia/Seoul
  pgqueue schedule next nightly
  pgqueue schedule pause nightly --note 'stocktaking'"""
)
def schedule() -> None:
    """Recurring jobs: see them, add, pause, resume and remove them."""


@schedule.command(
    "list",
    epilog="""\b
Examples:
  pgqueue schedule list
  pgqueue schedule list --json | jq '.[] | select(.state != "active") | .name'""",
)
@watch_option
@json_option
@click.pass_obj
def list_command(context: Context, watch: float | None, as_json: bool) -> None:
    """List all schedules: those in the code of applications, and those that were added.

    One from code comes as long as a live worker has it in its code; else its state is "not in code".
    """
    show_found(context, list_schedules, _schedules_table, watch=watch, as_json=as_json)


@schedule.command(
    "add",
    epilog="""\b
Examples:
  pgqueue schedule add nightly --task shop.tasks.close_day --cron '0 3 * * *' --timezone Asia/Seoul
  pgqueue -A shop.app:app schedule add poll --task shop.tasks.poll --every 15m --overlap skip
  pgqueue schedule add nightly --task shop.tasks.close_day --cron '0 4 * * *' --replace""",
)
@_name
@click.option("--task", type=Words(), required=True, metavar="NAME", help="Whose job it is.")
@_cron
@_every
@_timezone
@click.option("--args", callback=read_json, default="[]", metavar="JSON", help="Positional arguments.")
@click.option("--kwargs", callback=read_json, default="{}", metavar="JSON", help="Keyword arguments.")
@click.option("-q", "--queue", metavar="NAME", help="Where its jobs go.  [default: the task's]")
@click.option("--priority", type=click.IntRange(0, 9), help="Larger runs first.  [default: the task's]")
@click.option("--expires", type=float, metavar="SECONDS", help="Do not run a job later than this.")
@click.option(
    "--max-retries", type=click.IntRange(-1), help="Runs after the first; -1: ever.  [default: the task's]"
)
@click.option(
    "--catch-up",
    type=click.Choice(get_args(CatchUp)),
    default="latest",
    show_default=True,
    help="Which ticks to make up for when no worker was there.",
)
@click.option(
    "--overlap",
    type=click.Choice(get_args(Overlap)),
    default="allow",
    show_default=True,
    help="What to do at a tick while a job of it lives.",
)
@click.option(
    "--jitter", type=Duration(), default="0", metavar="TIME", help="Put each job off by up to this."
)
@click.option("--replace", is_flag=True, help="Change the one that has the name.")
@note_option
@json_option
@click.pass_obj
def add_command(
    context: Context,
    /,
    name: str,
    task: str,
    args: str,
    kwargs: str,
    note: str | None,
    as_json: bool,
    **given: Any,
) -> None:
    """Add a schedule; it comes until it is removed.

    With -A the arguments are checked against the task's signature, and the application's routes and defaults
    hold. Without, the name is taken as it is.
    """
    app = _app(context)
    try:
        known = app.tasks.get(task)
        call = (json.loads(args), json.loads(kwargs)) if known is None else known.codec.decode(args, kwargs)
        if context.app is not None:
            app.find_task(task)
        added = app.schedules.add(name, task, args=call[0], kwargs=call[1], by=who(), reason=note, **given)
    except (TypeError, ValueError) as error:
        raise click.UsageError(str(error)) from error
    if as_json:
        show_json(added)
    else:
        click.echo(f"schedule {clean(name)}: next {_when(added)}")


@schedule.command("pause", epilog="\b\nExamples:\n  pgqueue schedule pause nightly --note 'stocktaking'")
@_name
@note_option
@click.pass_obj
def pause_command(context: Context, name: str, note: str | None) -> None:
    """Let a schedule's ticks pass until it is resumed, whatever workers start or stop meanwhile."""
    _app(context).schedules.pause(name, by=who(), reason=note)
    click.echo(f"schedule {clean(name)}: paused")


@schedule.command("resume", epilog="\b\nExamples:\n  pgqueue schedule resume nightly")
@_name
@note_option
@click.pass_obj
def resume_command(context: Context, name: str, note: str | None) -> None:
    """Let a schedule's ticks count again, from now on: what came meanwhile is not made up for."""
    schedules = _app(context).schedules
    schedules.resume(name, by=who(), reason=note)
    click.echo(f"schedule {clean(name)}: next {_when(schedules.get(name))}")


@schedule.command(
    "remove", epilog="\b\nExamples:\n  pgqueue schedule remove nightly --note 'moved into the code'"
)
@_name
@note_option
@click.pass_obj
def remove_command(context: Context, name: str, note: str | None) -> None:
    """Remove a schedule; its jobs stay. One that a running worker has in its code can only be paused."""
    _app(context).schedules.remove(name, by=who(), reason=note)
    click.echo(f"schedule {clean(name)}: removed")


@schedule.command(
    "run-now",
    epilog="""\b
Examples:
  pgqueue schedule run-now nightly
  pgqueue job show $(pgqueue schedule run-now nightly)""",
)
@_name
@note_option
@json_option
@click.pass_obj
def run_now_command(context: Context, name: str, note: str | None, as_json: bool) -> None:
    """Enqueue a schedule's job now, beside its ticks, also of a paused one; prints the job's id."""
    job_id = _app(context).schedules.run_now(name, by=who(), reason=note)
    show_json({"id": job_id}) if as_json else click.echo(job_id)


@schedule.command(
    "next",
    epilog="""\b
Examples:
  pgqueue schedule next nightly
  pgqueue schedule next --cron '30 2 * * *' --timezone Europe/Berlin -n 10""",
)
@click.argument("name", type=Words(), required=False)
@_cron
@_every
@_timezone
@click.option("-n", "count", type=click.IntRange(1, 1000), default=5, show_default=True, help="So many.")
@json_option
@click.pass_obj
def next_command(
    context: Context,
    name: str | None,
    cron: str | None,
    every: float | None,
    timezone: str,
    count: int,
    as_json: bool,
) -> int:
    """Show when a schedule comes next, or an expression would, which needs no database."""
    if name is not None and (cron is not None or every is not None):
        raise click.UsageError(f"the schedule {name!r} has times of its own: leave out --cron and --every")
    state = "active"
    if name is not None:
        found = _app(context).schedules.get(name)
        cron, every, timezone, state = found.cron, found.every, found.timezone, found.state
    try:
        ticks = next_ticks(cron, every, timezone, count)
    except ValueError as error:
        if name is None:
            raise click.UsageError(str(error)) from error
        raise ScheduleError(f"the schedule {name!r} makes no sense: {error}") from error
    if as_json:
        show_json([{"tick": tick, "local": _local(tick, timezone)} for tick in ticks])
        return ExitStatus.DONE
    for tick in ticks:
        click.echo(moment(_local(tick, timezone)))
    if state != "active":
        click.echo(f"pgqueue: it is {state}: nothing comes now", err=True)
    return ExitStatus.DONE


def _app(context: Context) -> PgQueue:
    # A database is asked for first, like everywhere.
    return context.app or PgQueue("pgqueue", dsn=context.database, schema=context.config.schema)


def _local(tick: datetime, timezone: str) -> datetime:
    return tick.astimezone(find_zone(timezone))


def _when(found: ScheduleStatus) -> str:
    if found.next_tick is None:
        return found.state
    local = _local(found.next_tick, found.timezone)
    return f"{moment(local)} (in {duration(found.seconds)})"


def _cadence(found: ScheduleStatus) -> str:
    if found.cron is None:
        return f"every {_interval(found.every or 0.0)}"
    return found.cron if found.timezone == "UTC" else f"{found.cron} {found.timezone}"


def _interval(seconds: float) -> str:
    size, unit = next(
        (size, unit)
        for size, unit in ((86_400, "d"), (3600, "h"), (60, "min"), (1, "s"))
        if seconds % size == 0
    )
    return f"{seconds / size:g} {unit}"


def _schedules_table(found: list[ScheduleStatus]) -> RenderableType:
    if not found:
        return Text("no schedules; `pgqueue schedule add` makes one, or @app.periodic in the code")
    rows = [
        (
            each.name,
            each.task if each.task != each.name else "=",
            _cadence(each),
            _state(each),
            "-" if each.seconds is None else f"in {duration(each.seconds)}",
            f"{each.fired:,}",
            f"{each.missed:,}",
            f"{each.skipped:,}",
        )
        for each in found
    ]
    columns = ("name", "task", "when", "state", "next", "fired", "missed", "skipped")
    parts: list[RenderableType] = [table(columns, rows, right=("next", "fired", "missed", "skipped"))]
    if any(each.state == "not in code" for each in found):
        parts.append(Text("\nnot in code: no running worker has it; `pgqueue schedule remove` forgets it"))
    return Group(*parts)


def _state(found: ScheduleStatus) -> Text:
    text = found.state if not found.held else f"{found.state}, {len(found.held)} held"
    return Text(text, style="" if found.state == "active" else "bold red")
