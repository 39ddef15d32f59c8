-- The database's clock. Always one row.
SELECT clock_timestamp() AS now
