-- Move dead letters back to jobs, with a note in the audit log for each. The attempt stays: it only ever grows. They are
-- placed at the end of their lanes in the order they were once enqueued, but inserted in the order of their unique keys,
-- so that two batches that share keys wait for each other instead of deadlocking. A job that could not run because another
-- of its canvas failed is not moved: it comes back by itself when that one has succeeded; before, it lacks results.
-- Locks: the dead_letters rows, in id order, skipping held ones; then the new jobs rows. Index: dead_letters_pkey.
-- Rows: one for each letter it got hold of; not moved: see above, or another live job has its id or its unique key. No row: there is no
-- such letter, or somebody else is just moving or deleting it.
WITH picked AS MATERIALIZED (
    SELECT * FROM {schema}.dead_letters WHERE id = ANY (%(ids)s::uuid[]) ORDER BY id FOR UPDATE SKIP LOCKED
), placed AS MATERIALIZED (
    SELECT *, nextval('{schema}.jobs_position_seq') AS position
    FROM (SELECT * FROM picked WHERE reason <> 'member_failed' ORDER BY enqueued_at, id) AS in_turn
), moved AS (
    INSERT INTO {schema}.jobs (id, state, queue, task, args, kwargs, priority, position, attempt, max_retries, enqueued_at,
        enqueued_by, unique_key, headers)
    SELECT id, 'ready', queue, task, args, kwargs, priority, position, attempt, max_retries, enqueued_at,
        enqueued_by, unique_key, headers
    FROM placed
    ORDER BY task, unique_key, id
    ON CONFLICT DO NOTHING
    RETURNING id
), gone AS (
    DELETE FROM {schema}.dead_letters WHERE id = ANY (ARRAY(SELECT id FROM moved))
), noted AS (
    INSERT INTO {schema}.audit_log (action, job_id, queue, reason, details)
    SELECT 'requeue', id, queue, %(reason)s::text,
           jsonb_strip_nulls(jsonb_build_object('by', %(by)s::text, 'before', jsonb_build_object('state', 'dead',
               'died_at', died_at, 'dead_letter_queue', dead_letter_queue, 'reason', reason,
               'error_class', error_class, 'retries', retries, 'crashes', crashes),
               'after', '{"state": "ready", "retries": 0, "crashes": 0}'::jsonb))
    FROM picked
    WHERE id IN (SELECT id FROM moved)
    ORDER BY id
)
SELECT id::text AS id, queue, id IN (SELECT id FROM moved) AS moved
FROM picked
ORDER BY id
