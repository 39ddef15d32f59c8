"""Jobs are found by who enqueued them, their correlation id and their tags; each act says before and after.

Online: views and functions are replaced. The two indexes on history are built on the days that are empty or
small, which takes moments; a large one has none until its retention is over, and is read as a whole by whoever
searches in it. The index of the whole table is therefore made without those of its partitions.

Revision ID: 0009
Revises: 0008
"""

from __future__ import annotations

from alembic import context, op

revision = "0009"
down_revision = "0008"
branch_labels = None
depends_on = None

# A hash index, because headers may hold anything: a btree refuses a text of over 2,704 bytes, and with it the ack.
# IS NOT NULL, and not `headers ? …`: it follows from every comparison, so the planner sees that the index serves it.
# Tags without fastupdate: its pending list would be emptied by whoever acks when it is full.
INDEXES = r"""
DO $$
DECLARE
    name      text;
    index_def text;
    leaf      regclass;
BEGIN
    FOR name, index_def IN VALUES
        ('correlation_id', 'USING hash ((headers ->> ''correlation_id'')) WHERE headers ->> ''correlation_id'' IS NOT NULL'),
        ('tags', 'USING gin ((headers -> ''tags'')) WITH (fastupdate = off) WHERE headers -> ''tags'' IS NOT NULL')
    LOOP
        FOR leaf IN
            SELECT i.inhrelid::regclass FROM pg_inherits i
            WHERE i.inhparent = '{schema}.finished_jobs'::regclass AND pg_relation_size(i.inhrelid) < 8 * 1024 * 1024
        LOOP
            EXECUTE format('CREATE INDEX %I ON %s %s', (SELECT c.relname FROM pg_class c WHERE c.oid = leaf) || '_' || name, leaf, index_def);
        END LOOP;
        EXECUTE format('CREATE INDEX %I ON ONLY {schema}.finished_jobs %s', 'finished_jobs_' || name, index_def);
        FOR leaf IN
            SELECT x.indexrelid::regclass FROM pg_inherits i JOIN pg_index x ON x.indrelid = i.inhrelid
            JOIN pg_class c ON c.oid = x.indexrelid JOIN pg_class t ON t.oid = x.indrelid
            WHERE i.inhparent = '{schema}.finished_jobs'::regclass AND c.relname = t.relname || '_' || name
        LOOP
            EXECUTE format('ALTER INDEX {schema}.%I ATTACH PARTITION %s', 'finished_jobs_' || name, leaf);
        END LOOP;
    END LOOP;
END $$;
"""

VIEWS = r"""
CREATE OR REPLACE VIEW {schema}.all_jobs AS
    SELECT id, state, queue, task, args, kwargs, priority, eta, attempt, retries, crashes, worker_id, enqueued_at,
           claimed_at AS started_at, NULL::timestamptz AS finished_at, NULL::jsonb AS result, NULL::text AS reason,
           NULL::text AS error_class, NULL::text AS error_message, NULL::text AS dead_letter_queue,
           enqueued_by, headers ->> 'correlation_id' AS correlation_id, headers -> 'tags' AS tags
    FROM {schema}.jobs
    UNION ALL
    SELECT id, state, queue, task, args, kwargs, priority, eta, attempt, retries, crashes, worker_id, enqueued_at,
           started_at, finished_at, result, NULL, NULL, NULL, NULL,
           enqueued_by, headers ->> 'correlation_id', headers -> 'tags'
    FROM {schema}.finished_jobs
    UNION ALL
    SELECT id, 'dead', queue, task, args, kwargs, priority, eta, attempt, retries, crashes, worker_id, enqueued_at,
           claimed_at, died_at, NULL, reason, error_class, error_message, dead_letter_queue,
           enqueued_by, headers ->> 'correlation_id', headers -> 'tags'
    FROM {schema}.dead_letters;

CREATE VIEW {schema}.task_stats AS
    WITH live AS (
        SELECT task, count(*) FILTER (WHERE state = 'ready') AS ready,
               count(*) FILTER (WHERE state = 'scheduled') AS scheduled,
               count(*) FILTER (WHERE state = 'running') AS running
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
           runs[1] AS run_p50, runs[2] AS run_p95, run_max, wait_p95, last_finished_at
    FROM live FULL JOIN ended USING (task) FULL JOIN failed USING (task) FULL JOIN died USING (task);
COMMENT ON VIEW {schema}.task_stats IS 'Per task: live jobs by state, and of the last 24 hours ends, failed and crashed attempts, and times';

CREATE VIEW {schema}.failure_summary AS
    SELECT f.task, f.kind, f.error_class, count(*) AS attempts, count(DISTINCT f.job_id) AS jobs,
           count(DISTINCT d.id) AS dead, min(f.failed_at) AS first_at, max(f.failed_at) AS last_at,
           (array_agg(f.error_message ORDER BY f.failed_at DESC))[1] AS last_message
    FROM {schema}.failures f LEFT JOIN {schema}.dead_letters d ON d.id = f.job_id
    WHERE f.failed_at > now() - interval '24 hours'
    GROUP BY f.task, f.kind, f.error_class;
COMMENT ON VIEW {schema}.failure_summary IS 'Failed and crashed attempts of the last 24 hours by task and error, how many jobs they were, and how many of those are dead';

CREATE VIEW {schema}.audit_trail AS
    SELECT id, at, action, actor, details ->> 'by' AS by, job_id, queue, details ->> 'schedule' AS schedule, reason,
           details -> 'before' AS before, details -> 'after' AS after,
           details - '{by,schedule,before,after}'::text[] AS details
    FROM {schema}.audit_log;
COMMENT ON VIEW {schema}.audit_trail IS 'What people did, when and why: actor is the database role, by the name they gave';
"""

FUNCTIONS = r"""
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
            DELETE FROM jobs j WHERE j.id = cancel.job_id AND j.state IN ('scheduled', 'ready') RETURNING j.*
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
        FROM (SELECT * FROM dead_letters d WHERE d.id = ANY (gripped) ORDER BY d.enqueued_at, d.id) AS in_turn
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

DOWNGRADE = r"""
DROP VIEW {schema}.audit_trail, {schema}.failure_summary, {schema}.task_stats, {schema}.all_jobs;
DROP INDEX {schema}.finished_jobs_correlation_id, {schema}.finished_jobs_tags;
"""


def _run(*scripts: str) -> None:
    """Run whole scripts: through the driver without parameters, or onto paper for `--sql`."""
    for script in scripts:
        text = script.replace("{schema}", context.config.attributes["schema"])
        if context.is_offline_mode():
            context.get_context().impl.static_output(text)
        else:
            op.get_bind().execution_options(no_parameters=True).exec_driver_sql(text)


def _earlier(revision: str, name: str, start: str) -> str:
    """What an earlier revision made: the statements of its script from `start` on, to make it once more."""
    script: str = getattr(context.script.get_revision(revision).module, name)
    return script[script.index(start) :]


def upgrade() -> None:
    _run(INDEXES, VIEWS, FUNCTIONS)


def downgrade() -> None:
    cancel = _earlier("0004", "UPGRADE", "CREATE FUNCTION {schema}.cancel")
    requeue = _earlier("0007", "UPGRADE", "CREATE FUNCTION {schema}.requeue")
    all_jobs = _earlier("0001", "VIEWS", "CREATE VIEW {schema}.all_jobs").partition(
        "CREATE VIEW {schema}.active_jobs"
    )[0]
    again = (text.replace("CREATE FUNCTION", "CREATE OR REPLACE FUNCTION") for text in (cancel, requeue))
    _run(DOWNGRADE, all_jobs, *again)
