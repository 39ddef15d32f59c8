-- The database's clock in seconds since 1970, for jobs whose times are counted from now, and whether this role may load
-- jobs by COPY. Locks nothing. Reads catalogs that every role may read, so it cannot abort the caller's transaction.
SELECT extract(epoch FROM clock_timestamp())::float8 AS now,
       coalesce((
           SELECT has_schema_privilege(n.oid, 'USAGE')
                  AND has_table_privilege(j.oid, 'INSERT')
                  AND has_sequence_privilege(s.oid, 'USAGE')
           FROM pg_namespace n
           JOIN pg_class j ON j.relnamespace = n.oid AND j.relname = 'jobs'
           JOIN pg_class s ON s.relnamespace = n.oid AND s.relname = 'jobs_position_seq'
           WHERE n.nspname = %(schema)s::text
       ), false) AS may_copy
