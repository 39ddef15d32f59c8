-- First in every transaction of an operator. Local, so that they also hold behind a transaction pooler.
SELECT set_config('statement_timeout', %(statement_timeout)s::text, true), set_config('lock_timeout', %(lock_timeout)s::text, true)
