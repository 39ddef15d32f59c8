-- The arguments and headers, as text, of claimed jobs whose arguments were too large to travel with the claim. No row: the
-- job is no longer this worker's. Index: jobs_pkey, see ack_finished.
-- What comes behind a megabyte of others, as stored, is NULL: next time. Never all of them.
SELECT id::text AS id, attempt, CASE WHEN fits THEN args::text END AS args, CASE WHEN fits THEN kwargs::text END AS kwargs,
       CASE WHEN fits THEN headers::text END AS headers
FROM (
    SELECT *, coalesce(sum(pg_column_size(args) + pg_column_size(kwargs) + pg_column_size(headers))
                           OVER (ROWS BETWEEN UNBOUNDED PRECEDING AND 1 PRECEDING), 0) < 1 << 20 AS fits
    FROM (
        SELECT id, args, kwargs, headers, attempt, worker_id
        FROM {schema}.jobs
        WHERE id = ANY (%(ids)s::uuid[]) AND state || '' = 'running'
        OFFSET 0
    ) AS found
    WHERE (id, attempt, worker_id) IN (
        SELECT * FROM unnest(%(ids)s::uuid[], %(attempts)s::integer[], %(workers)s::text[])
    )
) AS mine
