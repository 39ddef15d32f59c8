-- Who keeps VACUUM from removing dead rows of this database, the longest first: sessions with a snapshot or a
-- transaction id, standbys that report theirs, prepared transactions, replication slots. A VACUUM holds nothing up.
-- seconds: since its transaction began, NULL where that is hidden from this role or not known. age: in transactions.
SELECT 'session' AS kind, pid, usename::text AS role, application_name AS name, state, left(query, 200) AS query,
       xact_start AS since, extract(epoch FROM clock_timestamp() - xact_start)::float8 AS seconds,
       greatest(age(backend_xmin), age(backend_xid)) AS age, NULL::boolean AS active, NULL::bigint AS wal
FROM pg_stat_activity
WHERE (backend_xmin IS NOT NULL OR backend_xid IS NOT NULL) AND datname = current_database() AND pid <> pg_backend_pid()
  AND (backend_type = 'autovacuum worker' OR query ILIKE 'vacuum%%') IS NOT TRUE
UNION ALL
SELECT 'standby', pid, usename::text, application_name, state, NULL, NULL, NULL, age(backend_xmin), true, NULL
FROM pg_stat_replication WHERE backend_xmin IS NOT NULL
UNION ALL
SELECT 'prepared', NULL, owner::text, gid, NULL, NULL, prepared,
       extract(epoch FROM clock_timestamp() - prepared)::float8, age(transaction), NULL, NULL
FROM pg_prepared_xacts WHERE database = current_database()
UNION ALL
SELECT 'slot', active_pid, NULL, slot_name::text, wal_status, NULL, NULL, NULL, greatest(age(xmin), age(catalog_xmin)), active,
       CASE WHEN NOT pg_is_in_recovery() THEN pg_wal_lsn_diff(pg_current_wal_lsn(), restart_lsn)::bigint END
FROM pg_replication_slots WHERE xmin IS NOT NULL OR catalog_xmin IS NOT NULL
ORDER BY seconds DESC NULLS LAST, age DESC NULLS LAST, pid
