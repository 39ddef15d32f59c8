-- Enqueue jobs and joins of a canvas that this transaction has begun. Locks: the new rows only. One row, without meaning.
SELECT {schema}.enqueue_canvas_nodes(%(id)s::text::uuid, %(nodes)s::text::jsonb) AS done
