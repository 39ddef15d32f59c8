-- What a connection of a client of ours is given, as far as nobody has chosen: timeouts, and commits that are on disk
-- when they are acknowledged. NULL leaves a timeout as it is; of synchronous_commit only `off` is raised.
-- Behind a pooler our pid is not the one the connection was given when it was made, for poolers make up their own. There
-- the session is others' too, so the settings hold for this transaction only; on a connection of its own, for good.
-- The second column is the statement timeout that holds from here on, in seconds, 0 for none.
SELECT is_pooled,
       extract(epoch FROM (
            CASE WHEN %(statement_timeout)s::text IS NOT NULL AND current_setting('statement_timeout') = '0'
                 THEN set_config('statement_timeout', %(statement_timeout)s::text, is_pooled)
                 ELSE current_setting('statement_timeout') END
       )::interval)::float8 AS statement_timeout,
       CASE WHEN %(lock_timeout)s::text IS NOT NULL AND current_setting('lock_timeout') = '0'
            THEN set_config('lock_timeout', %(lock_timeout)s::text, is_pooled) END,
       CASE WHEN current_setting('synchronous_commit') = 'off'
            THEN set_config('synchronous_commit', 'on', is_pooled) END
FROM (SELECT pg_backend_pid() <> %(pid)s::integer AS is_pooled) AS connection
