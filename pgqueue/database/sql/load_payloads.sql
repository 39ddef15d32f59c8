-- The arguments and headers, as text, of claimed jobs whose arguments were too large to travel with the claim. No row: the
-- job is no longer this worker's. Index: jobs_pkey, see ack_finished.
-- What comes behind a megabyte of others, as stored, is NULL: next time. The first never is.
SELECT id::text AS id, CASE WHEN fits THEN args::text END AS args, CASE WHEN fits THEN kwargs::text END AS kwargs,
       CASE WHEN fits THEN headers::text END AS headers
FROM (
    SELECT *, coalesce(sum(pg_column_size(args) + pg_column_size(kwargs))
                           OVER (ROWS BETWEEN UNBOUNDED PRECEDING AND 1 PRECEDING), 0) < 1 << 20 AS fits
    FROM (
        SELECT id, args, kwargs, headers, attempt, worker_id, array_position(%(ids)s::uuid[], id) AS nth
        FROM {schema}.jobs
        WHERE id = ANY (%(ids)s::uuid[]) AND state || '' = 'running'
        OFFSET 0
    ) AS found
    WHERE attempt = (%(attempts)s::integer[])[nth] AND worker_id = (%(workers)s::text[])[nth]
) AS mine
