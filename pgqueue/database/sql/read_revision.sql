-- The revision the schema is at, and the oldest release, by its own newest revision, that may work on it: NULL before
-- 0002. Read through JSON because the column need not be there.
SELECT version_num, (SELECT to_jsonb(meta) ->> 'oldest_code_revision' FROM {schema}.meta) AS oldest_code_revision
FROM {schema}.alembic_version
