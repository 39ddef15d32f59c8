"""History takes large values as they are, instead of trying to compress them again.

What is large has been compressed when it was enqueued, or could not be. Each ack copies it into the history, where
a compressed value stays so; but of one that could not be compressed the server tried it anew: of 1.9 ms that the ack
of a job with 100 KiB of text cost, 1.6.

Online: storage is a setting of columns, and functions are replaced. Rows that are there stay as they are.

Revision ID: 0014
Revises: 0013
"""

from __future__ import annotations

from alembic import context, op

revision = "0014"
down_revision = "0013"
branch_labels = None
depends_on = None

# Its partitions follow. What a task returns has not been compressed before.
STORAGE = """
ALTER TABLE {schema}.finished_jobs
    ALTER COLUMN args SET STORAGE {storage}, ALTER COLUMN kwargs SET STORAGE {storage}, ALTER COLUMN headers SET STORAGE {storage};
"""


def _run(*scripts: str) -> None:
    """Run whole scripts: through the driver without parameters, or onto paper for `--sql`."""
    for script in scripts:
        text = script.replace("{schema}", context.config.attributes["schema"])
        if context.is_offline_mode():
            context.get_context().impl.static_output(text)
        else:
            op.get_bind().execution_options(no_parameters=True).exec_driver_sql(text)


def _functions() -> str:
    """Those that make tables for history, of revision 0010."""
    retention = context.script.get_revision("0010").module
    functions: str = retention.PARTITIONS + retention.PRUNING
    return functions.replace("CREATE FUNCTION", "CREATE OR REPLACE FUNCTION")


def upgrade() -> None:
    _run(
        STORAGE.replace("{storage}", "EXTERNAL"),
        _functions().replace("INCLUDING INDEXES", "INCLUDING INDEXES INCLUDING STORAGE"),
    )


def downgrade() -> None:
    _run(STORAGE.replace("{storage}", "EXTENDED"), _functions())
