"""`pgqueue migrate`."""

from __future__ import annotations

import click

from pgqueue.cli.context import Context


@click.command(
    epilog="""\b
Examples:
  pgqueue --dsn postgresql://localhost/shop migrate
  pgqueue migrate --to 0001
  pgqueue migrate --sql > pgqueue.sql
  pgqueue migrate --sql --from 0001 > upgrade.sql"""
)
@click.option(
    "--sql", is_flag=True, help="Print the whole script for an empty database instead of running it."
)
@click.option("--from", "since", metavar="REVISION", help="With --sql: for a database at this revision.")
@click.option("--to", metavar="REVISION", help="Up or down to this one.  [default: the newest]")
@click.pass_obj
def migrate(context: Context, sql: bool, since: str | None, to: str | None) -> None:
    """Create or upgrade the queue's tables, while workers and producers go on.

    Safe to run again, and to run twice at once. The first time it needs the right to create a schema. It
    locks tables only if that takes moments, tries for a minute, and says whom it waits for. On a database
    that is newer than this release it does nothing.
    """
    from pgqueue.cli.options import who
    from pgqueue.database import migrate as migrations

    schema = context.config.schema
    if sql:
        if to is not None:
            raise click.UsageError("--to does not go with --sql: the script leads to the newest revision")
        click.echo(migrations.upgrade_sql(schema=schema, since=since), nl=False)
        return
    if since is not None:
        raise click.UsageError("--from goes with --sql: a database knows its revision itself")

    def tell(line: str) -> None:
        click.echo(f"pgqueue: {line}", err=True)

    wanted = migrations.head_revision() if to is None else migrations.check_revision(to)
    before = migrations.upgrade(context.database, schema=schema, revision=wanted, tell=tell, by=who())
    if to is not None and before is not None and before > wanted:
        before = migrations.downgrade(context.database, wanted, schema=schema, tell=tell, by=who())
    elif before is not None and before > wanted:
        click.echo(f"schema {schema} is at revision {before}, newer than {wanted}, and stays so")
        return
    if before == wanted:
        click.echo(f"schema {schema} is at revision {wanted} already")
    else:
        click.echo(f"schema {schema} is at revision {wanted} now, was {before or 'empty'}")
