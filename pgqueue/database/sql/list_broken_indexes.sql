-- Indexes of the schema that no plan may use: a CONCURRENTLY that failed leaves an invalid one, and so is one of a
-- partitioned table as long as a partition lacks it. missing: those partitions; columns: of the index.
SELECT i.relname AS index, t.relname AS table, t.relkind = 'p' AS partitioned,
       ARRAY(SELECT a.attname::text FROM pg_attribute a WHERE a.attrelid = i.oid ORDER BY a.attnum) AS columns,
       ARRAY(SELECT child.relname::text FROM pg_inherits h JOIN pg_class child ON child.oid = h.inhrelid
             WHERE h.inhparent = t.oid AND NOT EXISTS (
                 SELECT FROM pg_inherits hi JOIN pg_index xi ON xi.indexrelid = hi.inhrelid
                 WHERE hi.inhparent = i.oid AND xi.indrelid = child.oid)
             ORDER BY 1) AS missing
FROM pg_index x JOIN pg_class i ON i.oid = x.indexrelid JOIN pg_class t ON t.oid = x.indrelid
WHERE t.relnamespace = to_regnamespace('{schema}') AND NOT (x.indisvalid AND x.indisready)
ORDER BY 1
