-- What the server is, and in which state. One row; locks nothing.
SELECT current_setting('server_version') AS version, current_setting('server_version_num')::integer AS number,
       current_user AS role, current_database() AS database, pg_backend_pid() AS pid, pg_is_in_recovery() AS standby,
       current_setting('default_transaction_read_only') = 'on' AS read_only,
       coalesce(pg_has_role(current_user, 'pg_read_all_stats', 'USAGE'), false) AS sees_all
