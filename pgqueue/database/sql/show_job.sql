-- One job, whole, wherever it is. By primary key, and of history only the partitions it can be in. No row: unknown.
SELECT state, to_jsonb(f) AS job FROM {schema}.finished_jobs f
WHERE id = %(id)s::text::uuid AND finished_at >= {schema}.id_floor(%(id)s::text::uuid)
UNION ALL
SELECT 'dead', to_jsonb(d) FROM {schema}.dead_letters d WHERE id = %(id)s::text::uuid
UNION ALL
SELECT state, to_jsonb(j) FROM {schema}.jobs j WHERE id = %(id)s::text::uuid
LIMIT 1
