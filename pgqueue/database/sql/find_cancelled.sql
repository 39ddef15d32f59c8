-- Which of these jobs run under a worker's name and are to be cancelled. Index: jobs_pkey; by jobs_running it would walk
-- over every job that this worker has run, as long as an old snapshot keeps their entries. Locks nothing.
SELECT id::text AS id, attempt FROM {schema}.jobs
WHERE id = ANY (%(ids)s::uuid[]) AND state || '' = 'running' AND worker_id = %(worker)s::text AND cancel_requested_at IS NOT NULL
