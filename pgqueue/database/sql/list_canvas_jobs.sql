-- The ids of a canvas's jobs, in order. Index: canvas_nodes_canvas.
SELECT n.id::text AS id FROM {schema}.canvas_nodes n WHERE n.canvas_id = %(id)s::text::uuid AND NOT n.is_join ORDER BY n.nth
