-- Write to the audit log what somebody did to a schedule, and tell the workers. No locks but the cluster's for notifying.
SELECT {schema}.note_schedule_act(%(action)s::text, %(name)s::text, %(reason)s::text, %(actor)s::text, %(details)s::text::jsonb),
       {schema}.tell_schedulers()
