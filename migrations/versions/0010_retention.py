"""History and dead letters can be kept longer or shorter for a task or a queue; pruning waits for nobody.

History is dropped by the day. Where tasks or queues differ, a day is walked over, a few blocks at a time: before
its general retention has passed, what goes early is deleted; after it, what stays is copied into a new table
that takes the day's place.

Online: two tables, functions that only housekeeping calls, and those that people call. Workers of older
releases keep days for as long as any rule says, but delete dead letters by their own setting.

Revision ID: 0010
Revises: 0009
"""

from __future__ import annotations

from alembic import context, op

revision = "0010"
down_revision = "0009"
branch_labels = None
depends_on = None

TABLES = r"""
CREATE TABLE {schema}.retention (
    what   text COLLATE "C" NOT NULL,
    scope  text COLLATE "C" NOT NULL,
    name   text COLLATE "C" NOT NULL,
    keep   interval NOT NULL,
    set_at timestamptz NOT NULL DEFAULT clock_timestamp(),
    set_by text NOT NULL DEFAULT session_user,
    PRIMARY KEY (what, scope, name),
    CONSTRAINT retention_what_known CHECK (what IN ('finished', 'failures', 'dead_letters')),
    CONSTRAINT retention_scope_known CHECK (scope IN ('task', 'queue')),
    CONSTRAINT retention_keep_range CHECK (keep BETWEEN interval '0' AND interval '36500 days')
);

-- How far the walk over a day of history has come. general: what has no rule is past its retention, and goes; keep: the
-- longest rule that has passed, -1 day for none; node: the file of the day (VACUUM FULL moves its rows to another); block:
-- the next one to look at, NULL when it is through.
CREATE TABLE {schema}.retention_walks (
    part      text COLLATE "C" PRIMARY KEY,
    general   boolean NOT NULL,
    keep      interval NOT NULL,
    node      oid,
    block     bigint DEFAULT 0,
    walked_at timestamptz NOT NULL DEFAULT clock_timestamp()
);
"""

# A statement that waits for ACCESS EXCLUSIVE makes everybody who comes later wait behind it. So look first: whoever
# holds a lock now and still does after 0.2 s is not a quick ack, and nothing is tried. lock_timeout is for who comes in
# between.
LOOK_FIRST = r"""
CREATE FUNCTION {schema}.in_use(tables regclass[]) RETURNS boolean
LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $$
DECLARE
    holders text[] := ARRAY(SELECT l.virtualtransaction FROM pg_locks l
                            WHERE l.relation = ANY (tables) AND l.granted AND l.pid <> pg_backend_pid()
                              AND l.database = (SELECT d.oid FROM pg_database d WHERE d.datname = current_database()));
BEGIN
    FOR look IN 1..10 LOOP
        IF holders = '{}' THEN
            RETURN false;
        END IF;
        PERFORM pg_sleep(0.02);
        holders := ARRAY(SELECT l.virtualtransaction FROM pg_locks l
                         WHERE l.relation = ANY (tables) AND l.granted AND l.virtualtransaction = ANY (holders));
    END LOOP;
    RETURN holders <> '{}';
END $$;
COMMENT ON FUNCTION {schema}.in_use IS 'Whether some transaction that holds a lock on one of these tables goes on for 0.2 s';
REVOKE ALL ON FUNCTION {schema}.in_use FROM PUBLIC;
"""

PARTITIONS = r"""
CREATE OR REPLACE FUNCTION {schema}.make_partitions(days integer DEFAULT 14) RETURNS integer
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
            EXIT WHEN in_use(ARRAY[format('{schema}.%I', parent || '_default')::regclass]);
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

CREATE OR REPLACE FUNCTION {schema}.drop_partitions(finished_age interval, failures_age interval) RETURNS integer
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, {schema}, pg_temp SET timezone = 'UTC' SET lock_timeout = '200ms' AS $$
DECLARE
    parent  text;
    age     interval;
    kind    text;
    child   text;
    whole   regclass;
    part    regclass;
    dropped integer := 0;
BEGIN
    -- A negative age would drop what is to come, and all there is.
    IF NOT (finished_age >= interval '0' AND failures_age >= interval '0') OR finished_age IS NULL OR failures_age IS NULL THEN
        RAISE invalid_parameter_value USING
            MESSAGE = format('finished_age and failures_age must be 0 or more, got %L and %L', finished_age, failures_age);
    END IF;
    FOR parent, kind, age IN VALUES ('finished_jobs', 'finished', finished_age), ('failures', 'failures', failures_age) LOOP
        FOR child IN
            SELECT c.relname FROM pg_inherits i JOIN pg_class c ON c.oid = i.inhrelid
            WHERE i.inhparent = format('{schema}.%I', parent)::regclass AND c.relname ~ ('^' || parent || '_p\d{8}$')
              AND to_date(right(c.relname, 8), 'YYYYMMDD') + 1
                  <= now() - greatest(age, (SELECT max(r.keep) FROM retention r WHERE r.what = kind))
            ORDER BY c.relname
        LOOP
            -- Somebody reads it: the next pass tries again, acks must not wait for one after the other.
            EXIT WHEN in_use(ARRAY[format('{schema}.%I', parent)::regclass, format('{schema}.%I', child)::regclass]);
            BEGIN
                EXECUTE format('DROP TABLE {schema}.%I', child);
                EXECUTE format('DROP TABLE IF EXISTS {schema}.%I', replace(child, '_p', '_kept_'));
                DELETE FROM retention_walks w WHERE w.part = child;
                dropped := dropped + 1;
            EXCEPTION WHEN lock_not_available OR undefined_table THEN
                EXIT;
            END;
        END LOOP;
    END LOOP;
    -- An index that the last day without it has left behind is whole now, and says so once it is attached again: the
    -- newest day's, which nobody uses yet.
    FOR whole, part IN
        SELECT x.indexrelid::regclass, (SELECT h.inhrelid::regclass FROM pg_inherits h JOIN pg_index l ON l.indexrelid = h.inhrelid
                                        JOIN pg_class t ON t.oid = l.indrelid WHERE h.inhparent = x.indexrelid ORDER BY t.relname DESC LIMIT 1)
        FROM pg_index x
        WHERE x.indrelid IN ('{schema}.finished_jobs'::regclass, '{schema}.failures'::regclass) AND NOT x.indisvalid
          AND (SELECT count(*) FROM pg_inherits h WHERE h.inhparent = x.indrelid) = (SELECT count(*) FROM pg_inherits h WHERE h.inhparent = x.indexrelid)
    LOOP
        BEGIN
            EXECUTE format('ALTER INDEX %s ATTACH PARTITION %s', whole, part);
        EXCEPTION WHEN lock_not_available THEN
            NULL;
        END;
    END LOOP;
    DELETE FROM finished_jobs_default d WHERE d.finished_at <= now() - coalesce(
        (SELECT r.keep FROM retention r WHERE r.what = 'finished' AND r.scope = 'task' AND r.name = d.task),
        (SELECT r.keep FROM retention r WHERE r.what = 'finished' AND r.scope = 'queue' AND r.name = d.queue), finished_age);
    DELETE FROM failures_default d WHERE d.failed_at <= now() - coalesce(
        (SELECT r.keep FROM retention r WHERE r.what = 'failures' AND r.scope = 'task' AND r.name = d.task),
        (SELECT r.keep FROM retention r WHERE r.what = 'failures' AND r.scope = 'queue' AND r.name = d.queue), failures_age);
    RETURN dropped;
END $$;
"""

PRUNING = r"""
CREATE FUNCTION {schema}.retention_condition(what text, general interval, age interval) RETURNS text
LANGUAGE sql STABLE SECURITY DEFINER SET search_path = pg_catalog, {schema}, pg_temp AS $$
    SELECT format('(task = ANY (%L::text[]) OR task <> ALL (%L::text[]) AND (queue = ANY (%L::text[]) OR %L::boolean AND queue <> ALL (%L::text[])))',
        coalesce(array_agg(r.name) FILTER (WHERE r.scope = 'task' AND r.keep <= retention_condition.age), '{}'),
        coalesce(array_agg(r.name) FILTER (WHERE r.scope = 'task'), '{}'),
        coalesce(array_agg(r.name) FILTER (WHERE r.scope = 'queue' AND r.keep <= retention_condition.age), '{}'),
        retention_condition.general <= retention_condition.age,
        coalesce(array_agg(r.name) FILTER (WHERE r.scope = 'queue'), '{}'))
    FROM retention r WHERE r.what = retention_condition.what
$$;
COMMENT ON FUNCTION {schema}.retention_condition IS 'As SQL: whether a row of this age is past its retention, its task''s, else its queue''s, else the general one';

CREATE FUNCTION {schema}.prune_history(what text, general interval, blocks integer DEFAULT 500)
RETURNS TABLE (part text, removed bigint, kept bigint, blocks_left bigint)
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, {schema}, pg_temp SET timezone = 'UTC' SET lock_timeout = '200ms' AS $$
#variable_conflict use_column
DECLARE
    parent    text := CASE prune_history.what WHEN 'finished' THEN 'finished_jobs' WHEN 'failures' THEN 'failures' END;
    time_name text := CASE prune_history.what WHEN 'finished' THEN 'finished_at' ELSE 'failed_at' END;
    longest   interval := (SELECT max(r.keep) FROM retention r WHERE r.what = prune_history.what);
    child     text;
    copy      text;
    day       date;
    age       interval;
    due       interval;
    rest      boolean;
    walk      retention_walks%ROWTYPE;
    blocks_all bigint;
    upto      bigint;
    condition text;
    range     text;
    any_kept  boolean;
    its       regclass;
    node      oid;
BEGIN
    IF parent IS NULL OR NOT prune_history.general >= interval '0' OR prune_history.general IS NULL
        OR NOT prune_history.blocks >= 1 OR prune_history.blocks IS NULL THEN
        RAISE invalid_parameter_value USING MESSAGE = format(
            'what must be finished or failures, general 0 or more, blocks at least 1, got %L, %L and %L',
            prune_history.what, prune_history.general, prune_history.blocks);
    END IF;
    FOR child IN
        SELECT c.relname FROM pg_inherits i JOIN pg_class c ON c.oid = i.inhrelid
        WHERE longest IS NOT NULL AND i.inhparent = format('{schema}.%I', parent)::regclass
          AND c.relname ~ ('^' || parent || '_p\d{8}$')
        ORDER BY c.relname
    LOOP
        -- An hour late: an ack that comes late has found its day by then.
        day := to_date(right(child, 8), 'YYYYMMDD');
        age := now() - (day + 1)::timestamptz - interval '1 hour';
        rest := age >= prune_history.general;
        due := coalesce((SELECT max(r.keep) FROM retention r WHERE r.what = prune_history.what AND r.keep <= age), '-1 day');
        CONTINUE WHEN NOT rest AND due < interval '0'
            OR age >= greatest(prune_history.general, longest)  -- drop_partitions takes it
            OR EXISTS (SELECT FROM retention_walks w WHERE w.part = child AND w.general >= rest AND w.keep >= due AND w.block IS NULL);
        BEGIN
            INSERT INTO retention_walks (part, general, keep) VALUES (child, rest, due) ON CONFLICT DO NOTHING;
            SELECT * INTO walk FROM retention_walks w WHERE w.part = child FOR UPDATE SKIP LOCKED;
            -- Another worker's, which takes a step just now, or is set to keep less; or it is done.
            CONTINUE WHEN NOT FOUND OR walk.general > rest AND walk.walked_at > now() - interval '1 hour'
                OR walk.general >= rest AND walk.keep >= due AND walk.block IS NULL;
            copy := replace(child, '_p', '_kept_');
            its := format('{schema}.%I', child)::regclass;
            node := pg_relation_filenode(its);
            -- Settings that differ must not share a walk: one would delete what the other takes for copied.
            IF (walk.general, walk.keep) <> (rest, due) OR walk.block IS NULL OR walk.node IS DISTINCT FROM node
                OR rest AND to_regclass(format('{schema}.%I', copy)) IS NULL
            THEN
                walk.block := 0;
            END IF;
            condition := retention_condition(prune_history.what, prune_history.general, age);
            blocks_all := pg_relation_size(its) / current_setting('block_size')::bigint;
            -- Of a table whose rows have their bulk elsewhere, fewer: a step is short whatever they hold.
            upto := least(walk.block + greatest(1, prune_history.blocks * pg_relation_size(its) / greatest(pg_table_size(its), 1)), blocks_all);
            range := format('ctid >= %L::tid AND ctid < %L::tid', format('(%s,0)', walk.block), format('(%s,0)', upto));
            part := child;
            removed := 0;
            kept := 0;
            IF NOT rest THEN
                EXECUTE format('DELETE FROM {schema}.%I WHERE %s AND %s', child, range, condition);
                GET DIAGNOSTICS removed = ROW_COUNT;
            ELSE
                IF walk.block = 0 THEN
                    EXECUTE format('DROP TABLE IF EXISTS {schema}.%I', copy);
                    EXECUTE format('CREATE TABLE {schema}.%I (LIKE {schema}.%I INCLUDING DEFAULTS INCLUDING CONSTRAINTS INCLUDING INDEXES,'
                        ' CONSTRAINT of_the_day CHECK (%I >= %L AND %I < %L))', copy, parent,
                        time_name, day::timestamptz, time_name, (day + 1)::timestamptz);
                END IF;
                EXECUTE format('INSERT INTO {schema}.%I SELECT * FROM {schema}.%I WHERE %s AND NOT %s', copy, child, range, condition);
                GET DIAGNOSTICS kept = ROW_COUNT;
                EXECUTE format('SELECT count(*) FROM {schema}.%I WHERE %s AND %s', child, range, condition) INTO removed;
            END IF;
            walk.block := upto;
            IF upto >= blocks_all AND NOT rest THEN
                walk.block := NULL;
            ELSIF upto >= blocks_all AND NOT in_use(ARRAY[format('{schema}.%I', parent)::regclass, its]) THEN
                BEGIN
                    EXECUTE format('LOCK TABLE {schema}.%I IN ACCESS EXCLUSIVE MODE', parent);
                    EXECUTE format('DROP TABLE {schema}.%I', child);
                    EXECUTE format('SELECT EXISTS (SELECT FROM {schema}.%I)', copy) INTO any_kept;
                    IF any_kept THEN
                        EXECUTE format('ALTER TABLE {schema}.%I RENAME TO %I', copy, child);
                        EXECUTE format('ALTER TABLE {schema}.%I ATTACH PARTITION {schema}.%I FOR VALUES FROM (%L) TO (%L)',
                            parent, child, day::timestamptz, (day + 1)::timestamptz);
                        EXECUTE format('ALTER TABLE {schema}.%I DROP CONSTRAINT of_the_day', child);
                    ELSE
                        EXECUTE format('DROP TABLE {schema}.%I', copy);
                    END IF;
                    walk.block := NULL;
                EXCEPTION WHEN lock_not_available THEN
                    NULL;
                END;
            END IF;
            UPDATE retention_walks w SET general = rest, keep = due, node = pg_relation_filenode(to_regclass(format('{schema}.%I', child))), block = walk.block,
                walked_at = clock_timestamp() WHERE w.part = child;
            IF walk.block IS NULL OR upto < blocks_all THEN
                blocks_left := blocks_all - upto;
                RETURN NEXT;
            END IF;  -- else somebody reads the day: the next pass tries to put the copy in its place again
            RETURN;
        EXCEPTION WHEN lock_not_available OR undefined_table THEN
            CONTINUE;  -- another worker has just begun or ended it
        END;
    END LOOP;
END $$;
COMMENT ON FUNCTION {schema}.prune_history IS 'Walk on over a day of which some rows are past their retention and others are not; no row when there is nothing to do';

CREATE FUNCTION {schema}.prune_dead_letters(general interval, batch integer DEFAULT 1000) RETURNS SETOF uuid
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, {schema}, pg_temp AS $$
#variable_conflict use_column
BEGIN
    RETURN QUERY
    DELETE FROM dead_letters WHERE id = ANY (ARRAY(
        SELECT d.id FROM dead_letters d
        WHERE d.died_at <= now() - least(prune_dead_letters.general,
                  (SELECT min(r.keep) FROM retention r WHERE r.what = 'dead_letters'))
          AND d.died_at <= now() - coalesce(
              (SELECT r.keep FROM retention r WHERE r.what = 'dead_letters' AND r.scope = 'task' AND r.name = d.task),
              (SELECT r.keep FROM retention r WHERE r.what = 'dead_letters' AND r.scope = 'queue' AND r.name = d.queue),
              prune_dead_letters.general)
        ORDER BY d.died_at LIMIT prune_dead_letters.batch FOR UPDATE SKIP LOCKED))
    RETURNING id;
END $$;
COMMENT ON FUNCTION {schema}.prune_dead_letters IS 'Delete a batch of dead letters past their retention; their ids';
REVOKE ALL ON FUNCTION {schema}.retention_condition, {schema}.prune_history, {schema}.prune_dead_letters FROM PUBLIC;
"""

ACTS = r"""
CREATE FUNCTION {schema}.set_retention(
    scope text, name text, finished interval DEFAULT NULL, failures interval DEFAULT NULL, dead_letters interval DEFAULT NULL,
    reason text DEFAULT NULL, actor text DEFAULT NULL
) RETURNS void
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, {schema}, pg_temp AS $$
#variable_conflict use_column
DECLARE
    new_ones jsonb;
    earlier  jsonb;
BEGIN
    -- In days: a year is 360 of them where intervals are compared, and 365 or 366 where they are added to a time.
    SELECT coalesce(jsonb_object_agg(n.what, justify_hours(make_interval(secs => extract(epoch FROM n.keep)))), '{}') INTO new_ones
    FROM (VALUES ('finished', set_retention.finished), ('failures', set_retention.failures),
                 ('dead_letters', set_retention.dead_letters)) AS n(what, keep)
    WHERE n.keep IS NOT NULL;
    IF set_retention.scope NOT IN ('task', 'queue') OR set_retention.scope IS NULL THEN
        RAISE invalid_parameter_value USING MESSAGE = format('scope must be task or queue, got %L', set_retention.scope);
    ELSIF set_retention.name IS NULL OR length(set_retention.name) NOT BETWEEN 1 AND 255 THEN
        RAISE invalid_parameter_value USING MESSAGE = format('name must have 1 to 255 characters, got %L', left(set_retention.name, 300));
    ELSIF new_ones = '{}' THEN
        RAISE invalid_parameter_value USING MESSAGE = 'give finished, failures or dead_letters: how long they are kept';
    ELSIF EXISTS (SELECT FROM jsonb_each_text(new_ones) AS n WHERE n.value::interval NOT BETWEEN interval '0' AND interval '36500 days') THEN
        RAISE invalid_parameter_value USING MESSAGE = format('a retention must be from 0 to 36500 days, got %s', new_ones);
    END IF;
    -- A step that is under way goes by the old rules, and the next one is to start anew.
    LOCK TABLE retention_walks IN SHARE ROW EXCLUSIVE MODE;
    SELECT jsonb_object_agg(r.what, r.keep) INTO earlier FROM retention r
    WHERE r.scope = set_retention.scope AND r.name = set_retention.name;
    INSERT INTO retention (what, scope, name, keep)
    SELECT n.key, set_retention.scope, set_retention.name, n.value::interval FROM jsonb_each_text(new_ones) AS n
    ORDER BY n.key
    ON CONFLICT (what, scope, name) DO UPDATE SET keep = excluded.keep, set_at = excluded.set_at, set_by = excluded.set_by;
    DELETE FROM retention_walks;
    INSERT INTO audit_log (action, queue, reason, details)
    VALUES ('set_retention', CASE set_retention.scope WHEN 'queue' THEN set_retention.name END, set_retention.reason,
            jsonb_strip_nulls(jsonb_build_object('by', set_retention.actor, set_retention.scope, set_retention.name,
                'before', earlier, 'after', coalesce(earlier, '{}') || new_ones)));
END $$;
COMMENT ON FUNCTION {schema}.set_retention IS 'Keep history, failures or dead letters of a task or of a queue longer or shorter than the others';

CREATE FUNCTION {schema}.remove_retention(scope text, name text, reason text DEFAULT NULL, actor text DEFAULT NULL) RETURNS boolean
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, {schema}, pg_temp AS $$
#variable_conflict use_column
DECLARE
    earlier jsonb;
BEGIN
    LOCK TABLE retention_walks IN SHARE ROW EXCLUSIVE MODE;
    WITH gone AS (
        DELETE FROM retention r WHERE r.scope = remove_retention.scope AND r.name = remove_retention.name RETURNING r.*
    ) SELECT jsonb_object_agg(g.what, g.keep) INTO earlier FROM gone g;
    IF earlier IS NULL THEN
        RETURN false;
    END IF;
    DELETE FROM retention_walks;
    INSERT INTO audit_log (action, queue, reason, details)
    VALUES ('remove_retention', CASE remove_retention.scope WHEN 'queue' THEN remove_retention.name END, remove_retention.reason,
            jsonb_strip_nulls(jsonb_build_object('by', remove_retention.actor, remove_retention.scope, remove_retention.name,
                'before', earlier)));
    RETURN true;
END $$;
COMMENT ON FUNCTION {schema}.remove_retention IS 'Keep a task or a queue as long as the others again; whether it differed';
REVOKE ALL ON FUNCTION {schema}.set_retention, {schema}.remove_retention FROM PUBLIC;
"""

DOWNGRADE = r"""
DROP FUNCTION {schema}.remove_retention, {schema}.set_retention, {schema}.prune_dead_letters, {schema}.prune_history,
    {schema}.retention_condition, {schema}.in_use;
DROP TABLE {schema}.retention, {schema}.retention_walks;
DO $$
DECLARE
    copy regclass;
BEGIN
    FOR copy IN
        SELECT c.oid::regclass FROM pg_class c WHERE c.relnamespace = '{schema}'::regnamespace AND c.relkind = 'r'
          AND c.relname ~ '^(finished_jobs|failures)_kept_\d{8}$' AND NOT c.relispartition
    LOOP
        EXECUTE format('DROP TABLE %s', copy);
    END LOOP;
END $$;
"""


def _run(*scripts: str) -> None:
    """Run whole scripts: through the driver without parameters, or onto paper for `--sql`."""
    for script in scripts:
        text = script.replace("{schema}", context.config.attributes["schema"])
        if context.is_offline_mode():
            context.get_context().impl.static_output(text)
        else:
            op.get_bind().execution_options(no_parameters=True).exec_driver_sql(text)


def upgrade() -> None:
    _run(TABLES, LOOK_FIRST, PARTITIONS, PRUNING, ACTS)


def downgrade() -> None:
    functions: str = context.script.get_revision("0001").module.PARTITION_FUNCTIONS
    functions = functions.replace("CREATE FUNCTION", "CREATE OR REPLACE FUNCTION")
    _run(functions.partition("SELECT {schema}.make_partitions();")[0], DOWNGRADE)
