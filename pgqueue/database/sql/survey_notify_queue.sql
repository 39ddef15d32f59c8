-- How full the server's notification queue is, 0 to 1; asking also frees what everybody has read. readers: sessions of
-- the cluster that have been in a transaction for over `seconds`: one that listens reads nothing until it ends, and a
-- full queue stays full. Nobody can see who listens, so one whose last statement was LISTEN comes first. holders: who has
-- the lock that commits with a notification take turns on, while others have been waiting for it for over a second.
SELECT pg_notification_queue_usage() AS usage,
       coalesce((SELECT json_agg(s) FROM (
           SELECT pid, usename AS role, application_name AS name, state, left(query, 200) AS query, xact_start AS since,
                  extract(epoch FROM clock_timestamp() - xact_start)::float8 AS seconds
           FROM pg_stat_activity
           WHERE backend_type = 'client backend' AND pid <> pg_backend_pid()
             AND xact_start < clock_timestamp() - make_interval(secs => %(seconds)s::float8)
           ORDER BY query ILIKE '%%listen%%' DESC, xact_start LIMIT 3) AS s), '[]') AS readers,
       coalesce((SELECT json_agg(s) FROM (
           SELECT a.pid, a.usename AS role, a.application_name AS name, a.state, left(a.query, 200) AS query, a.wait_event
           FROM pg_locks l JOIN pg_stat_activity a ON a.pid = l.pid
           WHERE l.locktype = 'object' AND l.database = 0 AND l.classid = 'pg_database'::regclass AND l.objid = 0 AND l.granted
             AND EXISTS (SELECT FROM pg_locks w WHERE w.locktype = 'object' AND w.database = 0
                           AND w.classid = 'pg_database'::regclass AND w.objid = 0 AND NOT w.granted
                           AND w.waitstart < clock_timestamp() - interval '1 second')) AS s), '[]') AS holders
