-- What people did to one job, oldest first. Index: audit_log_job_id.
SELECT at, actor, action, reason, details FROM {schema}.audit_log WHERE job_id = %(id)s::uuid ORDER BY id
