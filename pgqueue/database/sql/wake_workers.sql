-- Notify the workers that sleep on these queues; with eta, only those that know of nothing earlier.
SELECT {schema}.wake_workers(%(queues)s::text[], %(eta)s::timestamptz)
