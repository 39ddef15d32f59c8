-- Every job that has not ended, in the order in which they were enqueued, for tests. Locks nothing.
SELECT id::text AS id, state, task, queue, args::text AS args, kwargs::text AS kwargs, priority, eta, expires_at, attempt,
       retries, unique_key, headers::text AS headers
FROM {schema}.jobs ORDER BY enqueued_at, position, id
