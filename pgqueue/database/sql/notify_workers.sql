-- Notify every worker that listens, for work that one of them cannot take now. Not by the wake hint: a worker under load
-- disarms it for its queues, and with it for those that had gone to sleep before.
-- No locks but the cluster's for notifying, which nobody waits for when somebody hangs in it; no table.
SELECT pg_notify('{schema}', name) FROM unnest(%(queues)s::text[]) AS name
WHERE pg_notification_queue_usage() < 0.5 AND NOT {schema}.notify_is_stuck()
