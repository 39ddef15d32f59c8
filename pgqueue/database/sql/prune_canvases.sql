-- Forget canvases that ended longer ago than history, or dead letters, are kept; some at a time. One row for each.
SELECT 1 FROM generate_series(1, {schema}.prune_canvases(%(finished_days)s::float8 * interval '1 day', %(dead_letters_days)s::float8 * interval '1 day'))
