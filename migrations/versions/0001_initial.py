"""Jobs, history, dead letters, workers, the wake hint, and the functions producers call.

Revision ID: 0001
Revises:
"""

from __future__ import annotations

from alembic import context, op

revision = "0001"
down_revision = None
branch_labels = None
depends_on = None

TABLES = r"""
CREATE TABLE {schema}.meta (
    only_row   boolean PRIMARY KEY DEFAULT true CHECK (only_row),
    install_id uuid NOT NULL DEFAULT gen_random_uuid(),
    created_at timestamptz NOT NULL DEFAULT now()
);
INSERT INTO {schema}.meta DEFAULT VALUES;

-- CACHE 1: a cached range would hand one session positions far behind those of the others.
CREATE SEQUENCE {schema}.jobs_position_seq AS bigint CACHE 1;

-- Live jobs only. A size CHECK reads the stored size: printing or detoasting args here would run on every claim.
CREATE TABLE {schema}.jobs (
    id                  uuid PRIMARY KEY,
    state               text COLLATE "C" NOT NULL DEFAULT 'ready',
    queue               text COLLATE "C" NOT NULL DEFAULT 'default',
    task                text COLLATE "C" NOT NULL,
    args                jsonb NOT NULL DEFAULT '[]',
    kwargs              jsonb NOT NULL DEFAULT '{}',
    priority            smallint NOT NULL DEFAULT 5,
    position            bigint NOT NULL DEFAULT nextval('{schema}.jobs_position_seq'),
    eta                 timestamptz,
    expires_at          timestamptz,
    attempt             integer NOT NULL DEFAULT 0,
    retries             integer NOT NULL DEFAULT 0,
    max_retries         integer,
    crashes             integer NOT NULL DEFAULT 0,
    rescues             integer NOT NULL DEFAULT 0,
    cancel_requested_at timestamptz,
    worker_id           text COLLATE "C",
    claimed_at          timestamptz,
    enqueued_at         timestamptz NOT NULL DEFAULT clock_timestamp(),
    enqueued_by         text NOT NULL DEFAULT session_user,
    unique_key          text COLLATE "C",
    headers             jsonb NOT NULL DEFAULT '{}',
    CONSTRAINT jobs_state_known CHECK (state IN ('scheduled', 'ready', 'running')),
    CONSTRAINT jobs_scheduled_has_eta CHECK (state <> 'scheduled' OR eta IS NOT NULL),
    CONSTRAINT jobs_priority_range CHECK (priority BETWEEN 0 AND 9),
    -- Room to count on: one row that cannot be counted up would fail the claim of its whole lane.
    CONSTRAINT jobs_counts_range CHECK (greatest(attempt, retries, crashes, rescues) <= 1000000000),
    -- What lanes can count on, beyond what the sequence will ever give: the cursors start below and end above.
    CONSTRAINT jobs_position_range CHECK (position BETWEEN 0 AND 4611686018427387903),
    CONSTRAINT jobs_worker_named CHECK (worker_id <> ''),
    CONSTRAINT jobs_queue_length CHECK (length(queue) BETWEEN 1 AND 63),
    CONSTRAINT jobs_payload_size CHECK (pg_column_size(args) + pg_column_size(kwargs) + pg_column_size(headers) <= 16777216)
) WITH (
    fillfactor = 85,
    autovacuum_vacuum_threshold = 2000, autovacuum_vacuum_scale_factor = 0,
    autovacuum_vacuum_insert_threshold = -1,
    autovacuum_analyze_threshold = 20000, autovacuum_analyze_scale_factor = 0,
    autovacuum_vacuum_cost_delay = 0, vacuum_truncate = off
);
CREATE INDEX jobs_ready ON {schema}.jobs (queue, priority, position) WHERE state = 'ready';
CREATE INDEX jobs_scheduled ON {schema}.jobs (eta) WHERE state = 'scheduled';
CREATE INDEX jobs_running ON {schema}.jobs (worker_id) WHERE state = 'running';
CREATE UNIQUE INDEX jobs_unique_key ON {schema}.jobs (task, unique_key) WHERE unique_key IS NOT NULL;

CREATE TABLE {schema}.finished_jobs (
    id           uuid NOT NULL,
    state        text COLLATE "C" NOT NULL,
    queue        text COLLATE "C" NOT NULL,
    task         text COLLATE "C" NOT NULL,
    args         jsonb NOT NULL,
    kwargs       jsonb NOT NULL,
    priority     smallint NOT NULL,
    eta          timestamptz,
    expires_at   timestamptz,
    attempt      integer NOT NULL,
    retries      integer NOT NULL,
    crashes      integer NOT NULL,
    rescues      integer NOT NULL,
    worker_id    text COLLATE "C",
    enqueued_at  timestamptz NOT NULL,
    enqueued_by  text NOT NULL,
    claimed_at   timestamptz,
    started_at   timestamptz,
    finished_at  timestamptz NOT NULL DEFAULT clock_timestamp(),
    unique_key   text COLLATE "C",
    headers      jsonb NOT NULL,
    result       jsonb,
    result_error text,
    CONSTRAINT finished_jobs_state_known CHECK (state IN ('succeeded', 'cancelled', 'expired'))
) PARTITION BY RANGE (finished_at);
CREATE INDEX finished_jobs_id ON {schema}.finished_jobs (id);
CREATE TABLE {schema}.finished_jobs_default PARTITION OF {schema}.finished_jobs DEFAULT;

-- One row per failed or crashed attempt.
CREATE TABLE {schema}.failures (
    job_id        uuid NOT NULL,
    attempt       integer NOT NULL,
    task          text COLLATE "C" NOT NULL,
    queue         text COLLATE "C" NOT NULL,
    kind          text COLLATE "C" NOT NULL,
    error_class   text,
    error_message text,
    traceback     text,
    worker_id     text COLLATE "C",
    failed_at     timestamptz NOT NULL DEFAULT clock_timestamp(),
    CONSTRAINT failures_kind_known CHECK (kind IN ('failed', 'crashed'))
) PARTITION BY RANGE (failed_at);
CREATE INDEX failures_job_id ON {schema}.failures (job_id);
CREATE TABLE {schema}.failures_default PARTITION OF {schema}.failures DEFAULT;

CREATE TABLE {schema}.dead_letters (
    id                uuid PRIMARY KEY,
    queue             text COLLATE "C" NOT NULL,
    task              text COLLATE "C" NOT NULL,
    args              jsonb NOT NULL,
    kwargs            jsonb NOT NULL,
    priority          smallint NOT NULL,
    eta               timestamptz,
    expires_at        timestamptz,
    attempt           integer NOT NULL,
    retries           integer NOT NULL,
    max_retries       integer,
    crashes           integer NOT NULL,
    rescues           integer NOT NULL,
    worker_id         text COLLATE "C",
    claimed_at        timestamptz,
    enqueued_at       timestamptz NOT NULL,
    enqueued_by       text NOT NULL,
    unique_key        text COLLATE "C",
    headers           jsonb NOT NULL,
    dead_letter_queue text COLLATE "C" NOT NULL,
    reason            text COLLATE "C" NOT NULL,
    error_class       text,
    error_message     text,
    traceback         text,
    died_at           timestamptz NOT NULL DEFAULT clock_timestamp(),
    CONSTRAINT dead_letters_reason_known CHECK (reason IN ('not_retryable', 'retries_exhausted', 'crashed',
        'time_limit', 'rejected', 'unknown_task', 'bad_payload'))
);
CREATE INDEX dead_letters_listing ON {schema}.dead_letters (dead_letter_queue, died_at);
CREATE INDEX dead_letters_died_at ON {schema}.dead_letters (died_at);

-- One row per supervisor boot. running: ids that have been running for more than a second.
CREATE TABLE {schema}.workers (
    id           text COLLATE "C" PRIMARY KEY,
    host         text NOT NULL,
    pid          integer NOT NULL,
    queues       text[] NOT NULL,
    pool         text NOT NULL,
    concurrency  integer NOT NULL,
    version      text NOT NULL,
    started_at   timestamptz NOT NULL DEFAULT now(),
    heartbeat    bigint NOT NULL DEFAULT 0,
    heartbeat_at timestamptz NOT NULL DEFAULT now(),
    fenced       boolean NOT NULL DEFAULT false,
    running      uuid[] NOT NULL DEFAULT '{}',
    stats        jsonb NOT NULL DEFAULT '{}'
) WITH (fillfactor = 50, autovacuum_vacuum_threshold = 100, autovacuum_vacuum_scale_factor = 0,
        autovacuum_vacuum_cost_delay = 0, vacuum_truncate = off);

-- The wake hint: some worker sleeps until wake_until and knows of no scheduled job before next_eta.
CREATE TABLE {schema}.wake (
    queue      text COLLATE "C" PRIMARY KEY,
    wake_until timestamptz NOT NULL,
    next_eta   timestamptz NOT NULL DEFAULT 'infinity'
) WITH (fillfactor = 50, autovacuum_vacuum_threshold = 100, autovacuum_vacuum_scale_factor = 0,
        autovacuum_vacuum_cost_delay = 0, vacuum_truncate = off);

CREATE TABLE {schema}.audit_log (
    id      bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    at      timestamptz NOT NULL DEFAULT clock_timestamp(),
    actor   text NOT NULL DEFAULT session_user,
    action  text NOT NULL,
    job_id  uuid,
    queue   text COLLATE "C",
    reason  text,
    details jsonb NOT NULL DEFAULT '{}'
);
CREATE INDEX audit_log_job_id ON {schema}.audit_log (job_id);
CREATE INDEX audit_log_at ON {schema}.audit_log (at);
"""

# Producers need EXECUTE on these and nothing on the tables. Parameters are written enqueue.x: they share names
# with columns.
PRODUCER_FUNCTIONS = r"""
CREATE FUNCTION {schema}.uuid7() RETURNS uuid LANGUAGE sql VOLATILE PARALLEL SAFE SET search_path = pg_catalog AS $$
    SELECT encode(set_bit(set_bit(overlay(uuid_send(gen_random_uuid())
        PLACING substring(int8send(floor(extract(epoch FROM clock_timestamp()) * 1000)::bigint) FROM 3) FROM 1 FOR 6),
        52, 1), 53, 1), 'hex')::uuid
$$;
COMMENT ON FUNCTION {schema}.uuid7() IS 'A UUIDv7 (RFC 9562): milliseconds, then random bits';

-- finished_at is never more than a day before the id was made, so a look-up by id reads few partitions.
CREATE FUNCTION {schema}.id_floor(id uuid) RETURNS timestamptz LANGUAGE sql IMMUTABLE PARALLEL SAFE AS $$
    SELECT CASE WHEN substr(id::text, 15, 1) = '7'
        THEN to_timestamp(('x' || substr(replace(id::text, '-', ''), 1, 12))::bit(48)::bigint / 1000.0) - interval '1 day'
        ELSE '-infinity' END
$$;
COMMENT ON FUNCTION {schema}.id_floor(uuid) IS 'Earliest finished_at a job with this id can have';

-- Commits that notify take turns, in the whole cluster: one that hangs (its server process is frozen, or it waits for a
-- synchronous standby) would stop every enqueue behind it. Who sleeps then is not notified, and looks for itself.
CREATE FUNCTION {schema}.notify_is_stuck() RETURNS boolean LANGUAGE sql VOLATILE SET search_path = pg_catalog AS $$
    SELECT EXISTS (
        SELECT FROM pg_locks
        WHERE locktype = 'object' AND database = 0 AND classid = 'pg_database'::regclass AND objid = 0 AND NOT granted
          AND waitstart < clock_timestamp() - interval '0.2 seconds'
    )
$$;
COMMENT ON FUNCTION {schema}.notify_is_stuck() IS 'Whether somebody has been waiting to NOTIFY for over 0.2 s';

CREATE FUNCTION {schema}.wake_workers(queues text[], eta timestamptz DEFAULT NULL) RETURNS void
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, {schema}, pg_temp AS $$
DECLARE
    sleepers text[];
BEGIN
    SELECT array_agg(w.queue) INTO sleepers FROM wake w
    WHERE w.queue = ANY (wake_workers.queues)
      AND w.wake_until BETWEEN clock_timestamp() AND clock_timestamp() + interval '10 seconds'
      AND (wake_workers.eta IS NULL OR wake_workers.eta < w.next_eta)
      AND pg_notification_queue_usage() < 0.5;
    IF sleepers IS NOT NULL AND NOT notify_is_stuck() THEN
        PERFORM pg_notify('{channel}', name) FROM unnest(sleepers) AS name;
    END IF;
END $$;
COMMENT ON FUNCTION {schema}.wake_workers(text[], timestamptz) IS
    'NOTIFY the workers that sleep on these queues; eta: only those that know of nothing earlier';

CREATE FUNCTION {schema}.enqueue(
    task        text,
    args        jsonb DEFAULT '[]',
    kwargs      jsonb DEFAULT '{}',
    queue       text DEFAULT 'default',
    priority    integer DEFAULT 5,
    eta         timestamptz DEFAULT NULL,
    expires_at  timestamptz DEFAULT NULL,
    job_id      uuid DEFAULT NULL,
    unique_key  text DEFAULT NULL,
    headers     jsonb DEFAULT '{}',
    max_retries integer DEFAULT NULL,
    new_id      boolean DEFAULT false
) RETURNS uuid
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, {schema}, pg_temp AS $$
#variable_conflict use_column
DECLARE
    wanted   uuid := coalesce(enqueue.job_id, uuid7());
    repeated boolean := enqueue.job_id IS NOT NULL AND NOT enqueue.new_id;
    waits    boolean := coalesce(enqueue.eta > clock_timestamp(), false);
    existing uuid;
    sleepers text[];
BEGIN
    -- Looking for one wrong character is fifty times faster than matching {1,255} right ones.
    IF enqueue.task ~ '[[:cntrl:][:space:]]' OR length(enqueue.task) NOT BETWEEN 1 AND 255 OR enqueue.task IS NULL THEN
        RAISE invalid_parameter_value USING
            MESSAGE = format('a task name is 1 to 255 characters without blanks, got %L', left(enqueue.task, 300));
    ELSIF enqueue.queue ~ '[^A-Za-z0-9_.:-]' OR length(enqueue.queue) NOT BETWEEN 1 AND 63 OR enqueue.queue IS NULL THEN
        RAISE invalid_parameter_value USING
            MESSAGE = format('a queue name is 1 to 63 letters, digits or ''_.:-'', got %L', left(enqueue.queue, 100));
    ELSIF enqueue.priority NOT BETWEEN 0 AND 9 OR enqueue.priority IS NULL THEN
        RAISE invalid_parameter_value USING
            MESSAGE = format('priority must be from 0 to 9 (larger runs first), got %L', enqueue.priority);
    ELSIF jsonb_typeof(enqueue.args) IS DISTINCT FROM 'array' OR jsonb_typeof(enqueue.kwargs) IS DISTINCT FROM 'object'
        OR jsonb_typeof(enqueue.headers) IS DISTINCT FROM 'object' THEN
        RAISE invalid_parameter_value USING
            MESSAGE = format('args must be a JSON array, kwargs and headers JSON objects, got %s, %s and %s',
                coalesce(jsonb_typeof(enqueue.args), 'NULL'), coalesce(jsonb_typeof(enqueue.kwargs), 'NULL'),
                coalesce(jsonb_typeof(enqueue.headers), 'NULL'));
    ELSIF NOT isfinite(enqueue.eta) OR NOT isfinite(enqueue.expires_at)
        OR enqueue.eta >= '9999-01-01' OR enqueue.expires_at >= '9999-01-01' THEN
        RAISE invalid_parameter_value USING
            MESSAGE = format('eta and expires_at must be before the year 9999, got %L and %L', enqueue.eta, enqueue.expires_at);
    ELSIF enqueue.max_retries < -1 THEN
        RAISE invalid_parameter_value USING
            MESSAGE = format('max_retries must be at least 0, or -1 for ever, got %s', enqueue.max_retries);
    END IF;
    -- An older snapshot would not show the end of the first run, and the job would run again.
    IF repeated AND current_setting('transaction_isolation') <> 'read committed' THEN
        RAISE feature_not_supported USING
            MESSAGE = 'a job_id of your own needs a READ COMMITTED transaction, this one is '
                || upper(current_setting('transaction_isolation')),
            HINT = 'Leave job_id out, or enqueue it in a transaction of its own.';
    END IF;

    FOR round IN 1..10 LOOP
        INSERT INTO jobs (id, state, queue, task, args, kwargs, priority, eta, expires_at, max_retries, unique_key,
                          headers, enqueued_by)
        VALUES (wanted, CASE WHEN waits THEN 'scheduled' ELSE 'ready' END, enqueue.queue, enqueue.task, enqueue.args,
                enqueue.kwargs, enqueue.priority, enqueue.eta, enqueue.expires_at, enqueue.max_retries,
                enqueue.unique_key, enqueue.headers, session_user)
        ON CONFLICT DO NOTHING;
        EXIT WHEN FOUND;
        SELECT j.id INTO existing FROM jobs j WHERE j.id = wanted;
        IF existing IS NULL THEN
            SELECT j.id INTO existing FROM jobs j
            WHERE j.task = enqueue.task AND j.unique_key = enqueue.unique_key;
        END IF;
        IF existing IS NOT NULL THEN
            RETURN existing;
        END IF;
        -- The job that stood in the way ended between the two statements: try again.
        IF round = 10 THEN
            RAISE serialization_failure USING MESSAGE = 'the job in the way kept changing; repeat the enqueue';
        END IF;
    END LOOP;

    -- In a second statement, whose snapshot is newer than the INSERT: the first run may have ended while it waited.
    IF repeated AND (EXISTS (SELECT FROM finished_jobs f WHERE f.id = wanted AND f.finished_at >= id_floor(wanted))
                     OR EXISTS (SELECT FROM dead_letters d WHERE d.id = wanted)) THEN
        DELETE FROM jobs j WHERE j.id = wanted;
        RETURN wanted;
    END IF;

    SELECT array_agg(w.queue) INTO sleepers FROM wake w
    WHERE w.queue = enqueue.queue
      AND w.wake_until BETWEEN clock_timestamp() AND clock_timestamp() + interval '10 seconds'
      AND (NOT waits OR enqueue.eta < w.next_eta)
      AND pg_notification_queue_usage() < 0.5;
    IF sleepers IS NOT NULL AND NOT notify_is_stuck() THEN
        PERFORM pg_notify('{channel}', name) FROM unnest(sleepers) AS name;
    END IF;
    RETURN wanted;
END $$;
COMMENT ON FUNCTION {schema}.enqueue IS 'Enqueue one job in the caller''s transaction; returns its id, or that of the job already there';

CREATE FUNCTION {schema}.enqueue_many(new_jobs jsonb, new_ids boolean DEFAULT false) RETURNS SETOF uuid
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, {schema}, pg_temp AS $$
#variable_conflict use_column
DECLARE
    inserted    uuid[];
    wake_queues text[];
    wake_eta    timestamptz;
    wrong       text;
BEGIN
    IF jsonb_typeof(enqueue_many.new_jobs) IS DISTINCT FROM 'array' THEN
        RAISE invalid_parameter_value USING
            MESSAGE = format('new_jobs must be a JSON array of objects, got %s',
                coalesce(jsonb_typeof(enqueue_many.new_jobs), 'NULL'));
    END IF;
    -- New ids are the library's, which has checked its jobs itself. One after the other: what follows a rule relies on it.
    IF NOT enqueue_many.new_ids THEN
        SELECT format('new_jobs[%s] %s', c.nth - 1, c.wrong) INTO wrong
        FROM (SELECT nth, CASE
            WHEN jsonb_typeof(job) <> 'object' THEN
                format('must be a JSON object, got %s', jsonb_typeof(job))
            WHEN job ->> 'id' IS NULL THEN
                'must have an id; {schema}.uuid7() makes one'
            WHEN job ->> 'task' ~ '[[:cntrl:][:space:]]' OR length(job ->> 'task') NOT BETWEEN 1 AND 255 OR job ->> 'task' IS NULL THEN
                format('is wrong: a task name is 1 to 255 characters without blanks, got %L', left(job ->> 'task', 300))
            WHEN job ->> 'queue' ~ '[^A-Za-z0-9_.:-]' OR length(job ->> 'queue') NOT BETWEEN 1 AND 63 THEN
                format('is wrong: a queue name is 1 to 63 letters, digits or ''_.:-'', got %L', left(job ->> 'queue', 100))
            WHEN (job ->> 'priority')::numeric NOT BETWEEN 0 AND 9 THEN
                format('is wrong: priority must be from 0 to 9 (larger runs first), got %s', job ->> 'priority')
            WHEN jsonb_typeof(coalesce(job -> 'args', '[]')) NOT IN ('array', 'null')
                OR jsonb_typeof(coalesce(job -> 'kwargs', '{}')) NOT IN ('object', 'null')
                OR jsonb_typeof(coalesce(job -> 'headers', '{}')) NOT IN ('object', 'null') THEN
                'is wrong: args must be a JSON array, kwargs and headers JSON objects'
            WHEN NOT isfinite((job ->> 'eta')::timestamptz) OR NOT isfinite((job ->> 'expires_at')::timestamptz)
                OR (job ->> 'eta')::timestamptz >= '9999-01-01' OR (job ->> 'expires_at')::timestamptz >= '9999-01-01' THEN
                format('is wrong: eta and expires_at must be before the year 9999, got %L and %L', job ->> 'eta', job ->> 'expires_at')
            WHEN (job ->> 'max_retries')::numeric NOT BETWEEN -1 AND 2147483647 THEN
                format('is wrong: max_retries must be at least 0, or -1 for ever, got %s', job ->> 'max_retries')
            END AS wrong
            FROM jsonb_array_elements(enqueue_many.new_jobs) WITH ORDINALITY AS n(job, nth)) AS c
        WHERE c.wrong IS NOT NULL ORDER BY c.nth LIMIT 1;
        IF wrong IS NOT NULL THEN
            RAISE invalid_parameter_value USING MESSAGE = wrong;
        END IF;
    END IF;
    IF NOT enqueue_many.new_ids AND current_setting('transaction_isolation') <> 'read committed' THEN
        RAISE feature_not_supported USING
            MESSAGE = 'ids that may have been used need a READ COMMITTED transaction, this one is '
                || upper(current_setting('transaction_isolation'));
    END IF;
    -- In key order, so that two batches that share unique keys wait for each other instead of deadlocking.
    WITH new AS (
    INSERT INTO jobs (id, state, queue, task, args, kwargs, priority, eta, expires_at, max_retries, unique_key,
                      headers, enqueued_by)
    SELECT n.id, CASE WHEN n.eta > clock_timestamp() THEN 'scheduled' ELSE 'ready' END, coalesce(n.queue, 'default'),
           n.task, coalesce(n.args, '[]'), coalesce(n.kwargs, '{}'), coalesce(n.priority, 5), n.eta, n.expires_at,
           n.max_retries, n.unique_key, coalesce(n.headers, '{}'), session_user
    FROM ROWS FROM (jsonb_to_recordset(enqueue_many.new_jobs) AS (id uuid, queue text, task text, args jsonb,
        kwargs jsonb, priority smallint, eta timestamptz, expires_at timestamptz, max_retries integer,
        unique_key text, headers jsonb)) WITH ORDINALITY AS n(id, queue, task, args, kwargs, priority, eta, expires_at,
        max_retries, unique_key, headers, nth)
    ORDER BY n.task, n.unique_key, n.nth
    ON CONFLICT DO NOTHING
    RETURNING id) SELECT array_agg(id) INTO inserted FROM new;

    IF NOT enqueue_many.new_ids THEN
        DELETE FROM jobs j WHERE j.id = ANY (inserted)
          AND (EXISTS (SELECT FROM finished_jobs f WHERE f.id = j.id AND f.finished_at >= id_floor(j.id))
               OR EXISTS (SELECT FROM dead_letters d WHERE d.id = j.id));
    END IF;

    SELECT array_agg(DISTINCT coalesce(n.queue, 'default')) FILTER (WHERE n.eta IS NULL OR n.eta <= clock_timestamp()),
           min(n.eta) FILTER (WHERE n.eta > clock_timestamp())
    INTO wake_queues, wake_eta
    FROM jsonb_to_recordset(enqueue_many.new_jobs) AS n(queue text, eta timestamptz);
    IF wake_queues IS NOT NULL THEN
        PERFORM wake_workers(wake_queues);
    END IF;
    IF wake_eta IS NOT NULL THEN
        PERFORM wake_workers(array_agg(DISTINCT coalesce(n.queue, 'default')), wake_eta)
        FROM jsonb_to_recordset(enqueue_many.new_jobs) AS n(queue text, eta timestamptz);
    END IF;

    RETURN QUERY
    SELECT coalesce(
        (SELECT j.id FROM jobs j WHERE j.task = n.task AND j.unique_key = n.unique_key), n.id)
    FROM ROWS FROM (jsonb_to_recordset(enqueue_many.new_jobs) AS (id uuid, task text, unique_key text))
        WITH ORDINALITY AS n(id, task, unique_key, nth)
    ORDER BY n.nth;
END $$;
COMMENT ON FUNCTION {schema}.enqueue_many IS 'Enqueue a JSON array of jobs, each with an id; returns their ids in the same order';
"""

# History is partitioned by UTC day. A plain CREATE ... PARTITION OF would queue behind one long reader, and every
# ack behind it; LIKE + ATTACH with a short lock_timeout gives up instead and is tried again later.
PARTITION_FUNCTIONS = r"""
CREATE FUNCTION {schema}.make_partitions(days integer DEFAULT 14) RETURNS integer
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, {schema}, pg_temp SET timezone = 'UTC' SET lock_timeout = '200ms' AS $$
DECLARE
    parent    text;
    time_name text;
    day       date;
    child     text;
    made      integer := 0;
BEGIN
    IF days NOT BETWEEN 0 AND 1000 OR days IS NULL THEN
        RAISE invalid_parameter_value USING MESSAGE = format('days must be from 0 to 1000, got %L', days);
    END IF;
    FOR parent, time_name IN VALUES ('finished_jobs', 'finished_at'), ('failures', 'failed_at') LOOP
        FOR day IN SELECT generate_series(current_date - 1, current_date + days, interval '1 day')::date LOOP
            child := format('%s_p%s', parent, to_char(day, 'YYYYMMDD'));
            CONTINUE WHEN to_regclass('{schema}.' || child) IS NOT NULL;
            BEGIN
                EXECUTE format('CREATE TABLE {schema}.%I (LIKE {schema}.%I INCLUDING DEFAULTS INCLUDING CONSTRAINTS INCLUDING INDEXES)', child, parent);
                -- Locked before rows are moved: one that came in between would make ATTACH fail.
                EXECUTE format('LOCK TABLE {schema}.%I IN ACCESS EXCLUSIVE MODE', parent || '_default');
                EXECUTE format('WITH moved AS (DELETE FROM {schema}.%I WHERE %I >= %L AND %I < %L RETURNING *) INSERT INTO {schema}.%I SELECT * FROM moved',
                    parent || '_default', time_name, day::timestamptz, time_name, (day + 1)::timestamptz, child);
                EXECUTE format('ALTER TABLE {schema}.%I ATTACH PARTITION {schema}.%I FOR VALUES FROM (%L) TO (%L)',
                    parent, child, day::timestamptz, (day + 1)::timestamptz);
                made := made + 1;
            EXCEPTION WHEN lock_not_available OR duplicate_table OR unique_violation THEN
                NULL;  -- somebody reads, or another worker makes it; rows go to the default partition meanwhile
            END;
        END LOOP;
    END LOOP;
    RETURN made;
END $$;
COMMENT ON FUNCTION {schema}.make_partitions(integer) IS 'Make the history partitions from yesterday to so many days ahead; returns how many were made';

CREATE FUNCTION {schema}.drop_partitions(finished_age interval, failures_age interval) RETURNS integer
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, {schema}, pg_temp SET timezone = 'UTC' SET lock_timeout = '200ms' AS $$
DECLARE
    child   text;
    dropped integer := 0;
BEGIN
    -- A negative age would drop what is to come, and all there is.
    IF NOT (finished_age >= interval '0' AND failures_age >= interval '0') OR finished_age IS NULL OR failures_age IS NULL THEN
        RAISE invalid_parameter_value USING
            MESSAGE = format('finished_age and failures_age must be 0 or more, got %L and %L', finished_age, failures_age);
    END IF;
    FOR child IN
        SELECT c.relname FROM pg_inherits i JOIN pg_class c ON c.oid = i.inhrelid
        WHERE (i.inhparent = '{schema}.finished_jobs'::regclass AND c.relname ~ '^finished_jobs_p\d{8}$'
               AND to_date(right(c.relname, 8), 'YYYYMMDD') + 1 <= now() - finished_age)
           OR (i.inhparent = '{schema}.failures'::regclass AND c.relname ~ '^failures_p\d{8}$'
               AND to_date(right(c.relname, 8), 'YYYYMMDD') + 1 <= now() - failures_age)
        ORDER BY c.relname
    LOOP
        BEGIN
            EXECUTE format('DROP TABLE {schema}.%I', child);
            dropped := dropped + 1;
        EXCEPTION WHEN lock_not_available OR undefined_table THEN
            EXIT;  -- somebody reads it: the next pass tries again, acks must not wait for one after the other
        END;
    END LOOP;
    DELETE FROM finished_jobs_default WHERE finished_at <= now() - finished_age;
    DELETE FROM failures_default WHERE failed_at <= now() - failures_age;
    RETURN dropped;
END $$;
COMMENT ON FUNCTION {schema}.drop_partitions(interval, interval) IS 'Drop history partitions that ended longer ago than this; returns how many were dropped';
SELECT {schema}.make_partitions();
"""

VIEWS = r"""
CREATE VIEW {schema}.all_jobs AS
    SELECT id, state, queue, task, args, kwargs, priority, eta, attempt, retries, crashes, worker_id, enqueued_at,
           claimed_at AS started_at, NULL::timestamptz AS finished_at, NULL::jsonb AS result, NULL::text AS reason,
           NULL::text AS error_class, NULL::text AS error_message, NULL::text AS dead_letter_queue
    FROM {schema}.jobs
    UNION ALL
    SELECT id, state, queue, task, args, kwargs, priority, eta, attempt, retries, crashes, worker_id, enqueued_at,
           started_at, finished_at, result, NULL, NULL, NULL, NULL
    FROM {schema}.finished_jobs
    UNION ALL
    SELECT id, 'dead', queue, task, args, kwargs, priority, eta, attempt, retries, crashes, worker_id, enqueued_at,
           claimed_at, died_at, NULL, reason, error_class, error_message, dead_letter_queue
    FROM {schema}.dead_letters;
COMMENT ON VIEW {schema}.all_jobs IS 'Every job that is live, finished or dead, once';

CREATE VIEW {schema}.active_jobs AS
    SELECT j.id, j.queue, j.task, j.args, j.kwargs, j.priority, j.attempt, j.retries, j.worker_id,
           w.host, w.pid, j.claimed_at, now() - j.claimed_at AS claimed_for, j.id = ANY (w.running) AS active
    FROM {schema}.jobs j LEFT JOIN {schema}.workers w ON w.id = j.worker_id
    WHERE j.state = 'running';
COMMENT ON VIEW {schema}.active_jobs IS 'Claimed jobs; active: known to have been running for more than a second, else reserved';

-- A worker that lists no queues serves every one. A job is ready since it was enqueued or since its eta.
CREATE VIEW {schema}.queue_stats AS
    WITH live AS (
        SELECT queue, count(*) FILTER (WHERE state = 'ready') AS ready,
               count(*) FILTER (WHERE state = 'scheduled') AS scheduled,
               count(*) FILTER (WHERE state = 'running') AS running,
               min(greatest(enqueued_at, eta)) FILTER (WHERE state = 'ready') AS oldest_ready
        FROM {schema}.jobs GROUP BY queue
    ), dead AS (
        SELECT queue, count(*) AS dead FROM {schema}.dead_letters GROUP BY queue
    ), alive AS (
        SELECT queues FROM {schema}.workers WHERE NOT fenced AND heartbeat_at > now() - interval '1 minute'
    ), named AS (
        SELECT queue FROM live UNION SELECT queue FROM dead UNION SELECT unnest(queues) FROM alive
    )
    SELECT queue, coalesce(ready, 0) AS ready, coalesce(scheduled, 0) AS scheduled, coalesce(running, 0) AS running,
           coalesce(dead, 0) AS dead, oldest_ready,
           (SELECT count(*) FROM alive WHERE alive.queues = '{}' OR named.queue = ANY (alive.queues)) AS workers
    FROM named LEFT JOIN live USING (queue) LEFT JOIN dead USING (queue);
COMMENT ON VIEW {schema}.queue_stats IS 'Per queue: jobs by state, dead letters, the oldest ready job and the workers that serve it';
"""

PRIVILEGES = r"""
REVOKE ALL ON ALL FUNCTIONS IN SCHEMA {schema} FROM PUBLIC;
"""

# The install id is also the schema's comment: any role can read it, and asking for it cannot fail inside the
# caller's transaction when the schema is not there.
COMMENT = r"""
DO $$ BEGIN
    EXECUTE format('COMMENT ON SCHEMA {schema} IS %L', 'pgqueue ' || (SELECT install_id FROM {schema}.meta));
END $$;
"""

DOWNGRADE = r"""
DROP VIEW {schema}.queue_stats, {schema}.active_jobs, {schema}.all_jobs;
DROP FUNCTION {schema}.drop_partitions(interval, interval), {schema}.make_partitions(integer),
    {schema}.enqueue_many(jsonb, boolean), {schema}.wake_workers(text[], timestamptz), {schema}.id_floor(uuid);
DROP FUNCTION {schema}.enqueue(text, jsonb, jsonb, text, integer, timestamptz, timestamptz, uuid, text, jsonb, integer, boolean);
DROP FUNCTION {schema}.notify_is_stuck();
DROP FUNCTION {schema}.uuid7();
DROP TABLE {schema}.audit_log, {schema}.wake, {schema}.workers, {schema}.dead_letters, {schema}.failures,
    {schema}.finished_jobs, {schema}.jobs, {schema}.meta;
DROP SEQUENCE {schema}.jobs_position_seq;
"""


def _run(*scripts: str) -> None:
    """Run whole scripts: through the driver without parameters, or onto paper for `--sql`."""
    schema = context.config.attributes["schema"]
    for script in scripts:
        text = script.replace("{schema}", schema).replace("{channel}", schema)
        if context.is_offline_mode():
            context.get_context().impl.static_output(text)
        else:
            op.get_bind().execution_options(no_parameters=True).exec_driver_sql(text)


def upgrade() -> None:
    _run(TABLES, PRODUCER_FUNCTIONS, PARTITION_FUNCTIONS, VIEWS, PRIVILEGES, COMMENT)


def downgrade() -> None:
    _run(DOWNGRADE)
