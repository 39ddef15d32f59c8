"""`pgqueue`: the root command, and how errors reach the terminal."""

from __future__ import annotations

import sys
from typing import Any

import click

from pgqueue import __version__
from pgqueue.cli.context import Context
from pgqueue.errors import PgQueueError

EXIT_FAILED = 1
"""Something went wrong; one line on stderr says what."""
EXIT_INTERRUPTED = 3
"""A worker stopped, but had to kill running jobs; they went back to their queue."""

_COMMANDS = {
    "migrate": "pgqueue.cli.migrate:migrate",
    "worker": "pgqueue.cli.worker:worker",
    "demo": "pgqueue.cli.demo:demo",
    "enqueue": "pgqueue.cli.enqueue:enqueue",
    "inspect": "pgqueue.cli.inspect:inspect",
    "dead": "pgqueue.cli.dead:dead",
}


class LazyGroup(click.Group):
    """Imports a command's module when the command is used: `--help` stays quick, `migrate` needs no
    worker."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(_COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        target = _COMMANDS.get(cmd_name)
        if target is None:
            return None
        module_name, attribute = target.split(":")
        command: click.Command = getattr(__import__(module_name, fromlist=[attribute]), attribute)
        return command


@click.command(
    cls=LazyGroup,
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog="""\b
Examples:
  pgqueue migrate
  pgqueue -A shop.app:app worker -Q high,normal -c 4
  pgqueue inspect queues

Exit status: 0 done, 1 failed, 2 wrong usage, 3 a worker had to kill running jobs when it stopped.""",
)
@click.option("-A", "--app", "target", envvar="PGQUEUE_APP", help="The application, as module:attribute.")
@click.option("--dsn", help="Where the database is.  [default: the application's, else $PGQUEUE_DSN]")
@click.option("--schema", help="The schema that holds the queue.  [default: pgqueue]")
@click.version_option(__version__, prog_name="pgqueue")
@click.pass_context
def cli(ctx: click.Context, target: str | None, dsn: str | None, schema: str | None) -> None:
    """A durable job queue in Postgres."""
    ctx.obj = Context(target=target, dsn=dsn, schema=schema)


def main() -> None:
    """The console script. Known errors are one line on stderr; a traceback is for bugs."""
    try:
        status: Any = cli(standalone_mode=False)
    except click.exceptions.Abort:
        click.echo("pgqueue: interrupted", err=True)
        status = 130
    except click.ClickException as error:
        error.show()
        status = error.exit_code
    except PgQueueError as error:
        click.echo(f"pgqueue: {error}", err=True)
        status = EXIT_FAILED
    except BrokenPipeError:
        sys.stderr.close()
        status = EXIT_FAILED
    sys.exit(status if isinstance(status, int) else 0)


if __name__ == "__main__":
    main()
