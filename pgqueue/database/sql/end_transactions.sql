-- End the transactions of executors that were killed, whose locks the server would else keep until it notices. Process ids
-- are used again: only what looks like one of ours. No locks. No rows, or one for each that was told.
SELECT pg_terminate_backend(pid)
FROM pg_stat_activity
WHERE pid = ANY (%(backends)s::integer[]) AND usename = session_user AND datname = current_database()
  AND pid <> pg_backend_pid() AND xact_start IS NOT NULL
