-- The failed and crashed attempts of one job that are still kept, oldest first. Index: failures_job_id, in each partition
-- from the day its id was made.
SELECT attempt, kind, error_class, error_message, traceback, worker_id, failed_at
FROM {schema}.failures
WHERE job_id = %(id)s::uuid AND failed_at >= {schema}.id_floor(%(id)s::uuid)
ORDER BY failed_at, attempt
