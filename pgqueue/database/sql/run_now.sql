-- Make a job that waits for its time or for its retry ready. Locks: its row, then the audit_log row.
-- One row: its queue. No row: it does not wait.
WITH due AS (
    UPDATE {schema}.jobs SET state = 'ready', position = nextval('{schema}.jobs_position_seq')
    WHERE id = %(id)s::text::uuid AND state = 'scheduled'
    RETURNING id, queue, eta
), noted AS (
    INSERT INTO {schema}.audit_log (action, job_id, queue, reason, details)
    SELECT 'run_now', id, queue, %(reason)s::text, jsonb_strip_nulls(jsonb_build_object('by', %(by)s::text,
           'before', jsonb_build_object('state', 'scheduled', 'eta', eta), 'after', '{"state": "ready"}'::jsonb))
    FROM due
)
SELECT queue FROM due
