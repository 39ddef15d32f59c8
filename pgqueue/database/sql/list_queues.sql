-- What `queue_stats` says, exactly: it counts every row.
SELECT queue, ready, scheduled, running, dead, oldest_ready, workers, false AS ready_is_least, false AS scheduled_is_least,
       false AS dead_is_least, extract(epoch FROM clock_timestamp() - oldest_ready)::float8 AS oldest_ready_seconds
FROM {schema}.queue_stats
ORDER BY queue
