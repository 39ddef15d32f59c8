-- Some of the server's settings as a session of this role begins with them, and where they come from.
SELECT name, reset_val AS setting, source FROM pg_settings WHERE name = ANY (%(names)s::text[])
