-- The queues that are paused now.
SELECT queue, since, resume_at, actor, by, reason FROM {schema}.paused_queues ORDER BY queue
