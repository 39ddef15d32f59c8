-- What the workers that are not fenced say of themselves, by id.
SELECT id, host, pid, tasks, schedules, conf FROM {schema}.workers WHERE NOT fenced ORDER BY id
