-- How far a running job says it is: [done, total, note] as JSON text, NULL if it says nothing. No locks. By the primary keys.
-- No row: the job is not running.
SELECT (worker.stats -> 'progress' -> job.id::text)::text
FROM {schema}.jobs AS job JOIN {schema}.workers AS worker ON worker.id = job.worker_id
WHERE job.id = %(id)s::uuid AND job.state = 'running'
