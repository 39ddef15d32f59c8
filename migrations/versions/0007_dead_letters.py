"""Dead letters can be requeued and purged from SQL.

Online: two functions more, which nobody calls but who requeues or purges.

Revision ID: 0007
Revises: 0006
"""

from __future__ import annotations

from alembic import context, op

revision = "0007"
down_revision = "0006"
branch_labels = None
depends_on = None

UPGRADE = r"""
-- As the library's requeue_dead_letters, which older revisions need.
CREATE FUNCTION {schema}.requeue(job_ids uuid[], reason text DEFAULT NULL, actor text DEFAULT NULL)
RETURNS TABLE (id uuid, requeued boolean)
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, {schema}, pg_temp AS $$
#variable_conflict use_column
DECLARE
    gripped uuid[];
    moved   uuid[];
    queues  text[];
BEGIN
    gripped := ARRAY(SELECT d.id FROM dead_letters d WHERE d.id = ANY (requeue.job_ids) ORDER BY d.id FOR UPDATE SKIP LOCKED);
    WITH placed AS MATERIALIZED (
        SELECT *, nextval('{schema}.jobs_position_seq') AS position
        FROM (SELECT * FROM dead_letters d WHERE d.id = ANY (gripped) ORDER BY d.enqueued_at, d.id) AS in_turn
    ), new AS (
        INSERT INTO jobs (id, state, queue, task, args, kwargs, priority, position, attempt, max_retries, enqueued_at,
            enqueued_by, unique_key, headers)
        SELECT p.id, 'ready', p.queue, p.task, p.args, p.kwargs, p.priority, p.position, p.attempt, p.max_retries,
            p.enqueued_at, p.enqueued_by, p.unique_key, p.headers
        FROM placed p ORDER BY p.task, p.unique_key, p.id
        ON CONFLICT DO NOTHING
        RETURNING jobs.id, jobs.queue
    )
    SELECT array_agg(new.id), array_agg(DISTINCT new.queue) INTO moved, queues FROM new;
    WITH gone AS (
        DELETE FROM dead_letters d WHERE d.id = ANY (moved) RETURNING d.*
    )
    INSERT INTO audit_log (action, job_id, queue, reason, details)
    SELECT 'requeue', g.id, g.queue, requeue.reason,
           jsonb_strip_nulls(jsonb_build_object('by', requeue.actor, 'died_at', g.died_at,
               'dead_letter_queue', g.dead_letter_queue, 'dead_because', g.reason, 'error_class', g.error_class,
               'retries', g.retries, 'crashes', g.crashes))
    FROM gone g ORDER BY g.id;
    IF queues IS NOT NULL THEN
        PERFORM wake_workers(queues);
    END IF;
    RETURN QUERY SELECT each, coalesce(each = ANY (moved), false) FROM unnest(gripped) AS each;
END $$;
COMMENT ON FUNCTION {schema}.requeue IS 'Put dead letters back into their queues; one row for each it got hold of, not requeued when a live job has its id or unique key';

CREATE FUNCTION {schema}.purge_dead_letters(job_ids uuid[], reason text DEFAULT NULL, actor text DEFAULT NULL) RETURNS SETOF uuid
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, {schema}, pg_temp AS $$
#variable_conflict use_column
BEGIN
    RETURN QUERY
    WITH picked AS MATERIALIZED (
        SELECT d.id FROM dead_letters d WHERE d.id = ANY (purge_dead_letters.job_ids) ORDER BY d.id FOR UPDATE SKIP LOCKED
    ), gone AS (
        DELETE FROM dead_letters d WHERE d.id = ANY (ARRAY(SELECT p.id FROM picked p)) RETURNING d.*
    ), noted AS (
        INSERT INTO audit_log (action, job_id, queue, reason, details)
        SELECT 'purge_dead_letter', g.id, g.queue, purge_dead_letters.reason,
               jsonb_strip_nulls(jsonb_build_object('by', purge_dead_letters.actor, 'before',
                   to_jsonb(g) - '{args,kwargs,headers,traceback,error_message}'::text[]))
        FROM gone g ORDER BY g.id
    )
    SELECT g.id FROM gone g;
END $$;
COMMENT ON FUNCTION {schema}.purge_dead_letters IS 'Delete dead letters, with a note in the audit log for each; the ids of those that are gone';
REVOKE ALL ON FUNCTION {schema}.requeue, {schema}.purge_dead_letters FROM PUBLIC;
"""

DOWNGRADE = r"""
DROP FUNCTION {schema}.purge_dead_letters, {schema}.requeue;
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
