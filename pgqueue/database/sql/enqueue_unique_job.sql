-- Enqueue one job with a unique key in the caller's transaction. While an open transaction holds the key this waits, at
-- most a second (55P03): lock_timeout is set for this statement and then back to what it was; OFFSET 0 keeps the planner
-- from merging the steps, which run from the inside out. The rest as enqueue_job.
-- One row: the id of the job, or of the one already there.
SELECT job_id::text AS id, set_config('lock_timeout', before, true) AS lock_timeout,
       CASE WHEN %(flush)s::boolean THEN pg_logical_emit_message(true, 'pgqueue', '') END AS flushed
FROM (
    SELECT before, {schema}.enqueue(
        task        => %(task)s::text,
        args        => %(args)s::text::jsonb,
        kwargs      => %(kwargs)s::text::jsonb,
        queue       => %(queue)s::text,
        priority    => %(priority)s::integer,
        eta         => coalesce(%(eta)s::timestamptz, clock_timestamp() + %(countdown)s::float8 * interval '1 second'),
        expires_at  => coalesce(%(expires_at)s::timestamptz, clock_timestamp() + %(expires_in)s::float8 * interval '1 second'),
        job_id      => %(id)s::text::uuid,
        unique_key  => %(unique_key)s::text,
        headers     => %(headers)s::text::jsonb,
        max_retries => %(max_retries)s::integer,
        new_id      => %(new_id)s::boolean
    ) AS job_id
    FROM (SELECT current_setting('lock_timeout') AS before, set_config('lock_timeout', '1s', true) AS now OFFSET 0) AS waiting
    OFFSET 0
) AS enqueued
