-- Whether this role may make a schema in this database. One row; locks nothing.
SELECT has_database_privilege(current_database(), 'CREATE') AS allowed, current_user::text AS role,
       current_database()::text AS database
