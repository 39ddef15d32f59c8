-- What became of one job. Reads by primary key, and of history only the partitions it can be in.
-- No row: never committed, or pruned.
SELECT state, result::text AS result, result_error, NULL AS reason, NULL AS error_class, NULL AS error_message, NULL AS traceback
FROM {schema}.finished_jobs WHERE id = %(id)s::text::uuid AND finished_at >= {schema}.id_floor(%(id)s::text::uuid)
UNION ALL
SELECT 'dead', NULL, NULL, reason, error_class, error_message, traceback
FROM {schema}.dead_letters WHERE id = %(id)s::text::uuid
UNION ALL
SELECT state, NULL, NULL, NULL, NULL, NULL, NULL
FROM {schema}.jobs WHERE id = %(id)s::text::uuid
LIMIT 1
