-- Which tasks wait in which queues, among the first and the last `most` ready jobs of each lane and the next scheduled
-- ones. Finds the queues by jumping from one to the next. Indexes: jobs_ready, jobs_scheduled.
WITH RECURSIVE waiting AS (
    (SELECT queue FROM {schema}.jobs WHERE state = 'ready' ORDER BY queue LIMIT 1)
    UNION ALL
    SELECT (SELECT j.queue FROM {schema}.jobs j WHERE j.state = 'ready' AND j.queue > waiting.queue ORDER BY j.queue LIMIT 1)
    FROM waiting WHERE waiting.queue IS NOT NULL
)
SELECT waiting.queue, found.task FROM waiting, generate_series(0, 9) AS lane, LATERAL (
    (SELECT j.task FROM {schema}.jobs j
     WHERE j.state = 'ready' AND j.queue = waiting.queue AND j.priority = lane::smallint ORDER BY j.position LIMIT %(most)s::integer)
    UNION ALL
    (SELECT j.task FROM {schema}.jobs j
     WHERE j.state = 'ready' AND j.queue = waiting.queue AND j.priority = lane::smallint ORDER BY j.position DESC LIMIT %(most)s::integer)
) AS found
UNION
SELECT queue, task FROM (
    SELECT queue, task FROM {schema}.jobs WHERE state = 'scheduled' ORDER BY eta LIMIT %(most)s::integer) AS later
ORDER BY 1, 2
