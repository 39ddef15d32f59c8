-- All schedules, or the one of a name, with what becomes of them. Reads all of them, which are few.
-- workers: live ones that have it in their code. live_jobs: those of its recent ones that have not ended.
SELECT s.name, s.source, s.task, s.cron, extract(epoch FROM s.every)::float8 AS every, s.timezone, s.args, s.kwargs, s.queue,
       s.priority, s.max_retries, extract(epoch FROM s.expires_in)::float8 AS expires_in, s.headers, s.catch_up, s.overlap,
       extract(epoch FROM s.jitter)::float8 AS jitter, s.paused, s.last_tick, s.next_tick, s.held, s.fired, s.missed,
       s.skipped, s.created_at, s.created_by, s.changed_at,
       (SELECT count(*) FROM {schema}.workers w WHERE NOT w.fenced AND s.name = ANY (w.schedules)) AS workers,
       ARRAY(SELECT j.id::text FROM {schema}.jobs j WHERE j.id = ANY (s.recent_jobs) ORDER BY j.id) AS live_jobs,
       s.recent_jobs[cardinality(s.recent_jobs)]::text AS last_job, clock_timestamp() AS now
FROM {schema}.schedules s
WHERE %(name)s::text IS NULL OR s.name = %(name)s::text
ORDER BY s.name
