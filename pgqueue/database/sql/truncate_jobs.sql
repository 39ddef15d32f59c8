-- Forget all jobs, for benchmarks, in their own schema. Locks the tables, which nobody else uses.
TRUNCATE {schema}.jobs, {schema}.finished_jobs, {schema}.failures
