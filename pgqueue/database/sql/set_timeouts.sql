-- First in every transaction of an operator: timeouts, and a COMMIT that is on disk when it is acknowledged. Local, so
-- that they also hold behind a transaction pooler.
SELECT set_config('statement_timeout', %(statement_timeout)s::text, true), set_config('lock_timeout', %(lock_timeout)s::text, true),
       CASE WHEN current_setting('synchronous_commit') = 'off' THEN set_config('synchronous_commit', 'on', true) END
