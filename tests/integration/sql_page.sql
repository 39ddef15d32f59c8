-- Something of everything that docs/sql.md asks for.
CREATE TABLE orders (id integer PRIMARY KEY, email text, placed_at timestamptz DEFAULT now());
INSERT INTO orders (id, email) VALUES (41, 'c@d.e'), (42, 'a@b.c');

INSERT INTO pgqueue.workers (id, host, pid, queues, pool, concurrency, version, running, tasks)
VALUES ('w1', 'box', 4711, '{}', 'prefork', 2, '1', ARRAY['01890a5d-0000-7000-8000-000000000001'::uuid], '{shop.send_email}');

INSERT INTO pgqueue.jobs (id, state, queue, task, args, worker_id, claimed_at, eta, headers) VALUES
 ('01890a5d-0000-7000-8000-000000000001', 'running', 'default', 'shop.charge', '[42]', 'w1', now() - interval '1 minute', NULL,
  '{"correlation_id": "order 42"}'),
 ('01890a5d-0000-7000-8000-000000000002', 'ready', 'default', 'shop.charge', '[41]', NULL, NULL, NULL, '{"tags": ["vip", "eu"]}'),
 ('01890a5d-0000-7000-8000-000000000003', 'scheduled', 'default', 'shop.charge', '[41]', NULL, NULL, now() + interval '1 minute', '{}');

INSERT INTO pgqueue.finished_jobs (id, state, queue, task, args, kwargs, priority, attempt, retries, crashes, rescues, worker_id,
    enqueued_at, enqueued_by, started_at, finished_at, headers, result, result_error) VALUES
 ('01890a5d-ac96-774b-bcce-b302099a8057', 'succeeded', 'default', 'shop.send_email', '[42]', '{}', 5, 2, 1, 0, 0, 'w1',
  now() - interval '3 minutes', 'shop', now() - interval '2 minutes', now() - interval '1 minute',
  '{"correlation_id": "order 42"}', NULL, 'too large');

INSERT INTO pgqueue.dead_letters (id, queue, task, args, kwargs, priority, attempt, retries, crashes, rescues, enqueued_at,
    enqueued_by, headers, dead_letter_queue, reason, error_class, died_at) VALUES
 ('01890a5d-0000-7000-8000-000000000005', 'default', 'shop.charge', '[40]', '{}', 5, 1, 0, 0, 0, now(), 'shop',
  '{"correlation_id": "order 40"}', 'default', 'not_retryable', 'ValueError', now()),
 ('01890a5d-0000-7000-8000-000000000006', 'default', 'shop.charge', '[39]', '{}', 5, 1, 0, 0, 0, now(), 'shop', '{}',
  'default', 'not_retryable', 'ValueError', now());

INSERT INTO pgqueue.failures (job_id, attempt, task, queue, kind, error_class, error_message, failed_at) VALUES
 ('01890a5d-ac96-774b-bcce-b302099a8057', 1, 'shop.send_email', 'default', 'failed', 'OSError', 'no route', now()),
 ('01890a5d-0000-7000-8000-000000000005', 1, 'shop.charge', 'default', 'crashed', NULL, 'killed by SIGKILL', now());
