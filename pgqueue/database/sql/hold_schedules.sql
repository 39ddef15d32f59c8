-- Say which schedules a worker has in its code: they come as long as somebody has them. Locks: the worker's row.
-- No row: it has been fenced.
UPDATE {schema}.workers SET schedules = %(names)s::text[] WHERE id = %(worker)s::text RETURNING id
