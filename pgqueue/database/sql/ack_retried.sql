-- Send failed or crashed runs of one attempt number back to wait for another one, and keep a failures row of each.
-- A job that somebody wants cancelled is due at once: the next claim ends it. Fenced as ack_finished, and its ids are sorted too. Locks: the jobs rows, in id order. Index: jobs_pkey.
-- One row: how many, and, when some were stale, the ids of those that were not.
WITH again AS (
    UPDATE {schema}.jobs
    SET state = 'scheduled',
        eta = clock_timestamp() + CASE WHEN cancel_requested_at IS NULL
            THEN (%(delays)s::float8[])[width_bucket(id, %(ids)s::uuid[])] ELSE 0 END * interval '1 second',
        retries = retries + CASE %(kind)s::text WHEN 'failed' THEN 1 ELSE 0 END,
        crashes = crashes + CASE %(kind)s::text WHEN 'crashed' THEN 1 ELSE 0 END,
        max_retries = coalesce((%(max_retries)s::integer[])[width_bucket(id, %(ids)s::uuid[])], max_retries),
        worker_id = NULL, claimed_at = NULL
    WHERE id = ANY (%(ids)s::uuid[]) AND attempt = %(attempt)s::integer AND worker_id = %(worker)s::text
      AND state || '' = 'running'
    RETURNING id, task, queue, attempt, width_bucket(id, %(ids)s::uuid[]) AS nth
), noted AS (
    INSERT INTO {schema}.failures (job_id, attempt, task, queue, kind, error_class, error_message, traceback, worker_id)
    SELECT id, attempt, task, queue, %(kind)s::text, (%(error_classes)s::text[])[nth], (%(error_messages)s::text[])[nth],
           (%(tracebacks)s::text[])[nth], %(worker)s::text
    FROM again
)
SELECT count(*) AS done, CASE WHEN count(*) < cardinality(%(ids)s::uuid[]) THEN array_agg(id::text) END AS done_ids
FROM again
