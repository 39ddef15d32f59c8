"""`pgqueue`: the root command, and how errors reach the terminal."""

from __future__ import annotations

import errno
import sys
import traceback
from typing import Any

import click

from pgqueue import __version__
from pgqueue.cli.context import Context
from pgqueue.cli.status import SUMMARY, ExitStatus, ignore_stop_signals, status_of
from pgqueue.errors import PgQueueError

_WHICH = "The application: module:attribute, or an installed one's name.  [default: the only one installed]"
_CANNOT_WRITE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO)

_COMMANDS = {
    "migrate": "pgqueue.cli.migrate:migrate",
    "worker": "pgqueue.cli.worker:worker",
    "ping": "pgqueue.cli.ping:ping",
    "demo": "pgqueue.cli.demo:demo",
    "enqueue": "pgqueue.cli.enqueue:enqueue",
    "inspect": "pgqueue.cli.inspect:inspect",
    "job": "pgqueue.cli.job:job",
    "canvas": "pgqueue.cli.canvas:canvas",
    "dead": "pgqueue.cli.dead:dead",
    "queue": "pgqueue.cli.queue:queue",
    "audit": "pgqueue.cli.audit:audit",
    "retention": "pgqueue.cli.retention:retention",
    "prune": "pgqueue.cli.retention:prune",
    "schedule": "pgqueue.cli.schedule:schedule",
    "doctor": "pgqueue.cli.doctor:doctor",
    "bench": "pgqueue.cli.bench:bench",
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
    epilog=f"""\b
Examples:
  pgqueue migrate
  pgqueue -A shop.app:app worker -Q high,normal -c 4
  pgqueue inspect queues

{SUMMARY}""",
)
@click.option("-A", "--app", "target", envvar="PGQUEUE_APP", help=_WHICH)
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
    except click.exceptions.Abort as error:
        click.echo("pgqueue: interrupted", err=True)
        status = status_of(error)
    except click.ClickException as error:
        error.show()
        status = status_of(error)
    except PgQueueError as error:
        click.echo(f"pgqueue: {error}", err=True)
        status = status_of(error)
    except BrokenPipeError:
        sys.stderr.close()
        status = ExitStatus.FAILED
    except Exception as error:
        if isinstance(error, OSError) and error.errno in _CANNOT_WRITE:
            click.echo(f"pgqueue: cannot write the output: {error.strerror}", err=True)
            status = ExitStatus.FAILED
        else:
            traceback.print_exc()
            status = status_of(error)
    ignore_stop_signals()
    sys.exit(status if isinstance(status, int) else ExitStatus.DONE)


if __name__ == "__main__":
    main()
