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
-- output: the node whose end and result are those of the whole. begun_by: the transaction that enqueued it, the only one that
-- may add nodes. state, ended_at: the output's end. failed: found to have dead jobs when it was to be forgotten, and kept longer.
CREATE TABLE {schema}.canvases (
    id          uuid PRIMARY KEY,
    output      uuid NOT NULL,
    jobs        integer NOT NULL,
    begun_by    bigint NOT NULL DEFAULT pg_current_xact_id()::text::bigint,
    enqueued_at timestamptz NOT NULL DEFAULT clock_timestamp(),
    enqueued_by text NOT NULL DEFAULT session_user,
    state       text COLLATE "C",
    ended_at    timestamptz,
    failed      boolean NOT NULL DEFAULT false
) WITH (fillfactor = 70);
CREATE INDEX canvases_ended ON {schema}.canvases (failed, ended_at) WHERE ended_at IS NOT NULL;
CREATE INDEX canvases_enqueued ON {schema}.canvases (enqueued_at);

-- One row per job, with the id of the job, and per join: what ends when all its members have ended. Members end each in a row
-- of its own, so ten thousand of them never wait for each other.
-- nth: the order of nodes in the canvas, and so of the members of a join. after: the node whose success releases the job.
-- member_of: the join that waits for it. takes_result: what `after` gives is put in front of the args. keeps_result: somebody
-- wants the result; size: its bytes as text. skips_failed: the join leaves out members that did not succeed. countdown, expires_in: seconds from the
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
    size              integer,
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
        size = CASE WHEN n.keeps_result THEN octet_length(ended.result::text) END,
        error = CASE WHEN n.keeps_result OR ended.state <> 'succeeded' THEN ended.error END,
        cause = CASE WHEN ended.state <> 'succeeded' OR n.keeps_result AND ended.error IS NOT NULL THEN n.id END
    WHERE n.id = OLD.id;
    RETURN NULL;
END $$;
COMMENT ON FUNCTION {schema}.end_canvas_node IS 'Trigger: a job of a canvas has left jobs, note how';
CREATE TRIGGER jobs_end_canvas_node AFTER DELETE ON {schema}.jobs FOR EACH ROW
    WHEN (OLD.headers -> 'pgqueue' ? 'canvas') EXECUTE FUNCTION {schema}.end_canvas_node();

CREATE FUNCTION {schema}.unbury_canvas_jobs(job_ids uuid[]) RETURNS void
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, {schema}, pg_temp SET enable_seqscan = off AS $$
BEGIN
    WITH back AS (
        DELETE FROM dead_letters l WHERE l.id = ANY (job_ids) AND l.reason = 'member_failed' RETURNING l.*
    ), again AS (
        INSERT INTO jobs (id, state, queue, task, args, kwargs, priority, eta, expires_at, max_retries, enqueued_at, enqueued_by,
            headers)
        SELECT b.id, 'blocked', b.queue, b.task, b.args, b.kwargs, b.priority, b.eta, b.expires_at, b.max_retries, b.enqueued_at,
               b.enqueued_by, b.headers
        FROM back b ORDER BY b.id
        RETURNING id
    )
    UPDATE canvas_nodes n SET state = NULL, cause = NULL, error = NULL, passed_on = false FROM again a WHERE n.id = a.id;
END $$;
COMMENT ON FUNCTION {schema}.unbury_canvas_jobs IS 'Have those of these jobs that could not run wait again';

CREATE FUNCTION {schema}.reopen_canvas_node() RETURNS trigger
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, {schema}, pg_temp SET enable_seqscan = off AS $$
DECLARE
    opened uuid[] := ARRAY[NEW.id];
BEGIN
    UPDATE canvas_nodes n SET state = NULL, cause = NULL, error = NULL, result = NULL, size = NULL, passed_on = false
    WHERE n.id = NEW.id;
    -- With it comes back what could not run because of it, step by step, to wait again.
    WHILE opened <> '{}' LOOP
        UPDATE canvases c SET ended_at = NULL, state = NULL FROM canvas_nodes n
        WHERE n.id = NEW.id AND c.id = n.canvas_id AND c.output = ANY (opened);
        opened := ARRAY(SELECT d.id FROM canvas_nodes d JOIN dead_letters l ON l.id = d.id
                        WHERE d.after = ANY (opened) AND NOT d.released AND d.state = 'dead' AND l.reason = 'member_failed')
               || ARRAY(SELECT DISTINCT j.id FROM canvas_nodes n JOIN canvas_nodes j ON j.id = n.member_of
                        WHERE n.id = ANY (opened) AND j.state IN ('dead', 'cancelled'));
        PERFORM unbury_canvas_jobs(opened);
        UPDATE canvas_nodes n SET state = NULL, cause = NULL, passed_on = false WHERE n.id = ANY (opened) AND n.is_join;
    END LOOP;
    RETURN NULL;
END $$;
COMMENT ON FUNCTION {schema}.reopen_canvas_node IS 'Trigger: a dead letter of a canvas is a job again, and what waits for it waits again';
CREATE TRIGGER jobs_reopen_canvas_node AFTER INSERT ON {schema}.jobs FOR EACH ROW
    WHEN (NEW.attempt > 0 AND NEW.headers -> 'pgqueue' ? 'canvas') EXECUTE FUNCTION {schema}.reopen_canvas_node();

-- Older releases would requeue what could not run, and it would run without the results that it waits for. A job that comes
-- back was enqueued a while ago; looking closer at each new one would make enqueueing a third slower.
CREATE FUNCTION {schema}.hold_back_canvas_job() RETURNS trigger
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, {schema}, pg_temp AS $$
BEGIN
    IF EXISTS (SELECT FROM dead_letters l WHERE l.id = NEW.id AND l.reason = 'member_failed') THEN
        RETURN NULL;
    END IF;
    RETURN NEW;
END $$;
COMMENT ON FUNCTION {schema}.hold_back_canvas_job IS 'Trigger: a job of a canvas that could not run is not requeued by itself';
CREATE TRIGGER jobs_hold_back_canvas_job BEFORE INSERT ON {schema}.jobs FOR EACH ROW
    WHEN (NEW.state <> 'blocked' AND NEW.attempt = 0 AND NEW.enqueued_at < clock_timestamp() - interval '1 second'
          AND NEW.headers -> 'pgqueue' ? 'canvas')
    EXECUTE FUNCTION {schema}.hold_back_canvas_job();
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
    foreign_node uuid;
    ready        text[];
    scheduled    text[];
    wake_eta     timestamptz;
BEGIN
    IF NOT EXISTS (SELECT FROM canvases c WHERE c.id = enqueue_canvas_nodes.canvas_id
                   AND c.begun_by = pg_current_xact_id()::text::bigint) THEN
        RAISE object_not_in_prerequisite_state USING
            MESSAGE = format('canvas %s was not begun in this transaction', enqueue_canvas_nodes.canvas_id);
    END IF;
    WITH n AS MATERIALIZED (
        SELECT * FROM jsonb_to_recordset(enqueue_canvas_nodes.nodes) AS n(id uuid, nth integer, after uuid, member_of uuid,
            takes_result boolean, keeps_result boolean, skips_failed boolean, countdown float8, expires_in float8,
            dead_letter_queue text, on_error jsonb, queue text, task text, args jsonb, kwargs jsonb, priority smallint,
            eta timestamptz, expires_at timestamptz, max_retries integer, headers jsonb)
    ), new_nodes AS (
        INSERT INTO canvas_nodes (id, canvas_id, nth, is_join, after, member_of, takes_result, keeps_result, skips_failed, countdown,
                                  expires_in, dead_letter_queue, on_error)
        SELECT n.id, enqueue_canvas_nodes.canvas_id, n.nth, n.task IS NULL, n.after, n.member_of, coalesce(n.takes_result, false),
               coalesce(n.keeps_result, false), coalesce(n.skips_failed, false), n.countdown, n.expires_in, n.dead_letter_queue, n.on_error
        FROM n
    ), new_jobs AS (
        INSERT INTO jobs (id, state, queue, task, args, kwargs, priority, eta, expires_at, max_retries, headers, enqueued_by)
        SELECT n.id, CASE WHEN n.after IS NOT NULL THEN 'blocked' WHEN n.eta > clock_timestamp() THEN 'scheduled' ELSE 'ready' END,
               n.queue, n.task, n.args, n.kwargs, n.priority, n.eta, n.expires_at, n.max_retries, n.headers, session_user
        FROM n WHERE n.task IS NOT NULL
        ORDER BY n.nth
        RETURNING queue, state, eta
    )
    SELECT array_agg(DISTINCT j.queue) FILTER (WHERE j.state = 'ready'), array_agg(DISTINCT j.queue) FILTER (WHERE j.state = 'scheduled'),
           min(j.eta) FILTER (WHERE j.state = 'scheduled'),
           -- Nobody may wait for the jobs of another canvas, and read their results.
           (SELECT other.id FROM (SELECT n.after AS id FROM n UNION SELECT n.member_of FROM n) AS other
            WHERE other.id IS NOT NULL AND NOT EXISTS (SELECT FROM n WHERE n.id = other.id) AND NOT EXISTS (
                SELECT FROM canvas_nodes o WHERE o.id = other.id AND o.canvas_id = enqueue_canvas_nodes.canvas_id) LIMIT 1)
    INTO ready, scheduled, wake_eta, foreign_node
    FROM new_jobs j;
    IF foreign_node IS NOT NULL THEN
        RAISE invalid_parameter_value USING
            MESSAGE = format('after and member_of must be nodes of the same canvas, enqueued before or beside, got %s', foreign_node);
    END IF;
    IF ready IS NOT NULL THEN
        PERFORM wake_workers(ready);
    END IF;
    IF scheduled IS NOT NULL THEN
        PERFORM wake_workers(scheduled, wake_eta);
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

CREATE FUNCTION {schema}.canvas_size(node_id uuid) RETURNS bigint
LANGUAGE plpgsql STABLE SECURITY DEFINER SET search_path = pg_catalog, {schema}, pg_temp SET enable_seqscan = off AS $$
DECLARE
    node canvas_nodes;
BEGIN
    SELECT n.* INTO node FROM canvas_nodes n WHERE n.id = canvas_size.node_id;
    IF NOT node.is_join THEN
        RETURN coalesce(node.size, 4);
    END IF;
    RETURN (SELECT 2 + coalesce(sum(2 + CASE WHEN m.is_join THEN canvas_size(m.id) ELSE coalesce(m.size, 4) END)
                                FILTER (WHERE m.state = 'succeeded' AND m.error IS NULL), 0)
            FROM canvas_nodes m WHERE m.member_of = node.id);
END $$;
COMMENT ON FUNCTION {schema}.canvas_size IS 'Bytes of what canvas_value gives, as text: to be asked before';

CREATE FUNCTION {schema}.canvas_fault(node {schema}.canvas_nodes) RETURNS text
LANGUAGE plpgsql STABLE SECURITY DEFINER SET search_path = pg_catalog, {schema}, pg_temp SET enable_seqscan = off AS $$
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
        SELECT format('job %s %s', n.id, CASE n.state WHEN 'succeeded' THEN 'succeeded without a result: ' || n.error
                                                      WHEN 'expired' THEN 'expired' WHEN 'dead' THEN 'was dead'
                                                      ELSE concat_ws(': ', 'was cancelled', n.error) END)
        INTO fault FROM canvas_nodes n WHERE n.id = node.cause;
    END IF;
    IF total > 1 THEN
        RETURN format('%s of the %s members that it waits for did not succeed; the first: %s', failed, total, fault);
    END IF;
    RETURN 'what it waits for did not succeed: ' || fault;
END $$;
COMMENT ON FUNCTION {schema}.canvas_fault IS 'Why what waits for this node cannot run';

CREATE FUNCTION {schema}.wake_later(queues text[], later timestamptz) RETURNS void
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, {schema}, pg_temp AS $$
BEGIN
    IF queues IS NOT NULL THEN
        PERFORM wake_workers(queues);
    END IF;
    IF later IS NOT NULL THEN
        PERFORM wake_workers(queues, later);
    END IF;
END $$;
COMMENT ON FUNCTION {schema}.wake_later IS 'NOTIFY the workers that sleep on these queues, for jobs that are ready, and for one that is due later';

-- In steps: what is released by one call is a thousand jobs, and 16 MiB, at most. done is false when there may be more.
CREATE FUNCTION {schema}.release_canvas_jobs(node {schema}.canvas_nodes, takers boolean, OUT jobs integer, OUT done boolean)
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, {schema}, pg_temp SET plan_cache_mode = force_generic_plan
SET enable_sort = on SET enable_seqscan = off SET enable_hashjoin = off SET enable_mergejoin = off AS $$
#variable_conflict use_column
DECLARE
    most   integer := 1000;
    bytes  bigint;
    chosen uuid[];
    value  jsonb;
    queues text[];
    later  timestamptz;
BEGIN
    IF release_canvas_jobs.takers AND EXISTS (SELECT FROM canvas_nodes d WHERE d.after = node.id AND NOT d.released AND d.takes_result) THEN
        bytes := canvas_size(node.id);
        IF bytes > 16000000 THEN
            RAISE program_limit_exceeded USING MESSAGE = format('%s bytes of results, 16000000 fit into the arguments', bytes);
        END IF;
        most := greatest(1, least(most, 16000000 / bytes));
        value := jsonb_build_array(canvas_value(node.id));
    END IF;
    chosen := ARRAY(SELECT d.id FROM canvas_nodes d WHERE d.after = node.id AND NOT d.released AND d.takes_result = release_canvas_jobs.takers
                    ORDER BY d.nth LIMIT most);
    jobs := cardinality(chosen);
    done := jobs < most;
    IF jobs = 0 THEN
        RETURN;
    END IF;
    -- What was buried because this node had failed, while somebody requeued the job at fault, comes back first.
    PERFORM unbury_canvas_jobs(chosen);
    WITH placed AS MATERIALIZED (
        SELECT d.id, d.countdown, d.expires_in, nextval('{schema}.jobs_position_seq') AS position
        FROM (SELECT d.* FROM canvas_nodes d WHERE d.id = ANY (chosen) ORDER BY d.nth) AS d
    ), freed AS (
        UPDATE jobs j
        SET eta = greatest(j.eta, clock_timestamp()) + coalesce(p.countdown, 0) * interval '1 second',
            expires_at = coalesce(clock_timestamp() + p.expires_in * interval '1 second', j.expires_at),
            state = CASE WHEN p.countdown > 0 OR j.eta > clock_timestamp() THEN 'scheduled' ELSE 'ready' END,
            position = p.position, args = coalesce(value || j.args, j.args)
        FROM placed p WHERE j.id = p.id AND j.state = 'blocked'
        RETURNING j.queue, j.state, j.eta
    )
    SELECT array_agg(DISTINCT f.queue), min(f.eta) FILTER (WHERE f.state = 'scheduled') INTO queues, later FROM freed f;
    UPDATE canvas_nodes d SET released = true WHERE d.id = ANY (chosen);
    UPDATE canvases c SET ended_at = NULL, state = NULL WHERE c.id = node.canvas_id AND c.output = ANY (chosen) AND c.ended_at IS NOT NULL;
    PERFORM wake_later(queues, later);
END $$;
COMMENT ON FUNCTION {schema}.release_canvas_jobs IS 'Release jobs that wait for this node, which has succeeded: those that take its result, or the others';

-- takers NULL: all that wait for it, until it succeeds after all. Else those that take its result, or the others, for good.
CREATE FUNCTION {schema}.bury_canvas_jobs(node {schema}.canvas_nodes, fault text, takers boolean, OUT jobs integer, OUT done boolean)
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, {schema}, pg_temp SET plan_cache_mode = force_generic_plan
SET enable_sort = on SET enable_seqscan = off SET enable_hashjoin = off SET enable_mergejoin = off AS $$
#variable_conflict use_column
DECLARE
    chosen uuid[];
BEGIN
    chosen := ARRAY(SELECT d.id FROM canvas_nodes d WHERE d.after = node.id AND NOT d.released
                      AND CASE WHEN bury_canvas_jobs.takers IS NULL THEN d.state IS NULL ELSE d.takes_result = bury_canvas_jobs.takers END
                    ORDER BY d.nth LIMIT 1000);
    jobs := cardinality(chosen);
    done := jobs < 1000;
    IF jobs = 0 THEN
        RETURN;
    END IF;
    WITH gone AS (
        DELETE FROM jobs j WHERE j.id = ANY (chosen) AND j.state = 'blocked' RETURNING j.*
    )
    INSERT INTO dead_letters (id, queue, task, args, kwargs, priority, eta, expires_at, attempt, retries, max_retries, crashes, rescues,
        enqueued_at, enqueued_by, headers, dead_letter_queue, reason, error_class, error_message)
    SELECT g.id, g.queue, g.task, g.args, g.kwargs, g.priority, g.eta, g.expires_at, g.attempt, g.retries, g.max_retries, g.crashes,
           g.rescues, g.enqueued_at, g.enqueued_by, g.headers, coalesce(d.dead_letter_queue, g.queue), 'member_failed',
           'MemberFailed', bury_canvas_jobs.fault
    FROM gone g JOIN canvas_nodes d ON d.id = g.id;
    UPDATE dead_letters l SET error_message = bury_canvas_jobs.fault WHERE l.id = ANY (chosen) AND l.reason = 'member_failed';
    -- One that has gone without a trace: somebody took it away behind the back of the triggers.
    UPDATE canvas_nodes d SET state = 'cancelled', error = 'it was deleted', passed_on = false
    WHERE d.id = ANY (chosen) AND d.state IS NULL;
    UPDATE canvas_nodes d
    SET cause = CASE WHEN d.state = 'dead' AND bury_canvas_jobs.takers IS NULL THEN node.cause ELSE d.id END,
        released = bury_canvas_jobs.takers IS NOT NULL
    WHERE d.id = ANY (chosen);
END $$;
COMMENT ON FUNCTION {schema}.bury_canvas_jobs IS 'Bury up to a thousand jobs that wait for this node and cannot run';

CREATE FUNCTION {schema}.enqueue_error_jobs(node {schema}.canvas_nodes) RETURNS void
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, {schema}, pg_temp AS $$
#variable_conflict use_column
DECLARE
    queues text[];
    later  timestamptz;
BEGIN
    -- Who cancels a job knows of it.
    IF EXISTS (SELECT FROM canvas_nodes n WHERE n.id = node.cause AND n.state = 'cancelled') THEN
        RETURN;
    END IF;
    WITH wanted AS (
        SELECT t.*, greatest(t.eta, clock_timestamp() + t.countdown * interval '1 second') AS due
        FROM jsonb_to_recordset(node.on_error) AS t(queue text, task text, args jsonb, kwargs jsonb, priority smallint,
            eta timestamptz, countdown float8, expires_at timestamptz, expires_in float8, max_retries integer, headers jsonb,
            takes_result boolean, own boolean)
        -- Of the job itself: not for what it waited for.
        WHERE NOT t.own OR node.cause = node.id
    ), new AS (
        INSERT INTO jobs (id, state, queue, task, args, kwargs, priority, eta, expires_at, max_retries, headers)
        SELECT uuid7(), CASE WHEN w.due > clock_timestamp() THEN 'scheduled' ELSE 'ready' END, w.queue, w.task,
               CASE WHEN w.takes_result THEN jsonb_build_array(node.cause) || w.args ELSE w.args END, w.kwargs, w.priority,
               w.due, coalesce(w.expires_at, clock_timestamp() + w.expires_in * interval '1 second'), w.max_retries, w.headers
        FROM wanted w
        RETURNING queue, state, eta
    )
    SELECT array_agg(DISTINCT n.queue), min(n.eta) FILTER (WHERE n.state = 'scheduled') INTO queues, later FROM new n;
    PERFORM wake_later(queues, later);
END $$;
COMMENT ON FUNCTION {schema}.enqueue_error_jobs IS 'Enqueue what is to run because this node has failed';

CREATE FUNCTION {schema}.pass_on_canvas_node(node {schema}.canvas_nodes, OUT jobs integer, OUT done boolean)
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, {schema}, pg_temp AS $$
DECLARE
    step record;
BEGIN
    jobs := 0;
    done := true;
    IF node.state <> 'succeeded' THEN
        step := bury_canvas_jobs(node, canvas_fault(node), NULL);
        jobs := step.jobs;
        done := step.done;
        IF done AND node.state IN ('dead', 'expired') AND node.on_error IS NOT NULL THEN
            PERFORM enqueue_error_jobs(node);
            jobs := jobs + 1;
        END IF;
        RETURN;
    END IF;
    FOR takers IN 0..1 LOOP
        IF takers = 1 AND node.error IS NOT NULL THEN
            step := bury_canvas_jobs(node, canvas_fault(node), true);
        ELSE
            BEGIN
                step := release_canvas_jobs(node, takers = 1);
            EXCEPTION WHEN program_limit_exceeded OR data_exception OR integrity_constraint_violation OR plpgsql_error THEN
                step := bury_canvas_jobs(node, left('it cannot be released with the results of what it waits for: ' || SQLERRM, 1000), takers = 1);
            END;
        END IF;
        jobs := jobs + step.jobs;
        done := done AND step.done;
    END LOOP;
END $$;
COMMENT ON FUNCTION {schema}.pass_on_canvas_node IS 'Release or bury jobs that wait for this node alone; done: all of them';

-- An end that this transaction makes itself, of a join or of a job that it buries, is passed on to what waits for that alone,
-- but counts for the join that it is a member of in a later transaction only: others cannot see it yet.
-- A node whose turn fails, or whose canvas somebody is just cancelling, is left for the next heartbeat, and harms no other.
CREATE FUNCTION {schema}.settle_canvases(node_ids uuid[] DEFAULT NULL, OUT released integer, OUT left_over uuid[], OUT more boolean)
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, {schema}, pg_temp SET plan_cache_mode = force_generic_plan
SET enable_sort = on SET enable_seqscan = off AS $$
#variable_conflict use_column
DECLARE
    deadline timestamptz := clock_timestamp() + interval '0.5 seconds';
    begun    boolean := false;
    next     uuid[] := settle_canvases.node_ids;
    ended    uuid[];
    outputs  uuid[] := '{}';
    node     canvas_nodes;
    step     record;
    joined   uuid;
    verdict  text;
    fault    uuid;
BEGIN
    released := 0;
    left_over := '{}';
    more := false;
    FOR round IN 1..100 LOOP
        IF next IS NULL THEN
            ended := ARRAY(SELECT n.id FROM canvas_nodes n WHERE n.state IS NOT NULL AND NOT n.passed_on
                           ORDER BY n.id LIMIT 1000 FOR UPDATE SKIP LOCKED);
            more := cardinality(ended) = 1000;
        ELSE
            ended := ARRAY(SELECT n.id FROM canvas_nodes n WHERE n.id = ANY (next) AND n.state IS NOT NULL AND NOT n.passed_on
                           ORDER BY n.id FOR UPDATE SKIP LOCKED);
        END IF;
        next := '{}';
        EXIT WHEN ended = '{}';

        -- First what waits for one of them alone: the next step of a chain, the body of a chord.
        FOR node IN
            SELECT n.* FROM canvas_nodes n
            WHERE n.id = ANY (ended) AND (n.on_error IS NOT NULL
                  OR EXISTS (SELECT FROM canvas_nodes d WHERE d.after = n.id AND NOT d.released))
            ORDER BY n.canvas_id, n.nth
        LOOP
            IF begun AND clock_timestamp() > deadline THEN
                left_over := left_over || node.id;
                ended := array_remove(ended, node.id);
                CONTINUE;
            END IF;
            -- Whoever cancels the canvas locks its jobs in another order.
            IF NOT pg_try_advisory_xact_lock_shared(hashtextextended('pgqueue canvas ' || node.canvas_id, 0)) THEN
                ended := array_remove(ended, node.id);
                CONTINUE;
            END IF;
            begun := true;
            BEGIN
                step := pass_on_canvas_node(node);
            EXCEPTION WHEN OTHERS THEN
                RAISE WARNING 'pgqueue: the end of % in canvas % is not passed on: % (%)', node.id, node.canvas_id, SQLERRM, SQLSTATE;
                ended := array_remove(ended, node.id);
                CONTINUE;
            END;
            released := released + step.jobs;
            next := next || ARRAY(SELECT d.id FROM canvas_nodes d WHERE d.after = node.id AND d.state IS NOT NULL
                                    AND NOT d.passed_on AND d.member_of IS NULL);
            left_over := left_over || ARRAY(SELECT d.id FROM canvas_nodes d WHERE d.after = node.id AND d.state IS NOT NULL
                                              AND NOT d.passed_on AND d.member_of IS NOT NULL);
            IF NOT step.done THEN
                left_over := left_over || node.id;
                ended := array_remove(ended, node.id);
            END IF;
        END LOOP;

        more := more AND ended <> '{}';
        UPDATE canvas_nodes n SET passed_on = true WHERE n.id = ANY (ended);
        outputs := outputs || ended;

        -- Then the joins that they are members of. An open member is looked for from the end: jobs end about in order.
        FOR joined IN
            SELECT DISTINCT n.member_of FROM canvas_nodes n WHERE n.id = ANY (ended) AND n.member_of IS NOT NULL ORDER BY 1
        LOOP
            -- Not EXISTS: the planner would drop the order, and walk over all that have ended.
            CONTINUE WHEN (SELECT m.id FROM canvas_nodes m WHERE m.member_of = joined AND m.state IS NULL
                           ORDER BY m.nth DESC LIMIT 1) IS NOT NULL;
            SELECT n.* INTO node FROM canvas_nodes n WHERE n.id = joined;
            SELECT CASE WHEN node.skips_failed OR count(*) = 0 THEN 'succeeded'
                        WHEN bool_and(m.state = 'cancelled') THEN 'cancelled' ELSE 'dead' END,
                   (array_agg(coalesce(m.cause, m.id) ORDER BY m.nth))[1]
            INTO verdict, fault
            FROM canvas_nodes m WHERE m.member_of = joined AND (m.state <> 'succeeded' OR m.error IS NOT NULL);
            UPDATE canvas_nodes n
            SET state = verdict, cause = CASE verdict WHEN 'succeeded' THEN NULL ELSE fault END, passed_on = false
            WHERE n.id = joined AND n.state IS DISTINCT FROM verdict;
            IF FOUND AND node.member_of IS NULL THEN
                next := next || joined;
            ELSIF FOUND THEN
                left_over := left_over || joined;
            END IF;
        END LOOP;
        EXIT WHEN next = '{}';
    END LOOP;
    left_over := left_over || coalesce(next, '{}');

    UPDATE canvases c SET ended_at = clock_timestamp(), state = o.state
    FROM canvas_nodes o WHERE o.id = ANY (outputs) AND c.id = o.canvas_id AND c.output = o.id;
END $$;
COMMENT ON FUNCTION {schema}.settle_canvases IS
    'Pass on the ends of these nodes, or of all that have not been: release or bury what waits for them; call it again with what is left over, in another transaction';
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
        IF round = 50 THEN
            RAISE lock_not_available USING
                MESSAGE = format('another session holds a job of canvas %s; nothing was cancelled, try again', cancel_canvas.canvas_id);
        END IF;
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
    old    record;
    nodes  bigint;
    total  bigint := 0;
    pruned bigint := 0;
BEGIN
    IF NOT (finished_age >= interval '0' AND dead_letters_age >= interval '0') OR finished_age IS NULL OR dead_letters_age IS NULL THEN
        RAISE invalid_parameter_value USING
            MESSAGE = format('finished_age and dead_letters_age must be 0 or more, got %L and %L', finished_age, dead_letters_age);
    END IF;
    -- About twenty thousand nodes at a time. What has failed may go on for as long as its dead letters are kept.
    FOR old IN
        (SELECT c.id, c.failed FROM canvases c WHERE NOT c.failed AND c.ended_at <= now() - finished_age ORDER BY c.ended_at LIMIT 1000)
        UNION ALL
        (SELECT c.id, c.failed FROM canvases c WHERE c.failed AND c.ended_at <= now() - greatest(finished_age, dead_letters_age)
         ORDER BY c.ended_at LIMIT 1000)
    LOOP
        EXIT WHEN total >= 20000;
        CONTINUE WHEN EXISTS (SELECT FROM canvas_nodes n JOIN jobs j ON j.id = n.id
                              WHERE n.canvas_id = old.id AND NOT n.is_join AND n.state IS NULL);
        IF NOT old.failed AND EXISTS (SELECT FROM canvas_nodes n WHERE n.canvas_id = old.id AND n.state = 'dead') THEN
            UPDATE canvases c SET failed = true WHERE c.id = old.id;
            CONTINUE;
        END IF;
        DELETE FROM canvas_nodes n
        WHERE n.id = ANY (ARRAY(SELECT m.id FROM canvas_nodes m WHERE m.canvas_id = old.id ORDER BY m.nth LIMIT 20000));
        GET DIAGNOSTICS nodes = ROW_COUNT;
        total := total + nodes;
        IF nodes < 20000 THEN
            DELETE FROM canvases c WHERE c.id = old.id;
            pruned := pruned + 1;
        END IF;
    END LOOP;
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
    SELECT c.id, coalesce(c.state, {schema}.canvas_state(c.output)) AS state, c.jobs, n.succeeded, n.dead, n.cancelled, n.expired,
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
    {schema}.cancel_canvas, {schema}.prune_canvases, {schema}.unbury_canvas_jobs, {schema}.hold_back_canvas_job,
    {schema}.canvas_size, {schema}.wake_later, {schema}.pass_on_canvas_node FROM PUBLIC;
"""

# What waits for other jobs has no place in the older schema: it is cancelled, and what could not run is rejected.
DOWNGRADE = r"""
DROP TRIGGER jobs_end_canvas_node ON {schema}.jobs;
DROP TRIGGER jobs_reopen_canvas_node ON {schema}.jobs;
DROP TRIGGER jobs_hold_back_canvas_job ON {schema}.jobs;
DROP VIEW {schema}.canvas_stats, {schema}.task_stats, {schema}.queue_stats;
DROP FUNCTION {schema}.prune_canvases, {schema}.cancel_canvas, {schema}.settle_canvases, {schema}.pass_on_canvas_node,
    {schema}.wake_later, {schema}.canvas_size, {schema}.hold_back_canvas_job, {schema}.unbury_canvas_jobs, {schema}.enqueue_error_jobs,
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
