-- Make due jobs ready, in order of eta, from the eta cursor on. Their new positions are drawn in that order beforehand: the
-- UPDATE comes to the rows in order of id.
-- Locks: the rows it promotes; rows that others hold are skipped. Index: jobs_scheduled, jobs_pkey.
-- now() and not clock_timestamp(): a volatile bound is a filter to the planner, and the scan would read every job that is
-- scheduled for later to find that it is not due.
-- Always one row: how many, their queues, the last eta, xmin and xmax as in claim_jobs. `now` moves the clock in tests.
WITH picked AS MATERIALIZED (
    SELECT ARRAY(
        SELECT id FROM {schema}.jobs
        WHERE state = 'scheduled' AND eta >= to_timestamp(%(after)s::float8) AND eta <= coalesce(%(now)s::timestamptz, now())
        ORDER BY eta LIMIT %(batch)s::integer FOR UPDATE SKIP LOCKED
    ) AS ids
), placed AS MATERIALIZED (
    SELECT ids, ARRAY(SELECT nextval('{schema}.jobs_position_seq') FROM unnest(ids)) AS positions FROM picked
), due AS (
    UPDATE {schema}.jobs
    SET state = 'ready', position = (SELECT positions FROM placed)[array_position((SELECT ids FROM placed), id)]
    WHERE id = ANY ((SELECT ids FROM placed)::uuid[])
    RETURNING queue, eta
)
SELECT count(*) AS promoted, coalesce(array_agg(DISTINCT queue), '{}') AS queues,
       coalesce(extract(epoch FROM max(eta)), 0)::float8 AS last_eta,
       pg_snapshot_xmin(pg_current_snapshot())::text::bigint AS xmin,
       coalesce(pg_current_xact_id_if_assigned(), pg_snapshot_xmax(pg_current_snapshot()))::text::bigint AS xmax
FROM due
