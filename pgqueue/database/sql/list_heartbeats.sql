-- The heartbeat counters of the workers that are not fenced.
SELECT id, heartbeat FROM {schema}.workers WHERE NOT fenced
