-- How many jobs have not ended, by state, for tests. Locks nothing.
SELECT state, count(*) AS jobs FROM {schema}.jobs GROUP BY state ORDER BY state
