-- Transactions that have written something and are idle, for tests that wonder where a job is. As far as this role may see.
SELECT count(*) AS writers FROM pg_stat_activity
WHERE datname = current_database() AND pid <> pg_backend_pid() AND state IN ('idle in transaction', 'idle in transaction (aborted)')
  AND backend_xid IS NOT NULL
