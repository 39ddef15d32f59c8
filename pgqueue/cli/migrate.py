"""`pgqueue migrate`."""

from __future__ import annotations

import click

from pgqueue.cli.context import Context


@click.command(
    epilog="""\b
Examples:
  pgqueue --dsn postgresql://localhost/shop migrate
  pgqueue migrate --sql > pgqueue.sql"""
)
@click.option(
    "--sql", is_flag=True, help="Print the whole script for an empty database instead of running it."
)
@click.pass_obj
def migrate(context: Context, sql: bool) -> None:
    """Create or upgrade the queue's tables.

    Safe to run again, and to run twice at once. The first time it needs the right to create a schema.
    """
    from pgqueue.database import migrate as migrations

    schema = context.config.schema
    if sql:
        click.echo(migrations.upgrade_sql(schema=schema), nl=False)
        return
    before = migrations.upgrade(context.database, schema=schema)
    head = migrations.head_revision()
    if before == head:
        click.echo(f"schema {schema} is at revision {head} already")
    else:
        click.echo(f"schema {schema} is at revision {head} now, was {before or 'empty'}")
