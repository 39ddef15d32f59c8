-- The jobs that run under a worker's name, one document each: after a lost answer it may hold jobs it does not know of.
-- Index: jobs_running. Payloads are left out; load_payloads fetches them.
SELECT id::text AS id, attempt,
       json_build_array(id, queue, priority, position, task, NULL, NULL, '{}', attempt, retries, max_retries, crashes,
                        NULL, coalesce(expires_at <= now(), false), cancel_requested_at IS NOT NULL)::text AS document
FROM {schema}.jobs
WHERE state = 'running' AND worker_id = %(worker)s::text
