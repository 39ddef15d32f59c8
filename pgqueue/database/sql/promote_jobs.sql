-- Make due jobs ready, those with the earliest eta first, beyond the eta cursor.
-- Locks: the rows it promotes; rows that others hold are skipped. Index: jobs_scheduled, jobs_pkey.
-- Always one row: how many, their queues, the last eta, and the snapshot's xmin and xmax. `now` moves the clock in tests.
WITH due AS (
    UPDATE {schema}.jobs
    SET state = 'ready', position = nextval('{schema}.jobs_position_seq')
    WHERE id = ANY (ARRAY(
        SELECT id FROM {schema}.jobs
        WHERE state = 'scheduled' AND eta > to_timestamp(%(after)s::float8)
          AND eta <= coalesce(%(now)s::timestamptz, clock_timestamp())
        ORDER BY eta LIMIT %(batch)s::integer FOR UPDATE SKIP LOCKED
    ))
    RETURNING queue, eta
)
SELECT count(*) AS promoted, coalesce(array_agg(DISTINCT queue), '{}') AS queues,
       coalesce(extract(epoch FROM max(eta)), 0)::float8 AS last_eta,
       pg_snapshot_xmin(pg_current_snapshot())::text::bigint AS xmin,
       pg_snapshot_xmax(pg_current_snapshot())::text::bigint AS xmax
FROM due
