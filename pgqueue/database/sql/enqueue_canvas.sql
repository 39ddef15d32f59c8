-- Begin a canvas in the caller's transaction; its nodes follow with enqueue_canvas_nodes. Locks: the new row.
-- One row: false if it is there already, with all its jobs.
SELECT {schema}.enqueue_canvas(%(id)s::text::uuid, %(output)s::text::uuid, %(jobs)s::integer) AS new
