-- Write to the audit log what `pgqueue doctor --fix` did. No locks.
INSERT INTO {schema}.audit_log (action, details) VALUES ('doctor_fix', %(details)s::text::jsonb) RETURNING id
