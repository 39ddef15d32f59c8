-- Seconds from the enqueue of each finished job to its start, for benchmarks. Locks nothing.
SELECT greatest(extract(epoch FROM started_at - enqueued_at), 0)::float8 AS seconds FROM {schema}.finished_jobs ORDER BY 1
