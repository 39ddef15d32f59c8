"""`pgqueue`: the root command, and how errors reach the terminal."""

from __future__ import annotations

import errno
import sys
import traceback
from importlib import import_module
from typing import TYPE_CHECKING, Any, Final

import click

from pgqueue import __version__
from pgqueue.cli.context import Context
from pgqueue.cli.status import SUMMARY, ExitStatus, ignore_stop_signals, status_of
from pgqueue.errors import PgQueueError

if TYPE_CHECKING:
    from click.shell_completion import CompletionItem

_WHICH = "The application: module:attribute, or an installed one's name.  [default: the only one installed]"
_CANNOT_WRITE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO)

_COMMANDS: Final = {
    "migrate": ("migrate", "Create or upgrade the queue's tables, while workers and producers go on."),
    "worker": ("worker", "Run jobs."),
    "ping": ("ping", "Say whether there is a live worker, and which workers there are."),
    "demo": ("demo", "Run a web shop on this queue, then prove that no job was lost."),
    "enqueue": ("enqueue", "Enqueue one job and print its id."),
    "inspect": ("inspect", "See what runs, what waits and who works."),
    "job": ("job", "Find jobs, see one, cancel it, or have it run again."),
    "canvas": ("canvas", "Chains, groups and chords: find them, see one, cancel what is left of it."),
    "dead": ("dead", "Jobs that will not run again by themselves: list, show, requeue and purge them."),
    "queue": ("queue", "Queues: see them, pause and resume them, empty them, move their jobs."),
    "audit": ("audit", "List what people did to jobs, queues, schedules and the schema, the latest first."),
    "retention": (
        "retention",
        "How long history and dead letters are kept: see it, and let a task or a queue differ.",
    ),
    "prune": ("retention", "Remove what is past its retention, as workers do each minute."),
    "schedule": ("schedule", "Recurring jobs: see them, add, pause, resume and remove them."),
    "doctor": ("doctor", "Look for what is wrong with the queue and its database, and say what mends it."),
    "bench": ("bench", "Measure the queue on a server of yours."),
}
"""The module in `pgqueue.cli` of each command, and the first sentence of its help."""


class LazyGroup(click.Group):
    """Imports a command's module when the command is used: `--help` stays quick, `migrate` needs no
    worker.

    Its `commands` are outlines, enough to be listed, completed and suggested.
    """

    def __init__(self, **settings: Any) -> None:
        outlines = {name: click.Command(name, help=help) for name, (_, help) in _COMMANDS.items()}
        super().__init__(commands=outlines, **settings)

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(self.commands)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in _COMMANDS:
            return None
        module, _ = _COMMANDS[cmd_name]
        command: click.Command = getattr(import_module(f"pgqueue.cli.{module}"), cmd_name)
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        limit = formatter.width - 6 - max(map(len, self.commands))
        with formatter.section("Commands"):
            formatter.write_dl(
                [(name, outline.get_short_help_str(limit)) for name, outline in self.commands.items()]
            )

    def shell_complete(self, ctx: click.Context, incomplete: str) -> list[CompletionItem]:
        from click.shell_completion import CompletionItem

        found = [
            CompletionItem(name, help=outline.get_short_help_str())
            for name, outline in self.commands.items()
            if name.startswith(incomplete)
        ]
        return found + click.Command.shell_complete(self, ctx, incomplete)


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
