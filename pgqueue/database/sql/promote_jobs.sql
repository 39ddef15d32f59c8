-- Make due jobs ready, in order of eta, from the eta cursor on. Their new positions are drawn in that order beforehand: the
-- UPDATE comes to the rows in order of id.
-- Locks: the rows it promotes; rows that others hold are skipped. Index: jobs_scheduled, jobs_pkey.
-- now() and not clock_timestamp(): a volatile bound is a filter to the planner, and the scan would read every job that is
-- scheduled for later to find that it is not due.
-- after: NULL for the present. upto: looks only at a part of the past. mark: take a transaction id in any case, for xmax.
-- Always one row: how many, their queues, the last eta, xmin and xmax as in claim_jobs, seconds it took, the time that
-- was the present, and, without upto, seconds until the next job is due that is not due now, NULL for none: that scan begins
-- in the present, where no job has been yet. From the year 9999 on counts as never: only plain SQL writes such rows, and not
-- every server can subtract infinity. `now` moves the clock in tests.
WITH picked AS MATERIALIZED (
    SELECT ARRAY(
        SELECT id FROM {schema}.jobs
        WHERE state = 'scheduled' AND eta >= coalesce(to_timestamp(%(after)s::float8), now())
          AND eta <= least(coalesce(%(now)s::timestamptz, now()), to_timestamp(%(upto)s::float8))
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
       coalesce(CASE WHEN %(mark)s::boolean THEN pg_current_xact_id() ELSE pg_current_xact_id_if_assigned() END,
                pg_snapshot_xmax(pg_current_snapshot()))::text::bigint AS xmax,
       extract(epoch FROM clock_timestamp() - statement_timestamp())::float8 AS took,
       extract(epoch FROM coalesce(%(now)s::timestamptz, now()))::float8 AS present,
       CASE WHEN %(upto)s::float8 IS NULL THEN (
           SELECT extract(epoch FROM eta - clock_timestamp())::float8 FROM {schema}.jobs
           WHERE state = 'scheduled' AND eta > coalesce(%(now)s::timestamptz, now()) AND eta < '9999-01-01'
           ORDER BY eta LIMIT 1) END AS next_in
FROM due
