-- Have the jobs of a tick expire so long after the tick, and not after the moment at which they were enqueued: for tests,
-- where the two may be years apart. Locks: the jobs rows. Rows: their ids.
UPDATE {schema}.jobs j
SET expires_at = (j.headers ->> 'tick')::timestamptz + s.expires_in
FROM {schema}.schedules s
WHERE s.name = j.headers ->> 'schedule' AND s.expires_in IS NOT NULL AND j.attempt = 0
  AND (j.headers ->> 'tick')::timestamptz = date_trunc('second', %(tick)s::timestamptz)
RETURNING j.id::text AS id
