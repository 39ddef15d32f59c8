-- The first `most` ends that have not been passed on, in the order in which settle_canvases takes them. A moment later a
-- worker has done it. Index: canvas_nodes_ended.
SELECT n.id::text AS id, n.canvas_id::text AS canvas FROM {schema}.canvas_nodes n
WHERE n.state IS NOT NULL AND NOT n.passed_on
ORDER BY n.id LIMIT %(most)s::integer
