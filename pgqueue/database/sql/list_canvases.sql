-- The last canvases to be enqueued, of one state or of any. States of those that have not ended are found out one by one.
-- Index: canvases_enqueued. No locks.
SELECT s.id::text AS id, s.state, s.jobs, s.succeeded, s.dead, s.cancelled, s.expired, s."left", s.enqueued_at, s.enqueued_by,
       s.ended_at
FROM {schema}.canvas_stats s
WHERE s.id = ANY (ARRAY(
    SELECT c.id FROM {schema}.canvases c
    WHERE %(state)s::text IS NULL OR coalesce(c.state, {schema}.canvas_state(c.output)) = %(state)s::text
    ORDER BY c.enqueued_at DESC LIMIT %(limit)s::integer))
ORDER BY s.enqueued_at DESC
