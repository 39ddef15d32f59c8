-- Delete everything but what says which schema it is, for tests: the rows of those tables that have ever had
-- any. DELETE, because TRUNCATE makes new files. Locks: all their rows.
DO $$
DECLARE
    used text;
BEGIN
    FOR used IN
        SELECT quote_ident(n.nspname) || '.' || quote_ident(c.relname)
        FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace
        WHERE n.nspname = '{schema}' AND c.relkind = 'r' AND c.relname NOT IN ('meta', 'alembic_version')
          AND pg_relation_size(c.oid) > 0
        ORDER BY 1
    LOOP
        EXECUTE 'DELETE FROM ' || used;
    END LOOP;
    UPDATE {schema}.meta SET paused = '{}' WHERE paused <> '{}';
END $$
