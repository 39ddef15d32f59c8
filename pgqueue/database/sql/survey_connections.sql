-- How many connections clients have, and how many they may have. One row. For an ordinary role some are reserved. What kind
-- a process is may be hidden from this role; then one in a database counts.
SELECT count(*) FILTER (WHERE coalesce(backend_type = 'client backend', datid IS NOT NULL)) AS used,
       current_setting('max_connections')::integer - current_setting('superuser_reserved_connections')::integer
           - coalesce(current_setting('reserved_connections', true)::integer, 0) AS most,
       (SELECT string_agg(format('%%s of %%s', n, name), ', ') FROM (
           SELECT count(*) AS n, coalesce(nullif(application_name, ''), 'no name') AS name FROM pg_stat_activity
           WHERE coalesce(backend_type = 'client backend', datid IS NOT NULL) GROUP BY 2 ORDER BY 1 DESC, 2 LIMIT 3) AS greedy) AS greedy
FROM pg_stat_activity
