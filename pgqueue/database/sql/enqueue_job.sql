-- Enqueue one job in the caller's transaction, and notify the workers that sleep on its queue.
-- Locks: the new row only. One row: the id of the job, or of the one already there. `flush`: when it was there, COMMIT would
-- have nothing to wait for, although the job's own COMMIT may still wait for a synchronous standby, or have given up: so
-- something without meaning is written to the log.
SELECT {schema}.enqueue(
    task        => %(task)s::text,
    args        => %(args)s::text::jsonb,
    kwargs      => %(kwargs)s::text::jsonb,
    queue       => %(queue)s::text,
    priority    => %(priority)s::integer,
    eta         => coalesce(%(eta)s::timestamptz, clock_timestamp() + %(countdown)s::float8 * interval '1 second'),
    expires_at  => coalesce(%(expires_at)s::timestamptz, clock_timestamp() + %(expires_in)s::float8 * interval '1 second'),
    job_id      => %(id)s::text::uuid,
    headers     => %(headers)s::text::jsonb,
    max_retries => %(max_retries)s::integer,
    new_id      => %(new_id)s::boolean
)::text AS id,
CASE WHEN %(flush)s::boolean THEN pg_logical_emit_message(true, 'pgqueue', '') END AS flushed
