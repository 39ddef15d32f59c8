-- Pause a queue, with a note in the audit log. Locks: the one row of meta, which claims only read. One row: paused.
SELECT {schema}.pause_queue(%(queue)s::text, %(reason)s::text, %(actor)s::text,
    coalesce(%(resume_at)s::timestamptz, clock_timestamp() + %(resume_in)s::float8 * interval '1 second')) AS answer
