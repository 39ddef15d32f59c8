-- Write down schedules: a JSON array of definitions of one source. What is there already and is the same stays untouched;
-- what is not begins anew where its ticks have changed, and keeps its place otherwise. `replace`: false leaves those that
-- are there. The name of a schedule of the other source is never taken.
-- Locks: the schedules rows, in order of name. Index: schedules_pkey.
-- Rows: one for each name, with the source it had before (NULL: it is new) and whether it has been written.
WITH wanted AS MATERIALIZED (
    SELECT name, task, cron, make_interval(secs => every) AS every, timezone, args, kwargs, queue, priority, max_retries,
           make_interval(secs => expires_in) AS expires_in, headers, catch_up, overlap, make_interval(secs => jitter) AS jitter
    FROM jsonb_to_recordset(%(schedules)s::text::jsonb) AS s(name text, task text, cron text, every float8, timezone text,
        args jsonb, kwargs jsonb, queue text, priority smallint, max_retries integer, expires_in float8, headers jsonb,
        catch_up text, overlap text, jitter float8)
), put AS (
    INSERT INTO {schema}.schedules AS old (name, source, task, cron, every, timezone, args, kwargs, queue, priority,
        max_retries, expires_in, headers, catch_up, overlap, jitter)
    SELECT name, %(source)s::text, task, cron, every, timezone, args, kwargs, queue, priority, max_retries, expires_in,
           headers, catch_up, overlap, jitter
    FROM wanted ORDER BY name
    ON CONFLICT (name) DO UPDATE SET task = excluded.task, cron = excluded.cron, every = excluded.every,
        timezone = excluded.timezone, args = excluded.args, kwargs = excluded.kwargs, queue = excluded.queue,
        priority = excluded.priority, max_retries = excluded.max_retries, expires_in = excluded.expires_in,
        headers = excluded.headers, catch_up = excluded.catch_up, overlap = excluded.overlap, jitter = excluded.jitter,
        last_tick = CASE WHEN (old.cron, old.every, old.timezone) IS DISTINCT FROM
                              (excluded.cron, excluded.every, excluded.timezone)
                         THEN greatest(old.last_tick, excluded.last_tick) ELSE old.last_tick END,
        held = CASE WHEN (old.cron, old.every, old.timezone, old.overlap) IS DISTINCT FROM
                         (excluded.cron, excluded.every, excluded.timezone, excluded.overlap)
                    THEN '{}' ELSE old.held END,
        next_tick = NULL, version = old.version + 1, changed_at = excluded.changed_at
    WHERE %(replace)s::boolean AND old.source = excluded.source
      AND (old.task, old.cron, old.every, old.timezone, old.args, old.kwargs, old.queue, old.priority, old.max_retries,
           old.expires_in, old.headers, old.catch_up, old.overlap, old.jitter) IS DISTINCT FROM
          (excluded.task, excluded.cron, excluded.every, excluded.timezone, excluded.args, excluded.kwargs, excluded.queue,
           excluded.priority, excluded.max_retries, excluded.expires_in, excluded.headers, excluded.catch_up,
           excluded.overlap, excluded.jitter)
    RETURNING name
)
SELECT w.name, s.source AS source_before, w.name IN (SELECT name FROM put) AS written
FROM wanted w LEFT JOIN {schema}.schedules s ON s.name = w.name
ORDER BY w.name
