-- Write to the audit log what somebody did.
INSERT INTO {schema}.audit_log (action, reason, details)
VALUES (%(action)s::text, %(reason)s::text, %(details)s::text::jsonb)
RETURNING id
