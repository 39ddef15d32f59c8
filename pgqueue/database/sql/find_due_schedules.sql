-- The schedules that something is to be done about: their tick has come, or is to be worked out, or one is held. Those
-- from code only while a live worker has them in its code. Reads all schedules, which are few. Locks nothing: who acts on
-- the answer names the version it has read. `now` moves the clock in tests.
-- Always one row: the time, the seconds until the next tick that is not due (NULL for none), how many workers may be looking too, and the
-- schedules as JSON. Times are seconds since 1970.
WITH clock AS MATERIALIZED (
    SELECT coalesce(%(now)s::timestamptz, clock_timestamp()) AS now
), current AS MATERIALIZED (
    SELECT s.* FROM {schema}.schedules s
    WHERE NOT s.paused
      AND (s.source = 'database' OR EXISTS (SELECT FROM {schema}.workers w WHERE NOT w.fenced AND s.name = ANY (w.schedules)))
), due AS (
    SELECT c.*, EXISTS (SELECT FROM {schema}.jobs j WHERE j.id = ANY (c.recent_jobs)) AS busy
    FROM current c WHERE c.next_tick IS NULL OR c.next_tick <= (SELECT now FROM clock) OR c.held <> '{}'
)
SELECT (SELECT extract(epoch FROM now)::float8 FROM clock) AS now,
       (SELECT extract(epoch FROM min(next_tick) - (SELECT now FROM clock))::float8 FROM current
        WHERE next_tick > (SELECT now FROM clock)) AS next_in,
       (SELECT count(*) FROM {schema}.workers WHERE NOT fenced) AS workers,
       coalesce((SELECT json_agg(json_build_object(
           'name', name, 'version', version, 'task', task, 'cron', cron, 'every', extract(epoch FROM every)::float8,
           'timezone', timezone, 'catch_up', catch_up, 'overlap', overlap, 'jitter', extract(epoch FROM jitter)::float8,
           'last_tick', extract(epoch FROM last_tick)::float8, 'busy', busy,
           'held', ARRAY(SELECT extract(epoch FROM tick)::float8 FROM unnest(held) AS tick)) ORDER BY next_tick)
         FROM due), '[]')::text AS due
