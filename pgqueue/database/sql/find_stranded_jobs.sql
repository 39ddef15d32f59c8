-- Blocked jobs that nobody will release, and why: they have no open node, or what they wait for is not there or has told
-- everybody of its end. From both ends, `most` rows of each: jobs, and nodes that wait; what hangs becomes the oldest.
-- Indexes: jobs_pkey, canvas_nodes_waiting; then primary keys, row by row.
WITH looked AS MATERIALIZED (
    SELECT j.id FROM (
        (SELECT id, state FROM {schema}.jobs ORDER BY id LIMIT %(most)s::integer)
        UNION ALL
        (SELECT id, state FROM {schema}.jobs ORDER BY id DESC LIMIT %(most)s::integer)
    ) AS j WHERE j.state = 'blocked'
    UNION (SELECT n.id FROM {schema}.canvas_nodes n WHERE NOT n.released AND n.after IS NOT NULL
           ORDER BY n.after, n.nth LIMIT %(most)s::integer)
    UNION (SELECT n.id FROM {schema}.canvas_nodes n WHERE NOT n.released AND n.after IS NOT NULL
           ORDER BY n.after DESC, n.nth DESC LIMIT %(most)s::integer)
)
SELECT job.id::text AS id, node.canvas_id::text AS canvas,
       CASE WHEN node.id IS NULL THEN 'not in canvas_nodes'
            WHEN node.state IS NOT NULL THEN 'ended already, says canvas_nodes'
            WHEN node.released OR node.after IS NULL THEN 'released already, says canvas_nodes'
            WHEN before.id IS NULL THEN 'what it waits for is not in canvas_nodes'
            ELSE 'what it waits for has ended and was passed on' END AS why
FROM looked
CROSS JOIN LATERAL (SELECT j.id FROM {schema}.jobs j WHERE j.id = looked.id AND j.state = 'blocked' LIMIT 1) AS job
LEFT JOIN LATERAL (SELECT n.* FROM {schema}.canvas_nodes n WHERE n.id = job.id LIMIT 1) AS node ON true
LEFT JOIN LATERAL (SELECT a.* FROM {schema}.canvas_nodes a WHERE a.id = node.after LIMIT 1) AS before ON true
WHERE node.id IS NULL OR node.state IS NOT NULL OR node.released OR node.after IS NULL
   OR before.id IS NULL OR before.state IS NOT NULL AND before.passed_on
LIMIT %(most)s::integer
