-- When something is due next, for tests: a job that waits, a schedule's tick (NULL for none); and whether a tick is held,
-- or one is still to be worked out. Reads all schedules, which are few. Index: jobs_scheduled. Always one row.
SELECT (SELECT min(eta) FROM {schema}.jobs WHERE state = 'scheduled') AS eta,
       (SELECT min(next_tick) FROM {schema}.schedules WHERE NOT paused) AS tick,
       EXISTS (SELECT FROM {schema}.schedules WHERE NOT paused AND (held <> '{}' OR next_tick IS NULL)) AS unsettled
