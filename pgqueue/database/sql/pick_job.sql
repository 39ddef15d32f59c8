-- The ready job that a worker with one slot would run next, for tests: by priority, then by position, none of a paused
-- queue. Locks nothing. `now` moves the clock. No row: there is none.
SELECT id::text AS id, task, queue, priority, position,
       coalesce(expires_at <= coalesce(%(now)s::timestamptz, now()), false) AS expired
FROM {schema}.jobs
WHERE state = 'ready'
  AND (%(queue)s::text IS NULL OR queue = %(queue)s::text) AND (%(task)s::text IS NULL OR task = %(task)s::text)
  AND queue <> ALL (ARRAY(
      SELECT p.queue FROM {schema}.meta m, jsonb_each(to_jsonb(m) -> 'paused') AS p(queue, pause)
      WHERE (p.pause ->> 'until')::timestamptz > now() OR p.pause ->> 'until' IS NULL))
ORDER BY priority DESC, position LIMIT 1
