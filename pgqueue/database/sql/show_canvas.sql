-- One canvas: its state, and how many of its jobs have ended how. By primary key, then canvas_nodes_canvas. No row: unknown.
SELECT s.id::text AS id, s.state, s.jobs, s.succeeded, s.dead, s.cancelled, s.expired, s."left", s.enqueued_at, s.enqueued_by,
       s.ended_at
FROM {schema}.canvas_stats s WHERE s.id = %(id)s::text::uuid
