-- How tables of the schema are kept: their storage settings, and what the statistics say of rows and of the last VACUUM.
-- Estimates all, so it costs the same however large they are. The sizes are read from the file system.
SELECT c.relname AS name, coalesce(c.reloptions, '{}') AS options, s.n_live_tup AS live, s.n_dead_tup AS dead,
       pg_table_size(c.oid) AS bytes,
       extract(epoch FROM clock_timestamp() - greatest(s.last_vacuum, s.last_autovacuum))::float8 AS vacuumed_ago,
       greatest(s.last_vacuum, s.last_autovacuum) AS vacuumed_at,
       pg_get_userbyid(c.relowner) AS owner
FROM pg_class c JOIN pg_stat_all_tables s ON s.relid = c.oid
WHERE c.relnamespace = to_regnamespace('{schema}') AND c.relname = ANY (%(names)s::text[])
ORDER BY c.relname
