-- Cancel jobs of a queue that wait, as `cancel` does one, with a note in the audit log for each. Locks: their rows, in
-- order of id, skipping held ones: whoever claims one meanwhile has it. Index: jobs_pkey.
-- One row: how many.
WITH picked AS MATERIALIZED (
    SELECT id FROM {schema}.jobs
    WHERE id = ANY (%(ids)s::uuid[]) AND queue = %(queue)s::text AND state IN ('blocked', 'scheduled', 'ready')
    ORDER BY id FOR UPDATE SKIP LOCKED
), gone AS (
    DELETE FROM {schema}.jobs WHERE id = ANY (ARRAY(SELECT id FROM picked)) RETURNING *
), kept AS (
    INSERT INTO {schema}.finished_jobs (id, state, queue, task, args, kwargs, priority, eta, expires_at, attempt, retries,
        crashes, rescues, worker_id, enqueued_at, enqueued_by, claimed_at, unique_key, headers)
    SELECT id, 'cancelled', queue, task, args, kwargs, priority, eta, expires_at, attempt, retries,
        crashes, rescues, worker_id, enqueued_at, enqueued_by, claimed_at, unique_key, headers
    FROM gone
), noted AS (
    INSERT INTO {schema}.audit_log (action, job_id, queue, reason, details)
    SELECT 'purge_queue', id, queue, %(reason)s::text, jsonb_strip_nulls(jsonb_build_object('by', %(by)s::text,
           'before', jsonb_build_object('state', state, 'eta', eta), 'after', '{"state": "cancelled"}'::jsonb))
    FROM gone
)
SELECT count(*) AS jobs FROM gone
