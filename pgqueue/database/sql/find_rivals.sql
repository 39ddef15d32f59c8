-- Why dead letters could not be requeued: whether a live job has the same id, which one has the same unique key, and why
-- they are dead.
-- Indexes: dead_letters_pkey, jobs_pkey, jobs_unique_key. Rows: one for each letter.
SELECT d.id::text AS id, EXISTS (SELECT FROM {schema}.jobs j WHERE j.id = d.id) AS id_is_live, d.unique_key, d.reason,
       (SELECT j.id::text FROM {schema}.jobs j WHERE j.task = d.task AND j.unique_key = d.unique_key) AS key_holder
FROM {schema}.dead_letters d
WHERE d.id = ANY (%(ids)s::uuid[])
ORDER BY d.id
