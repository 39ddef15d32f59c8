-- Delete a batch of audit entries past their retention. Index: audit_log_at. Rows: their ids.
DELETE FROM {schema}.audit_log
WHERE id = ANY (ARRAY(SELECT id FROM {schema}.audit_log WHERE at < now() - %(days)s::float8 * interval '1 day'
                      ORDER BY at LIMIT 1000 FOR UPDATE SKIP LOCKED))
RETURNING id
