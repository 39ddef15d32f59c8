-- Jobs that wait for their time or for their retry, the next first. Index: jobs_scheduled.
SELECT id::text AS id, queue, task, priority, attempt, retries, eta,
       extract(epoch FROM eta - clock_timestamp())::float8 AS seconds
FROM {schema}.jobs
WHERE state = 'scheduled' AND isfinite(eta)
ORDER BY eta
LIMIT %(limit)s::integer
