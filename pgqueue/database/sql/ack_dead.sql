-- Bury jobs of one attempt number: out of jobs, into dead_letters, with a failures row of the last run.
-- Fenced as ack_finished, and its ids are sorted too. An upsert, so that a job requeued and dead again replaces its older letter.
-- Locks: the jobs rows, in id order, then the dead_letters rows. Index: jobs_pkey.
-- One row: how many, and, when some were stale, the ids of those that were not.
WITH gone AS (
    DELETE FROM {schema}.jobs
    WHERE id = ANY (%(ids)s::uuid[]) AND attempt = %(attempt)s::integer AND worker_id = %(worker)s::text
      AND state || '' = 'running'
    RETURNING *, width_bucket(id, %(ids)s::uuid[]) AS nth
), buried AS (
    INSERT INTO {schema}.dead_letters (id, queue, task, args, kwargs, priority, eta, expires_at, attempt, retries,
        max_retries, crashes, rescues, worker_id, claimed_at, enqueued_at, enqueued_by, unique_key, headers,
        dead_letter_queue, reason, error_class, error_message, traceback)
    SELECT id, queue, task, args, kwargs, priority, eta, expires_at, attempt, retries, max_retries,
        crashes + CASE %(kind)s::text WHEN 'crashed' THEN 1 ELSE 0 END, rescues, worker_id, claimed_at, enqueued_at,
        enqueued_by, unique_key, headers, coalesce((%(dead_letter_queues)s::text[])[nth], queue), (%(reasons)s::text[])[nth],
        (%(error_classes)s::text[])[nth], (%(error_messages)s::text[])[nth], (%(tracebacks)s::text[])[nth]
    FROM gone
    ON CONFLICT (id) DO UPDATE SET attempt = excluded.attempt, retries = excluded.retries, crashes = excluded.crashes,
        rescues = excluded.rescues, eta = excluded.eta, worker_id = excluded.worker_id, claimed_at = excluded.claimed_at,
        dead_letter_queue = excluded.dead_letter_queue, reason = excluded.reason, error_class = excluded.error_class,
        error_message = excluded.error_message, traceback = excluded.traceback, died_at = excluded.died_at
), noted AS (
    INSERT INTO {schema}.failures (job_id, attempt, task, queue, kind, error_class, error_message, traceback, worker_id)
    SELECT id, attempt, task, queue, %(kind)s::text, (%(error_classes)s::text[])[nth], (%(error_messages)s::text[])[nth],
           (%(tracebacks)s::text[])[nth], %(worker)s::text
    FROM gone
)
SELECT count(*) AS done, CASE WHEN count(*) < cardinality(%(ids)s::uuid[]) THEN array_agg(id::text) END AS done_ids
FROM gone
