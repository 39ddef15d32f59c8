-- Deregister, after draining: rescue treats jobs of a missing worker row as lost. The row stays while jobs are running
-- under it. Locks: the worker's row. No row: some jobs are still running.
DELETE FROM {schema}.workers w
WHERE w.id = %(worker)s::text
  AND NOT EXISTS (SELECT FROM {schema}.jobs WHERE state = 'running' AND worker_id = %(worker)s::text)
RETURNING w.id
