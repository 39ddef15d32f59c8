-- Forget fenced workers that have no running jobs left and fell silent over an hour ago. Locks: those rows, skipping
-- held ones. Index: jobs_running per worker; OFFSET 0 keeps the planner from joining with all of it. Rows: their ids.
DELETE FROM {schema}.workers
WHERE id = ANY (ARRAY(
    SELECT w.id FROM {schema}.workers w
    WHERE w.fenced AND w.heartbeat_at < now() - interval '1 hour'
      AND NOT EXISTS (SELECT FROM {schema}.jobs j WHERE j.state = 'running' AND j.worker_id = w.id OFFSET 0)
    ORDER BY w.id LIMIT 100 FOR UPDATE SKIP LOCKED
))
RETURNING id
