-- Fence a silent worker, unless its counter has moved since it was judged. Locks: the worker's row.
-- No row: it beats again, or somebody else was first.
UPDATE {schema}.workers SET fenced = true
WHERE id = %(worker)s::text AND heartbeat = %(heartbeat)s::bigint AND NOT fenced
RETURNING id
