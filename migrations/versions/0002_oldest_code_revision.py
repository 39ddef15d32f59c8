"""The database says which releases may work on it, so that old and new ones can run side by side.

A release is named by its newest revision. Whoever adds a revision that an older release cannot work on also
raises `meta.oldest_code_revision` in it; one that only adds leaves it as it is.

Online: one column on a table of one row, which no enqueue and no worker reads while it works.

Revision ID: 0002
Revises: 0001
"""

from __future__ import annotations

from alembic import context, op

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None

UPGRADE = r"""
ALTER TABLE {schema}.meta ADD COLUMN oldest_code_revision text COLLATE "C" NOT NULL DEFAULT '0001';
"""

DOWNGRADE = r"""
ALTER TABLE {schema}.meta DROP COLUMN oldest_code_revision;
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
