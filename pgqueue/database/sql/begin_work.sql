-- First in every transaction of a worker. The planner may otherwise meet a bulk load with old statistics and sort the
-- whole lane for each claim, or scan a bloated table. Plans do not depend on parameters: an ack of one job looked so much
-- cheaper than one of several that it was planned anew each time, which took longer than the ack.
-- What is acknowledged is on disk: of synchronous_commit only `off` is raised. Local settings also hold behind a
-- transaction pooler.
SELECT set_config('enable_seqscan', 'off', true), set_config('enable_bitmapscan', 'off', true),
       set_config('enable_sort', 'off', true), set_config('jit', 'off', true),
       set_config('plan_cache_mode', 'force_generic_plan', true),
       set_config('statement_timeout', %(statement_timeout)s::text, true), set_config('lock_timeout', %(lock_timeout)s::text, true),
       CASE WHEN current_setting('synchronous_commit') = 'off' THEN set_config('synchronous_commit', 'on', true) END
