-- Seconds until the next scheduled job beyond the eta cursor is due; no row when none waits. Index: jobs_scheduled.
SELECT extract(epoch FROM eta - clock_timestamp())::float8 AS seconds
FROM {schema}.jobs WHERE state = 'scheduled' AND eta > to_timestamp(%(after)s::float8)
ORDER BY eta LIMIT 1
