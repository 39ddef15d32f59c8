-- Cancel one job. Locks: its row. One row: cancelled, requested or too_late.
SELECT {schema}.cancel(%(id)s::text::uuid, %(reason)s::text, %(actor)s::text) AS answer
