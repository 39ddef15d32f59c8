-- enqueue_job for most jobs: ready now, with a fresh id, and nothing else that needs saying. Half as many parameters, and
-- nothing to work out from them, save a tenth of the server's time.
-- Locks: the new row only. One row: the id of the job.
SELECT {schema}.enqueue(
    task     => %(task)s::text,
    args     => %(args)s::text::jsonb,
    kwargs   => %(kwargs)s::text::jsonb,
    queue    => %(queue)s::text,
    priority => %(priority)s::integer,
    job_id   => %(id)s::text::uuid,
    headers  => %(headers)s::text::jsonb,
    new_id   => true
)::text AS id
