-- Change a job with a unique key while it waits. Locks: its row; waits at most a second, as enqueue_unique_job.
-- One row: replaced, running, or gone.
SELECT what, set_config('lock_timeout', before, true) AS lock_timeout
FROM (
    SELECT before, {schema}.replace_job(
        job_id      => %(id)s::text::uuid,
        task        => %(task)s::text,
        unique_key  => %(unique_key)s::text,
        args        => %(args)s::text::jsonb,
        kwargs      => %(kwargs)s::text::jsonb,
        queue       => %(queue)s::text,
        priority    => %(priority)s::integer,
        eta         => coalesce(%(eta)s::timestamptz, clock_timestamp() + %(countdown)s::float8 * interval '1 second'),
        expires_at  => coalesce(%(expires_at)s::timestamptz, clock_timestamp() + %(expires_in)s::float8 * interval '1 second'),
        headers     => %(headers)s::text::jsonb,
        max_retries => %(max_retries)s::integer
    ) AS what
    FROM (SELECT current_setting('lock_timeout') AS before, set_config('lock_timeout', '1s', true) AS now OFFSET 0) AS waiting
    OFFSET 0
) AS changed
