-- The revision the schema is at.
SELECT version_num FROM {schema}.alembic_version
