-- Send jobs of one attempt number back to wait, by their own wish: no retry is burned and no failure kept.
-- A job that somebody wants cancelled is due at once: the next claim ends it. Fenced as ack_finished, and its ids are sorted too. Locks: the jobs rows, in id order. Index: jobs_pkey.
-- One row: how many, and, when some were stale, the ids of those that were not.
WITH again AS (
    UPDATE {schema}.jobs
    SET state = 'scheduled',
        eta = clock_timestamp() + CASE WHEN cancel_requested_at IS NULL
            THEN (%(delays)s::float8[])[width_bucket(id, %(ids)s::uuid[])] ELSE 0 END * interval '1 second',
        worker_id = NULL, claimed_at = NULL
    WHERE id = ANY (%(ids)s::uuid[]) AND attempt = %(attempt)s::integer AND worker_id = %(worker)s::text
      AND state || '' = 'running'
    RETURNING id
)
SELECT count(*) AS done, CASE WHEN count(*) < cardinality(%(ids)s::uuid[]) THEN array_agg(id::text) END AS done_ids
FROM again
