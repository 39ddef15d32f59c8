"""Jobs can wait for other jobs: chains, groups and chords.

Online: two tables, functions, and triggers on `jobs` that fire for the jobs of a canvas only. The two CHECKs allow
one word more than before, so a large table is not read again: there they stay NOT VALID. Workers of older
releases run and end the jobs of a canvas like others; what waits for them is released by one of this release.

Revision ID: 0011
Revises: 0010
"""

from __future__ import annotations

from alembic import context, op

revision = "0011"
down_revision = "0010"
branch_labels = None
depends_on = None

CHECKS = r"""
ALTER TABLE {schema}.jobs DROP CONSTRAINT jobs_state_known;
ALTER TABLE {schema}.jobs ADD CONSTRAINT jobs_state_known CHECK (state IN ('blocked', 'scheduled', 'ready', 'running')) NOT VALID;
ALTER TABLE {schema}.dead_letters DROP CONSTRAINT dead_letters_reason_known;
ALTER TABLE {schema}.dead_letters ADD CONSTRAINT dead_letters_reason_known CHECK (reason IN ('not_retryable', 'retries_exhausted',
    'crashed', 'time_limit', 'rejected', 'unknown_task', 'bad_payload', 'member_failed')) NOT VALID;
DO $$
BEGIN
    IF pg_relation_size('{schema}.jobs') < 8 * 1024 * 1024 THEN
        ALTER TABLE {schema}.jobs VALIDATE CONSTRAINT jobs_state_known;
    END IF;
    IF pg_relation_size('{schema}.dead_letters') < 8 * 1024 * 1024 THEN
        ALTER TABLE {schema}.dead_letters VALIDATE CONSTRAINT dead_letters_reason_known;
    END IF;
END $$;
"""

TABLES = r"""
-- output: the node whose end and result are those of the whole.
CREATE TABLE {schema}.canvases (
    id          uuid PRIMARY KEY,
    output      uuid NOT NULL,
    jobs        integer NOT NULL,
    enqueued_at timestamptz NOT NULL DEFAULT clock_timestamp(),
    enqueued_by text NOT NULL DEFAULT session_user,
    ended_at    timestamptz
) WITH (fillfactor = 70);
CREATE INDEX canvases_ended ON {schema}.canvases (ended_at) WHERE ended_at IS NOT NULL;
CREATE INDEX canvases_enqueued ON {schema}.canvases (enqueued_at);

-- One row per job, with the id of the job, and per join: what ends when all its members have ended. Members end each in a row
-- of its own, so ten thousand of them never wait for each other.
-- nth: the order of nodes in the canvas, and so of the members of a join. after: the node whose success releases the job.
-- member_of: the join that waits for it. takes_result: what `after` gives is put in front of the args. keeps_result: somebody
-- wants the result. skips_failed: the join leaves out members that did not succeed. countdown, expires_in: seconds from the
-- release on. on_error: jobs to enqueue when it has failed. cause: the job that is at fault. released: nothing is left to do
-- for it when `after` succeeds. passed_on: what waits for it has been told of its end.
CREATE TABLE {schema}.canvas_nodes (
    id                uuid PRIMARY KEY,
    canvas_id         uuid NOT NULL,
    nth               integer NOT NULL,
    is_join           boolean NOT NULL DEFAULT false,
    after             uuid,
    member_of         uuid,
    takes_result      boolean NOT NULL DEFAULT false,
    keeps_result      boolean NOT NULL DEFAULT false,
    skips_failed      boolean NOT NULL DEFAULT false,
    countdown         float8,
    expires_in        float8,
    dead_letter_queue text COLLATE "C",
    on_error          jsonb,
    state             text COLLATE "C",
    cause             uuid,
    error             text,
    released          boolean NOT NULL DEFAULT false,
    passed_on         boolean NOT NULL DEFAULT false,
    result            jsonb,
    CONSTRAINT canvas_nodes_state_known CHECK (state IN ('succeeded', 'cancelled', 'expired', 'dead'))
) WITH (
    fillfactor = 70,
    autovacuum_vacuum_threshold = 2000, autovacuum_vacuum_scale_factor = 0,
    autovacuum_vacuum_cost_delay = 0, vacuum_truncate = off
);
CREATE INDEX canvas_nodes_canvas ON {schema}.canvas_nodes (canvas_id, nth);
CREATE INDEX canvas_nodes_waiting ON {schema}.canvas_nodes (after, nth) WHERE NOT released AND after IS NOT NULL;
CREATE INDEX canvas_nodes_members ON {schema}.canvas_nodes (member_of, nth) WHERE member_of IS NOT NULL;
CREATE INDEX canvas_nodes_open ON {schema}.canvas_nodes (member_of, nth) WHERE state IS NULL AND member_of IS NOT NULL;
CREATE INDEX canvas_nodes_ended ON {schema}.canvas_nodes (id) WHERE state IS NOT NULL AND NOT passed_on;
"""

# A job ends in the statement that deletes its row, whichever that is: of this release or an older one, cancel() or a
# person's DELETE. AFTER triggers see all that the statement did, so the end is in finished_jobs or dead_letters by then.
# Only the job's own node is written here. Whether a join is complete cannot be known in this transaction: of two members
# that end at the same time neither sees the other. So settle_canvases looks after the commit, and of those who look the
# one who comes for the last member to commit sees all of them.
ENDS = r"""
CREATE FUNCTION {schema}.end_canvas_node() RETURNS trigger
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, {schema}, pg_temp AS $$
DECLARE
    ended record;
BEGIN
    -- An ack says when a job finished, which may be long ago; nearly always it was just now, in one or two partitions.
    SELECT f.state, f.result, f.result_error AS error INTO ended FROM finished_jobs f
    WHERE f.id = OLD.id AND f.finished_at BETWEEN now() - interval '1 hour' AND now() + interval '1 hour';
    IF NOT FOUND THEN
        SELECT f.state, f.result, f.result_error AS error INTO ended FROM finished_jobs f
        WHERE f.id = OLD.id AND f.finished_at >= id_floor(OLD.id);
    END IF;
    IF NOT FOUND THEN
        SELECT 'dead' AS state, NULL::jsonb AS result, NULL::text AS error INTO ended FROM dead_letters d WHERE d.id = OLD.id;
    END IF;
    IF NOT FOUND THEN
        SELECT 'cancelled' AS state, NULL::jsonb AS result,
               'it was deleted, or its task keeps no history and a worker of an older release ran it' AS error INTO ended;
    END IF;
    UPDATE canvas_nodes n
    SET state = ended.state, passed_on = false, result = CASE WHEN n.keeps_result THEN ended.result END,
        error = CASE WHEN n.keeps_result OR ended.state <> 'succeeded' THEN ended.error END,
        cause = CASE WHEN ended.state <> 'succeeded' OR n.keeps_result AND ended.error IS NOT NULL THEN n.id END
    WHERE n.id = OLD.id;
    RETURN NULL;
END $$;
COMMENT ON FUNCTION {schema}.end_canvas_node IS 'Trigger: a job of a canvas has left jobs, note how';
CREATE TRIGGER jobs_end_canvas_node AFTER DELETE ON {schema}.jobs FOR EACH ROW
    WHEN (OLD.headers -> 'pgqueue' ? 'canvas') EXECUTE FUNCTION {schema}.end_canvas_node();

CREATE FUNCTION {schema}.reopen_canvas_node() RETURNS trigger
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, {schema}, pg_temp AS $$
DECLARE
    opened uuid[] := ARRAY[NEW.id];
BEGIN
    -- With it comes back what could not run because of it, step by step, to wait again.
    WHILE opened <> '{}' LOOP
        WITH back AS (
            DELETE FROM dead_letters l WHERE l.id = ANY (opened) AND l.id <> NEW.id AND l.reason = 'member_failed' RETURNING l.*
        )
        INSERT INTO jobs (id, state, queue, task, args, kwargs, priority, eta, expires_at, max_retries, enqueued_at, enqueued_by, headers)
        SELECT b.id, 'blocked', b.queue, b.task, b.args, b.kwargs, b.priority, b.eta, b.expires_at, b.max_retries, b.enqueued_at,
               b.enqueued_by, b.headers
        FROM back b ORDER BY b.id;
        UPDATE canvas_nodes n SET state = NULL, cause = NULL, error = NULL, result = NULL, passed_on = false WHERE n.id = ANY (opened);
        UPDATE canvases c SET ended_at = NULL FROM canvas_nodes n
        WHERE n.id = NEW.id AND c.id = n.canvas_id AND c.output = ANY (opened);
        opened := ARRAY(SELECT d.id FROM canvas_nodes d JOIN dead_letters l ON l.id = d.id
                        WHERE d.after = ANY (opened) AND NOT d.released AND d.state = 'dead' AND l.reason = 'member_failed')
               || ARRAY(SELECT DISTINCT j.id FROM canvas_nodes n JOIN canvas_nodes j ON j.id = n.member_of
                        WHERE n.id = ANY (opened) AND j.state IN ('dead', 'cancelled'));
    END LOOP;
    RETURN NULL;
END $$;
COMMENT ON FUNCTION {schema}.reopen_canvas_node IS 'Trigger: a dead letter of a canvas is a job again, and what waits for it waits again';
CREATE TRIGGER jobs_reopen_canvas_node AFTER INSERT ON {schema}.jobs FOR EACH ROW
    WHEN (NEW.attempt > 0 AND NEW.headers -> 'pgqueue' ? 'canvas') EXECUTE FUNCTION {schema}.reopen_canvas_node();
"""

ENQUEUE = r"""
CREATE FUNCTION {schema}.enqueue_canvas(canvas_id uuid, output uuid, jobs integer) RETURNS boolean
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, {schema}, pg_temp AS $$
#variable_conflict use_column
BEGIN
    INSERT INTO canvases (id, output, jobs, enqueued_by)
    VALUES (enqueue_canvas.canvas_id, enqueue_canvas.output, enqueue_canvas.jobs, session_user)
    ON CONFLICT DO NOTHING;
    RETURN FOUND;
END $$;
COMMENT ON FUNCTION {schema}.enqueue_canvas IS 'For the library: begin a canvas in the caller''s transaction; false: it is there already, with all its jobs';

CREATE FUNCTION {schema}.enqueue_canvas_nodes(canvas_id uuid, nodes jsonb) RETURNS void
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, {schema}, pg_temp AS $$
#variable_conflict use_column
DECLARE
    wake_queues text[];
    wake_eta    timestamptz;
BEGIN
    IF NOT EXISTS (SELECT FROM canvases c WHERE c.id = enqueue_canvas_nodes.canvas_id AND c.xmin = pg_current_xact_id()::xid) THEN
        RAISE object_not_in_prerequisite_state USING
            MESSAGE = format('canvas %s was not begun in this transaction', enqueue_canvas_nodes.canvas_id);
    END IF;
    INSERT INTO canvas_nodes (id, canvas_id, nth, is_join, after, member_of, takes_result, keeps_result, skips_failed, countdown,
                              expires_in, dead_letter_queue, on_error)
    SELECT n.id, enqueue_canvas_nodes.canvas_id, n.nth, n.task IS NULL, n.after, n.member_of, coalesce(n.takes_result, false),
           coalesce(n.keeps_result, false), coalesce(n.skips_failed, false), n.countdown, n.expires_in, n.dead_letter_queue, n.on_error
    FROM jsonb_to_recordset(enqueue_canvas_nodes.nodes) AS n(id uuid, nth integer, task text, after uuid, member_of uuid,
        takes_result boolean, keeps_result boolean, skips_failed boolean, countdown float8, expires_in float8,
        dead_letter_queue text, on_error jsonb);
    INSERT INTO jobs (id, state, queue, task, args, kwargs, priority, eta, expires_at, max_retries, headers, enqueued_by)
    SELECT n.id, CASE WHEN n.after IS NOT NULL THEN 'blocked' WHEN n.eta > clock_timestamp() THEN 'scheduled' ELSE 'ready' END,
           n.queue, n.task, n.args, n.kwargs, n.priority, n.eta, n.expires_at, n.max_retries, n.headers, session_user
    FROM jsonb_to_recordset(enqueue_canvas_nodes.nodes) AS n(id uuid, nth integer, after uuid, queue text, task text, args jsonb,
        kwargs jsonb, priority smallint, eta timestamptz, expires_at timestamptz, max_retries integer, headers jsonb)
    WHERE n.task IS NOT NULL
    ORDER BY n.nth;
    SELECT array_agg(DISTINCT n.queue) FILTER (WHERE n.eta IS NULL OR n.eta <= clock_timestamp()),
           min(n.eta) FILTER (WHERE n.eta > clock_timestamp())
    INTO wake_queues, wake_eta
    FROM jsonb_to_recordset(enqueue_canvas_nodes.nodes) AS n(queue text, after uuid, eta timestamptz)
    WHERE n.after IS NULL AND n.queue IS NOT NULL;
    IF wake_queues IS NOT NULL THEN
        PERFORM wake_workers(wake_queues);
    END IF;
    IF wake_eta IS NOT NULL THEN
        PERFORM wake_workers(array_agg(DISTINCT n.queue), wake_eta)
        FROM jsonb_to_recordset(enqueue_canvas_nodes.nodes) AS n(queue text, after uuid, eta timestamptz)
        WHERE n.after IS NULL AND n.eta > clock_timestamp();
    END IF;
END $$;
COMMENT ON FUNCTION {schema}.enqueue_canvas_nodes IS 'For the library: add jobs and joins to a canvas that this transaction has begun';
"""

# Workers switch sorts off for their own statements; here one would then be done by walking over a whole index.
SETTLE = r"""
CREATE FUNCTION {schema}.canvas_value(node_id uuid) RETURNS jsonb
LANGUAGE plpgsql STABLE SECURITY DEFINER SET search_path = pg_catalog, {schema}, pg_temp AS $$
DECLARE
    node canvas_nodes;
BEGIN
    SELECT n.* INTO node FROM canvas_nodes n WHERE n.id = canvas_value.node_id;
    IF NOT node.is_join THEN
        RETURN coalesce(node.result, 'null');
    END IF;
    RETURN (SELECT coalesce(jsonb_agg(CASE WHEN m.is_join THEN canvas_value(m.id) ELSE coalesce(m.result, 'null') END ORDER BY m.nth)
                            FILTER (WHERE m.state = 'succeeded' AND m.error IS NULL), '[]')
            FROM canvas_nodes m WHERE m.member_of = node.id);
END $$;
COMMENT ON FUNCTION {schema}.canvas_value IS 'What a node that has succeeded gives: the result of its job, or the list of those of its members';

CREATE FUNCTION {schema}.canvas_state(output uuid) RETURNS text
LANGUAGE sql STABLE SECURITY DEFINER SET search_path = pg_catalog, {schema}, pg_temp AS $$
    SELECT coalesce(o.state, CASE
        WHEN EXISTS (SELECT FROM canvas_nodes n WHERE n.canvas_id = o.canvas_id AND n.state IS NOT NULL)
          OR EXISTS (SELECT FROM canvas_nodes n JOIN jobs j ON j.id = n.id WHERE n.canvas_id = o.canvas_id AND j.state = 'running') THEN 'running'
        WHEN EXISTS (SELECT FROM canvas_nodes n JOIN jobs j ON j.id = n.id WHERE n.canvas_id = o.canvas_id AND j.state = 'ready') THEN 'ready'
        ELSE 'scheduled' END)
    FROM canvas_nodes o WHERE o.id = canvas_state.output
$$;
COMMENT ON FUNCTION {schema}.canvas_state IS 'The state of the canvas with this output: how it has ended, or scheduled, ready or running';

CREATE FUNCTION {schema}.canvas_fault(node {schema}.canvas_nodes) RETURNS text
LANGUAGE plpgsql STABLE SECURITY DEFINER SET search_path = pg_catalog, {schema}, pg_temp AS $$
DECLARE
    total  bigint := 1;
    failed bigint := 1;
    fault  text;
BEGIN
    IF node.is_join THEN
        SELECT count(*), count(*) FILTER (WHERE m.state <> 'succeeded' OR m.error IS NOT NULL) INTO total, failed
        FROM canvas_nodes m WHERE m.member_of = node.id;
    END IF;
    SELECT format('job %s of %s %s', d.id, d.task, CASE WHEN d.reason = 'member_failed' THEN 'did not run' ELSE 'is dead: ' || d.reason END)
    INTO fault FROM dead_letters d WHERE d.id = node.cause;
    IF NOT FOUND THEN
        SELECT format('job %s %s', n.id, CASE WHEN n.state = 'succeeded' THEN 'succeeded without a result: ' || n.error
                                              WHEN n.state = 'expired' THEN 'expired'
                                              ELSE coalesce('was cancelled: ' || n.error, 'was cancelled') END)
        INTO fault FROM canvas_nodes n WHERE n.id = node.cause;
    END IF;
    IF total > 1 THEN
        RETURN format('%s of the %s members that it waits for did not succeed; the first: %s', failed, total, fault);
    END IF;
    RETURN 'what it waits for did not succeed: ' || fault;
END $$;
COMMENT ON FUNCTION {schema}.canvas_fault IS 'Why what waits for this node cannot run';

CREATE FUNCTION {schema}.release_canvas_jobs(node {schema}.canvas_nodes) RETURNS integer
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, {schema}, pg_temp
SET enable_sort = on SET enable_seqscan = off SET enable_hashjoin = off SET enable_mergejoin = off AS $$
DECLARE
    chosen uuid[];
    value  jsonb;
    queues text[];
    later  timestamptz;
BEGIN
    chosen := ARRAY(SELECT d.id FROM canvas_nodes d WHERE d.after = node.id AND NOT d.released ORDER BY d.nth LIMIT 1000);
    IF chosen = '{}' THEN
        RETURN 0;
    END IF;
    IF EXISTS (SELECT FROM canvas_nodes d WHERE d.id = ANY (chosen) AND d.takes_result) THEN
        value := jsonb_build_array(canvas_value(node.id));
    END IF;
    -- What was buried because this node had failed, while somebody requeued the job at fault, comes back first.
    WITH back AS (
        DELETE FROM dead_letters l WHERE l.id = ANY (chosen) AND l.reason = 'member_failed' RETURNING l.*
    )
    INSERT INTO jobs (id, state, queue, task, args, kwargs, priority, eta, expires_at, max_retries, enqueued_at, enqueued_by, headers)
    SELECT b.id, 'blocked', b.queue, b.task, b.args, b.kwargs, b.priority, b.eta, b.expires_at, b.max_retries, b.enqueued_at,
           b.enqueued_by, b.headers
    FROM back b ORDER BY b.id;
    UPDATE canvas_nodes d SET state = NULL, cause = NULL, error = NULL, passed_on = false
    WHERE d.id = ANY (chosen) AND d.state IS NOT NULL AND EXISTS (SELECT FROM jobs j WHERE j.id = d.id AND j.state = 'blocked');
    WITH placed AS MATERIALIZED (
        SELECT d.id, d.takes_result, d.countdown, d.expires_in, nextval('{schema}.jobs_position_seq') AS position
        FROM (SELECT * FROM canvas_nodes d WHERE d.id = ANY (chosen) ORDER BY d.nth) AS d
    ), freed AS (
        UPDATE jobs j
        SET eta = greatest(j.eta, clock_timestamp()) + coalesce(p.countdown, 0) * interval '1 second',
            expires_at = coalesce(clock_timestamp() + p.expires_in * interval '1 second', j.expires_at),
            state = CASE WHEN p.countdown > 0 OR j.eta > clock_timestamp() THEN 'scheduled' ELSE 'ready' END,
            position = p.position, args = CASE WHEN p.takes_result THEN value || j.args ELSE j.args END
        FROM placed p WHERE j.id = p.id AND j.state = 'blocked'
        RETURNING j.queue, j.state, j.eta
    )
    SELECT array_agg(DISTINCT f.queue), min(f.eta) FILTER (WHERE f.state = 'scheduled') INTO queues, later FROM freed f;
    UPDATE canvas_nodes d SET released = true WHERE d.id = ANY (chosen);
    UPDATE canvases c SET ended_at = NULL WHERE c.id = node.canvas_id AND c.output = ANY (chosen) AND c.ended_at IS NOT NULL;
    IF queues IS NOT NULL THEN
        PERFORM wake_workers(queues);
    END IF;
    IF later IS NOT NULL THEN
        PERFORM wake_workers(queues, later);
    END IF;
    RETURN cardinality(chosen);
END $$;
COMMENT ON FUNCTION {schema}.release_canvas_jobs IS 'Release up to a thousand jobs that wait for this node, which has succeeded';

CREATE FUNCTION {schema}.bury_canvas_jobs(node {schema}.canvas_nodes, reason text, fault text) RETURNS integer
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, {schema}, pg_temp
SET enable_sort = on SET enable_seqscan = off SET enable_hashjoin = off SET enable_mergejoin = off AS $$
#variable_conflict use_column
DECLARE
    chosen uuid[];
BEGIN
    chosen := ARRAY(SELECT d.id FROM canvas_nodes d WHERE d.after = bury_canvas_jobs.node.id AND NOT d.released AND d.state IS NULL
                      AND (bury_canvas_jobs.reason = 'member_failed' OR d.takes_result)
                    ORDER BY d.nth LIMIT 1000);
    IF chosen = '{}' THEN
        RETURN 0;
    END IF;
    WITH gone AS (
        DELETE FROM jobs j WHERE j.id = ANY (chosen) AND j.state = 'blocked' RETURNING j.*
    )
    INSERT INTO dead_letters (id, queue, task, args, kwargs, priority, eta, expires_at, attempt, retries, max_retries, crashes, rescues,
        enqueued_at, enqueued_by, headers, dead_letter_queue, reason, error_class, error_message)
    SELECT g.id, g.queue, g.task, g.args, g.kwargs, g.priority, g.eta, g.expires_at, g.attempt, g.retries, g.max_retries, g.crashes,
           g.rescues, g.enqueued_at, g.enqueued_by, g.headers, coalesce(d.dead_letter_queue, g.queue), bury_canvas_jobs.reason,
           'MemberFailed', bury_canvas_jobs.fault
    FROM gone g JOIN canvas_nodes d ON d.id = g.id;
    UPDATE canvas_nodes d
    SET cause = CASE WHEN bury_canvas_jobs.reason = 'member_failed' THEN bury_canvas_jobs.node.cause ELSE d.id END,
        released = bury_canvas_jobs.reason <> 'member_failed'
    WHERE d.id = ANY (chosen) AND d.state = 'dead';
    -- One that has gone without a trace: somebody took it away behind the back of the triggers.
    UPDATE canvas_nodes d SET state = 'cancelled', cause = d.id, error = 'it was deleted', released = true, passed_on = false
    WHERE d.id = ANY (chosen) AND d.state IS NULL;
    RETURN cardinality(chosen);
END $$;
COMMENT ON FUNCTION {schema}.bury_canvas_jobs IS 'Bury up to a thousand jobs that wait for this node, which has failed; those of reason member_failed come back when it succeeds after all';

CREATE FUNCTION {schema}.enqueue_error_jobs(node {schema}.canvas_nodes) RETURNS void
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, {schema}, pg_temp AS $$
#variable_conflict use_column
DECLARE
    queues text[];
    later  timestamptz;
BEGIN
    WITH wanted AS (
        SELECT t.*, greatest(t.eta, clock_timestamp() + t.countdown * interval '1 second') AS due
        FROM jsonb_to_recordset(enqueue_error_jobs.node.on_error) AS t(queue text, task text, args jsonb, kwargs jsonb, priority smallint,
            eta timestamptz, countdown float8, expires_at timestamptz, expires_in float8, max_retries integer, headers jsonb,
            takes_result boolean, own boolean)
        -- Of the job itself: not for what it waited for.
        WHERE NOT t.own OR enqueue_error_jobs.node.cause = enqueue_error_jobs.node.id
    ), new AS (
        INSERT INTO jobs (id, state, queue, task, args, kwargs, priority, eta, expires_at, max_retries, headers)
        SELECT uuid7(), CASE WHEN w.due > clock_timestamp() THEN 'scheduled' ELSE 'ready' END, w.queue, w.task,
               CASE WHEN w.takes_result THEN jsonb_build_array(enqueue_error_jobs.node.cause) || w.args ELSE w.args END, w.kwargs, w.priority,
               w.due, coalesce(w.expires_at, clock_timestamp() + w.expires_in * interval '1 second'), w.max_retries, w.headers
        FROM wanted w
        RETURNING queue, state, eta
    )
    SELECT array_agg(DISTINCT n.queue), min(n.eta) FILTER (WHERE n.state = 'scheduled') INTO queues, later FROM new n;
    IF queues IS NOT NULL THEN
        PERFORM wake_workers(queues);
    END IF;
    IF later IS NOT NULL THEN
        PERFORM wake_workers(queues, later);
    END IF;
END $$;
COMMENT ON FUNCTION {schema}.enqueue_error_jobs IS 'Enqueue what is to run because this node has failed';

CREATE FUNCTION {schema}.settle_canvases(node_ids uuid[] DEFAULT NULL) RETURNS TABLE (released integer, left_over uuid[])
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, {schema}, pg_temp SET enable_sort = on SET enable_seqscan = off AS $$
#variable_conflict use_column
DECLARE
    next    uuid[] := settle_canvases.node_ids;
    ended   uuid[];
    large   uuid[] := '{}';
    node    canvas_nodes;
    joined  uuid;
    verdict text;
    fault   uuid;
    handled integer;
BEGIN
    released := 0;
    FOR round IN 1..100 LOOP
        IF next IS NULL THEN
            ended := ARRAY(SELECT n.id FROM canvas_nodes n WHERE n.state IS NOT NULL AND NOT n.passed_on
                           ORDER BY n.id LIMIT 1000 FOR UPDATE SKIP LOCKED);
        ELSE
            ended := ARRAY(SELECT n.id FROM canvas_nodes n WHERE n.id = ANY (next) AND n.state IS NOT NULL AND NOT n.passed_on
                           ORDER BY n.id FOR UPDATE SKIP LOCKED);
        END IF;
        next := '{}';
        EXIT WHEN ended = '{}';

        -- First what waits for one of them alone: the next step of a chain, the callback of a chord.
        FOR node IN
            SELECT n.* FROM canvas_nodes n
            WHERE n.id = ANY (ended) AND (n.on_error IS NOT NULL
                  OR EXISTS (SELECT FROM canvas_nodes d WHERE d.after = n.id AND NOT d.released))
            ORDER BY n.canvas_id, n.nth
        LOOP
            -- Whoever cancels the canvas locks its jobs in another order.
            PERFORM pg_advisory_xact_lock_shared(hashtextextended('pgqueue canvas ' || node.canvas_id, 0));
            IF node.state <> 'succeeded' THEN
                handled := bury_canvas_jobs(node, 'member_failed', canvas_fault(node));
                next := next || ARRAY(SELECT d.id FROM canvas_nodes d WHERE d.after = node.id AND NOT d.released);
            ELSE
                handled := 0;
                IF node.error IS NOT NULL THEN
                    handled := bury_canvas_jobs(node, 'bad_payload', canvas_fault(node));
                END IF;
                BEGIN
                    handled := handled + release_canvas_jobs(node);
                    released := released + handled;
                EXCEPTION WHEN program_limit_exceeded OR check_violation OR data_exception THEN
                    handled := 1000 + bury_canvas_jobs(node, 'bad_payload',
                        left('the results of what it waits for do not fit into its arguments: ' || SQLERRM, 1000));
                END;
                next := next || ARRAY(SELECT d.id FROM canvas_nodes d WHERE d.after = node.id AND d.state = 'dead' AND NOT d.passed_on);
            END IF;
            IF handled >= 1000 THEN
                large := large || node.id;
                ended := array_remove(ended, node.id);
            ELSIF node.state IN ('dead', 'expired') AND node.on_error IS NOT NULL THEN
                PERFORM enqueue_error_jobs(node);
                released := released + 1;
            END IF;
        END LOOP;

        UPDATE canvas_nodes n SET passed_on = true WHERE n.id = ANY (ended);
        UPDATE canvases c SET ended_at = clock_timestamp()
        FROM (SELECT DISTINCT n.canvas_id AS id FROM canvas_nodes n WHERE n.id = ANY (ended)) AS theirs
        WHERE c.id = theirs.id AND c.output = ANY (ended);

        -- Then the joins that they are members of. An open member is looked for from the end: jobs end about in order.
        FOR joined IN
            SELECT DISTINCT n.member_of FROM canvas_nodes n WHERE n.id = ANY (ended) AND n.member_of IS NOT NULL ORDER BY 1
        LOOP
            CONTINUE WHEN EXISTS (SELECT FROM canvas_nodes m WHERE m.member_of = joined AND m.state IS NULL ORDER BY m.nth DESC LIMIT 1);
            SELECT n.* INTO node FROM canvas_nodes n WHERE n.id = joined;
            SELECT CASE WHEN node.skips_failed OR count(*) = 0 THEN 'succeeded'
                        WHEN bool_and(m.state = 'cancelled') THEN 'cancelled' ELSE 'dead' END,
                   (array_agg(coalesce(m.cause, m.id) ORDER BY m.nth))[1]
            INTO verdict, fault
            FROM canvas_nodes m WHERE m.member_of = joined AND (m.state <> 'succeeded' OR m.error IS NOT NULL);
            UPDATE canvas_nodes n
            SET state = verdict, cause = CASE verdict WHEN 'succeeded' THEN NULL ELSE fault END, passed_on = false
            WHERE n.id = joined AND n.state IS DISTINCT FROM verdict;
            IF FOUND THEN
                next := next || joined;
            END IF;
        END LOOP;
        EXIT WHEN next = '{}';
    END LOOP;
    left_over := large || coalesce(next, '{}');
    RETURN NEXT;
END $$;
COMMENT ON FUNCTION {schema}.settle_canvases IS
    'Pass on the ends of these nodes, or of all that have not been: release or bury what waits for them; call it again with what is left over';
"""

CANCEL = r"""
CREATE OR REPLACE FUNCTION {schema}.cancel(job_id uuid, reason text DEFAULT NULL, actor text DEFAULT NULL) RETURNS text
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, {schema}, pg_temp AS $$
#variable_conflict use_column
DECLARE
    which  text;
    was    text;
    answer text := 'too_late';
BEGIN
    -- It may start, or be given back, between the two statements: then look again.
    FOR round IN 1..3 LOOP
        WITH gone AS (
            DELETE FROM jobs j WHERE j.id = cancel.job_id AND j.state IN ('blocked', 'scheduled', 'ready') RETURNING j.*
        ), kept AS (
            INSERT INTO finished_jobs (id, state, queue, task, args, kwargs, priority, eta, expires_at, attempt, retries,
                crashes, rescues, worker_id, enqueued_at, enqueued_by, claimed_at, unique_key, headers)
            SELECT id, 'cancelled', queue, task, args, kwargs, priority, eta, expires_at, attempt, retries,
                crashes, rescues, worker_id, enqueued_at, enqueued_by, claimed_at, unique_key, headers
            FROM gone
        )
        SELECT queue, state INTO which, was FROM gone;
        IF FOUND THEN
            answer := 'cancelled';
            EXIT;
        END IF;
        UPDATE jobs j SET cancel_requested_at = coalesce(j.cancel_requested_at, clock_timestamp())
        WHERE j.id = cancel.job_id AND j.state = 'running'
        RETURNING j.queue, j.state INTO which, was;
        IF FOUND THEN
            answer := 'requested';
            EXIT;
        END IF;
        EXIT WHEN NOT EXISTS (SELECT FROM jobs j WHERE j.id = cancel.job_id);
    END LOOP;
    IF answer <> 'too_late' THEN
        INSERT INTO audit_log (action, job_id, queue, reason, details)
        VALUES ('cancel', cancel.job_id, which, cancel.reason, jsonb_strip_nulls(jsonb_build_object('by', cancel.actor,
            'answer', answer, 'before', jsonb_build_object('state', was),
            'after', jsonb_build_object('state', CASE answer WHEN 'cancelled' THEN answer ELSE was END))));
    END IF;
    IF answer = 'requested' AND pg_notification_queue_usage() < 0.5 AND NOT notify_is_stuck() THEN
        PERFORM pg_notify('{schema}_control', cancel.job_id::text);
    END IF;
    RETURN answer;
END $$;

CREATE FUNCTION {schema}.cancel_canvas(canvas_id uuid, reason text DEFAULT NULL, actor text DEFAULT NULL)
RETURNS TABLE (answer text, cancelled integer, requested integer)
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, {schema}, pg_temp SET enable_sort = on SET enable_seqscan = off AS $$
#variable_conflict use_column
DECLARE
    told     uuid[];
    affected integer;
BEGIN
    cancelled := 0;
    requested := 0;
    -- Nobody releases anything of it meanwhile, so that what is blocked now stays so.
    PERFORM pg_advisory_xact_lock(hashtextextended('pgqueue canvas ' || cancel_canvas.canvas_id, 0));
    -- Jobs that somebody is just claiming, acking or promoting are passed over, and looked for again.
    FOR round IN 1..50 LOOP
        WITH picked AS MATERIALIZED (
            SELECT j.id FROM canvas_nodes n JOIN jobs j ON j.id = n.id
            WHERE n.canvas_id = cancel_canvas.canvas_id AND j.state IN ('blocked', 'scheduled', 'ready')
            ORDER BY j.id FOR UPDATE OF j SKIP LOCKED
        ), gone AS (
            DELETE FROM jobs j WHERE j.id = ANY (ARRAY(SELECT p.id FROM picked p)) RETURNING j.*
        ), kept AS (
            INSERT INTO finished_jobs (id, state, queue, task, args, kwargs, priority, eta, expires_at, attempt, retries,
                crashes, rescues, worker_id, enqueued_at, enqueued_by, claimed_at, unique_key, headers)
            SELECT g.id, 'cancelled', g.queue, g.task, g.args, g.kwargs, g.priority, g.eta, g.expires_at, g.attempt, g.retries,
                g.crashes, g.rescues, g.worker_id, g.enqueued_at, g.enqueued_by, g.claimed_at, g.unique_key, g.headers
            FROM gone g
        )
        INSERT INTO audit_log (action, job_id, queue, reason, details)
        SELECT 'cancel', g.id, g.queue, cancel_canvas.reason, jsonb_strip_nulls(jsonb_build_object('by', cancel_canvas.actor,
               'canvas', cancel_canvas.canvas_id, 'answer', 'cancelled', 'before', jsonb_build_object('state', g.state),
               'after', '{"state": "cancelled"}'::jsonb))
        FROM gone g ORDER BY g.id;
        GET DIAGNOSTICS affected = ROW_COUNT;
        cancelled := cancelled + affected;
        WITH picked AS MATERIALIZED (
            SELECT j.id FROM canvas_nodes n JOIN jobs j ON j.id = n.id
            WHERE n.canvas_id = cancel_canvas.canvas_id AND j.state = 'running' AND j.cancel_requested_at IS NULL
            ORDER BY j.id FOR UPDATE OF j SKIP LOCKED
        ), asked AS (
            UPDATE jobs j SET cancel_requested_at = clock_timestamp()
            WHERE j.id = ANY (ARRAY(SELECT p.id FROM picked p)) RETURNING j.id, j.queue
        ), noted AS (
            INSERT INTO audit_log (action, job_id, queue, reason, details)
            SELECT 'cancel', a.id, a.queue, cancel_canvas.reason, jsonb_strip_nulls(jsonb_build_object('by', cancel_canvas.actor,
                   'canvas', cancel_canvas.canvas_id, 'answer', 'requested', 'before', '{"state": "running"}'::jsonb,
                   'after', '{"state": "running"}'::jsonb))
            FROM asked a ORDER BY a.id
        )
        SELECT array_agg(a.id) INTO told FROM asked a;
        requested := requested + coalesce(cardinality(told), 0);
        IF told IS NOT NULL AND pg_notification_queue_usage() < 0.5 AND NOT notify_is_stuck() THEN
            PERFORM pg_notify('{schema}_control', each::text) FROM unnest(told) AS each;
        END IF;
        EXIT WHEN NOT EXISTS (
            SELECT FROM canvas_nodes n JOIN jobs j ON j.id = n.id
            WHERE n.canvas_id = cancel_canvas.canvas_id AND (j.state <> 'running' OR j.cancel_requested_at IS NULL));
        PERFORM pg_sleep(0.01);
    END LOOP;
    answer := CASE WHEN requested > 0 THEN 'requested' WHEN cancelled > 0 THEN 'cancelled' ELSE 'too_late' END;
    RETURN NEXT;
END $$;
COMMENT ON FUNCTION {schema}.cancel_canvas IS
    'Cancel what is left of a canvas: cancelled (all of it waited), requested (some runs, and is told), or too_late (there is nothing left)';

CREATE OR REPLACE FUNCTION {schema}.requeue(job_ids uuid[], reason text DEFAULT NULL, actor text DEFAULT NULL)
RETURNS TABLE (id uuid, requeued boolean)
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, {schema}, pg_temp AS $$
#variable_conflict use_column
DECLARE
    gripped uuid[];
    moved   uuid[];
    queues  text[];
BEGIN
    gripped := ARRAY(SELECT d.id FROM dead_letters d WHERE d.id = ANY (requeue.job_ids) ORDER BY d.id FOR UPDATE SKIP LOCKED);
    WITH placed AS MATERIALIZED (
        SELECT *, nextval('{schema}.jobs_position_seq') AS position
        -- What could not run comes back by itself when what it waits for has succeeded; before, it lacks results.
        FROM (SELECT * FROM dead_letters d WHERE d.id = ANY (gripped) AND d.reason <> 'member_failed'
              ORDER BY d.enqueued_at, d.id) AS in_turn
    ), new AS (
        INSERT INTO jobs (id, state, queue, task, args, kwargs, priority, position, attempt, max_retries, enqueued_at,
            enqueued_by, unique_key, headers)
        SELECT p.id, 'ready', p.queue, p.task, p.args, p.kwargs, p.priority, p.position, p.attempt, p.max_retries,
            p.enqueued_at, p.enqueued_by, p.unique_key, p.headers
        FROM placed p ORDER BY p.task, p.unique_key, p.id
        ON CONFLICT DO NOTHING
        RETURNING jobs.id, jobs.queue
    )
    SELECT array_agg(new.id), array_agg(DISTINCT new.queue) INTO moved, queues FROM new;
    WITH gone AS (
        DELETE FROM dead_letters d WHERE d.id = ANY (moved) RETURNING d.*
    )
    INSERT INTO audit_log (action, job_id, queue, reason, details)
    SELECT 'requeue', g.id, g.queue, requeue.reason,
           jsonb_strip_nulls(jsonb_build_object('by', requeue.actor, 'before', jsonb_build_object('state', 'dead',
               'died_at', g.died_at, 'dead_letter_queue', g.dead_letter_queue, 'reason', g.reason,
               'error_class', g.error_class, 'retries', g.retries, 'crashes', g.crashes),
               'after', '{"state": "ready", "retries": 0, "crashes": 0}'::jsonb))
    FROM gone g ORDER BY g.id;
    IF queues IS NOT NULL THEN
        PERFORM wake_workers(queues);
    END IF;
    RETURN QUERY SELECT each, coalesce(each = ANY (moved), false) FROM unnest(gripped) AS each;
END $$;
"""

PRUNING = r"""
CREATE FUNCTION {schema}.prune_canvases(finished_age interval, dead_letters_age interval) RETURNS bigint
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, {schema}, pg_temp SET enable_sort = on SET enable_seqscan = off AS $$
DECLARE
    old    uuid[];
    pruned bigint;
BEGIN
    IF NOT (finished_age >= interval '0' AND dead_letters_age >= interval '0') OR finished_age IS NULL OR dead_letters_age IS NULL THEN
        RAISE invalid_parameter_value USING
            MESSAGE = format('finished_age and dead_letters_age must be 0 or more, got %L and %L', finished_age, dead_letters_age);
    END IF;
    -- As many as have twenty thousand jobs together, one at least; those of which nothing lives any more. What has failed may
    -- go on for as long as its dead letters are kept.
    old := ARRAY(
        SELECT c.id FROM (
            SELECT c.id, c.jobs, sum(c.jobs) OVER (ORDER BY c.ended_at, c.id) AS before
            FROM canvases c JOIN canvas_nodes o ON o.id = c.output
            WHERE c.ended_at <= now() - CASE o.state WHEN 'dead' THEN greatest(finished_age, dead_letters_age) ELSE finished_age END
              AND NOT EXISTS (SELECT FROM canvas_nodes n JOIN jobs j ON j.id = n.id WHERE n.canvas_id = c.id)
            ORDER BY c.ended_at, c.id LIMIT 1000
        ) AS c
        WHERE c.before - c.jobs < 20000);
    DELETE FROM canvas_nodes n WHERE n.canvas_id = ANY (old);
    DELETE FROM canvases c WHERE c.id = ANY (old);
    GET DIAGNOSTICS pruned = ROW_COUNT;
    RETURN pruned;
END $$;
COMMENT ON FUNCTION {schema}.prune_canvases IS 'Forget canvases that ended longer ago than this; returns how many were forgotten';
"""

VIEWS = r"""
CREATE OR REPLACE VIEW {schema}.queue_stats AS
    WITH live AS (
        SELECT queue, count(*) FILTER (WHERE state = 'ready') AS ready,
               count(*) FILTER (WHERE state = 'scheduled') AS scheduled,
               count(*) FILTER (WHERE state = 'running') AS running,
               count(*) FILTER (WHERE state = 'blocked') AS blocked,
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
           (SELECT count(*) FROM alive WHERE alive.queues = '{}' OR named.queue = ANY (alive.queues)) AS workers,
           coalesce(blocked, 0) AS blocked
    FROM named LEFT JOIN live USING (queue) LEFT JOIN dead USING (queue);

CREATE OR REPLACE VIEW {schema}.task_stats AS
    WITH live AS (
        SELECT task, count(*) FILTER (WHERE state = 'ready') AS ready,
               count(*) FILTER (WHERE state = 'scheduled') AS scheduled,
               count(*) FILTER (WHERE state = 'running') AS running,
               count(*) FILTER (WHERE state = 'blocked') AS blocked
        FROM {schema}.jobs GROUP BY task
    ), ended AS (
        SELECT task, count(*) FILTER (WHERE state = 'succeeded') AS succeeded,
               count(*) FILTER (WHERE state = 'cancelled') AS cancelled,
               count(*) FILTER (WHERE state = 'expired') AS expired,
               percentile_cont(ARRAY[0.5, 0.95]) WITHIN GROUP (ORDER BY finished_at - started_at)
                   FILTER (WHERE state = 'succeeded') AS runs,
               max(finished_at - started_at) FILTER (WHERE state = 'succeeded') AS run_max,
               percentile_cont(0.95) WITHIN GROUP (ORDER BY started_at - greatest(enqueued_at, eta)) AS wait_p95,
               max(finished_at) AS last_finished_at
        FROM {schema}.finished_jobs WHERE finished_at > now() - interval '24 hours' GROUP BY task
    ), failed AS (
        SELECT task, count(*) FILTER (WHERE kind = 'failed') AS failed, count(*) FILTER (WHERE kind = 'crashed') AS crashed
        FROM {schema}.failures WHERE failed_at > now() - interval '24 hours' GROUP BY task
    ), died AS (
        SELECT task, count(*) AS dead FROM {schema}.dead_letters WHERE died_at > now() - interval '24 hours' GROUP BY task
    )
    SELECT task, coalesce(ready, 0) AS ready, coalesce(scheduled, 0) AS scheduled, coalesce(running, 0) AS running,
           coalesce(succeeded, 0) AS succeeded, coalesce(cancelled, 0) AS cancelled, coalesce(expired, 0) AS expired,
           coalesce(dead, 0) AS dead, coalesce(failed, 0) AS failed, coalesce(crashed, 0) AS crashed,
           runs[1] AS run_p50, runs[2] AS run_p95, run_max, wait_p95, last_finished_at,
           coalesce(blocked, 0) AS blocked
    FROM live FULL JOIN ended USING (task) FULL JOIN failed USING (task) FULL JOIN died USING (task);

CREATE VIEW {schema}.canvas_stats AS
    SELECT c.id, {schema}.canvas_state(c.output) AS state, c.jobs, n.succeeded, n.dead, n.cancelled, n.expired,
           c.jobs - n.succeeded - n.dead - n.cancelled - n.expired AS left, c.enqueued_at, c.enqueued_by, c.ended_at
    FROM {schema}.canvases c, LATERAL (
        SELECT count(*) FILTER (WHERE n.state = 'succeeded') AS succeeded, count(*) FILTER (WHERE n.state = 'dead') AS dead,
               count(*) FILTER (WHERE n.state = 'cancelled') AS cancelled, count(*) FILTER (WHERE n.state = 'expired') AS expired
        FROM {schema}.canvas_nodes n WHERE n.canvas_id = c.id AND NOT n.is_join
    ) AS n;
COMMENT ON VIEW {schema}.canvas_stats IS 'Per canvas: its state, and how many of its jobs have ended how';
"""

PRIVILEGES = r"""
REVOKE ALL ON FUNCTION {schema}.end_canvas_node, {schema}.reopen_canvas_node, {schema}.enqueue_canvas,
    {schema}.enqueue_canvas_nodes, {schema}.canvas_value, {schema}.canvas_state, {schema}.canvas_fault,
    {schema}.release_canvas_jobs, {schema}.bury_canvas_jobs, {schema}.enqueue_error_jobs, {schema}.settle_canvases,
    {schema}.cancel_canvas, {schema}.prune_canvases FROM PUBLIC;
"""

# What waits for other jobs has no place in the older schema: it is cancelled, and what could not run is rejected.
DOWNGRADE = r"""
DROP TRIGGER jobs_end_canvas_node ON {schema}.jobs;
DROP TRIGGER jobs_reopen_canvas_node ON {schema}.jobs;
DROP VIEW {schema}.canvas_stats, {schema}.task_stats, {schema}.queue_stats;
DROP FUNCTION {schema}.prune_canvases, {schema}.cancel_canvas, {schema}.settle_canvases, {schema}.enqueue_error_jobs,
    {schema}.bury_canvas_jobs, {schema}.release_canvas_jobs, {schema}.canvas_fault, {schema}.canvas_state, {schema}.canvas_value,
    {schema}.enqueue_canvas_nodes, {schema}.enqueue_canvas, {schema}.reopen_canvas_node, {schema}.end_canvas_node;
DROP TABLE {schema}.canvas_nodes, {schema}.canvases;
WITH gone AS (
    DELETE FROM {schema}.jobs WHERE state = 'blocked' RETURNING *
)
INSERT INTO {schema}.finished_jobs (id, state, queue, task, args, kwargs, priority, eta, expires_at, attempt, retries,
    crashes, rescues, worker_id, enqueued_at, enqueued_by, claimed_at, unique_key, headers)
SELECT id, 'cancelled', queue, task, args, kwargs, priority, eta, expires_at, attempt, retries,
    crashes, rescues, worker_id, enqueued_at, enqueued_by, claimed_at, unique_key, headers
FROM gone;
UPDATE {schema}.dead_letters SET reason = 'rejected' WHERE reason = 'member_failed';
ALTER TABLE {schema}.jobs DROP CONSTRAINT jobs_state_known;
ALTER TABLE {schema}.jobs ADD CONSTRAINT jobs_state_known CHECK (state IN ('scheduled', 'ready', 'running'));
ALTER TABLE {schema}.dead_letters DROP CONSTRAINT dead_letters_reason_known;
ALTER TABLE {schema}.dead_letters ADD CONSTRAINT dead_letters_reason_known CHECK (reason IN ('not_retryable',
    'retries_exhausted', 'crashed', 'time_limit', 'rejected', 'unknown_task', 'bad_payload'));
"""


def _run(*scripts: str) -> None:
    """Run whole scripts: through the driver without parameters, or onto paper for `--sql`."""
    for script in scripts:
        text = script.replace("{schema}", context.config.attributes["schema"])
        if context.is_offline_mode():
            context.get_context().impl.static_output(text)
        else:
            op.get_bind().execution_options(no_parameters=True).exec_driver_sql(text)


def _earlier(revision: str, name: str, start: str, end: str | None = None) -> str:
    """What an earlier revision made, from one place of its script to another, to make it once more."""
    script: str = getattr(context.script.get_revision(revision).module, name)
    return script[script.index(start) : script.index(end) if end else None]


def upgrade() -> None:
    _run(CHECKS, TABLES, ENDS, ENQUEUE, SETTLE, CANCEL, PRUNING, VIEWS, PRIVILEGES)


def downgrade() -> None:
    functions = _earlier("0009", "FUNCTIONS", "CREATE OR REPLACE FUNCTION {schema}.cancel(")
    queue_stats = _earlier("0001", "VIEWS", "CREATE VIEW {schema}.queue_stats")
    task_stats = _earlier(
        "0009", "VIEWS", "CREATE VIEW {schema}.task_stats", "CREATE VIEW {schema}.failure_summary"
    )
    _run(DOWNGRADE, queue_stats, task_stats, functions)
