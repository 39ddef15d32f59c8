-- Enqueue a schedule's job now, beside its ticks, with a note in the audit log. Locks: the schedule's row.
-- One row: the job's id, NULL if there is no such schedule.
SELECT {schema}.run_schedule(%(name)s::text, %(reason)s::text, %(actor)s::text)::text AS id
