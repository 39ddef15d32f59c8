-- Whether this database was ever migrated. Never fails.
SELECT to_regclass('{schema}.alembic_version') IS NOT NULL AS found
