-- Seconds until the next scheduled job from the eta cursor on is due; no row when none waits. Index: jobs_scheduled.
-- From the year 9999 on counts as never: only plain SQL writes such rows, and not every server can subtract infinity.
SELECT extract(epoch FROM eta - clock_timestamp())::float8 AS seconds
FROM {schema}.jobs WHERE state = 'scheduled' AND eta >= to_timestamp(%(after)s::float8) AND eta < '9999-01-01'
ORDER BY eta LIMIT 1
