-- How many jobs have succeeded, how many of them are different ones, and the seconds from the first start to the last end,
-- for benchmarks. One row; locks nothing.
SELECT count(*) AS jobs, count(DISTINCT id) AS different,
       extract(epoch FROM max(finished_at) - min(started_at))::float8 AS seconds
FROM {schema}.finished_jobs WHERE state = 'succeeded'
