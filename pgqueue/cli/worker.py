"""`pgqueue worker`."""

from __future__ import annotations

import logging
import re
import sys

import click

from pgqueue import __version__
from pgqueue.cli.context import Context
from pgqueue.cli.status import ExitStatus, leaving_when_asked
from pgqueue.config import LOG_FORMAT, LOG_LEVELS, MAX_PROCESSES, POOLS, Config
from pgqueue.errors import shown
from pgqueue.job import check_queue

MOST_WEIGHT = 1e9


def parse_queues(text: str | None) -> tuple[list[str], dict[str, float] | None]:
    """`high,normal` → those queues, strictly in order; `high:3,normal:1` → with weights.

    Raises:
        ValueError: A name or weight is wrong, a queue comes twice, or only some have weights.
    """
    if text is None:
        return [], None
    queues: list[str] = []
    weights: dict[str, float] = {}
    for part in text.split(","):
        name, colon, weight = part.strip().rpartition(":")
        if colon and re.fullmatch(r"[+-]?\d+(\.\d+)?(e[+-]?\d+)?", weight, re.IGNORECASE):
            if not 0 < float(weight) <= MOST_WEIGHT:
                raise ValueError(
                    f"a weight must be above 0 and at most {MOST_WEIGHT:g}, got {shown(part.strip())}"
                )
            weights[check_queue(name)] = float(weight)
        else:
            name = check_queue(part.strip())
        if name in queues:
            raise ValueError(f"queue {name!r} is named twice")
        queues.append(name)
    if weights and len(weights) < len(queues):
        missing = ", ".join(queue for queue in queues if queue not in weights)
        raise ValueError(f"give every queue a weight or none; without one: {missing}")
    return queues, weights or None


@click.command(
    epilog="""\b
Examples:
  pgqueue -A shop.app:app worker
  pgqueue -A shop.app:app worker -Q high,normal -c 4
  pgqueue -A shop.app:app worker -Q high:3,normal:1
  pgqueue -A shop.app:app worker --pool asyncio -c 200
  pgqueue -A shop.app:app worker --autoscale 8,2 --max-memory-per-child 200000

SIGTERM, SIGHUP or Ctrl-C: finish what is running, give the rest back, leave. A second one (half a second
later or more) or SIGQUIT does not wait."""
)
@click.option(
    "-Q",
    "--queues",
    metavar="NAMES",
    help="Queues to serve, the first before the second; name:weight shares instead.  [default: all]",
)
@click.option(
    "--pool",
    type=click.Choice(POOLS),
    help="What jobs run in: processes, threads or coroutines; solo is for debuggers.  [default: prefork]",
)
@click.option(
    "-c",
    "--concurrency",
    type=click.IntRange(1, 1024),
    help="Jobs at a time, in each process.  [default: usable CPUs; 10 threads; 100 coroutines]",
)
@click.option(
    "--processes",
    type=click.IntRange(1, MAX_PROCESSES),
    help="Processes of threads or coroutines.  [default: 1]",
)
@click.option(
    "--task-pools",
    metavar="SIZES",
    help="Jobs at a time in the pools that tasks ask for, as in threads:20,asyncio:200.",
)
@click.option(
    "--autoscale",
    metavar="MAX,MIN",
    help="Instead of -c: so many executors at most and at least, by the work there is.",
)
@click.option(
    "--max-tasks-per-child", type=int, metavar="JOBS", help="Replace an executor after so many jobs."
)
@click.option(
    "--max-memory-per-child",
    type=int,
    metavar="KIB",
    help="Replace an executor that has grown beyond so many KiB, after its job.",
)
@click.option(
    "--soft-time-limit",
    type=float,
    metavar="SECONDS",
    help="Raise SoftTimeLimitExceeded in tasks that name no limit of their own.",
)
@click.option(
    "--time-limit", type=float, metavar="SECONDS", help="Kill tasks that name no limit of their own."
)
@click.option("-l", "--loglevel", type=click.Choice(LOG_LEVELS, case_sensitive=False), help="[default: INFO]")
@click.option(
    "--poll-interval",
    type=float,
    metavar="SECONDS",
    help="Idle looks without a notification.  [default: 5; where none can come, 0.5]",
)
@click.option("--listen-dsn", metavar="DSN", help="A direct connection to listen on, if --dsn is a pooler's.")
@click.option("--no-listen", is_flag=True, help="Poll every half second instead of listening.")
@click.option("--heartbeat", type=float, metavar="SECONDS", help="Signs of life.  [default: 5]")
@click.option(
    "--lease", type=float, metavar="SECONDS", help="Silence after which others take over.  [default: 30]"
)
@click.option(
    "--shutdown-timeout",
    type=float,
    metavar="SECONDS",
    help="Time to finish running jobs when stopped.  [default: 25]",
)
@click.option("--max-crashes", type=int, help="Process deaths that bury a job.  [default: 3]")
@click.option(
    "--health-port",
    type=click.IntRange(0, 65535),
    metavar="PORT",
    help="Answer GET /live and /ready here; 0 for a free port, which is logged.  [default: off]",
)
@click.option("--health-host", metavar="ADDRESS", help="Where that listens.  [default: 127.0.0.1]")
@click.option("--reload", is_flag=True, help="For development: start anew when a Python file changes.")
@click.pass_obj
def worker(
    context: Context,
    queues: str | None,
    pool: str | None,
    concurrency: int | None,
    processes: int | None,
    task_pools: str | None,
    autoscale: str | None,
    max_tasks_per_child: int | None,
    max_memory_per_child: int | None,
    soft_time_limit: float | None,
    time_limit: float | None,
    loglevel: str | None,
    poll_interval: float | None,
    listen_dsn: str | None,
    no_listen: bool,
    heartbeat: float | None,
    lease: float | None,
    shutdown_timeout: float | None,
    max_crashes: int | None,
    health_port: int | None,
    health_host: str | None,
    reload: bool,
) -> int:
    """Run jobs."""
    target = context.application
    if target is None:
        raise click.UsageError("a worker needs an application: pgqueue -A module:attribute worker")
    if concurrency is not None and autoscale is not None:
        raise click.UsageError("-c and --autoscale exclude each other: give one of them")
    if pool == "solo" and (concurrency or processes or autoscale):
        raise click.UsageError("pool solo runs one job at a time: leave -c, --processes and --autoscale out")
    try:
        names, weights = parse_queues(queues)
    except ValueError as error:
        raise click.BadParameter(str(error), param_hint="-Q") from error
    flags = {
        "dsn": context.dsn,
        "schema": context.schema,
        "pool": pool,
        "task_pools": task_pools,
        "concurrency": concurrency,
        "processes": processes,
        "autoscale": autoscale,
        "max_tasks_per_child": max_tasks_per_child,
        "max_memory_per_child": max_memory_per_child,
        "soft_time_limit": soft_time_limit,
        "time_limit": time_limit,
        "log_level": loglevel.upper() if loglevel else None,
        "poll_interval": poll_interval,
        "listen_dsn": listen_dsn,
        "listen": False if no_listen else None,
        "heartbeat": heartbeat,
        "lease": lease,
        "shutdown_timeout": shutdown_timeout,
        "max_crashes": max_crashes,
        "health_port": health_port,
        "health_host": health_host,
    }
    # What flags alone show to be wrong is reported before anything starts. Heartbeat and lease are judged
    # together: one of them alone may fit what the application sets, which is known when it is imported, so
    # here it is judged beside one that fits.
    fitting: dict[str, float] = {}
    if (heartbeat is None) != (lease is None):
        fitting = {"heartbeat": 1e-9} if heartbeat is None else {"lease": 1e9}
    Config.load({}, **{**flags, **fitting})
    logging.basicConfig(level=(loglevel or "INFO").upper(), format=LOG_FORMAT)
    # It warns of each lost connection, which we have reported already.
    logging.getLogger("psycopg").setLevel(logging.ERROR)
    if reload:
        from pgqueue.cli.reload import run_reloading, worker_command

        return run_reloading(target, worker_command(sys.argv[1:]))
    with leaving_when_asked():
        from pgqueue.worker.run import run_worker

        finished = run_worker(target, version=__version__, flags=flags, queues=names, weights=weights)
    return ExitStatus.DONE if finished else ExitStatus.INTERRUPTED
