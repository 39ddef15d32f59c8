-- Delete dead letters, with a note in the audit log for each. Locks: their rows, in order of id, skipping held ones.
-- Index: dead_letters_pkey. Rows: the ids of those that are gone.
SELECT id::text AS id FROM {schema}.purge_dead_letters(%(ids)s::uuid[], %(reason)s::text, %(by)s::text) AS id
