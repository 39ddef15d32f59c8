-- Pass on the ends of these nodes, or of all that have not been passed on: release or bury what waits for them. In a
-- transaction after that of the ends: see revision 0011. Locks: those nodes, skipping held ones; then the jobs that wait for
-- them. Index: canvas_nodes_pkey, or canvas_nodes_ended.
-- One row: how many jobs it has released or buried; the nodes to call it for once more, NULL for none; whether there are
-- more of those that nobody has passed on.
SELECT released, CASE WHEN left_over <> '{}' THEN left_over::text END AS left_over, more
FROM {schema}.settle_canvases(%(ids)s::text::uuid[])
