-- The jobs that run under a worker's name and that somebody wants cancelled. Index: jobs_running. Locks nothing.
SELECT id::text AS id, attempt FROM {schema}.jobs
WHERE state = 'running' AND worker_id = %(worker)s::text AND cancel_requested_at IS NOT NULL
