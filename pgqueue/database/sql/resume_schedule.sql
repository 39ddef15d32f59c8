-- Resume one schedule, with a note in the audit log. Locks: its row. One row: resumed, or why not.
SELECT {schema}.resume_schedule(%(name)s::text, %(reason)s::text, %(actor)s::text) AS answer
