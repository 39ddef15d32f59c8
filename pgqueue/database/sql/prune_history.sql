-- Walk on over a day of history of which only some rows are past their retention. Locks: the rows that go, or, for a
-- moment at the end, the table, unless somebody reads it. A scan of 500 blocks by their place, without an index.
-- One row: the day, rows removed and kept in this step, blocks left. No row: nothing to do, or the day is being read.
SELECT part, removed, kept, blocks_left
FROM {schema}.prune_history(%(what)s::text, %(days)s::float8 * interval '1 day')
