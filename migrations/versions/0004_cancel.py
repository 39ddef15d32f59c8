"""A job can be cancelled.

Online: one function more, which nobody calls but who cancels.

Revision ID: 0004
Revises: 0003
"""

from __future__ import annotations

from alembic import context, op

revision = "0004"
down_revision = "0003"
branch_labels = None
depends_on = None

UPGRADE = r"""
CREATE FUNCTION {schema}.cancel(job_id uuid, reason text DEFAULT NULL, actor text DEFAULT NULL) RETURNS text
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, {schema}, pg_temp AS $$
#variable_conflict use_column
DECLARE
    which  text;
    answer text := 'too_late';
BEGIN
    -- It may start, or be given back, between the two statements: then look again.
    FOR round IN 1..3 LOOP
        WITH gone AS (
            DELETE FROM jobs j WHERE j.id = cancel.job_id AND j.state IN ('scheduled', 'ready') RETURNING j.*
        ), kept AS (
            INSERT INTO finished_jobs (id, state, queue, task, args, kwargs, priority, eta, expires_at, attempt, retries,
                crashes, rescues, worker_id, enqueued_at, enqueued_by, claimed_at, unique_key, headers)
            SELECT id, 'cancelled', queue, task, args, kwargs, priority, eta, expires_at, attempt, retries,
                crashes, rescues, worker_id, enqueued_at, enqueued_by, claimed_at, unique_key, headers
            FROM gone
        )
        SELECT queue INTO which FROM gone;
        IF FOUND THEN
            answer := 'cancelled';
            EXIT;
        END IF;
        UPDATE jobs j SET cancel_requested_at = coalesce(j.cancel_requested_at, clock_timestamp())
        WHERE j.id = cancel.job_id AND j.state = 'running'
        RETURNING j.queue INTO which;
        IF FOUND THEN
            answer := 'requested';
            EXIT;
        END IF;
        EXIT WHEN NOT EXISTS (SELECT FROM jobs j WHERE j.id = cancel.job_id);
    END LOOP;
    IF answer <> 'too_late' THEN
        INSERT INTO audit_log (action, job_id, queue, reason, details)
        VALUES ('cancel', cancel.job_id, which, cancel.reason,
                jsonb_build_object('answer', answer) || CASE WHEN cancel.actor IS NULL THEN '{}'
                                                             ELSE jsonb_build_object('by', cancel.actor) END);
    END IF;
    IF answer = 'requested' AND pg_notification_queue_usage() < 0.5 AND NOT notify_is_stuck() THEN
        PERFORM pg_notify('{schema}_control', cancel.job_id::text);
    END IF;
    RETURN answer;
END $$;
COMMENT ON FUNCTION {schema}.cancel IS 'Cancel a job: cancelled (it waited), requested (it runs, and is told), or too_late (it has ended, or there is none)';
REVOKE ALL ON FUNCTION {schema}.cancel FROM PUBLIC;
"""

DOWNGRADE = r"""
DROP FUNCTION {schema}.cancel;
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
