-- The days of history of which something is past its retention: the whole day, or the rows that meet `condition`. Reads
-- catalogs only; `rows` is the planner's estimate, NULL when the day was never analyzed.
SELECT parent, part, bytes, CASE WHEN estimate >= 0 THEN estimate END AS rows, goes, condition
FROM (
    SELECT h.parent, c.relname AS part, pg_total_relation_size(c.oid) AS bytes, c.reltuples::bigint AS estimate,
           CASE WHEN a.age >= greatest(h.general, (SELECT max(r.keep) FROM {schema}.retention r WHERE r.what = h.what))
                THEN 'whole'
                WHEN EXISTS (SELECT FROM {schema}.retention r WHERE r.what = h.what
                             AND least(r.keep, h.general) <= a.age - interval '1 hour')
                THEN 'rows' END AS goes,
           {schema}.retention_condition(h.what, h.general, a.age - interval '1 hour') AS condition
    FROM (VALUES ('finished', 'finished_jobs', %(finished)s::float8 * interval '1 day'),
                 ('failures', 'failures', %(failures)s::float8 * interval '1 day')) AS h(what, parent, general),
         pg_inherits i JOIN pg_class c ON c.oid = i.inhrelid,
         LATERAL (SELECT now() - (to_date(right(c.relname, 8), 'YYYYMMDD') + 1)::timestamp AT TIME ZONE 'UTC' AS age) AS a
    WHERE i.inhparent = ('{schema}.' || h.parent)::regclass AND c.relname ~ '_p[0-9]{8}$'
) AS days
WHERE goes IS NOT NULL
ORDER BY parent, part
