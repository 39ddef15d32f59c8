-- Queues with ready jobs that are not known yet: at most one for each gap between the known ones, so ask again until
-- none comes. Looking only into the gaps never walks over the dead index entries of the queues in use.
-- Index: jobs_ready.
SELECT found.queue
FROM (SELECT coalesce(lag(name) OVER (ORDER BY name COLLATE "C"), '') AS low, name AS high
      FROM (SELECT unnest(%(known)s::text[]) UNION ALL SELECT NULL) AS known(name)) AS gap,
     LATERAL (SELECT queue FROM {schema}.jobs
              WHERE state = 'ready' AND queue > gap.low AND (gap.high IS NULL OR queue < gap.high)
              ORDER BY queue LIMIT 1) AS found
