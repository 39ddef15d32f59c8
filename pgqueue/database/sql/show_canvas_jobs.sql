-- The first jobs of a canvas: those that have failed, then those that have not ended, then the others. after: the job, or
-- the join of jobs, that it waits for. Index: canvas_nodes_canvas; then by primary key.
SELECT n.id::text AS id, coalesce(n.state, j.state, 'unknown') AS state, coalesce(j.task, d.task) AS task,
       coalesce(j.queue, d.queue) AS queue, n.after::text AS after, d.reason, coalesce(d.error_message, n.error) AS error
FROM (SELECT * FROM {schema}.canvas_nodes WHERE canvas_id = %(id)s::text::uuid AND NOT is_join
      ORDER BY state = 'succeeded' NULLS FIRST, state IS NULL, nth LIMIT %(limit)s::integer) AS n
LEFT JOIN {schema}.jobs j ON j.id = n.id
LEFT JOIN {schema}.dead_letters d ON d.id = n.id
ORDER BY n.state = 'succeeded' NULLS FIRST, n.state IS NULL, n.nth
