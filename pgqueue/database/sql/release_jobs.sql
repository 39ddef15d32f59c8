-- Give claimed jobs of one attempt number back untouched: ready again at the end of their lanes, no retry burned. The
-- attempt stays: it only ever grows. Fenced as ack_finished. Locks: the jobs rows, in id order. Index: jobs_pkey.
-- One row: how many, and, when some were stale, the ids of those that were not.
WITH freed AS (
    UPDATE {schema}.jobs
    SET state = 'ready', position = nextval('{schema}.jobs_position_seq'), worker_id = NULL, claimed_at = NULL
    WHERE id = ANY (%(ids)s::uuid[]) AND attempt = %(attempt)s::integer AND worker_id = %(worker)s::text
      AND state || '' = 'running'
    RETURNING id
)
SELECT count(*) AS done, CASE WHEN count(*) < cardinality(%(ids)s::uuid[]) THEN array_agg(id::text) END AS done_ids
FROM freed
