-- Some of the server's settings as this session has them, and where they come from.
SELECT name, setting, source FROM pg_settings WHERE name = ANY (%(names)s::text[])
