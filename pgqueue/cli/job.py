"""`pgqueue job`: one job, whatever has become of it."""

from __future__ import annotations

from typing import Any

import click
from rich.table import Table
from rich.text import Text

from pgqueue.cli.context import Context
from pgqueue.cli.dead import error_text, read_id, read_ids, who
from pgqueue.cli.options import json_option, note_option
from pgqueue.cli.output import clean, clean_lines, moment, show, show_json, table, to_json
from pgqueue.cli.status import ExitStatus
from pgqueue.database import jobs
from pgqueue.database.session import open_session

_TALL = ("failures", "acts", "traceback")


@click.group(
    epilog="""\b
Examples:
  pgqueue job show 01890a5d-ac96-774b-bcce-b302099a8057
  pgqueue job cancel 01890a5d-ac96-774b-bcce-b302099a8057 --note 'order withdrawn'
  pgqueue job retry 01890a5d-ac96-774b-bcce-b302099a8057"""
)
def job() -> None:
    """See one job, cancel it, or have it run again."""


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
