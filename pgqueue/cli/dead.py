"""`pgqueue dead`: list, show, requeue and purge dead letters."""

from __future__ import annotations

from typing import Any

import click
from rich.table import Table
from rich.text import Text

from pgqueue.cli.context import Context
from pgqueue.cli.options import (
    MOST_ROWS,
    Command,
    Rate,
    Words,
    bulk,
    json_option,
    limit_option,
    read_id,
    read_ids,
    read_since,
    who,
)
from pgqueue.cli.output import (
    clean,
    clean_lines,
    confirmed,
    duration,
    moment,
    plural,
    progress_bar,
    shortened,
    show,
    show_json,
    table,
    to_json,
)
from pgqueue.cli.status import ExitStatus
from pgqueue.database import dead as letters
from pgqueue.database.dead import ANY, BATCH, Requeued
from pgqueue.database.session import Session, open_session
from pgqueue.job import DEAD_REASONS, DeadFilter

_MESSAGE_LENGTH = 60


def filters(command: Command) -> Command:
    """The options that say which dead letters."""
    for option in (
        click.option(
            "--since", callback=read_since, metavar="AGO|TIME", help="Died since 30m, 2h, 3d, or a time."
        ),
        click.option(
            "--error", type=Words(), metavar="CLASS", help="Class of the last exception, its module optional."
        ),
        click.option("--reason", type=click.Choice(DEAD_REASONS), help="Why they are dead."),
        click.option("--task", type=Words(), metavar="NAME", help="Name of their task."),
        click.option(
            "--queue", type=Words(), metavar="NAME", help="Queue they came from, or label they lie under."
        ),
    ):
        command = option(command)
    return command


@click.group(
    epilog="""\b
Examples:
  pgqueue dead list --since 2h
  pgqueue dead show 01890a5d-ac96-774b-bcce-b302099a8057
  pgqueue dead requeue --task shop.tasks.send_email --yes"""
)
def dead() -> None:
    """Jobs that will not run again by themselves: list, show, requeue and purge them."""


@dead.command(
    "list",
    epilog="""\b
Examples:
  pgqueue dead list
  pgqueue dead list --queue failed_emails --since 2h
  pgqueue dead list --error SMTPServerDisconnected --json""",
)
@filters
@limit_option(50)
@json_option
@click.pass_obj
def list_command(context: Context, /, limit: int, as_json: bool, **which: Any) -> None:
    """List dead letters, the last that died first."""
    with open_session(context.database, schema=context.config.schema) as session:
        found = letters.list_dead_letters(session, _filter(which), limit=limit + 1)
        if as_json:
            show_json(found[:limit])
            return
        total = letters.count_dead_letters(session, _filter(which)) if len(found) > limit else len(found)
    if not found:
        show(Text("no dead letters"))
        return
    rows = [
        (
            letter.id,
            f"{duration(letter.seconds)} ago",
            letter.dead_letter_queue,
            letter.task,
            letter.reason,
            letter.attempt,
            shortened(error_text(letter.error_class, letter.error_message), _MESSAGE_LENGTH),
        )
        for letter in found[:limit]
    ]
    show(table(("id", "died", "queue", "task", "reason", "attempts", "error"), rows, right=("attempts",)))
    if total > limit:
        click.echo(f"{limit:,} of {total:,}; --limit shows more", err=True)


@dead.command(
    "show",
    epilog="""\b
Examples:
  pgqueue dead show 01890a5d-ac96-774b-bcce-b302099a8057
  pgqueue dead show 01890a5d-ac96-774b-bcce-b302099a8057 --json | jq .kwargs""",
)
@click.argument("job_id", callback=read_id, metavar="ID")
@json_option
@click.pass_obj
def show_command(context: Context, job_id: str, as_json: bool) -> int:
    """Show one dead letter: arguments, error, traceback and each failed attempt.

    Exit status: 1 if the job is not a dead letter; the message says what it is.
    """
    with open_session(context.database, schema=context.config.schema) as session:
        letter = letters.show_dead_letter(session, job_id)
        if letter is None:
            _say_not_dead(session, job_id)
            return ExitStatus.FAILED
    if as_json:
        show_json(letter)
    else:
        _show_letter(letter)
    return ExitStatus.DONE


@dead.command(
    "requeue",
    epilog="""\b
Examples:
  pgqueue dead requeue 01890a5d-ac96-774b-bcce-b302099a8057 --note 'address corrected'
  pgqueue dead requeue --task shop.tasks.send_email --since 2h
  pgqueue dead requeue --queue failed_emails --rate 20 --yes""",
)
@click.argument("job_ids", callback=read_ids, metavar="[ID]...", nargs=-1)
@click.option("--all", "everything", is_flag=True, help="All dead letters.")
@filters
@click.option("--limit", type=click.IntRange(1, MOST_ROWS), help="Requeue so many at most, by id.")
@click.option("--rate", type=Rate(), metavar="NUMBER", help="Requeue so many a second at most.")
@bulk
@click.pass_obj
def requeue_command(
    context: Context,
    /,
    job_ids: tuple[str, ...],
    everything: bool,
    limit: int | None,
    rate: float | None,
    note: str | None,
    dry_run: bool,
    yes: bool,
    as_json: bool,
    **which: Any,
) -> int:
    """Put dead letters back into their queues: with the attempts counted on, the retries counted anew.

    By id it acts at once. By filter it asks on a terminal, and elsewhere only says how many it would requeue,
    unless there is --yes. A job whose unique key another live job has stays dead and is reported.

    Exit status: 1 if an id is not a dead letter, or a job had to stay dead.
    """
    where = _filter(which)
    _check_choice(job_ids, everything, where, limit=limit, rate=rate)
    with open_session(context.database, schema=context.config.schema) as session:
        if job_ids:
            return _requeue_ids(session, job_ids, note, dry_run=dry_run, as_json=as_json)
        matching = letters.count_dead_letters(session, where)
        count = matching if limit is None else min(matching, limit)
        if dry_run or not count or not (yes or confirmed(f"requeue {plural(count, 'dead letter')}?")):
            if as_json:
                show_json({"dry_run": True, "would_requeue": count})
            else:
                way = "" if dry_run or not count else "; --yes does it"
                click.echo(f"would requeue {plural(count, 'dead letter')}{way}")
            return ExitStatus.DONE
        with progress_bar("requeueing", count, shown=count > BATCH or rate is not None) as advance:
            done = letters.requeue_where(
                session, where, limit=limit, rate=rate, by=who(), reason=note, progress=advance
            )
        return _report(done, as_json=as_json)


@dead.command(
    "purge",
    epilog="""\b
Examples:
  pgqueue dead purge 01890a5d-ac96-774b-bcce-b302099a8057 --note 'a test'
  pgqueue dead purge --task shop.tasks.send_email --reason bad_payload
  pgqueue dead purge --queue failed_emails --limit 100 --yes""",
)
@click.argument("job_ids", callback=read_ids, metavar="[ID]...", nargs=-1)
@click.option("--all", "everything", is_flag=True, help="All dead letters.")
@filters
@click.option("--limit", type=click.IntRange(1, MOST_ROWS), help="Purge so many at most, by id.")
@bulk
@click.pass_obj
def purge_command(
    context: Context,
    /,
    job_ids: tuple[str, ...],
    everything: bool,
    limit: int | None,
    note: str | None,
    dry_run: bool,
    yes: bool,
    as_json: bool,
    **which: Any,
) -> int:
    """Delete dead letters for good; a note of each stays in the audit log.

    It asks on a terminal, and elsewhere only says how many it would purge, unless there is --yes.

    Exit status: 1 if an id is not a dead letter.
    """
    where = _filter(which)
    _check_choice(job_ids, everything, where, limit=limit)
    with open_session(context.database, schema=context.config.schema) as session:
        missing = [each for each in job_ids if letters.find_state(session, each) != "dead"]
        matching = len(job_ids) - len(missing) if job_ids else letters.count_dead_letters(session, where)
        count = matching if limit is None else min(matching, limit)
        if dry_run or not count or not (yes or confirmed(f"purge {plural(count, 'dead letter')}?")):
            if as_json:
                show_json({"dry_run": True, "would_purge": count})
            else:
                way = "" if dry_run or not count else "; --yes does it"
                click.echo(f"would purge {plural(count, 'dead letter')}{way}")
        else:
            with progress_bar("purging", count, shown=count > BATCH) as advance:
                if job_ids:
                    done = letters.purge(session, job_ids, by=who(), reason=note)
                else:
                    done = letters.purge_where(
                        session, where, limit=limit, by=who(), reason=note, progress=advance
                    )
            missing = done.missing
            if as_json:
                show_json({"dry_run": False, "purged": done.ids})
            else:
                click.echo(f"purged {plural(len(done.ids), 'dead letter')}")
        for job_id in missing:
            _say_not_dead(session, job_id)
    return ExitStatus.FAILED if missing else ExitStatus.DONE


def _check_choice(
    job_ids: tuple[str, ...], everything: bool, where: DeadFilter, **only_many: float | None
) -> None:
    """Ids, or filters, or --all: UsageError unless it is exactly one of them."""
    ways = [bool(job_ids), where != ANY, everything]
    if sum(ways) != 1:
        problem = "say which" if not any(ways) else "ids, filters and --all exclude each other"
        raise click.UsageError(
            f"{problem}: ids, or filters (--queue, --task, --reason, --error, --since), or --all"
        )
    for name, value in only_many.items():
        if job_ids and value is not None:
            raise click.UsageError(f"--{name} goes with filters or --all, not with ids")


def _requeue_ids(
    session: Session, job_ids: tuple[str, ...], note: str | None, *, dry_run: bool, as_json: bool
) -> int:
    if dry_run:
        missing = [each for each in job_ids if letters.find_state(session, each) != "dead"]
        count = len(job_ids) - len(missing)
        if as_json:
            show_json({"dry_run": True, "would_requeue": count})
        else:
            click.echo(f"would requeue {plural(count, 'dead letter')}")
    else:
        done = letters.requeue(session, job_ids, by=who(), reason=note)
        missing = done.missing
        status = _report(done, as_json=as_json)
    for job_id in missing:
        _say_not_dead(session, job_id)
    return ExitStatus.FAILED if missing or (not dry_run and status) else ExitStatus.DONE


def _report(done: Requeued, *, as_json: bool) -> int:
    """Say what became of it; the exit status."""
    for refusal in done.refused:
        click.echo(f"pgqueue: job {refusal.id} stays dead: {clean(refusal.why)}", err=True)
    if as_json:
        show_json({"dry_run": False, "requeued": done.ids, "refused": done.refused})
    else:
        click.echo(f"requeued {plural(len(done.ids), 'dead letter')}")
    return ExitStatus.FAILED if done.refused else ExitStatus.DONE


def _say_not_dead(session: Session, job_id: str) -> None:
    state = letters.find_state(session, job_id)
    if state == "unknown":
        what = f"no job {job_id}: never committed, pruned, or in another database"
    elif state == "dead":
        what = f"job {job_id} is in somebody else's hands just now; try again"
    else:
        what = f"job {job_id} is {state}, not dead"
    click.echo(f"pgqueue: {what}", err=True)


def _show_letter(letter: dict[str, Any]) -> None:
    facts = {
        "id": letter["id"],
        "task": letter["task"],
        "queue": letter["queue"],
        "dead-letter queue": letter["dead_letter_queue"],
        "reason": letter["reason"],
        "error": error_text(letter["error_class"], letter["error_message"]),
        "died": moment(letter["died_at"]),
        "enqueued": f"{moment(letter['enqueued_at'])} by {letter['enqueued_by']}",
        "args": to_json(letter["args"]),
        "kwargs": to_json(letter["kwargs"]),
        "headers": to_json(letter["headers"]),
        "unique key": letter["unique_key"],
        "priority": letter["priority"],
        "attempts": letter["attempt"],
        "retries": f"{letter['retries']} of {_most(letter['max_retries'])}",
        "crashes": letter["crashes"],
        "rescues": letter["rescues"],
        "worker": letter["worker_id"],
    }
    grid = Table.grid(padding=(0, 2, 0, 0))
    grid.add_column(style="bold", no_wrap=True)
    grid.add_column(overflow="fold")
    for name, value in facts.items():
        grid.add_row(Text(name), Text(clean(value)))
    show(grid)
    if letter["traceback"]:
        show(Text(f"\n{clean_lines(letter['traceback']).rstrip()}"))
    if letter["failures"]:
        rows = [
            (
                failure["attempt"],
                failure["kind"],
                moment(failure["failed_at"]),
                failure["worker_id"],
                error_text(failure["error_class"], failure["error_message"]),
            )
            for failure in letter["failures"]
        ]
        show(Text(""))
        show(table(("attempt", "kind", "when", "worker", "error"), rows, right=("attempt",)))


def _most(max_retries: int | None) -> str:
    return {None: "the task's limit", -1: "any number"}.get(max_retries, str(max_retries))


def error_text(error_class: str | None, message: str | None) -> str:
    return ": ".join(part for part in (error_class, message) if part) or "-"


def _filter(which: dict[str, Any]) -> DeadFilter:
    return DeadFilter(
        queue=which["queue"],
        task=which["task"],
        reason=which["reason"],
        error_class=which["error"],
        since=which["since"],
    )
