-- The constraints of the schema's tables, by name, partitions left out.
SELECT c.relname AS table, k.conname AS name FROM pg_constraint k JOIN pg_class c ON c.oid = k.conrelid
WHERE c.relnamespace = to_regnamespace('{schema}') AND NOT c.relispartition
