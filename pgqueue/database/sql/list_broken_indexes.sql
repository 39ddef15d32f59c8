-- Indexes of the schema that no plan may use: a CONCURRENTLY that failed leaves an invalid one, and so is one of a
-- partitioned table as long as a partition lacks it. missing: those partitions; made_with: what stands
-- behind the table's name in its definition; partial: it holds some of the rows only, for searches.
SELECT i.relname AS index, t.relname AS table, t.relkind = 'p' AS partitioned,
       substring(pg_get_indexdef(i.oid) FROM 'USING .*') AS made_with, x.indpred IS NOT NULL AS partial,
       ARRAY(SELECT child.relname::text FROM pg_inherits h JOIN pg_class child ON child.oid = h.inhrelid
             WHERE h.inhparent = t.oid AND NOT EXISTS (
                 SELECT FROM pg_inherits hi JOIN pg_index xi ON xi.indexrelid = hi.inhrelid
                 WHERE hi.inhparent = i.oid AND xi.indrelid = child.oid)
             ORDER BY 1) AS missing
FROM pg_index x JOIN pg_class i ON i.oid = x.indexrelid JOIN pg_class t ON t.oid = x.indrelid
WHERE t.relnamespace = to_regnamespace('{schema}') AND NOT (x.indisvalid AND x.indisready)
ORDER BY 1
