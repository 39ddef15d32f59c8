-- End jobs of one attempt number whose tasks keep no history: out of jobs, and nothing remains.
-- Fenced as ack_finished. Locks: the jobs rows, in id order. Index: jobs_pkey.
-- One row: how many ended, and, when some were stale, the ids of those that did end.
WITH gone AS (
    DELETE FROM {schema}.jobs
    WHERE id = ANY (%(ids)s::uuid[]) AND attempt = %(attempt)s::integer AND worker_id = %(worker)s::text
      AND state || '' = 'running'
    RETURNING id
)
SELECT count(*) AS done, CASE WHEN count(*) < cardinality(%(ids)s::uuid[]) THEN array_agg(id::text) END AS done_ids
FROM gone
