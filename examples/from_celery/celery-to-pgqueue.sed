# What can be said as search and replace, for sed -E. Say your own name for the application in the first two.
s/celery_app/queue_app/g
s/= Celery\(/= PgQueue(/

# Imports.
s/^from celery(\.canvas)? import ((Celery|Signature|Task|chain|chord|group|shared_task|, )+)$/from pgqueue import \2/
s/^(from pgqueue import .*)\bCelery\b/\1PgQueue/
s/^(from pgqueue import .*)\bTask\b/\1TaskContext/
s/^(from pgqueue import .*), shared_task$/\1\nfrom .queue_app import queue_app/
s/^from pgqueue import shared_task$/from .queue_app import queue_app/
s/^from celery\.result import AsyncResult$/from pgqueue import AsyncResult/
s/^from celery\.exceptions import (Reject|Retry|SoftTimeLimitExceeded|TimeLimitExceeded)$/from pgqueue import \1/

# Tasks.
s/@shared_task/@queue_app.task/
s/self: Task(\[[^]]*\])?/self: TaskContext/
s/(acks_late|reject_on_worker_lost|track_started|store_errors_even_if_ignored|trail)=(True|False), //g
s/(, )?(acks_late|reject_on_worker_lost|track_started|store_errors_even_if_ignored|trail)=(True|False)//g
s/serializer="json", //g
s/(, )?serializer="json"//g
s/self\.request\.hostname/self.request.worker/g

# Calls and results.
s/task_id=/job_id=/g
s/\.GroupResult\.restore\(/.CanvasResult(/
s/\.revoke\((terminate=True)?(, signal="[A-Z]+")?\)/.cancel()/g

# requirements.txt
s/^celery(\[[a-z,]*\])?([<>=~! ].*)?$/pgqueue/
/^flower/d
