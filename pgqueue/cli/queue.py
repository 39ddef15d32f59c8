"""`pgqueue queue`: pause and resume queues, empty them, move their jobs."""

from __future__ import annotations

from datetime import datetime
from typing import Any

import click

from pgqueue.cli.context import Context
from pgqueue.cli.enqueue import read_time
from pgqueue.cli.inspect import exact_option, show_queues
from pgqueue.cli.options import (
    MOST_ROWS,
    Duration,
    Words,
    bulk,
    json_option,
    note_option,
    read_queue,
    watch_option,
    who,
)
from pgqueue.cli.output import confirmed, moment, plural, progress_bar, show_json
from pgqueue.cli.status import ExitStatus
from pgqueue.database import queues
from pgqueue.database.queues import BATCH, WAITING, Waiting
from pgqueue.database.session import Session, open_session
from pgqueue.options import check_time

_name = click.argument("queue", callback=read_queue)


def _jobs(command: Any) -> Any:
    """The options that say which jobs."""
    for option in (
        click.option("--limit", type=click.IntRange(1, MOST_ROWS), help="So many at most, the first to run."),
        click.option("--state", type=click.Choice(WAITING), help="Only those that are in this state."),
        click.option("--task", type=Words(), metavar="NAME", help="Only jobs of this task."),
    ):
        command = option(command)
    return command


@click.group(
    epilog="""\b
Examples:
  pgqueue queue list
  pgqueue queue pause email --for 2h --note 'mail server moves'
  pgqueue queue move email email_slow --task shop.tasks.newsletter --yes"""
)
def queue() -> None:
    """Queues: see them, pause and resume them, empty them, move their jobs."""


@queue.command(
    "list",
    epilog="""\b
Examples:
  pgqueue queue list
  pgqueue queue list --json | jq '.[] | select(.pause) | .queue'""",
)
@exact_option
@watch_option
@json_option
@click.pass_obj
def list_command(context: Context, exact: bool, watch: float | None, as_json: bool) -> None:
    """List the queues: jobs by state, dead letters, workers, and which are paused; as `inspect queues`."""
    show_queues(context, exact=exact, watch=watch, as_json=as_json)


@queue.command(
    "pause",
    epilog="""\b
Examples:
  pgqueue queue pause email --note 'mail server moves'
  pgqueue queue pause email --for 2h
  pgqueue queue pause email --until 2026-01-31T09:00Z""",
)
@_name
@click.option("--for", "resume_in", type=Duration(), metavar="TIME", help="Resume it after 30m, 2h or 1d.")
@click.option("--until", "resume_at", callback=read_time, metavar="TIME", help="Resume it then, ISO 8601.")
@note_option
@click.pass_obj
def pause_command(
    context: Context, queue: str, resume_in: float | None, resume_at: datetime | None, note: str | None
) -> None:
    """Let no worker claim jobs from a queue, those that start later included.

    What runs ends, and jobs can still be enqueued. It holds until the queue is resumed. On a paused queue it
    sets the new time and note.
    """
    if resume_in is not None and resume_at is not None:
        raise click.UsageError("--for and --until exclude each other: give one of them")
    if resume_at is not None:
        try:
            check_time("--until", resume_at)
        except ValueError as error:
            raise click.UsageError(str(error)) from error
    if resume_in == 0:
        raise click.UsageError("--for must be longer than 0 seconds")
    with _session(context) as session:
        queues.pause_queue(session, queue, resume_at=resume_at, resume_in=resume_in, by=who(), reason=note)
        (pause,) = [each for each in queues.list_pauses(session) if each.queue == queue]
    until = "" if pause.resume_at is None else f" until {moment(pause.resume_at)}"
    click.echo(f"queue {queue}: paused{until}")


@queue.command("resume", epilog="\b\nExamples:\n  pgqueue queue resume email --note 'it is back'")
@_name
@note_option
@click.pass_obj
def resume_command(context: Context, queue: str, note: str | None) -> None:
    """Let workers claim jobs from a queue again; they are told."""
    with _session(context) as session:
        was_paused = queues.resume_queue(session, queue, by=who(), reason=note)
    click.echo(f"queue {queue}: {'resumed' if was_paused else 'was not paused'}")


@queue.command(
    "purge",
    epilog="""\b
Examples:
  pgqueue queue purge email
  pgqueue queue purge email --task shop.tasks.newsletter --note 'sent by hand' --yes""",
)
@_name
@_jobs
@bulk
@click.pass_obj
def purge_command(context: Context, /, queue: str, **given: Any) -> int:
    """Cancel the jobs that wait in a queue: they end as cancelled, in the history.

    It asks on a terminal, and elsewhere only says how many it would be, unless there is --yes.
    """
    return _act_on_many(context, queue, "cancel", "cancelled", queues.purge_queue, **given)


@queue.command(
    "move",
    epilog="""\b
Examples:
  pgqueue queue move email email_slow --task shop.tasks.newsletter
  pgqueue queue move low default --limit 1000 --yes""",
)
@_name
@click.argument("to", callback=read_queue)
@_jobs
@bulk
@click.pass_obj
def move_command(context: Context, /, queue: str, to: str, **given: Any) -> int:
    """Move the jobs that wait in a queue to another one, behind those there and in their order.

    It asks on a terminal, and elsewhere only says how many it would be, unless there is --yes.
    """
    if queue == to:
        raise click.UsageError(f"jobs are moved to another queue, got {to!r} twice")

    def move(session: Session, where: Waiting, **options: Any) -> int:
        return queues.move_jobs(session, where, to, **options)

    return _act_on_many(context, queue, "move", "moved", move, **given)


def _act_on_many(
    context: Context,
    queue: str,
    verb: str,
    done: str,
    act: Any,
    *,
    task: str | None,
    state: Any,
    limit: int | None,
    note: str | None,
    dry_run: bool,
    yes: bool,
    as_json: bool,
) -> int:
    where = Waiting(queue, task, state)
    with _session(context) as session:
        matching = queues.count_waiting(session, where)
        count = matching if limit is None else min(matching, limit)
        if dry_run or not count or not (yes or confirmed(f"{verb} {plural(count, 'job')} of queue {queue}?")):
            if as_json:
                show_json({"dry_run": True, "jobs": count})
            else:
                way = "" if dry_run or not count else "; --yes does it"
                click.echo(f"would {verb} {plural(count, 'job')} of queue {queue}{way}")
            return ExitStatus.DONE
        with progress_bar(verb, count, shown=count > BATCH) as advance:
            jobs = act(session, where, limit=limit, by=who(), reason=note, progress=advance)
    if as_json:
        show_json({"dry_run": False, "jobs": jobs})
    else:
        click.echo(f"{done} {plural(jobs, 'job')} of queue {queue}")
    return ExitStatus.DONE


def _session(context: Context) -> Any:
    return open_session(context.database, schema=context.config.schema)
