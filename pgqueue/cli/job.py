"""`pgqueue job`: one job, whatever has become of it."""

from __future__ import annotations

from typing import Any, Final

import click
from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from pgqueue.cli.context import Context
from pgqueue.cli.dead import error_text
from pgqueue.cli.inspect import show_found
from pgqueue.cli.options import (
    Words,
    json_option,
    limit_option,
    note_option,
    read_id,
    read_ids,
    read_since,
    watch_option,
    who,
)
from pgqueue.cli.output import clean, clean_lines, moment, show, show_json, table, to_json
from pgqueue.cli.status import ExitStatus
from pgqueue.database import jobs
from pgqueue.database.session import open_session
from pgqueue.job import FINISHED_STATES, LIVE_STATES, JobFilter

_STATES: Final = (*LIVE_STATES, *FINISHED_STATES, "dead")
_TALL = ("failures", "acts", "traceback")


@click.group(
    epilog="""\b
Examples:
  pgqueue job list --correlation-id 'order 42'
  pgqueue job show 01890a5d-ac96-774b-bcce-b302099a8057
  pgqueue job cancel 01890a5d-ac96-774b-bcce-b302099a8057 --note 'order withdrawn'
  pgqueue job retry 01890a5d-ac96-774b-bcce-b302099a8057"""
)
def job() -> None:
    """Find jobs, see one, cancel it, or have it run again."""


@job.command(
    "list",
    epilog="""\b
Examples:
  pgqueue job list --correlation-id 'order 42'
  pgqueue job list --task shop.tasks.send_email --state dead --since 12h
  pgqueue job list --tag vip --tag eu --json | jq -r '.[].id'""",
)
@click.option("--state", type=click.Choice(_STATES), help="Only those that are in this state.")
@click.option("--queue", type=Words(), metavar="NAME", help="Only those in this queue, or once there.")
@click.option("--task", type=Words(), metavar="NAME", help="Only jobs of this task.")
@click.option("--correlation-id", type=Words(), metavar="TEXT", help="Only those that belong to this.")
@click.option(
    "--tag",
    "tags",
    type=Words(),
    multiple=True,
    metavar="TEXT",
    help="Only with this label; may be given again.",
)
@click.option("--enqueued-by", type=Words(), metavar="ROLE", help="Only those of this database role.")
@click.option("--since", callback=read_since, metavar="AGO|TIME", help="Enqueued since 30m, 3d, or a time.")
@limit_option(50)
@watch_option
@json_option
@click.pass_obj
def list_command(context: Context, /, limit: int, watch: float | None, as_json: bool, **where: Any) -> None:
    """Find jobs, live, finished and dead, the last enqueued first."""
    show_found(
        context,
        lambda session: jobs.list_jobs(session, JobFilter(**where), limit=limit),
        _found_table,
        watch=watch,
        as_json=as_json,
    )


@job.command(
    "show",
    epilog="""\b
Examples:
  pgqueue job show 01890a5d-ac96-774b-bcce-b302099a8057
  pgqueue job show 01890a5d-ac96-774b-bcce-b302099a8057 --json | jq .state""",
)
@click.argument("job_id", callback=read_id, metavar="ID")
@json_option
@click.pass_obj
def show_command(context: Context, job_id: str, as_json: bool) -> int:
    """Show one job: its state, times and arguments, each failed attempt, and what people did to it."""
    with open_session(context.database, schema=context.config.schema) as session:
        found = jobs.show_job(session, job_id)
    if found is None:
        click.echo(f"pgqueue: no job {job_id}: never committed, pruned, or in another database", err=True)
        return ExitStatus.FAILED
    if as_json:
        show_json(found)
    else:
        _show(found)
    return ExitStatus.DONE


@job.command(
    "cancel",
    epilog="""\b
Examples:
  pgqueue job cancel 01890a5d-ac96-774b-bcce-b302099a8057
  pgqueue job cancel 01890a5d-ac96-774b-bcce-b302099a8057 --note 'order withdrawn' --json""",
)
@click.argument("job_ids", callback=read_ids, metavar="ID...", nargs=-1, required=True)
@note_option
@json_option
@click.pass_obj
def cancel_command(context: Context, job_ids: tuple[str, ...], note: str | None, as_json: bool) -> int:
    """Cancel jobs: one that waits will not run, one that runs is told to end, and is not retried.

    A run that does not end within ten seconds is killed; one that ends first has succeeded.

    Exit status: 1 if it was too late for one of them.
    """
    answers = {}
    with open_session(context.database, schema=context.config.schema) as session:
        for job_id in job_ids:
            answers[job_id] = jobs.cancel_job(session, job_id, by=who(), reason=note)
    if as_json:
        show_json(answers)
    for job_id, answer in answers.items():
        if answer == "too_late":
            click.echo(f"pgqueue: job {job_id} has ended, or there is none", err=True)
        elif not as_json:
            click.echo(f"job {job_id}: {answer}")
    return ExitStatus.FAILED if "too_late" in answers.values() else ExitStatus.DONE


@job.command(
    "retry",
    epilog="""\b
Examples:
  pgqueue job retry 01890a5d-ac96-774b-bcce-b302099a8057
  pgqueue job retry 01890a5d-ac96-774b-bcce-b302099a8057 --note 'address corrected'""",
)
@click.argument("job_id", callback=read_id, metavar="ID")
@note_option
@click.pass_obj
def retry_command(context: Context, job_id: str, note: str | None) -> int:
    """Have a job run now: a dead letter, or one that waits for its time or its retry.

    Exit status: 1 if it is neither.
    """
    with open_session(context.database, schema=context.config.schema) as session:
        why_not = jobs.retry_job(session, job_id, by=who(), reason=note)
    if why_not is not None:
        click.echo(f"pgqueue: job {job_id} cannot be retried: {clean(why_not)}", err=True)
        return ExitStatus.FAILED
    click.echo(f"job {job_id}: ready")
    return ExitStatus.DONE


def _found_table(found: list[jobs.FoundJob]) -> RenderableType:
    if not found:
        return Text("no such job: never committed, pruned, or in another database")
    rows = [
        (
            each.id,
            each.task,
            each.queue,
            f"{each.state} ({each.reason})" if each.reason else each.state,
            each.attempt,
            moment(each.enqueued_at),
            moment(each.finished_at) if each.finished_at else None,
            each.correlation_id,
            _words(each.tags),
        )
        for each in found
    ]
    columns = ("id", "task", "queue", "state", "attempt", "enqueued", "ended", "belongs to", "tags")
    return table(columns, rows, right=("attempt",))


def _words(tags: object) -> str:
    """Headers may hold anything."""
    if tags is None:
        return ""
    listed = isinstance(tags, list) and all(isinstance(each, str) for each in tags)
    return ", ".join(tags) if listed else to_json(tags)  # type: ignore[arg-type]


def _show(found: dict[str, Any]) -> None:
    grid = Table.grid(padding=(0, 2, 0, 0))
    grid.add_column(style="bold", no_wrap=True)
    grid.add_column(overflow="fold")
    for name, value in found.items():
        if name not in _TALL and value is not None:
            text = value if isinstance(value, str) else to_json(value)
            grid.add_row(Text(name.replace("_", " ")), Text(clean(text)))
    show(grid)
    if found.get("traceback"):
        show(Text(f"\n{clean_lines(found['traceback']).rstrip()}"))
    if found["failures"]:
        rows = [
            (
                each["attempt"],
                each["kind"],
                moment(each["failed_at"]),
                each["worker_id"],
                error_text(each["error_class"], each["error_message"]),
            )
            for each in found["failures"]
        ]
        show(Text(""))
        show(table(("attempt", "kind", "when", "worker", "error"), rows, right=("attempt",)))
    if found["acts"]:
        acts = [
            (
                moment(each["at"]),
                each["details"].get("by") or each["actor"],
                each["action"],
                each["reason"] or "",
            )
            for each in found["acts"]
        ]
        show(Text(""))
        show(table(("when", "who", "what", "why"), acts))
