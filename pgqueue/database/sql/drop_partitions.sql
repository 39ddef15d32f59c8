-- Drop history that is past its retention, whole days at a time; a partition somebody reads is left for the next pass.
-- One row: how many were dropped.
SELECT {schema}.drop_partitions(%(finished_days)s::float8 * interval '1 day', %(failures_days)s::float8 * interval '1 day') AS dropped
