"""`pgqueue ping`: is there a live worker? For shells, health checks and people."""

from __future__ import annotations

import json
import re
import socket
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

import click
from rich.text import Text

from pgqueue.cli.context import Context
from pgqueue.cli.options import Seconds, read_queue
from pgqueue.cli.output import clean, duration, show, show_json, table
from pgqueue.cli.status import ExitStatus
from pgqueue.database.session import open_session
from pgqueue.database.stats import WorkerStats, list_workers, number_or_none, worker_state
from pgqueue.errors import ConfigError, DatabaseUnavailable, SchemaMismatch

PORT_TIMEOUT: Final = 2.0
"""Seconds for a health port to answer."""
ANSWER_LIMIT: Final = 1 << 16
LOOK_AGAIN: Final = 0.5
"""Seconds between looks with --wait."""


@dataclass(frozen=True)
class Seen:
    """What a look has found.

    Attributes:
        document: For --json.
        problem: Why the answer is no; None when it is yes.
        way: What to do about it.
    """

    document: Any
    problem: str | None
    way: str = ""


@click.command(
    epilog="""\b
Examples:
  pgqueue ping
  pgqueue ping --queue email --ready --wait 30
  pgqueue ping --port 8080
  pgqueue ping --json | jq '.workers[] | select(.live | not) | .id'

A worker is live when it beat lately and no claim it wants is overdue. ready: and it takes jobs now, not
draining, with an executor up and, asked by --port, its database answering."""
)
@click.option("--queue", callback=read_queue, metavar="NAME", help="Only workers that serve this queue.")
@click.option(
    "--host", metavar="NAME", help="Only workers on this host; with --port, whom to ask.  [127.0.0.1]"
)
@click.option("--worker", "worker_id", metavar="ID", help="Only this worker.")
@click.option(
    "--max-age",
    type=Seconds(min_open=True),
    metavar="SECONDS",
    help="How old a heartbeat, or how overdue a claim may be.  [default: the lease, 30]",
)
@click.option("--port", type=click.IntRange(1, 65535), help="Ask a worker's health port, not the database.")
@click.option("--ready", is_flag=True, help="Ask for a ready worker, not only a live one.")
@click.option("--wait", type=Seconds(), metavar="SECONDS", default=0.0, help="Wait so long for a yes.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@click.pass_obj
def ping(
    context: Context,
    queue: str | None,
    host: str | None,
    worker_id: str | None,
    max_age: float | None,
    port: int | None,
    ready: bool,
    wait: float,
    as_json: bool,
) -> int:
    """Say whether there is a live worker, and which workers there are.

    Exit status: 0 if there is one, 1 if not; 4 if the database cannot be reached.
    """
    look: Callable[[], Seen]
    if port is not None:
        if queue is not None or worker_id is not None or max_age is not None:
            raise click.UsageError("--queue, --worker and --max-age ask the database; leave out --port")
        address, asked = host or "127.0.0.1", port

        def look() -> Seen:
            return ask_port(address, asked, ready=ready)
    else:
        dsn, config = context.database, context.config
        oldest = config.lease if max_age is None else max_age

        def look() -> Seen:
            found = _list_workers(dsn, config.schema)
            return judge(found, queue=queue, host=host, worker_id=worker_id, max_age=oldest, ready=ready)

    seen = _look_until(look, time.monotonic() + wait)
    _show(seen.document, as_json=as_json)
    if seen.problem is None:
        return ExitStatus.DONE
    click.echo(f"pgqueue: {clean(seen.problem)}; {seen.way}", err=True)
    return ExitStatus.FAILED


def _look_until(look: Callable[[], Seen], deadline: float) -> Seen:
    """Look until the answer is yes or the time is up; a database that is not there yet is a no."""
    while True:
        left = deadline - time.monotonic()
        try:
            seen = look()
            if seen.problem is None or left <= 0:
                return seen
        except (DatabaseUnavailable, SchemaMismatch):
            if left <= 0:
                raise
        time.sleep(min(LOOK_AGAIN, max(deadline - time.monotonic(), 0.0)))


def _list_workers(dsn: str, schema: str) -> list[WorkerStats]:
    with open_session(dsn, schema=schema) as session:
        return list_workers(session)


def judge(
    workers: list[WorkerStats],
    *,
    queue: str | None = None,
    host: str | None = None,
    worker_id: str | None = None,
    max_age: float,
    ready: bool = False,
) -> Seen:
    """Whether one of the workers that are meant is live, or `ready`; `max_age` in seconds."""
    meant = [
        worker
        for worker in workers
        if (queue is None or not worker.queues or queue in worker.queues)
        and host in (None, worker.host)
        and worker_id in (None, worker.id)
    ]
    documents = [_document(worker, max_age) for worker in meant]
    word = "ready" if ready else "live"
    good = sum(document[word] for document in documents)
    answer = {"ok": good > 0, "workers": documents}
    if good:
        return Seen(answer, None)
    which = "".join(
        f" {what} {value}"
        for what, value in (("that serves queue", queue), ("on host", host), ("with id", worker_id))
        if value is not None
    )
    if not documents:
        others = f" among {len(workers)}" if workers and which else ""
        flags = f" -Q {queue}, or without -Q" if queue is not None else ""
        way = f"start one with `pgqueue -A module:attribute worker`{flags}"
        return Seen(answer, f"no worker{which}{others} is registered", way)
    first = documents[0]
    why = f"{first['id']} is {_described(first, max_age)}"
    more = f", and {len(documents) - 1} more" if len(documents) > 1 else ""
    return Seen(answer, f"no worker{which} is {word}: {why}{more}", _WAYS[first["state"]])


_WAYS: Final = {
    "starting": "wait for its first heartbeat (--wait)",
    "draining": "start another one",
    "no executors": "look at its log for executor_died",
    "stuck": "restart it",
    "silent": "start it again, or look at its log",
    "fenced": "start it again, or look at its log",
}


def _document(worker: WorkerStats, max_age: float) -> dict[str, Any]:
    said = worker.stats
    state = worker_state(worker, max_age)
    return {
        "id": worker.id,
        "state": state,
        "live": state in ("ready", "starting", "draining", "no executors"),
        "ready": state == "ready",
        "host": worker.host,
        "pid": worker.pid,
        "queues": worker.queues,
        "beat_ago": round(worker.beat_ago, 1),
        "last_claim_ago": number_or_none(said.get("last_claim_ago")),
        "claim_due_for": number_or_none(said.get("claim_due_for")),
        "executors": number_or_none(said.get("executors")),
        "concurrency": worker.concurrency,
        "running": worker.running,
        "version": worker.version,
        "started_at": worker.started_at,
    }


def _described(document: dict[str, Any], max_age: float) -> str:
    if document["state"] == "silent":
        return f"silent for {document['beat_ago']:.0f} s (limit {max_age:g} s)"
    if document["state"] == "stuck":
        return f"stuck, with a claim due for {document['claim_due_for']:.0f} s (limit {max_age:g} s)"
    return {"no executors": "without executors", "starting": "only starting"}.get(
        document["state"], str(document["state"])
    )


def ask_port(host: str, port: int, *, ready: bool) -> Seen:
    """Ask a health port over HTTP."""
    path = "/ready" if ready else "/live"
    where = f"{host} port {port}"
    way = f"start the worker with --health-port {port}, or look whether it is frozen"
    request = f"GET {path} HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n\r\n"
    try:
        answer = _exchange(host, port, request.encode())
    except TimeoutError:
        return Seen(None, f"{where} has not answered within {PORT_TIMEOUT:g} s", way)
    except (socket.gaierror, UnicodeError):
        raise ConfigError(f"--host must be an address or the name of a host, got {host!r}") from None
    except OSError as error:
        return Seen(None, f"{where} does not answer: {(error.strerror or str(error)).lower()}", way)
    status = re.match(rb"HTTP/1\.\d (\d{3}) ", answer)
    try:
        document = json.loads(answer.partition(b"\r\n\r\n")[2])
    except (ValueError, RecursionError):
        document = None
    known = isinstance(document, dict) and {"worker", "live", "ready", "why"} <= document.keys()
    if status is None or document is None or not known:
        return Seen(None, f"{where} is not the health port of a worker", way)
    if status[1] == b"200":
        return Seen(document, None)
    why = ", ".join(map(str, document["why"])) if isinstance(document["why"], list) else "?"
    problem = f"worker {document['worker']} is not {path[1:]}: {why}"
    return Seen(document, problem, "look at its log" if document["live"] else "restart it")


def _exchange(host: str, port: int, request: bytes) -> bytes:
    """Send the request, read until the other side closes; TimeoutError when all of it takes too long."""
    # Not http.client: its timeout begins anew with each byte.
    deadline = time.monotonic() + PORT_TIMEOUT
    answer = b""
    with socket.create_connection((host, port), timeout=PORT_TIMEOUT) as line:
        line.sendall(request)
        while len(answer) < ANSWER_LIMIT:
            left = deadline - time.monotonic()
            if left <= 0:
                raise TimeoutError
            line.settimeout(left)
            received = line.recv(ANSWER_LIMIT)
            if not received:
                break
            answer += received
    return answer


def _show(document: Any, *, as_json: bool) -> None:
    if as_json:
        show_json(document)
    elif document is None:
        return
    elif "workers" in document:
        _show_workers(document["workers"])
    else:
        _show_report(document)


def _show_workers(workers: list[dict[str, Any]]) -> None:
    if not workers:
        return
    rows = [
        (
            worker["id"],
            worker["state"] if worker["ready"] else Text(worker["state"], style="bold red"),
            ",".join(worker["queues"]) or "(all)",
            f"{duration(worker['beat_ago'])} ago",
            "-" if worker["last_claim_ago"] is None else f"{duration(worker['last_claim_ago'])} before",
            f"{'-' if worker['executors'] is None else worker['executors']}/{worker['concurrency']}",
            worker["running"],
        )
        for worker in workers
    ]
    columns = ("id", "state", "queues", "last beat", "last claim", "executors", "running")
    show(table(columns, rows, right=columns[3:]))


def _show_report(report: dict[str, Any]) -> None:
    states = [word for word in ("live", "ready") if report[word]]
    claim = report.get("last_claim_ago")
    facts = [
        f"{report.get('executors')} of {report.get('concurrency')} executors",
        f"running {report.get('running')}",
        "no claim yet" if claim is None else f"last claim {duration(claim)} ago",
        f"database {report.get('database')}",
    ]
    line = f"{report['worker']} is {' and '.join(states) or 'not live'}: {', '.join(facts)}"
    show(Text(clean(line)))
