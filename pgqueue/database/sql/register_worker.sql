-- A new supervisor boot. One row: its id.
INSERT INTO {schema}.workers (id, host, pid, queues, pool, concurrency, version)
VALUES (%(worker)s::text, %(host)s::text, %(pid)s::integer, %(queues)s::text[], %(pool)s::text, %(concurrency)s::integer,
        %(version)s::text)
RETURNING id
