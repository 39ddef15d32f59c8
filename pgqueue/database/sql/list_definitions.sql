-- The functions and views of the schema: name, kind, and the body of a function.
SELECT p.proname AS name, 'function' AS kind, p.prosrc AS body FROM pg_proc p
WHERE p.pronamespace = to_regnamespace('{schema}') AND p.prokind = 'f'
UNION ALL
SELECT c.relname, 'view', NULL FROM pg_class c WHERE c.relnamespace = to_regnamespace('{schema}') AND c.relkind = 'v'
