-- Make the history partitions of the coming days. One row: how many were made.
SELECT {schema}.make_partitions() AS made
