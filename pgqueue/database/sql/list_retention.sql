-- What is kept longer or shorter than the rest, by name.
SELECT scope, name, what, extract(epoch FROM keep)::float8 / 86400 AS days, set_at, set_by
FROM {schema}.retention ORDER BY scope, name, what
