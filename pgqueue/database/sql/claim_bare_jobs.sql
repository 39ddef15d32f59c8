-- Claim up to `batch` ready jobs of the default lane beyond `after`, with nothing of what a worker's claim looks after: the
-- yardstick of benchmarks. Locks: the rows it returns. Index: jobs_ready, jobs_pkey. No rows: there is nothing left.
UPDATE {schema}.jobs SET state = 'running', attempt = attempt + 1, worker_id = 'bare', claimed_at = now()
WHERE id = ANY (ARRAY(
    SELECT id FROM {schema}.jobs
    WHERE state = 'ready' AND queue = 'default' AND priority = 5 AND position > %(after)s::bigint
    ORDER BY position LIMIT %(batch)s::integer FOR UPDATE SKIP LOCKED))
RETURNING id::text, position
