-- How full the server's notification queue is, 0 to 1. Asking also lets the server discard what everybody has read: a
-- full queue stays full until somebody asks.
SELECT pg_notification_queue_usage() AS usage
