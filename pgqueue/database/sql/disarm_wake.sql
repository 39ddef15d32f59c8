-- Say that nobody sleeps on these queues: producers stop notifying. Locks: the hint rows, skipping held ones.
UPDATE {schema}.wake SET wake_until = '-infinity'
WHERE queue = ANY (ARRAY(SELECT queue FROM {schema}.wake
                         WHERE queue = ANY (%(queues)s::text[]) AND wake_until > '-infinity'
                         ORDER BY queue FOR UPDATE SKIP LOCKED))
