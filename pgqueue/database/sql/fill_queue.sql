-- Make so many ready jobs of one task, for benchmarks. Locks: the new rows only. One row: how many were made.
WITH made AS (
    INSERT INTO {schema}.jobs (id, task) SELECT {schema}.uuid7(), %(task)s::text FROM generate_series(1, %(jobs)s::integer)
    RETURNING id
)
SELECT count(*) AS jobs FROM made
