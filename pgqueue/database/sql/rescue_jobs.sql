-- Take back running jobs whose worker is fenced or missing: a standing rule, whoever notices first. A job that its
-- worker's heartbeat recorded as running has crashed; one whose start nobody recorded is only rescued, unless its task
-- must not run twice (`once`): then it may have begun. Too many of either buries it. Locks: those jobs rows, in order of worker, skipping held ones; then dead_letters rows.
-- Index: jobs_running, only in the gaps between live workers, so their index entries, dead or alive, are never walked
-- over; the gap beyond the last one is asked for apart, because `high IS NULL OR worker_id < high` bounds no index scan.
-- A worker may register after our snapshot and claim one of these rows before we lock it: the lock shows its claim, the
-- snapshot not its registration. Such a claim is younger than now(); one that is younger by more than a minute was made
-- before somebody set the clock back.
-- jobs_pkey for the writes; the failures rows are made of what those return, a join with jobs could read all of it.
-- Always one row: how many became ready again, their queues, and how many were buried.
WITH live AS MATERIALIZED (
    SELECT id FROM {schema}.workers WHERE NOT fenced
), gap AS (
    SELECT coalesce(lag(id) OVER (ORDER BY id), '') AS low, id AS high FROM live
), lost AS MATERIALIZED (
    SELECT found.* FROM gap, LATERAL (
        SELECT j.id, j.task, j.worker_id, j.crashes, j.rescues FROM {schema}.jobs j
        WHERE j.state = 'running' AND j.worker_id > gap.low AND j.worker_id < gap.high
          AND (j.claimed_at BETWEEN now() AND now() + interval '1 minute') IS NOT TRUE
        ORDER BY j.worker_id LIMIT %(batch)s::integer FOR UPDATE SKIP LOCKED
    ) AS found
    UNION ALL
    SELECT beyond.* FROM (
        SELECT id, task, worker_id, crashes, rescues FROM {schema}.jobs
        WHERE state = 'running' AND worker_id > coalesce((SELECT max(id) FROM live), '')
          AND (claimed_at BETWEEN now() AND now() + interval '1 minute') IS NOT TRUE
        ORDER BY worker_id LIMIT %(batch)s::integer FOR UPDATE SKIP LOCKED
    ) AS beyond
    UNION ALL
    SELECT ownerless.* FROM (
        SELECT id, task, worker_id, crashes, rescues FROM {schema}.jobs
        WHERE state = 'running' AND worker_id IS NULL
        LIMIT %(batch)s::integer FOR UPDATE SKIP LOCKED
    ) AS ownerless
    LIMIT %(batch)s::integer
), judged AS MATERIALIZED (
    SELECT lost.*, coalesce(lost.id = ANY (w.running), false) OR lost.task = ANY (%(once)s::text[]) AS crashed,
           coalesce((%(task_max_crashes)s::text::jsonb ->> lost.task)::integer, %(max_crashes)s::integer) AS max_crashes
    FROM lost LEFT JOIN {schema}.workers w ON w.id = lost.worker_id
), again AS (
    UPDATE {schema}.jobs
    SET state = 'ready', position = nextval('{schema}.jobs_position_seq'), worker_id = NULL, claimed_at = NULL,
        crashes = crashes + CASE WHEN id = ANY (ARRAY(SELECT id FROM judged WHERE crashed)) THEN 1 ELSE 0 END,
        rescues = rescues + CASE WHEN id = ANY (ARRAY(SELECT id FROM judged WHERE crashed)) THEN 0 ELSE 1 END
    WHERE id = ANY (ARRAY(SELECT id FROM judged WHERE CASE WHEN crashed THEN crashes + 1 < max_crashes
                                                           ELSE rescues < %(max_rescues)s::integer END))
    RETURNING id, queue, task, attempt
), gone AS (
    DELETE FROM {schema}.jobs
    WHERE id = ANY (ARRAY(SELECT id FROM judged WHERE CASE WHEN crashed THEN crashes + 1 >= max_crashes
                                                           ELSE rescues >= %(max_rescues)s::integer END))
    RETURNING *
), buried AS (
    INSERT INTO {schema}.dead_letters (id, queue, task, args, kwargs, priority, eta, expires_at, attempt, retries,
        max_retries, crashes, rescues, worker_id, claimed_at, enqueued_at, enqueued_by, unique_key, headers,
        dead_letter_queue, reason, error_class, error_message)
    SELECT g.id, g.queue, g.task, g.args, g.kwargs, g.priority, g.eta, g.expires_at, g.attempt, g.retries, g.max_retries,
        g.crashes + CASE WHEN judged.crashed THEN 1 ELSE 0 END, g.rescues, g.worker_id, g.claimed_at, g.enqueued_at,
        g.enqueued_by, g.unique_key, g.headers, coalesce(%(dead_letter_queues)s::text::jsonb ->> g.task, g.queue), 'crashed',
        'WorkerLost', format('worker %%s went silent or lost the job too often (crashes %%s, rescues %%s)',
                             coalesce(g.worker_id, '(none)'), g.crashes + CASE WHEN judged.crashed THEN 1 ELSE 0 END,
                             g.rescues)
    FROM gone g JOIN judged ON judged.id = g.id
    ON CONFLICT (id) DO UPDATE SET attempt = excluded.attempt, retries = excluded.retries, crashes = excluded.crashes,
        rescues = excluded.rescues, eta = excluded.eta, worker_id = excluded.worker_id, claimed_at = excluded.claimed_at,
        dead_letter_queue = excluded.dead_letter_queue, reason = excluded.reason, error_class = excluded.error_class,
        error_message = excluded.error_message, traceback = excluded.traceback, died_at = excluded.died_at
), noted AS (
    INSERT INTO {schema}.failures (job_id, attempt, task, queue, kind, error_class, error_message, worker_id)
    SELECT ended.id, ended.attempt, ended.task, ended.queue, 'crashed', 'WorkerLost',
           format('worker %%s went silent while it was running the job', judged.worker_id), judged.worker_id
    FROM judged JOIN (SELECT id, attempt, task, queue FROM again UNION ALL SELECT id, attempt, task, queue FROM gone) AS ended
         ON ended.id = judged.id
    WHERE judged.crashed
)
SELECT (SELECT count(*) FROM again) AS rescued, coalesce((SELECT array_agg(DISTINCT queue) FROM again), '{}') AS queues,
       (SELECT count(*) FROM gone) AS buried
