-- Resume a queue, with a note in the audit log, and wake workers. Locks: the one row of meta, which claims only read.
-- One row: resumed, or already.
SELECT {schema}.resume_queue(%(queue)s::text, %(reason)s::text, %(actor)s::text) AS answer
