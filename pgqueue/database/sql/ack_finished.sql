-- End jobs of one attempt number: out of jobs, into history. Fenced: a row counts only while it is still running this
-- attempt for this worker. Locks: the jobs rows, in id order. Index: jobs_pkey; the concatenation keeps the
-- planner off jobs_running: with statistics from a moment when nothing ran, it takes that index for empty and walks all of
-- it, dead entries included, instead of looking up the ids.
-- One row: how many ended, and, when some were stale, the ids of those that did end.
-- Times are seconds before now(), the arrival of BEGIN, so that only the database's clock is ever stored.
-- ids come sorted: width_bucket finds a row's place among them by halving; array_position walks, and took a tenth of the
-- server's time for a batch of 500.
WITH gone AS (
    DELETE FROM {schema}.jobs
    WHERE id = ANY (%(ids)s::uuid[]) AND attempt = %(attempt)s::integer AND worker_id = %(worker)s::text
      AND state || '' = 'running'
    RETURNING *, width_bucket(id, %(ids)s::uuid[]) AS nth
), kept AS (
    INSERT INTO {schema}.finished_jobs (id, state, queue, task, args, kwargs, priority, eta, expires_at, attempt, retries,
        crashes, rescues, worker_id, enqueued_at, enqueued_by, claimed_at, started_at, finished_at, unique_key, headers,
        result, result_error)
    SELECT id, %(state)s::text, queue, task, args, kwargs, priority, eta, expires_at, attempt, retries,
        crashes, rescues, worker_id, enqueued_at, enqueued_by, claimed_at,
        CASE WHEN %(state)s::text <> 'expired' THEN now() - (%(started_ago)s::float8[])[nth] * interval '1 second' END,
        now() - (%(finished_ago)s::float8[])[nth] * interval '1 second', unique_key, headers,
        (%(results)s::text[])[nth]::jsonb, (%(result_errors)s::text[])[nth]
    FROM gone
)
SELECT count(*) AS done, CASE WHEN count(*) < cardinality(%(ids)s::uuid[]) THEN array_agg(id::text) END AS done_ids
FROM gone
