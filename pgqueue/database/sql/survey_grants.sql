-- What this role may do in the schema. One row, none if there is no such schema. Reads only catalogs that every role may read.
-- relations: for each table, view and sequence what it may do there; functions: whether it may execute all of that name.
SELECT current_user AS role, has_schema_privilege(n.oid, 'USAGE') AS usage,
       coalesce((SELECT json_object_agg(c.relname, array_remove(ARRAY[
                     CASE WHEN c.relkind <> 'S' AND has_table_privilege(c.oid, 'SELECT') THEN 'SELECT' END,
                     CASE WHEN c.relkind <> 'S' AND has_table_privilege(c.oid, 'INSERT') THEN 'INSERT' END,
                     CASE WHEN c.relkind <> 'S' AND has_table_privilege(c.oid, 'UPDATE') THEN 'UPDATE' END,
                     CASE WHEN c.relkind <> 'S' AND has_table_privilege(c.oid, 'DELETE') THEN 'DELETE' END,
                     CASE WHEN c.relkind = 'S' AND has_sequence_privilege(c.oid, 'USAGE') THEN 'USAGE' END], NULL))
                 FROM pg_class c WHERE c.relnamespace = n.oid AND c.relkind IN ('r', 'p', 'v', 'S')
                   AND NOT c.relispartition), '{}') AS relations,
       coalesce((SELECT json_object_agg(name, granted) FROM (
                     SELECT p.proname AS name, bool_and(has_function_privilege(p.oid, 'EXECUTE')) AS granted
                     FROM pg_proc p WHERE p.pronamespace = n.oid GROUP BY 1) AS named), '{}') AS functions
FROM pg_namespace n WHERE n.nspname = '{schema}'
