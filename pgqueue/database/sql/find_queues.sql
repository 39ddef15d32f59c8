-- Queues with ready jobs that are not known yet: at most one for each gap between the known ones, so ask again until
-- none comes. Looking only into the gaps never walks over the index entries, dead or alive, of the queues in use; the gap
-- beyond the last one is asked for apart, because `high IS NULL OR queue < high` bounds no index scan.
-- Index: jobs_ready.
WITH known AS (
    SELECT unnest(%(known)s::text[]) COLLATE "C" AS name
), gap AS (
    SELECT coalesce(lag(name) OVER (ORDER BY name), '') AS low, name AS high FROM known
)
SELECT found.queue
FROM gap, LATERAL (
    SELECT queue FROM {schema}.jobs
    WHERE state = 'ready' AND queue > gap.low AND queue < gap.high
    ORDER BY queue LIMIT 1
) AS found
UNION ALL
SELECT beyond.queue
FROM (
    SELECT queue FROM {schema}.jobs
    WHERE state = 'ready' AND queue > coalesce((SELECT max(name) FROM known), '')
    ORDER BY queue LIMIT 1
) AS beyond
