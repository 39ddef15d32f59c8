"""A waiting job can be changed by the next enqueue with its unique key.

Online: one function more, which only `on_conflict="replace"` calls.

Revision ID: 0003
Revises: 0002
"""

from __future__ import annotations

from alembic import context, op

revision = "0003"
down_revision = "0002"
branch_labels = None
depends_on = None

UPGRADE = r"""
CREATE FUNCTION {schema}.replace_job(
    job_id      uuid,
    task        text,
    unique_key  text,
    args        jsonb DEFAULT '[]',
    kwargs      jsonb DEFAULT '{}',
    queue       text DEFAULT 'default',
    priority    integer DEFAULT 5,
    eta         timestamptz DEFAULT NULL,
    expires_at  timestamptz DEFAULT NULL,
    headers     jsonb DEFAULT '{}',
    max_retries integer DEFAULT NULL
) RETURNS text
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, {schema}, pg_temp AS $$
#variable_conflict use_column
DECLARE
    waits boolean := coalesce(replace_job.eta > clock_timestamp(), false);
BEGIN
    IF replace_job.queue ~ '[^A-Za-z0-9_.:-]' OR length(replace_job.queue) NOT BETWEEN 1 AND 63 OR replace_job.queue IS NULL THEN
        RAISE invalid_parameter_value USING
            MESSAGE = format('a queue name is 1 to 63 letters, digits or ''_.:-'', got %L', left(replace_job.queue, 100));
    ELSIF replace_job.priority NOT BETWEEN 0 AND 9 OR replace_job.priority IS NULL THEN
        RAISE invalid_parameter_value USING
            MESSAGE = format('priority must be from 0 to 9 (larger runs first), got %L', replace_job.priority);
    ELSIF jsonb_typeof(replace_job.args) IS DISTINCT FROM 'array' OR jsonb_typeof(replace_job.kwargs) IS DISTINCT FROM 'object'
        OR jsonb_typeof(replace_job.headers) IS DISTINCT FROM 'object' THEN
        RAISE invalid_parameter_value USING
            MESSAGE = format('args must be a JSON array, kwargs and headers JSON objects, got %s, %s and %s',
                coalesce(jsonb_typeof(replace_job.args), 'NULL'), coalesce(jsonb_typeof(replace_job.kwargs), 'NULL'),
                coalesce(jsonb_typeof(replace_job.headers), 'NULL'));
    ELSIF NOT isfinite(replace_job.eta) OR NOT isfinite(replace_job.expires_at)
        OR replace_job.eta >= '9999-01-01' OR replace_job.expires_at >= '9999-01-01' THEN
        RAISE invalid_parameter_value USING
            MESSAGE = format('eta and expires_at must be before the year 9999, got %L and %L', replace_job.eta, replace_job.expires_at);
    ELSIF replace_job.max_retries < -1 THEN
        RAISE invalid_parameter_value USING
            MESSAGE = format('max_retries must be at least 0, or -1 for ever, got %s', replace_job.max_retries);
    END IF;
    UPDATE jobs j
    SET state = CASE WHEN waits THEN 'scheduled' ELSE 'ready' END, position = nextval('{schema}.jobs_position_seq'),
        args = replace_job.args, kwargs = replace_job.kwargs, queue = replace_job.queue, priority = replace_job.priority,
        eta = replace_job.eta, expires_at = replace_job.expires_at, headers = replace_job.headers,
        max_retries = replace_job.max_retries
    WHERE j.id = replace_job.job_id AND j.task = replace_job.task AND j.unique_key = replace_job.unique_key
      AND j.state IN ('scheduled', 'ready');
    IF NOT FOUND THEN
        RETURN CASE WHEN EXISTS (SELECT FROM jobs j WHERE j.id = replace_job.job_id AND j.unique_key = replace_job.unique_key)
                    THEN 'running' ELSE 'gone' END;
    END IF;
    PERFORM wake_workers(ARRAY[replace_job.queue], CASE WHEN waits THEN replace_job.eta END);
    RETURN 'replaced';
END $$;
COMMENT ON FUNCTION {schema}.replace_job IS 'Change a job that still waits; returns replaced, running, or gone (it has ended, or lost its key)';
REVOKE ALL ON FUNCTION {schema}.replace_job FROM PUBLIC;
"""

DOWNGRADE = r"""
DROP FUNCTION {schema}.replace_job;
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
