"""Alembic environment: one schema, one transaction, run through `pgqueue.database.migrate`."""

from __future__ import annotations

import re

from alembic import context
from sqlalchemy.schema import SchemaItem

from pgqueue.database.migrate import VERSION_TABLE
from pgqueue.database.tables import metadata_for

config = context.config
schema: str = config.attributes["schema"]
_PARTITION = re.compile(r"_(p\d{8}|kept_\d{8}|default)$")


def _is_ours(
    item: SchemaItem, name: str | None, kind: str, reflected: bool, compare_to: SchemaItem | None
) -> bool:
    """Day partitions are made by a function, so only their parents are compared."""
    return not (kind == "table" and reflected and _PARTITION.search(name or ""))


def _options() -> dict[str, object]:
    return {
        "target_metadata": metadata_for(schema),
        "version_table": VERSION_TABLE,
        "version_table_schema": schema,
        "include_schemas": True,
        "include_name": lambda name, kind, parents: kind != "schema" or name == schema,
        "include_object": _is_ours,
        "transaction_per_migration": False,
    }


if context.is_offline_mode():
    context.configure(dialect_name="postgresql", literal_binds=True, **_options())  # type: ignore[arg-type]
    with context.begin_transaction():
        context.execute(config.attributes["preamble"])
        context.run_migrations()
else:
    context.configure(connection=config.attributes["connection"], **_options())  # type: ignore[arg-type]
    with context.begin_transaction():
        context.run_migrations()
