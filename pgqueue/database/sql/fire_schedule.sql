-- Decide about a schedule's ticks, once: only from the version of the row that was read, which the first one to write
-- raises. The jobs of the ticks are enqueued by the same statement. Their ids are made of schedule and tick.
-- Locks: the schedules row, unless somebody else holds it: one who froze must not delay other schedules; then the new jobs
-- rows. Index: schedules_pkey, jobs_pkey.
-- One row: the jobs' queue and how many there are. No row: somebody else was first, or holds, has changed or paused it.
WITH decided AS (
    UPDATE {schema}.schedules s
    SET last_tick = to_timestamp(%(last_tick)s::float8), next_tick = to_timestamp(%(next_tick)s::float8),
        held = ARRAY(SELECT to_timestamp(tick) FROM unnest(%(held)s::float8[]) AS tick),
        fired = fired + cardinality(%(ids)s::uuid[]), missed = missed + %(missed)s::integer,
        skipped = skipped + %(skipped)s::integer, version = version + 1,
        recent_jobs = CASE WHEN %(ids)s::uuid[] = '{}' THEN recent_jobs
            WHEN overlap = 'allow' THEN (%(ids)s::uuid[])[cardinality(%(ids)s::uuid[]):]
            ELSE ARRAY(SELECT j.id FROM {schema}.jobs j WHERE j.id = ANY (s.recent_jobs)) || %(ids)s::uuid[] END
    WHERE name = (SELECT name FROM {schema}.schedules
                  WHERE name = %(name)s::text AND version = %(version)s::bigint AND NOT paused FOR UPDATE SKIP LOCKED)
    RETURNING *
), fired AS (
    INSERT INTO {schema}.jobs (id, state, queue, task, args, kwargs, priority, eta, expires_at, max_retries, headers)
    SELECT tick.id, CASE WHEN to_timestamp(tick.eta) > clock_timestamp() THEN 'scheduled' ELSE 'ready' END, d.queue, d.task,
           d.args, d.kwargs, d.priority, CASE WHEN to_timestamp(tick.eta) > clock_timestamp() THEN to_timestamp(tick.eta) END,
           clock_timestamp() + d.expires_in, d.max_retries, d.headers || jsonb_build_object('schedule', d.name,
               'tick', to_char(to_timestamp(tick.tick) AT TIME ZONE 'UTC', 'YYYY-MM-DD"T"HH24:MI:SS"Z"'))
    FROM decided d, unnest(%(ids)s::uuid[], %(ticks)s::float8[], %(etas)s::float8[]) AS tick(id, tick, eta)
    ORDER BY tick.tick
    ON CONFLICT DO NOTHING
    RETURNING id
)
SELECT queue, (SELECT count(*) FROM fired) AS jobs FROM decided
