-- Keep a task or a queue as long as the rest again. Locks: its rows. One row: whether it differed.
SELECT {schema}.remove_retention(%(scope)s::text, %(name)s::text, %(reason)s::text, %(actor)s::text) AS removed
