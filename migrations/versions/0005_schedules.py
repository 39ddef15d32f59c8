"""Recurring jobs, and which worker has which of them in its code.

Online: a table and functions that older releases do not know, and a column with a constant default on the
workers' table, which is changed without being rewritten.

Revision ID: 0005
Revises: 0004
"""

from __future__ import annotations

from alembic import context, op

revision = "0005"
down_revision = "0004"
branch_labels = None
depends_on = None

UPGRADE = r"""
ALTER TABLE {schema}.workers ADD COLUMN schedules text[] NOT NULL DEFAULT '{}';

-- source: 'code' comes as long as a live worker has it in its code, 'database' until it is removed.
-- last_tick: the last tick that was decided about. next_tick: NULL has it worked out anew. held: ticks that wait for the
-- job before them. recent_jobs: the last job, and others that may still be live. version: whoever changes the row raises it,
-- and does so only from the version it has read; so each tick is decided about once.
CREATE TABLE {schema}.schedules (
    name        text COLLATE "C" PRIMARY KEY,
    source      text COLLATE "C" NOT NULL,
    task        text COLLATE "C" NOT NULL,
    cron        text,
    every       interval,
    timezone    text NOT NULL DEFAULT 'UTC',
    args        jsonb NOT NULL DEFAULT '[]',
    kwargs      jsonb NOT NULL DEFAULT '{}',
    queue       text COLLATE "C" NOT NULL DEFAULT 'default',
    priority    smallint NOT NULL DEFAULT 5,
    max_retries integer,
    expires_in  interval,
    headers     jsonb NOT NULL DEFAULT '{}',
    catch_up    text COLLATE "C" NOT NULL DEFAULT 'latest',
    overlap     text COLLATE "C" NOT NULL DEFAULT 'allow',
    jitter      interval NOT NULL DEFAULT '0',
    paused      boolean NOT NULL DEFAULT false,
    last_tick   timestamptz NOT NULL DEFAULT clock_timestamp(),
    next_tick   timestamptz,
    held        timestamptz[] NOT NULL DEFAULT '{}',
    recent_jobs uuid[] NOT NULL DEFAULT '{}',
    fired       bigint NOT NULL DEFAULT 0,
    missed      bigint NOT NULL DEFAULT 0,
    skipped     bigint NOT NULL DEFAULT 0,
    version     bigint NOT NULL DEFAULT 0,
    created_at  timestamptz NOT NULL DEFAULT clock_timestamp(),
    created_by  text NOT NULL DEFAULT session_user,
    changed_at  timestamptz NOT NULL DEFAULT clock_timestamp(),
    CONSTRAINT schedules_name_length CHECK (length(name) BETWEEN 1 AND 255),
    CONSTRAINT schedules_source_known CHECK (source IN ('code', 'database')),
    CONSTRAINT schedules_one_cadence CHECK (num_nonnulls(cron, every) = 1),
    CONSTRAINT schedules_catch_up_known CHECK (catch_up IN ('latest', 'all', 'none')),
    CONSTRAINT schedules_overlap_known CHECK (overlap IN ('allow', 'skip', 'queue')),
    CONSTRAINT schedules_priority_range CHECK (priority BETWEEN 0 AND 9),
    CONSTRAINT schedules_queue_length CHECK (length(queue) BETWEEN 1 AND 63)
) WITH (fillfactor = 50, autovacuum_vacuum_threshold = 100, autovacuum_vacuum_scale_factor = 0,
        autovacuum_vacuum_cost_delay = 0, vacuum_truncate = off);

CREATE FUNCTION {schema}.tell_schedulers() RETURNS void
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, {schema}, pg_temp AS $$
BEGIN
    IF pg_notification_queue_usage() < 0.5 AND NOT notify_is_stuck() THEN
        PERFORM pg_notify('{schema}_control', 'schedules');
    END IF;
END $$;
COMMENT ON FUNCTION {schema}.tell_schedulers IS 'Tell the workers that listen to look at the schedules; others look within seconds';

CREATE FUNCTION {schema}.note_schedule_act(
    action text, name text, reason text, actor text, details jsonb DEFAULT '{}'
) RETURNS void
LANGUAGE sql SECURITY DEFINER SET search_path = pg_catalog, {schema}, pg_temp AS $$
    INSERT INTO audit_log (action, reason, details)
    VALUES (action, reason, jsonb_strip_nulls(jsonb_build_object('schedule', name, 'by', actor)) || details)
$$;
COMMENT ON FUNCTION {schema}.note_schedule_act IS 'Write to the audit log what somebody did to a schedule';

CREATE FUNCTION {schema}.pause_schedule(name text, reason text DEFAULT NULL, actor text DEFAULT NULL) RETURNS text
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, {schema}, pg_temp AS $$
#variable_conflict use_column
BEGIN
    UPDATE schedules s SET paused = true, next_tick = NULL, held = '{}', version = s.version + 1, changed_at = clock_timestamp()
    WHERE s.name = pause_schedule.name AND NOT s.paused;
    IF NOT FOUND THEN
        RETURN CASE WHEN EXISTS (SELECT FROM schedules s WHERE s.name = pause_schedule.name) THEN 'already' ELSE 'unknown' END;
    END IF;
    PERFORM note_schedule_act('pause_schedule', pause_schedule.name, pause_schedule.reason, pause_schedule.actor,
                              '{"before": {"paused": false}, "after": {"paused": true}}');
    RETURN 'paused';
END $$;
COMMENT ON FUNCTION {schema}.pause_schedule IS 'Let a schedule''s ticks pass; returns paused, already, or unknown';

CREATE FUNCTION {schema}.resume_schedule(name text, reason text DEFAULT NULL, actor text DEFAULT NULL) RETURNS text
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, {schema}, pg_temp AS $$
#variable_conflict use_column
BEGIN
    -- What came meanwhile was not wanted: it is not made up for.
    UPDATE schedules s SET paused = false, last_tick = greatest(s.last_tick, clock_timestamp()), next_tick = NULL,
        version = s.version + 1, changed_at = clock_timestamp()
    WHERE s.name = resume_schedule.name AND s.paused;
    IF NOT FOUND THEN
        RETURN CASE WHEN EXISTS (SELECT FROM schedules s WHERE s.name = resume_schedule.name) THEN 'already' ELSE 'unknown' END;
    END IF;
    PERFORM note_schedule_act('resume_schedule', resume_schedule.name, resume_schedule.reason, resume_schedule.actor,
                              '{"before": {"paused": true}, "after": {"paused": false}}');
    PERFORM tell_schedulers();
    RETURN 'resumed';
END $$;
COMMENT ON FUNCTION {schema}.resume_schedule IS 'Let a schedule''s ticks count again from now on; returns resumed, already, or unknown';

CREATE FUNCTION {schema}.remove_schedule(name text, reason text DEFAULT NULL, actor text DEFAULT NULL) RETURNS text
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, {schema}, pg_temp AS $$
#variable_conflict use_column
DECLARE
    gone jsonb;
BEGIN
    IF EXISTS (SELECT FROM schedules s JOIN workers w ON NOT w.fenced AND s.name = ANY (w.schedules)
               WHERE s.name = remove_schedule.name AND s.source = 'code') THEN
        RETURN 'in_code';
    END IF;
    DELETE FROM schedules s WHERE s.name = remove_schedule.name
    RETURNING to_jsonb(s) - '{held,recent_jobs,version}'::text[] INTO gone;
    IF NOT FOUND THEN
        RETURN 'unknown';
    END IF;
    PERFORM note_schedule_act('remove_schedule', remove_schedule.name, remove_schedule.reason, remove_schedule.actor,
                              jsonb_build_object('before', gone));
    RETURN 'removed';
END $$;
COMMENT ON FUNCTION {schema}.remove_schedule IS 'Remove a schedule; returns removed, in_code (a live worker has it in its code: pause it), or unknown';

CREATE FUNCTION {schema}.run_schedule(name text, reason text DEFAULT NULL, actor text DEFAULT NULL) RETURNS uuid
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, {schema}, pg_temp AS $$
#variable_conflict use_column
DECLARE
    its    schedules%ROWTYPE;
    job_id uuid := uuid7();
BEGIN
    -- The jobs that are live count for `overlap`, this one too.
    UPDATE schedules s SET version = s.version + 1,
        recent_jobs = ARRAY(SELECT j.id FROM jobs j WHERE j.id = ANY (s.recent_jobs)) || job_id
    WHERE s.name = run_schedule.name RETURNING s.* INTO its;
    IF NOT FOUND THEN
        RETURN NULL;
    END IF;
    INSERT INTO jobs (id, queue, task, args, kwargs, priority, expires_at, max_retries, headers, enqueued_by)
    VALUES (job_id, its.queue, its.task, its.args, its.kwargs, its.priority,
            clock_timestamp() + its.expires_in, its.max_retries,
            its.headers || jsonb_build_object('schedule', its.name,
                'tick', to_char(clock_timestamp() AT TIME ZONE 'UTC', 'YYYY-MM-DD"T"HH24:MI:SS"Z"')),
            session_user);
    INSERT INTO audit_log (action, job_id, queue, reason, details)
    VALUES ('run_schedule', job_id, its.queue, run_schedule.reason,
            jsonb_strip_nulls(jsonb_build_object('schedule', its.name, 'by', run_schedule.actor)));
    PERFORM wake_workers(ARRAY[its.queue]);
    RETURN job_id;
END $$;
COMMENT ON FUNCTION {schema}.run_schedule IS 'Enqueue a schedule''s job now, beside its ticks; returns its id, or NULL if there is no such schedule';
REVOKE ALL ON FUNCTION {schema}.tell_schedulers, {schema}.note_schedule_act, {schema}.pause_schedule, {schema}.resume_schedule,
    {schema}.remove_schedule, {schema}.run_schedule FROM PUBLIC;
"""

DOWNGRADE = r"""
DROP FUNCTION {schema}.run_schedule, {schema}.remove_schedule, {schema}.resume_schedule, {schema}.pause_schedule,
    {schema}.note_schedule_act, {schema}.tell_schedulers;
DROP TABLE {schema}.schedules;
ALTER TABLE {schema}.workers DROP COLUMN schedules;
"""


def _run(script: str) -> None:
    """Run a whole script: through the driver without parameters, or onto paper for `--sql`."""
    text = script.replace("{schema}", context.config.attributes["schema"])
    if context.is_offline_mode():
        context.get_context().impl.static_output(text)
    else:
        op.get_bind().execution_options(no_parameters=True).exec_driver_sql(text)


def upgrade() -> None:
    _run(UPGRADE)


def downgrade() -> None:
    _run(DOWNGRADE)
