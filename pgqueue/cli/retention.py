"""`pgqueue retention` and `pgqueue prune`: how long things are kept, and removing what is past that."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import click
from rich.console import Group, RenderableType
from rich.text import Text

from pgqueue.cli.context import Context
from pgqueue.cli.inspect import show_found
from pgqueue.cli.options import Duration, Words, bulk, json_option, note_option, who
from pgqueue.cli.output import confirmed, moment, plural, progress_bar, show, show_json, table
from pgqueue.cli.status import ExitStatus
from pgqueue.database import retention as store
from pgqueue.database.retention import General, Plan, Pruned, RetentionRule, Scope
from pgqueue.database.session import open_session
from pgqueue.retention import general_of

_DAY = 86_400
_STEP = 500 * 8192
"""Bytes of a day that a step walks over, for the progress bar."""


def _which(command: Any) -> Any:
    """The options that say what differs."""
    for option in (
        click.option("--queue", type=Words(), metavar="NAME", help="Of the jobs of this queue."),
        click.option("--task", type=Words(), metavar="NAME", help="Of the jobs of this task."),
    ):
        command = option(command)
    return command


def _scope(task: str | None, queue: str | None) -> tuple[Scope, str]:
    if task is not None and queue is None:
        return "task", task
    if queue is not None and task is None:
        return "queue", queue
    raise click.UsageError("give --task or --queue, one of them")


@click.group(
    epilog="""\b
Examples:
  pgqueue retention list
  pgqueue retention set --task shop.tasks.invoice --finished 365d --note 'tax law'
  pgqueue retention remove --task shop.tasks.invoice"""
)
def retention() -> None:
    """How long history and dead letters are kept: see it, and let a task or a queue differ."""


@retention.command(
    "list",
    epilog="""\b
Examples:
  pgqueue retention list
  pgqueue retention list --json | jq '.rules[] | select(.what == "finished")'""",
)
@json_option
@click.pass_obj
def list_command(context: Context, as_json: bool) -> None:
    """List what is kept how long: first in general, as set here, then what differs by task or queue.

    The general retentions are settings of each worker. The rules hold for all workers.
    """
    general = general_of(context.config)
    show_found(
        context,
        lambda session: {"general": asdict(general), "rules": store.list_retention(session)},
        _rules_table,
        watch=None,
        as_json=as_json,
    )


@retention.command(
    "set",
    epilog="""\b
Examples:
  pgqueue retention set --task shop.tasks.invoice --finished 365d --failures 365d --note 'tax law'
  pgqueue retention set --queue clicks --finished 1d""",
)
@_which
@click.option("--finished", type=Duration(), metavar="TIME", help="Keep finished jobs for 1d, 4w, 365d.")
@click.option("--failures", type=Duration(), metavar="TIME", help="Keep the rows of failed attempts so long.")
@click.option("--dead-letters", type=Duration(), metavar="TIME", help="Keep dead letters so long.")
@note_option
@click.pass_obj
def set_command(
    context: Context, /, task: str | None, queue: str | None, note: str | None, **keep: float | None
) -> None:
    """Keep what a task or a queue leaves behind longer or shorter than the rest.

    A task's rule goes before its queue's. What is not given stays as it is. History goes by whole days, so a
    row stays up to a day longer.
    """
    scope, name = _scope(task, queue)
    days = {what: seconds / _DAY for what, seconds in keep.items() if seconds is not None}
    if not days:
        raise click.UsageError("give --finished, --failures or --dead-letters: how long they are kept")
    with open_session(context.database, schema=context.config.schema) as session:
        store.set_retention(session, scope, name, **days, by=who(), reason=note)
    words = ", ".join(f"{_words(what)} {_days(kept)}" for what, kept in days.items())
    click.echo(f"{scope} {name}: keeps {words}")


@retention.command(
    "remove",
    epilog="""\b
Examples:
  pgqueue retention remove --task shop.tasks.invoice
  pgqueue retention remove --queue clicks --note 'wanted for the audit'""",
)
@_which
@note_option
@click.pass_obj
def remove_command(context: Context, task: str | None, queue: str | None, note: str | None) -> None:
    """Keep what a task or a queue leaves behind as long as the rest again."""
    scope, name = _scope(task, queue)
    with open_session(context.database, schema=context.config.schema) as session:
        differed = store.remove_retention(session, scope, name, by=who(), reason=note)
    click.echo(f"{scope} {name}: {'as the rest again' if differed else 'did not differ'}")


@click.command(
    epilog="""\b
Examples:
  pgqueue prune --dry-run
  pgqueue prune --yes
  PGQUEUE_RETENTION_FINISHED=1 pgqueue prune --note 'the disk is full'"""
)
@bulk
@click.pass_obj
def prune(context: Context, note: str | None, dry_run: bool, yes: bool, as_json: bool) -> int:
    """Remove what is past its retention, as workers do each minute.

    The general retentions are those of the settings, PGQUEUE_RETENTION_FINISHED and so on. It asks on a
    terminal, and elsewhere only says what it would remove, unless there is --yes. It waits for nobody who
    reads: what is in use stays for the next time.
    """
    general = general_of(context.config)
    with open_session(context.database, schema=context.config.schema) as session:
        plan = store.plan_pruning(session, general)
        if not as_json:
            show(_plan_table(plan, general))
        if dry_run or plan.empty or not (yes or confirmed("remove it?")):
            if as_json:
                show_json({"dry_run": True, **asdict(plan)})
            elif not (dry_run or plan.empty):
                click.echo("nothing was removed; --yes does it")
            return ExitStatus.DONE
        steps = 1 + sum(1 + day.bytes // _STEP for day in plan.days if day.goes == "rows")
        with progress_bar("prune", steps, shown=True) as advance:
            done = store.prune(session, general, by=who(), reason=note, progress=advance)
    if as_json:
        show_json({"dry_run": False, **asdict(done)})
    else:
        click.echo(_done(done))
    return ExitStatus.DONE


def _words(what: str) -> str:
    return {"finished": "finished jobs", "dead_letters": "dead letters", "audit": "the audit log"}.get(
        what, what
    )


def _days(days: float) -> str:
    return f"{days:g} d"


def _rules_table(found: dict[str, Any]) -> RenderableType:
    rows: list[tuple[object, ...]] = [
        (_words(what), "(the rest)", _days(days), "settings", None) for what, days in found["general"].items()
    ]
    rules: list[RetentionRule] = found["rules"]
    rows += [
        (_words(rule.what), f"{rule.scope} {rule.name}", _days(rule.days), rule.set_by, moment(rule.set_at))
        for rule in rules
    ]
    return table(("what", "of", "kept", "set by", "since"), rows, right=("kept",))


def _plan_table(plan: Plan, general: General) -> RenderableType:
    if plan.empty:
        return Text("nothing is past its retention")
    parts: list[RenderableType] = []
    if plan.days:
        rows = [
            (
                day.part,
                "all of it" if day.goes == "whole" else f"{day.rows:,} rows",
                "?" if day.rows is None else f"{'about ' if day.goes == 'whole' else ''}{day.rows:,}",
                f"{day.bytes / 2**20:,.1f} MiB",
            )
            for day in plan.days
        ]
        parts.append(table(("day", "goes", "rows", "size"), rows, right=("rows", "size")))
    letters = plural(plan.dead_letters, "dead letter")
    acts = plural(plan.acts, "row")
    parts.append(
        Text(
            f"{letters} past {_days(general.dead_letters)} or their rule, "
            f"{acts} of the audit log past {_days(general.audit)}"
        )
    )
    return Group(*parts)


def _done(done: Pruned) -> str:
    words = (
        f"removed {plural(done.days, 'day')} of history, {plural(done.rows, 'row')} of other days, "
        f"{plural(done.dead_letters, 'dead letter')}, {plural(done.acts, 'row')} of the audit log"
    )
    if done.in_use:
        words += f"; {', '.join(done.in_use)}: somebody reads it, it goes later"
    return words
