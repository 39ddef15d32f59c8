-- Write something of no meaning to the log, so that this transaction's COMMIT waits for the disk, and for synchronous
-- standbys, up to here: also for an earlier commit it has only read of, whose own wait was cut short.
SELECT pg_logical_emit_message(true, 'pgqueue', '')::text AS position
