-- Say that a worker sleeps on these queues for the next 10 s and knows of no scheduled job due sooner than `next_eta`
-- seconds from now (NULL: none at all). Locks: the hint rows, skipping held ones, so nothing can block it.
WITH mine AS (
    SELECT queue FROM {schema}.wake WHERE queue = ANY (%(queues)s::text[]) ORDER BY queue FOR UPDATE SKIP LOCKED
), renewed AS (
    UPDATE {schema}.wake
    SET wake_until = clock_timestamp() + interval '10 seconds',
        next_eta = coalesce(clock_timestamp() + %(next_eta)s::float8 * interval '1 second', 'infinity')
    WHERE queue = ANY (ARRAY(SELECT queue FROM mine))
)
INSERT INTO {schema}.wake (queue, wake_until, next_eta)
SELECT name, clock_timestamp() + interval '10 seconds',
       coalesce(clock_timestamp() + %(next_eta)s::float8 * interval '1 second', 'infinity')
FROM unnest(%(queues)s::text[]) AS name
WHERE NOT EXISTS (SELECT FROM {schema}.wake w WHERE w.queue = name)
ORDER BY name
ON CONFLICT DO NOTHING
