-- How many jobs of a canvas have ended, and how many it has. Index: canvas_nodes_canvas. No row: unknown.
SELECT (SELECT count(*) FROM {schema}.canvas_nodes n WHERE n.canvas_id = c.id AND NOT n.is_join AND n.state IS NOT NULL), c.jobs
FROM {schema}.canvases c WHERE c.id = %(id)s::text::uuid
