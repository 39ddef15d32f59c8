-- Set how long this transaction waits for a lock. One row: what it was before.
SELECT before, set_config('lock_timeout', %(timeout)s::text, true) AS now
FROM (SELECT current_setting('lock_timeout') AS before OFFSET 0) AS waiting
