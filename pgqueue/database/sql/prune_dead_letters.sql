-- Delete a batch of dead letters past their retention. Locks: those rows, skipping held ones. Index: dead_letters_died_at.
-- Rows: their ids.
DELETE FROM {schema}.dead_letters
WHERE id = ANY (ARRAY(SELECT id FROM {schema}.dead_letters
                      WHERE died_at < now() - %(days)s::float8 * interval '1 day'
                      ORDER BY died_at LIMIT 1000 FOR UPDATE SKIP LOCKED))
RETURNING id
