-- One dead letter, whole. Index: dead_letters_pkey. No row: it is not dead.
SELECT id::text AS id, queue, task, args, kwargs, priority, eta, expires_at, attempt, retries, max_retries, crashes, rescues,
       worker_id, claimed_at, enqueued_at, enqueued_by, unique_key, headers, dead_letter_queue, reason, error_class,
       error_message, traceback, died_at
FROM {schema}.dead_letters
WHERE id = %(id)s::uuid
