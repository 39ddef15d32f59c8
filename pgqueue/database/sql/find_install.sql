-- Which queue lives in this database: 'pgqueue <install id>', NULL when none does. Never fails: it reads catalogs that
-- every role may read, so it cannot abort the caller's transaction.
SELECT obj_description(to_regnamespace(%(schema)s::text)::oid, 'pg_namespace') AS install
