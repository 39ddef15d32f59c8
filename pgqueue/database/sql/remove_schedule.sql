-- Remove one schedule, with a note in the audit log. Locks: its row. One row: removed, or why not.
SELECT {schema}.remove_schedule(%(name)s::text, %(reason)s::text, %(actor)s::text) AS answer
