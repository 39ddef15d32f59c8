-- Delete a batch of dead letters past their retention: their task's, else their queue's, else the general one. Locks: those
-- rows, skipping held ones. Index: dead_letters_died_at. Rows: their ids.
SELECT id::text AS id FROM {schema}.prune_dead_letters(%(days)s::float8 * interval '1 day') AS id
