-- The arguments and headers of one claimed job, as text. Index: jobs_pkey, see ack_finished. No row: it is no longer this
-- worker's.
SELECT args::text AS args, kwargs::text AS kwargs, headers::text AS headers
FROM {schema}.jobs
WHERE id = %(id)s::uuid AND attempt = %(attempt)s::integer AND worker_id = %(worker)s::text AND state || '' = 'running'
