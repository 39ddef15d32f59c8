-- Enqueue a JSON array of jobs in the caller's transaction. Locks: the new rows only.
-- Rows: the ids, in the order of the array.
SELECT id::text AS id FROM {schema}.enqueue_many(%(jobs)s::text::jsonb, %(new_ids)s::boolean) AS id
