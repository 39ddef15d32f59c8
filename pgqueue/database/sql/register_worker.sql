-- A new supervisor boot, also when the answer to the first try was lost. One row: its id.
INSERT INTO {schema}.workers (id, host, pid, queues, pool, concurrency, version)
VALUES (%(worker)s::text, %(host)s::text, %(pid)s::integer, %(queues)s::text[], %(pool)s::text, %(concurrency)s::integer,
        %(version)s::text)
ON CONFLICT (id) DO UPDATE SET started_at = now()
RETURNING id
