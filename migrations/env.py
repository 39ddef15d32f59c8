"""Alembic environment: one schema, one transaction, run through `pgqueue.database.migrate`."""

from __future__ import annotations

from alembic import context

from pgqueue.database.migrate import compare_options

config = context.config
schema: str = config.attributes["schema"]
_options = {**compare_options(schema), "transaction_per_migration": False}

if context.is_offline_mode():
    context.configure(dialect_name="postgresql", literal_binds=True, **_options)
    with context.begin_transaction():
        context.execute(config.attributes["preamble"])
        context.run_migrations()
else:
    context.configure(connection=config.attributes["connection"], **_options)
    with context.begin_transaction():
        context.run_migrations()
