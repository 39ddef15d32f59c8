-- The workers that have a row, the last that beat first.
SELECT id, host, pid, queues, pool, concurrency, version, started_at, fenced, cardinality(running) AS running, stats,
       greatest(extract(epoch FROM clock_timestamp() - heartbeat_at), 0)::float8 AS beat_ago,
       greatest(extract(epoch FROM clock_timestamp() - started_at), 0)::float8 AS seconds
FROM {schema}.workers
ORDER BY heartbeat_at DESC, id
