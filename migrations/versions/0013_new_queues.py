"""A job in a queue that nobody sleeps on wakes the workers that serve every queue.

Those ask for it with a row named `*` in `wake`, which no queue is called. Online: two functions are replaced. Workers
of older releases go on looking for new queues every second, and so do those of this one on an older schema.

Revision ID: 0013
Revises: 0012
"""

from __future__ import annotations

from alembic import context, op

revision = "0013"
down_revision = "0012"
branch_labels = None
depends_on = None

# A hint that has run out is of a worker that is gone or has its hands full; whoever serves everything need not know its
# queue. One that was disarmed ('-infinity') is of a worker that keeps up by itself: then nobody is notified.
WAKE_WORKERS = r"""
CREATE OR REPLACE FUNCTION {schema}.wake_workers(queues text[], eta timestamptz DEFAULT NULL) RETURNS void
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, {schema}, pg_temp AS $$
DECLARE
    sleepers text[];
BEGIN
    SELECT array_agg(w.queue) INTO sleepers FROM wake w
    WHERE (w.queue = ANY (wake_workers.queues)
           OR w.queue = '*' AND EXISTS (
               SELECT FROM unnest(wake_workers.queues) AS name LEFT JOIN wake its ON its.queue = name
               WHERE (its.wake_until BETWEEN clock_timestamp() AND clock_timestamp() + interval '10 seconds'
                      OR its.wake_until = '-infinity') IS NOT TRUE))
      AND w.wake_until BETWEEN clock_timestamp() AND clock_timestamp() + interval '10 seconds'
      AND (wake_workers.eta IS NULL OR wake_workers.eta < w.next_eta)
      AND pg_notification_queue_usage() < 0.5;
    IF sleepers IS NOT NULL AND NOT notify_is_stuck() THEN
        PERFORM pg_notify('{channel}', name) FROM unnest(sleepers) AS name;
    END IF;
END $$;
COMMENT ON FUNCTION {schema}.wake_workers(text[], timestamptz) IS
    'NOTIFY the workers that sleep on these queues; eta: only those that know of nothing earlier';
"""

# In `enqueue`, which has the same in its own lines: a call costs more than the look.
BEFORE = r"""
    SELECT array_agg(w.queue) INTO sleepers FROM wake w
    WHERE w.queue = enqueue.queue
      AND w.wake_until BETWEEN clock_timestamp() AND clock_timestamp() + interval '10 seconds'
      AND (waits IS NOT TRUE OR enqueue.eta < w.next_eta)
      AND pg_notification_queue_usage() < 0.5;
    IF sleepers IS NOT NULL AND NOT notify_is_stuck() THEN
        PERFORM pg_notify('{schema}', name) FROM unnest(sleepers) AS name;
    END IF;
    RETURN wanted;
"""
AFTER = r"""
    SELECT w.queue, w.wake_until BETWEEN clock_timestamp() AND clock_timestamp() + interval '10 seconds',
           w.wake_until = '-infinity', w.next_eta
    INTO sleeper, sleeps, disarmed, next_eta FROM wake w WHERE w.queue = enqueue.queue;
    IF (sleeps OR disarmed) IS NOT TRUE THEN
        SELECT w.queue, w.wake_until BETWEEN clock_timestamp() AND clock_timestamp() + interval '10 seconds', w.next_eta
        INTO sleeper, sleeps, next_eta FROM wake w WHERE w.queue = '*';
    END IF;
    -- Not just `sleeps`: after NULL the rest is evaluated, and whether notifying is stuck costs as much as the insert.
    IF sleeps IS TRUE AND (waits IS NOT TRUE OR enqueue.eta < next_eta) AND pg_notification_queue_usage() < 0.5
        AND NOT notify_is_stuck()
    THEN
        PERFORM pg_notify('{channel}', sleeper);
    END IF;
    RETURN wanted;
"""
DECLARED_BEFORE = "    sleepers text[];\n"
DECLARED_AFTER = (
    "    sleeper  text;\n    sleeps   boolean;\n    disarmed boolean;\n    next_eta timestamptz;\n"
)


def _run(*scripts: str) -> None:
    """Run whole scripts: through the driver without parameters, or onto paper for `--sql`."""
    schema = context.config.attributes["schema"]
    for script in scripts:
        text = script.replace("{schema}", schema).replace("{channel}", schema)
        if context.is_offline_mode():
            context.get_context().impl.static_output(text)
        else:
            op.get_bind().execution_options(no_parameters=True).exec_driver_sql(text)


def _enqueue() -> str:
    """The function as the revision before made it."""
    made: str = context.script.get_revision("0012").module.ENQUEUE
    return made


def _wake_workers() -> str:
    """The function as the first revision made it."""
    script: str = context.script.get_revision("0001").module.PRODUCER_FUNCTIONS
    made = script[
        script.index("CREATE FUNCTION {schema}.wake_workers(") : script.index(
            "CREATE FUNCTION {schema}.enqueue("
        )
    ]
    return made.replace("CREATE FUNCTION", "CREATE OR REPLACE FUNCTION")


def _replaced(text: str, old: str, new: str) -> str:
    if text.count(old) != 1:
        raise RuntimeError(f"revision 0012 has changed: expected once in enqueue: {old}")
    return text.replace(old, new)


def upgrade() -> None:
    enqueue = _replaced(_replaced(_enqueue(), BEFORE, AFTER), DECLARED_BEFORE, DECLARED_AFTER)
    _run(WAKE_WORKERS, enqueue)


def downgrade() -> None:
    _run(_wake_workers(), _enqueue())
