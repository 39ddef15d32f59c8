-- How many dead letters and acts are past their retention. Indexes: dead_letters_died_at, audit_log_at.
SELECT (SELECT count(*) FROM {schema}.dead_letters d
        WHERE d.died_at <= now() - coalesce(
            (SELECT r.keep FROM {schema}.retention r WHERE r.what = 'dead_letters' AND r.scope = 'task' AND r.name = d.task),
            (SELECT r.keep FROM {schema}.retention r WHERE r.what = 'dead_letters' AND r.scope = 'queue' AND r.name = d.queue),
            %(dead_letters)s::float8 * interval '1 day')) AS dead_letters,
       (SELECT count(*) FROM {schema}.audit_log WHERE at < now() - %(audit)s::float8 * interval '1 day') AS acts
