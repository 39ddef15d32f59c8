-- Claimed jobs and who holds them, those known to be running first, then the oldest. Index: jobs_running.
SELECT id::text AS id, queue, task, priority, attempt, retries, active, worker_id, host, pid, claimed_at,
       extract(epoch FROM claimed_for)::float8 AS seconds
FROM {schema}.active_jobs
ORDER BY active DESC NULLS LAST, claimed_at, id
LIMIT %(limit)s::integer
