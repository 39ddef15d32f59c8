-- Move jobs of a queue that wait to another one, to the end of their lanes there, in the order they had, with a note in the
-- audit log for each. Locks: their rows, in order of id, skipping held ones. Index: jobs_pkey.
-- One row: how many, and whether some are ready.
WITH picked AS MATERIALIZED (
    SELECT id, position FROM {schema}.jobs
    WHERE id = ANY (%(ids)s::uuid[]) AND queue = %(queue)s::text AND state IN ('blocked', 'scheduled', 'ready')
    ORDER BY id FOR UPDATE SKIP LOCKED
), placed AS MATERIALIZED (
    SELECT ids, ARRAY(SELECT nextval('{schema}.jobs_position_seq') FROM unnest(ids)) AS positions
    FROM (SELECT ARRAY(SELECT id FROM picked ORDER BY position) AS ids) AS in_turn
), moved AS (
    UPDATE {schema}.jobs
    SET queue = %(to)s::text, position = (SELECT positions FROM placed)[array_position((SELECT ids FROM placed), id)]
    WHERE id = ANY ((SELECT ids FROM placed)::uuid[])
    RETURNING id, state
), noted AS (
    INSERT INTO {schema}.audit_log (action, job_id, queue, reason, details)
    SELECT 'move_job', id, %(queue)s::text, %(reason)s::text, jsonb_strip_nulls(jsonb_build_object('by', %(by)s::text,
           'before', jsonb_build_object('queue', %(queue)s::text), 'after', jsonb_build_object('queue', %(to)s::text)))
    FROM moved
)
SELECT count(*) AS jobs, coalesce(bool_or(state = 'ready'), false) AS ready FROM moved
