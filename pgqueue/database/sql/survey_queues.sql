-- What `queue_stats` says, in a bounded time however many jobs wait: `most` rows are counted of each kind, ready ones with
-- an equal share for each queue (but a thousand at least). Beyond that a count is a least one, and marked.
-- The oldest ready job is looked for at the head of each lane. Finds the queues by jumping from one to the next.
-- Indexes: jobs_ready, jobs_scheduled, jobs_running; dead_letters from the start of the table.
WITH RECURSIVE waiting AS (
    (SELECT queue FROM {schema}.jobs WHERE state = 'ready' ORDER BY queue LIMIT 1)
    UNION ALL
    SELECT (SELECT j.queue FROM {schema}.jobs j WHERE j.state = 'ready' AND j.queue > waiting.queue ORDER BY j.queue LIMIT 1)
    FROM waiting WHERE waiting.queue IS NOT NULL
), share AS (
    SELECT greatest(%(most)s::integer / greatest(count(queue), 1) / 1000 * 1000, least(%(most)s::integer, 1000)) AS most
    FROM waiting
), ready AS (
    SELECT waiting.queue,
           (SELECT count(*) FROM (SELECT FROM {schema}.jobs j WHERE j.state = 'ready' AND j.queue = waiting.queue
                                  LIMIT (SELECT most FROM share) + 1) AS counted) AS ready,
           (SELECT min(head.since) FROM generate_series(0, 9) AS lane,
                LATERAL (SELECT greatest(j.enqueued_at, j.eta) AS since FROM {schema}.jobs j
                         WHERE j.state = 'ready' AND j.queue = waiting.queue AND j.priority = lane::smallint
                         ORDER BY j.position LIMIT 1) AS head) AS oldest_ready
    FROM waiting WHERE waiting.queue IS NOT NULL
), scheduled AS (
    SELECT queue, count(*) AS scheduled
    FROM (SELECT queue FROM {schema}.jobs WHERE state = 'scheduled' ORDER BY eta LIMIT %(most)s::integer / 2) AS counted
    GROUP BY queue
), running AS (
    SELECT queue, count(*) AS running FROM {schema}.jobs WHERE state = 'running' GROUP BY queue
), dead AS (
    SELECT queue, count(*) AS dead
    FROM (SELECT queue FROM {schema}.dead_letters LIMIT %(most)s::integer / 2) AS counted
    GROUP BY queue
), live AS (
    SELECT queues FROM {schema}.workers WHERE NOT fenced AND heartbeat_at > now() - interval '1 minute'
), named AS (
    SELECT queue FROM ready UNION SELECT queue FROM scheduled UNION SELECT queue FROM running UNION SELECT queue FROM dead
    UNION SELECT unnest(queues) FROM live
)
SELECT queue, least(coalesce(ready, 0), (SELECT most FROM share)) AS ready, coalesce(scheduled, 0) AS scheduled,
       coalesce(running, 0) AS running, coalesce(dead, 0) AS dead, oldest_ready,
       (SELECT count(*) FROM live WHERE live.queues = '{}' OR named.queue = ANY (live.queues)) AS workers,
       coalesce(ready, 0) > (SELECT most FROM share) AS ready_is_least,
       (SELECT sum(scheduled) FROM scheduled) >= %(most)s::integer / 2 AS scheduled_is_least,
       (SELECT sum(dead) FROM dead) >= %(most)s::integer / 2 AS dead_is_least,
       extract(epoch FROM clock_timestamp() - oldest_ready)::float8 AS oldest_ready_seconds
FROM named LEFT JOIN ready USING (queue) LEFT JOIN scheduled USING (queue) LEFT JOIN running USING (queue)
     LEFT JOIN dead USING (queue)
ORDER BY queue
