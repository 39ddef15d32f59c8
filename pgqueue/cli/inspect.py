"""`pgqueue inspect`: what runs and what waits, read from the database."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import click
from rich.console import Group, RenderableType
from rich.text import Text

from pgqueue.cli.context import Context
from pgqueue.cli.options import json_option, limit_option, watch_option
from pgqueue.cli.output import clean, duration, moment, repeat, table, to_json
from pgqueue.database.session import Session, open_session
from pgqueue.database.stats import (
    ActiveJob,
    QueueStats,
    ScheduledJob,
    WorkerFacts,
    WorkerStats,
    list_active_jobs,
    list_queues,
    list_scheduled_jobs,
    list_worker_facts,
    list_workers,
    number_or_none,
    worker_state,
)

exact_option = click.option("--exact", is_flag=True, help="Count every job, however many there are.")


_limit = limit_option(1000)


@click.group(
    epilog="""\b
Examples:
  pgqueue inspect queues
  pgqueue inspect active --watch 2
  pgqueue inspect workers --json"""
)
def inspect() -> None:
    """See what runs, what waits and who works. It asks the database: workers may be busy or gone."""


@inspect.command(
    epilog="""\b
Examples:
  pgqueue inspect active
  pgqueue inspect active --json | jq '.[] | select(.seconds > 60) | .task'"""
)
@_limit
@watch_option
@json_option
@click.pass_obj
def active(context: Context, limit: int, watch: float | None, as_json: bool) -> None:
    """List the jobs that are known to have been running for more than a second, the oldest first.

    The age counts from the claim.
    """
    show_found(
        context,
        lambda session: list_active_jobs(session, limit=limit),
        lambda found: _claimed_table(found, "no job has been running for more than a second"),
        watch=watch,
        as_json=as_json,
    )


@inspect.command(
    epilog="""\b
Examples:
  pgqueue inspect reserved
  pgqueue inspect reserved --watch 1"""
)
@_limit
@watch_option
@json_option
@click.pass_obj
def reserved(context: Context, limit: int, watch: float | None, as_json: bool) -> None:
    """List the jobs that workers have claimed and that have just started, or not yet.

    Their worker is "gone" if it has no row: they are about to be rescued.
    """
    show_found(
        context,
        lambda session: list_active_jobs(session, active=False, limit=limit),
        lambda found: _claimed_table(found, "no job is claimed that is not active"),
        watch=watch,
        as_json=as_json,
    )


@inspect.command(
    epilog="""\b
Examples:
  pgqueue inspect scheduled
  pgqueue inspect scheduled --limit 10 --json | jq '.[].eta'"""
)
@_limit
@watch_option
@json_option
@click.pass_obj
def scheduled(context: Context, limit: int, watch: float | None, as_json: bool) -> None:
    """List the jobs that wait for their time or for a retry, the next first."""
    show_found(
        context,
        lambda session: list_scheduled_jobs(session, limit=limit),
        _scheduled_table,
        watch=watch,
        as_json=as_json,
    )


@inspect.command(
    epilog="""\b
Examples:
  pgqueue inspect workers
  pgqueue inspect workers --json | jq '.[] | select(.state != "ready") | .id'"""
)
@watch_option
@json_option
@click.pass_obj
def workers(context: Context, watch: float | None, as_json: bool) -> None:
    """List the workers: where they are, what they serve, and how long ago they were heard of.

    ready; starting; draining: asked to stop; no executors; stuck: a claim has been due for over 30 seconds;
    silent: not heard of for as long; fenced: judged lost by the others, which run its jobs.
    """
    show_found(
        context,
        lambda session: [_worker_document(each) for each in list_workers(session)],
        _workers_table,
        watch=watch,
        as_json=as_json,
    )


@inspect.command(
    epilog="""\b
Examples:
  pgqueue inspect stats
  pgqueue inspect stats --json | jq 'map(.succeeded) | add'"""
)
@watch_option
@json_option
@click.pass_obj
def stats(context: Context, watch: float | None, as_json: bool) -> None:
    """Show what each worker has done since it started: its own count, as of its last heartbeat."""
    show_found(
        context,
        lambda session: [_stats_document(each) for each in list_workers(session) if not each.fenced],
        _stats_table,
        watch=watch,
        as_json=as_json,
    )


@inspect.command(
    epilog="""\b
Examples:
  pgqueue inspect registered
  pgqueue inspect registered --json | jq '.[] | select(.workers == []) | .task'"""
)
@watch_option
@json_option
@click.pass_obj
def registered(context: Context, watch: float | None, as_json: bool) -> None:
    """List the tasks that workers know, and which workers do.

    With -A those of the application too, also if no worker knows them.
    """
    names = sorted(context.app.tasks) if context.app is not None else []
    show_found(
        context,
        lambda session: _registered(list_worker_facts(session), names),
        _registered_table,
        watch=watch,
        as_json=as_json,
    )


@inspect.command(
    epilog="""\b
Examples:
  pgqueue inspect conf
  pgqueue inspect conf --json | jq '.[].conf.lease'"""
)
@watch_option
@json_option
@click.pass_obj
def conf(context: Context, watch: float | None, as_json: bool) -> None:
    """Show how each worker is set, without passwords; where they differ, the lines are marked."""
    show_found(
        context,
        list_worker_facts,
        _conf_table,
        watch=watch,
        as_json=as_json,
    )


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
    show_queues(context, exact=exact, watch=watch, as_json=as_json)


def show_found(
    context: Context,
    look: Callable[[Session], Any],
    render: Callable[[Any], RenderableType],
    *,
    watch: float | None,
    as_json: bool,
) -> None:
    """Show what `look` finds in the database, once, or every `watch` seconds."""
    with open_session(context.database, schema=context.config.schema) as session:
        repeat(lambda: look(session), render, watch=watch, as_json=as_json)


def show_queues(context: Context, *, exact: bool, watch: float | None, as_json: bool) -> None:
    """The queues, for `inspect queues` and `queue list`."""
    show_found(
        context,
        lambda session: [_queue_document(each) for each in list_queues(session, exact=exact)],
        _queues_table,
        watch=watch,
        as_json=as_json,
    )


def _where(host: str | None, pid: int | None) -> str:
    return f"{host}:{pid}" if host is not None else "gone"


def _claimed_table(jobs: list[ActiveJob], nothing: str) -> RenderableType:
    if not jobs:
        return Text(nothing)
    rows = [
        (job.id, job.task, job.queue, job.attempt, _where(job.host, job.pid), duration(job.seconds))
        for job in jobs
    ]
    return table(("id", "task", "queue", "attempt", "worker", "age"), rows, right=("attempt", "age"))


def _scheduled_table(jobs: list[ScheduledJob]) -> RenderableType:
    if not jobs:
        return Text("no job waits for its time")
    rows = [
        (
            job.id,
            job.task,
            job.queue,
            moment(job.eta),
            f"in {duration(job.seconds)}" if job.seconds > 0 else "now",
            f"retry {job.retries}" if job.retries else "eta",
        )
        for job in jobs
    ]
    return table(("id", "task", "queue", "eta", "due", "why"), rows, right=("due",))


def _worker_document(worker: WorkerStats) -> dict[str, Any]:
    return {**asdict(worker), "state": worker_state(worker)}


def _workers_table(workers: list[dict[str, Any]]) -> RenderableType:
    if not workers:
        return Text("no worker is there; `pgqueue worker` starts one")
    rows = [
        (
            worker["id"],
            Text(worker["state"], style="" if worker["state"] == "ready" else "bold red"),
            ",".join(worker["queues"]) or "(all)",
            worker["pool"],
            worker["concurrency"],
            worker["running"],
            duration(worker["beat_ago"]),
            duration(worker["seconds"]),
            worker["version"],
        )
        for worker in workers
    ]
    columns = ("id", "state", "queues", "pool", "size", "running", "heard of", "up", "version")
    return table(columns, rows, right=("size", "running", "heard of", "up"))


_COUNTS = ("succeeded", "failed", "crashed", "stale_acks")


def _stats_document(worker: WorkerStats) -> dict[str, Any]:
    known = ("id", "host", "pid", "pool", "concurrency", "running", "started_at", "seconds")
    counts = {name: number_or_none(worker.stats.get(name)) or 0 for name in _COUNTS}
    executors = number_or_none(worker.stats.get("executors"))
    return {**{name: getattr(worker, name) for name in known}, "executors": executors, **counts}


def _stats_table(workers: list[dict[str, Any]]) -> RenderableType:
    if not workers:
        return Text("no worker is there; `pgqueue worker` starts one")
    rows: list[tuple[object, ...]] = [
        (each["id"], duration(each["seconds"]), each["running"], *(f"{each[name]:,}" for name in _COUNTS))
        for each in workers
    ]
    if len(workers) > 1:
        totals = (f"{sum(each[name] for each in workers):,}" for name in _COUNTS)
        rows.append(("together", "", sum(each["running"] for each in workers), *totals))
    columns = ("id", "up", "running", "succeeded", "failed", "crashed", "stale acks")
    return table(columns, rows, right=columns[1:])


def _registered(workers: list[WorkerFacts], names: list[str]) -> list[dict[str, Any]]:
    known = sorted({*names, *(task for worker in workers for task in worker.tasks)})
    return [
        {"task": task, "workers": [worker.id for worker in workers if task in worker.tasks]} for task in known
    ]


def _registered_table(tasks: list[dict[str, Any]]) -> RenderableType:
    if not tasks:
        return Text("no worker is there; `pgqueue worker` starts one")
    rows = [
        (
            each["task"],
            ", ".join(each["workers"]) if each["workers"] else Text("no worker knows it", style="bold red"),
        )
        for each in tasks
    ]
    return table(("task", "workers"), rows)


def _conf_table(workers: list[WorkerFacts]) -> RenderableType:
    if not workers:
        return Text("no worker is there; `pgqueue worker` starts one")
    names = sorted({name for worker in workers for name in worker.conf})
    rows = []
    for name in names:
        values = [to_json(worker.conf.get(name)) for worker in workers]
        differs = len(set(values)) > 1
        rows.append((Text(name, style="bold red" if differs else ""), *(values if differs else values[:1])))
    columns = ("setting", *(worker.id for worker in workers))
    if all(len(row) == 2 for row in rows):
        columns = ("setting", "value" if len(workers) > 1 else workers[0].id)
    wide = [row if len(row) == len(columns) else (*row, *["="] * (len(columns) - len(row))) for row in rows]
    return table(columns, wide)


def _queue_document(stats: QueueStats) -> dict[str, Any]:
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


def _queues_table(queues: list[dict[str, Any]]) -> RenderableType:
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
