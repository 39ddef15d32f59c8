"""`pgqueue enqueue`: one job, from a shell."""

from __future__ import annotations

import json
from datetime import datetime
from typing import Any

import click

from pgqueue.cli.context import Context
from pgqueue.cli.options import Words
from pgqueue.errors import shown


def read_json(ctx: click.Context, param: click.Parameter, value: str) -> str:
    """The text as it is, when it is a JSON array (--args) or object (--kwargs)."""
    kind, name = (list, "array") if param.name == "args" else (dict, "object")
    try:
        # NaN and Infinity are Python's idea of JSON, not Postgres's.
        found = json.loads(value, parse_constant=_refuse)
    except (ValueError, RecursionError) as error:
        # A number of over 4,300 digits is refused by name of a Python function.
        why = "a number in it has too many digits" if "int_max_str" in str(error) else error
        raise click.UsageError(
            f"--{param.name} must be a JSON {name}, got {shown(value)}: {why}", ctx
        ) from None
    if not isinstance(found, kind):
        raise click.UsageError(f"--{param.name} must be a JSON {name}, got {shown(value)}", ctx)
    return value


def _refuse(word: str) -> Any:
    raise ValueError(f"{word} is not JSON")


def read_time(ctx: click.Context, param: click.Parameter, value: str | None) -> datetime | None:
    """ISO 8601, with a timezone."""
    if value is None:
        return None
    try:
        moment = datetime.fromisoformat(value)
    except ValueError:
        raise click.BadParameter(f"must be like 2026-01-31T09:00Z, got {shown(value)}") from None
    if moment.tzinfo is None:
        raise click.BadParameter(f"must have a timezone, as in {moment.isoformat()}Z, got {value!r}")
    return moment


@click.command(
    epilog="""\b
Examples:
  pgqueue enqueue shop.tasks.send_email --args '[1, "a@example.com"]'
  pgqueue -A shop.app:app enqueue shop.tasks.send_email --kwargs '{"order_id": 1}' --countdown 60
  pgqueue enqueue shop.tasks.refund --args '[42]' --correlation-id 'order 42' --tag urgent
  pgqueue enqueue shop.tasks.close_day --eta 2026-01-31T09:00+00:00 -q reports --json"""
)
@click.argument("task")
@click.option(
    "--args", callback=read_json, default="[]", metavar="JSON", help="Positional arguments: an array."
)
@click.option(
    "--kwargs", callback=read_json, default="{}", metavar="JSON", help="Keyword arguments: an object."
)
@click.option("-q", "--queue", metavar="NAME", help="Where to put it.  [default: the task's]")
@click.option("--priority", type=click.IntRange(0, 9), help="Larger runs first.  [default: the task's]")
@click.option("--countdown", type=float, metavar="SECONDS", help="Run it so many seconds from now.")
@click.option(
    "--eta", callback=read_time, metavar="TIME", help="Run it at this time, ISO 8601 with a timezone."
)
@click.option("--expires", type=float, metavar="SECONDS", help="Do not run it later than this.")
@click.option(
    "--max-retries", type=click.IntRange(-1), help="Runs after the first; -1: ever.  [default: the task's]"
)
@click.option("--correlation-id", type=Words(), metavar="TEXT", help="What it belongs to, to find it by.")
@click.option(
    "--tag",
    "tags",
    type=Words(),
    multiple=True,
    metavar="TEXT",
    help="A label to find it by; may be given again.",
)
@click.option("--job-id", type=click.UUID, metavar="UUID", help="Its id. One that was used does nothing.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@click.pass_obj
def enqueue(context: Context, /, task: str, args: str, kwargs: str, as_json: bool, **options: Any) -> None:
    """Enqueue one job and print its id.

    With -A the arguments are checked against the task's signature, and the application's routes and defaults
    hold. Without, the name is taken as it is.
    """
    from pgqueue.app import PgQueue

    # Asked for first: without a database there is no use in checking anything else.
    app = context.app or PgQueue("pgqueue", dsn=context.database, schema=context.config.schema)
    if options["eta"] is not None and options["countdown"] is not None:
        raise click.UsageError("--eta and --countdown exclude each other: give one of them")
    given = {name: value for name, value in options.items() if value is not None and value != ()}
    try:
        if context.app is None:
            result = app.send_task(task, json.loads(args), json.loads(kwargs), **given)
        else:
            known = app.find_task(task)
            result = known.apply_async(*known.codec.decode(args, kwargs), **given)
    except (TypeError, ValueError) as error:
        # Bad arguments of ours are ValueErrors and TypeErrors, those with a class of their own included.
        raise click.UsageError(str(error)) from error
    finally:
        app.close()
    if as_json:
        click.echo(json.dumps({"id": result.id}))
    else:
        click.echo(result.id)
