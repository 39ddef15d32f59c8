-- Whether this database is migrated. Never fails.
SELECT to_regclass('{schema}.alembic_version') IS NOT NULL AND to_regclass('{schema}.meta') IS NOT NULL AS found
