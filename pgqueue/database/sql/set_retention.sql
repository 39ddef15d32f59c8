-- Keep what a task or a queue leaves behind longer or shorter than the rest; NULL leaves it as it is. Locks: its rows.
SELECT {schema}.set_retention(%(scope)s::text, %(name)s::text, %(finished)s::float8 * interval '1 day',
    %(failures)s::float8 * interval '1 day', %(dead_letters)s::float8 * interval '1 day', %(reason)s::text, %(actor)s::text)
