"""A worker's row says which tasks it knows and how it is set.

Online: two columns with constant defaults, which changes the workers' table without rewriting it.

Revision ID: 0008
Revises: 0007
"""

from __future__ import annotations

from alembic import context, op

revision = "0008"
down_revision = "0007"
branch_labels = None
depends_on = None

UPGRADE = r"""
ALTER TABLE {schema}.workers ADD COLUMN tasks text[] NOT NULL DEFAULT '{}', ADD COLUMN conf jsonb NOT NULL DEFAULT '{}';
"""

DOWNGRADE = r"""
ALTER TABLE {schema}.workers DROP COLUMN tasks, DROP COLUMN conf;
"""


def _run(script: str) -> None:
    """Run a whole script: through the driver without parameters, or onto paper for `--sql`."""
    text = script.replace("{schema}", context.config.attributes["schema"])
    if context.is_offline_mode():
        context.get_context().impl.static_output(text)
    else:
        op.get_bind().execution_options(no_parameters=True).exec_driver_sql(text)


def upgrade() -> None:
    _run(UPGRADE)


def downgrade() -> None:
    _run(DOWNGRADE)
