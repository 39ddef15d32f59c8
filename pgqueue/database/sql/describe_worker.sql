-- Say which tasks a worker knows, and how it is set. Locks: the worker's row. No row: it has been fenced.
UPDATE {schema}.workers SET tasks = %(tasks)s::text[], conf = %(conf)s::text::jsonb
WHERE id = %(worker)s::text
RETURNING id
