-- Claimed jobs and who holds them, oldest claim first: those known to be running (`active`), or the others.
-- Index: jobs_running.
SELECT id::text AS id, queue, task, priority, attempt, retries, active, worker_id, host, pid, claimed_at,
       extract(epoch FROM claimed_for)::float8 AS seconds
FROM {schema}.active_jobs
WHERE coalesce(active, false) = %(active)s::boolean
ORDER BY claimed_at, id
LIMIT %(limit)s::integer
