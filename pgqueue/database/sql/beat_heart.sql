-- Count the heartbeat up and record which jobs are running. Locks: the worker's row. No row: this worker is fenced.
UPDATE {schema}.workers
SET heartbeat = heartbeat + 1, heartbeat_at = clock_timestamp(), running = %(running)s::uuid[],
    stats = %(stats)s::jsonb
WHERE id = %(worker)s::text AND NOT fenced
RETURNING heartbeat
