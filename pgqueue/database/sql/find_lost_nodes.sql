-- Open nodes of jobs whose job is not in jobs: it was taken away past the triggers, and nobody will note its end. found: the
-- end that history has of it. One snapshot sees a job and its node change together, so none is just on its way.
-- From both ends, `most` rows of each: members of joins, what waits, what is waited for, and outputs of canvases that have
-- not ended; what hangs becomes the oldest. Indexes: canvas_nodes_open, canvas_nodes_waiting, canvases_enqueued; then primary
-- keys, row by row: a subquery with a LIMIT is never made a join that reads all jobs.
WITH waiting AS MATERIALIZED (
    (SELECT n.id, n.after FROM {schema}.canvas_nodes n WHERE NOT n.released AND n.after IS NOT NULL
     ORDER BY n.after, n.nth LIMIT %(most)s::integer)
    UNION ALL
    (SELECT n.id, n.after FROM {schema}.canvas_nodes n WHERE NOT n.released AND n.after IS NOT NULL
     ORDER BY n.after DESC, n.nth DESC LIMIT %(most)s::integer)
), looked AS MATERIALIZED (
    SELECT id FROM waiting
    UNION SELECT after FROM waiting
    UNION (SELECT n.id FROM {schema}.canvas_nodes n WHERE n.state IS NULL AND n.member_of IS NOT NULL
           ORDER BY n.member_of, n.nth LIMIT %(most)s::integer)
    UNION (SELECT n.id FROM {schema}.canvas_nodes n WHERE n.state IS NULL AND n.member_of IS NOT NULL
           ORDER BY n.member_of DESC, n.nth DESC LIMIT %(most)s::integer)
    UNION SELECT c.output FROM (
        (SELECT output, ended_at FROM {schema}.canvases ORDER BY enqueued_at LIMIT %(most)s::integer)
        UNION ALL
        (SELECT output, ended_at FROM {schema}.canvases ORDER BY enqueued_at DESC LIMIT %(most)s::integer)
    ) AS c WHERE c.ended_at IS NULL
)
SELECT node.id::text AS id, node.canvas_id::text AS canvas,
       coalesce(
           (SELECT f.state FROM {schema}.finished_jobs f
            WHERE f.id = node.id AND f.finished_at >= {schema}.id_floor(node.id) LIMIT 1),
           (SELECT 'dead' FROM {schema}.dead_letters d WHERE d.id = node.id LIMIT 1)
       ) AS found
FROM looked, LATERAL (
    SELECT n.id, n.canvas_id FROM {schema}.canvas_nodes n
    WHERE n.id = looked.id AND n.state IS NULL AND NOT n.is_join LIMIT 1
) AS node
WHERE (SELECT true FROM {schema}.jobs j WHERE j.id = node.id LIMIT 1) IS NULL
LIMIT %(most)s::integer
