-- Give these nodes the end that the trigger end_canvas_node would have noted, if their job is still not in jobs: the one that
-- history has, else cancelled. Passed on by settle_canvases in a transaction after this one. Locks: those nodes, in order of
-- id, skipping held ones. Index: canvas_nodes_pkey. A row for each that has an end now; none: there was nothing to do.
WITH picked AS MATERIALIZED (
    SELECT n.id FROM {schema}.canvas_nodes n
    WHERE n.id = ANY (%(ids)s::text[]::uuid[]) AND n.state IS NULL AND NOT n.is_join
      AND (SELECT true FROM {schema}.jobs j WHERE j.id = n.id LIMIT 1) IS NULL
    ORDER BY n.id FOR UPDATE OF n SKIP LOCKED
), ended AS MATERIALIZED (
    SELECT p.id, coalesce(f.state, d.state, 'cancelled') AS state, f.result,
           CASE WHEN f.state IS NOT NULL THEN f.error
                WHEN d.state IS NULL THEN 'it was deleted past the triggers, and the doctor has ended it' END AS error
    FROM picked p
    LEFT JOIN LATERAL (
        SELECT f.state, f.result, f.result_error AS error FROM {schema}.finished_jobs f
        WHERE f.id = p.id AND f.finished_at >= {schema}.id_floor(p.id) LIMIT 1
    ) AS f ON true
    LEFT JOIN LATERAL (SELECT 'dead' AS state FROM {schema}.dead_letters d WHERE d.id = p.id LIMIT 1) AS d ON true
)
UPDATE {schema}.canvas_nodes n
SET state = e.state, passed_on = false, result = CASE WHEN n.keeps_result THEN e.result END,
    size = CASE WHEN n.keeps_result THEN octet_length(e.result::text) END,
    error = CASE WHEN n.keeps_result OR e.state <> 'succeeded' THEN e.error END,
    cause = CASE WHEN e.state <> 'succeeded' OR n.keeps_result AND e.error IS NOT NULL THEN n.id END
FROM ended e WHERE n.id = e.id
RETURNING n.id::text AS id
