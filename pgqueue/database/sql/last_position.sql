-- The last position given out, and a transaction id: whoever was given one up to it has a smaller id, or is just about to
-- have one. One row. Locks nothing.
WITH given AS MATERIALIZED (
    SELECT coalesce(pg_sequence_last_value('{schema}.jobs_position_seq'), 0) AS position
)
SELECT position, pg_current_xact_id()::text::bigint AS xid FROM given
