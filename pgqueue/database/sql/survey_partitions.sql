-- The history partitions from yesterday to `days` days ahead that are missing, for one of the partitioned tables (which
-- {schema}.make_partitions would make), and rows in the default partition: `most` are counted, beyond that it is at least so many.
-- movable: those of them that go to a partition when it is made.
SELECT h.parent,
       ARRAY(SELECT day::date::text FROM generate_series((now() AT TIME ZONE 'UTC')::date - 1,
                 (now() AT TIME ZONE 'UTC')::date + %(days)s::integer, interval '1 day') AS day
             WHERE to_regclass(format('{schema}.%%I', h.parent || to_char(day, '"_p"YYYYMMDD'))) IS NULL
             ORDER BY day) AS missing,
       (now() AT TIME ZONE 'UTC')::date::text AS today, h.counted, h.movable
FROM (SELECT 'finished_jobs' AS parent, count(*) AS counted, count(*) FILTER (
          WHERE at >= ((now() AT TIME ZONE 'UTC')::date - 1)::timestamp AT TIME ZONE 'UTC'
            AND at < ((now() AT TIME ZONE 'UTC')::date + %(days)s::integer + 1)::timestamp AT TIME ZONE 'UTC') AS movable
      FROM (SELECT finished_at AS at FROM {schema}.finished_jobs_default LIMIT %(most)s::integer) AS counted
      UNION ALL
      SELECT 'failures', count(*), count(*) FILTER (
          WHERE at >= ((now() AT TIME ZONE 'UTC')::date - 1)::timestamp AT TIME ZONE 'UTC'
            AND at < ((now() AT TIME ZONE 'UTC')::date + %(days)s::integer + 1)::timestamp AT TIME ZONE 'UTC')
      FROM (SELECT failed_at AS at FROM {schema}.failures_default LIMIT %(most)s::integer) AS counted) AS h
