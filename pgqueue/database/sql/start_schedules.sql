-- Have schedules count from a time on, for tests: those of which no tick has been decided about, or, with `all`, every one.
-- Locks: the schedules rows. Rows: their names.
UPDATE {schema}.schedules
SET last_tick = %(at)s::timestamptz, next_tick = NULL, version = version + 1
WHERE last_tick < %(at)s::timestamptz AND (%(all)s::boolean OR (fired + missed + skipped = 0 AND held = '{}'))
RETURNING name
