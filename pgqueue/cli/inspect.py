"""`pgqueue inspect`: what runs and what waits, read from the database."""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import asdict
from typing import Any

import click
from rich.console import Group, RenderableType
from rich.text import Text

from pgqueue.cli.context import Context
from pgqueue.cli.options import MOST_ROWS, Seconds
from pgqueue.cli.output import clean, duration, moment, repeat, table
from pgqueue.database.session import Session, open_session
from pgqueue.database.stats import ActiveJob, QueueStats, list_active_jobs, list_queues

json_option = click.option(
    "--json", "as_json", is_flag=True, help="Print JSON; with --watch, a line each time."
)
watch_option = click.option(
    "--watch",
    type=Seconds(0.1),
    metavar="SECONDS",
    help="Look again every so often, until Ctrl-C.",
)

exact_option = click.option("--exact", is_flag=True, help="Count every job, however many there are.")


@click.group(
    epilog="""\b
Examples:
  pgqueue inspect queues
  pgqueue inspect active --watch 2"""
)
def inspect() -> None:
    """See what runs and what waits. Works when workers are busy or gone."""


@inspect.command(
    epilog="""\b
Examples:
  pgqueue inspect active
  pgqueue inspect active --json | jq '.[] | select(.active) | .task'"""
)
@click.option(
    "--limit", type=click.IntRange(1, MOST_ROWS), default=1000, show_default=True, help="So many at most."
)
@watch_option
@json_option
@click.pass_obj
def active(context: Context, limit: int, watch: float | None, as_json: bool) -> None:
    """List the jobs that workers have in hand.

    active: known to have been running for more than a second. reserved: claimed, and perhaps not yet started.
    The age counts from the claim.
    """
    with _session(context) as session:
        repeat(lambda: list_active_jobs(session, limit=limit), _active_table, watch=watch, as_json=as_json)


@inspect.command(
    epilog="""\b
Examples:
  pgqueue inspect queues
  pgqueue inspect queues --watch 2
  pgqueue inspect queues --json | jq '.[] | select(.served | not) | .queue'"""
)
@exact_option
@watch_option
@json_option
@click.pass_obj
def queues(context: Context, exact: bool, watch: float | None, as_json: bool) -> None:
    """List the queues: jobs by state, dead letters, how long the oldest ready job has waited, and workers.

    Large counts stop early, so that looking costs little; they are shown as ≥ (in JSON, named in at_least). A
    queue that has ready jobs and nobody to run them is marked, and so is one that is paused.
    """
    with _session(context) as session:
        repeat(
            lambda: [queue_document(each) for each in list_queues(session, exact=exact)],
            queues_table,
            watch=watch,
            as_json=as_json,
        )


def _session(context: Context) -> AbstractContextManager[Session]:
    return open_session(context.database, schema=context.config.schema)


def _active_table(jobs: list[ActiveJob]) -> RenderableType:
    if not jobs:
        return Text("no jobs are running")
    rows = [
        (
            job.id,
            job.task,
            job.queue,
            "active" if job.active else "reserved",
            job.attempt,
            f"{job.host}:{job.pid}" if job.host is not None else "gone",
            duration(job.seconds),
        )
        for job in jobs
    ]
    return table(("id", "task", "queue", "state", "attempt", "worker", "age"), rows, right=("attempt", "age"))


def queue_document(stats: QueueStats) -> dict[str, Any]:
    return {**asdict(stats), "served": stats.served}


def _served(queue: dict[str, Any]) -> Text:
    if queue["pause"]:
        return Text("paused", style="bold yellow")
    return Text(f"{queue['workers']}") if queue["served"] else Text("nobody", style="bold red")


def _pause_line(queue: str, pause: dict[str, Any]) -> str:
    until = f" until {moment(pause['resume_at'])}" if pause["resume_at"] is not None else ""
    why = f": {clean(pause['reason'])}" if pause["reason"] is not None else ""
    who = clean(pause["by"] or pause["actor"])
    return f"{queue} is paused since {moment(pause['since'])}{until} by {who}{why}"


def queues_table(queues: list[dict[str, Any]]) -> RenderableType:
    if not queues:
        return Text("no queue has jobs, dead letters or workers")
    kinds = ("ready", "scheduled", "running", "dead")
    rows = [
        (
            queue["queue"],
            *(f"{'≥ ' if kind in queue['at_least'] else ''}{queue[kind]:,}" for kind in kinds),
            duration(queue["oldest_ready_seconds"]),
            _served(queue),
        )
        for queue in queues
    ]
    columns = ("queue", *kinds, "oldest ready", "workers")
    parts: list[RenderableType] = [table(columns, rows, right=columns[1:])]
    lonely = [queue["queue"] for queue in queues if not queue["served"] and not queue["pause"]]
    if lonely:
        way = f"start a worker with -Q {','.join(lonely)}, or without -Q"
        parts.append(Text(f"\nnobody serves {', '.join(lonely)}; {way}"))
    for queue in queues:
        if queue["pause"]:
            parts.append(Text(f"\n{_pause_line(queue['queue'], queue['pause'])}"))
    if any(queue["at_least"] for queue in queues):
        parts.append(Text("\n≥ counted only so far; --exact counts every job"))
    return Group(*parts)
