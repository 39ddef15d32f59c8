-- Pause one schedule, with a note in the audit log. Locks: its row. One row: paused, or why not.
SELECT {schema}.pause_schedule(%(name)s::text, %(reason)s::text, %(actor)s::text) AS answer
