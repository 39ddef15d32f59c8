-- Running jobs whose worker is fenced or has no row, by that worker; `most` running jobs are looked at. A live worker
-- takes them back within seconds. oldest: seconds since the oldest of them was claimed. Index: jobs_running.
SELECT j.worker_id AS worker, w.id IS NOT NULL AS fenced, count(*) AS jobs,
       max(extract(epoch FROM clock_timestamp() - j.claimed_at))::float8 AS oldest
FROM (SELECT worker_id, claimed_at FROM {schema}.jobs WHERE state = 'running' LIMIT %(most)s::integer) AS j
LEFT JOIN {schema}.workers w ON w.id = j.worker_id
WHERE w.id IS NULL OR w.fenced
GROUP BY 1, 2 ORDER BY 3 DESC, 1
