-- Claim up to `batch` ready jobs for one worker, lane by lane, each lane beyond its cursor in order of position.
-- Locks: exactly the rows it returns, in lane order; rows that others hold are skipped, so claims never wait.
-- Index: jobs_ready per lane, jobs_pkey for the update. `= ANY (ARRAY(…))` instead of a join: on a bloated table with few
-- live rows the planner turns a join into a full scan. No ORDER BY outside: it would lock one row more than it returns.
-- tasks: NULL for all, else only these, or with `but` all except these: passed over, not locked, and walked over again by
-- the next claim from the same cursor.
-- A job that is unique until its start gives its key up.
-- Paused queues are left out, from their next claim on. They are read through JSON because the column need not be there.
-- A fenced or missing worker gets nothing. `least`: one row that was written with an absurd attempt must not fail the
-- claim of its whole lane. Args are printed up to 8 kB a value, so 500 jobs stay under 8 MiB; NULL means
-- fetch them with load_payloads. `bare`: print none, when what takes a few bytes as stored would be a gigabyte (1e131071). Always one row; xmin is of the snapshot that looked. xmax: every transaction that had an id
-- by then has a smaller one. With rows it is our own id: the snapshot's xmax is only one above the last id that has *ended*,
-- and a writer that began later but took earlier positions may still be open above it. took: seconds. unseen: the queues that
-- were left out: they are paused, or the worker may not claim.
WITH unseen AS MATERIALIZED (
    SELECT CASE WHEN (SELECT NOT fenced FROM {schema}.workers WHERE id = %(worker)s::text)
                THEN ARRAY(SELECT p.queue FROM {schema}.meta m, jsonb_each(to_jsonb(m) -> 'paused') AS p(queue, pause)
                           WHERE (p.pause ->> 'until')::timestamptz > now() OR p.pause ->> 'until' IS NULL)
                ELSE %(queues)s::text[] END AS queues
), taken AS (
    UPDATE {schema}.jobs
    SET state = 'running', attempt = least(attempt + 1, 1000000000), worker_id = %(worker)s::text, claimed_at = now(),
        unique_key = CASE WHEN unique_key IS NOT NULL AND headers #>> '{pgqueue,unique_until}' = 'start' THEN NULL
                          ELSE unique_key END
    WHERE id = ANY (ARRAY(
        SELECT found.id
        FROM unnest(%(queues)s::text[], %(priorities)s::smallint[], %(after)s::bigint[], %(upto)s::bigint[],
                    %(most)s::integer[]) AS lane(queue, priority, after, upto, most),
             LATERAL (
                 SELECT id FROM {schema}.jobs
                 WHERE state = 'ready' AND queue = lane.queue AND priority = lane.priority
                   AND position > lane.after AND position <= lane.upto
                   AND (%(tasks)s::text[] IS NULL OR (task = ANY (%(tasks)s::text[])) <> %(but)s::boolean)
                 ORDER BY position LIMIT lane.most FOR UPDATE SKIP LOCKED
             ) AS found
        WHERE lane.queue <> ALL ((SELECT queues FROM unseen)::text[])
        LIMIT %(batch)s::integer
    ))
    RETURNING id, queue, priority, position, task, args, kwargs, headers, attempt, retries, max_retries, crashes, eta,
              expires_at, cancel_requested_at
)
SELECT coalesce(json_agg(json_build_array(
           id, queue, priority, position, task,
           CASE WHEN small THEN args_text END, CASE WHEN small THEN kwargs_text END,
           CASE WHEN small THEN headers_text ELSE '{}' END,
           attempt, retries, max_retries, crashes,
           CASE WHEN isfinite(eta) THEN extract(epoch FROM eta)::float8 END,
           coalesce(expires_at <= now(), false), cancel_requested_at IS NOT NULL
       ))::text, '[]') AS document,
       pg_snapshot_xmin(pg_current_snapshot())::text::bigint AS xmin,
       coalesce(pg_current_xact_id_if_assigned(), pg_snapshot_xmax(pg_current_snapshot()))::text::bigint AS xmax,
       extract(epoch FROM clock_timestamp() - statement_timestamp())::float8 AS took,
       (SELECT queues FROM unseen) AS unseen
FROM (SELECT *, octet_length(args_text) <= 8192 AND octet_length(kwargs_text) <= 8192
                AND octet_length(headers_text) <= 2048 AS small
      FROM (SELECT *, CASE WHEN NOT %(bare)s::boolean AND pg_column_size(args) <= 8192 THEN args::text END AS args_text,
                   CASE WHEN NOT %(bare)s::boolean AND pg_column_size(kwargs) <= 8192 THEN kwargs::text END AS kwargs_text,
                   CASE WHEN NOT %(bare)s::boolean AND pg_column_size(headers) <= 2048 THEN headers::text END AS headers_text
            FROM taken OFFSET 0) AS printed OFFSET 0) AS measured
