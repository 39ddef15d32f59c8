"""Queues can be paused.

Online: a column with a constant default on a table of one row, a view and functions that nobody calls but who
pauses. Claims of this release read the pauses wherever they are; those of older ones go on with paused queues.

Revision ID: 0006
Revises: 0005
"""

from __future__ import annotations

from alembic import context, op

revision = "0006"
down_revision = "0005"
branch_labels = None
depends_on = None

UPGRADE = r"""
-- {queue: {since, until, by, actor, reason}}: every claim reads it, so it is one value in one row.
ALTER TABLE {schema}.meta ADD COLUMN paused jsonb NOT NULL DEFAULT '{}';

CREATE VIEW {schema}.paused_queues AS
    SELECT p.queue, (p.pause ->> 'since')::timestamptz AS since, (p.pause ->> 'until')::timestamptz AS resume_at,
           p.pause ->> 'actor' AS actor, p.pause ->> 'by' AS by, p.pause ->> 'reason' AS reason
    FROM {schema}.meta m, jsonb_each(m.paused) AS p(queue, pause)
    WHERE (p.pause ->> 'until')::timestamptz > now() OR p.pause ->> 'until' IS NULL;
COMMENT ON VIEW {schema}.paused_queues IS 'The queues that no job is claimed from now, since when, until when, by whom and why';

CREATE FUNCTION {schema}.pause_queue(
    queue text, reason text DEFAULT NULL, actor text DEFAULT NULL, resume_at timestamptz DEFAULT NULL
) RETURNS text
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, {schema}, pg_temp AS $$
#variable_conflict use_column
DECLARE
    earlier jsonb;
    pause   jsonb;
BEGIN
    IF pause_queue.queue ~ '[^A-Za-z0-9_.:-]' OR length(pause_queue.queue) NOT BETWEEN 1 AND 63 OR pause_queue.queue IS NULL THEN
        RAISE invalid_parameter_value USING
            MESSAGE = format('a queue name is 1 to 63 letters, digits or ''_.:-'', got %L', left(pause_queue.queue, 100));
    ELSIF NOT isfinite(pause_queue.resume_at) OR pause_queue.resume_at NOT BETWEEN clock_timestamp() AND '9999-01-01' THEN
        RAISE invalid_parameter_value USING
            MESSAGE = format('resume_at must be in the future, before the year 9999, got %L', pause_queue.resume_at);
    END IF;
    PERFORM FROM meta FOR UPDATE;
    SELECT m.paused -> pause_queue.queue INTO earlier FROM meta m;
    pause := jsonb_strip_nulls(jsonb_build_object(
        'since', coalesce((SELECT p.since FROM paused_queues p WHERE p.queue = pause_queue.queue), clock_timestamp()),
        'until', pause_queue.resume_at, 'actor', session_user, 'by', pause_queue.actor, 'reason', pause_queue.reason));
    -- Those that ended by themselves are forgotten on the way.
    UPDATE meta SET paused = (SELECT coalesce(jsonb_object_agg(p.key, p.value), '{}') FROM jsonb_each(paused) AS p
                              WHERE p.key IN (SELECT queue FROM paused_queues)) || jsonb_build_object(pause_queue.queue, pause);
    INSERT INTO audit_log (action, queue, reason, details)
    VALUES ('pause_queue', pause_queue.queue, pause_queue.reason,
            jsonb_strip_nulls(jsonb_build_object('by', pause_queue.actor, 'before', earlier)) || jsonb_build_object('after', pause));
    RETURN 'paused';
END $$;
COMMENT ON FUNCTION {schema}.pause_queue IS 'Claim no more jobs from a queue, until it is resumed or resume_at has come; what runs ends';

CREATE FUNCTION {schema}.resume_queue(queue text, reason text DEFAULT NULL, actor text DEFAULT NULL) RETURNS text
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, {schema}, pg_temp AS $$
#variable_conflict use_column
DECLARE
    earlier jsonb;
BEGIN
    PERFORM FROM meta FOR UPDATE;
    SELECT m.paused -> resume_queue.queue INTO earlier FROM meta m
    WHERE EXISTS (SELECT FROM paused_queues p WHERE p.queue = resume_queue.queue);
    IF earlier IS NULL THEN
        RETURN 'already';
    END IF;
    UPDATE meta SET paused = paused - resume_queue.queue;
    INSERT INTO audit_log (action, queue, reason, details)
    VALUES ('resume_queue', resume_queue.queue, resume_queue.reason,
            jsonb_strip_nulls(jsonb_build_object('by', resume_queue.actor)) || jsonb_build_object('before', earlier));
    PERFORM wake_workers(ARRAY[resume_queue.queue]);
    RETURN 'resumed';
END $$;
COMMENT ON FUNCTION {schema}.resume_queue IS 'Claim jobs from a queue again; returns resumed, or already';
REVOKE ALL ON FUNCTION {schema}.pause_queue, {schema}.resume_queue FROM PUBLIC;
"""

DOWNGRADE = r"""
DROP FUNCTION {schema}.resume_queue, {schema}.pause_queue;
DROP VIEW {schema}.paused_queues;
ALTER TABLE {schema}.meta DROP COLUMN paused;
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
