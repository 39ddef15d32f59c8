# What can be said as search and replace, for sed -E. Say your own name for the application in the first two.
s/celery_app/queue_app/g
s/= Celery\(/= PgQueue(/

# Imports.
s/^from celery import Celery$/from pgqueue import PgQueue/
s/^from celery import Task$/from pgqueue import TaskContext/
s/^from celery\.result import AsyncResult$/from pgqueue import AsyncResult/
s/^from celery\.exceptions import (Reject|Retry|SoftTimeLimitExceeded|TimeLimitExceeded)$/from pgqueue import \1/
s/^from celery import shared_task$/from .queue_app import queue_app/

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
s/\.revoke\((terminate=True)?(, signal="[A-Z]+")?\)/.cancel()/g

# requirements.txt
s/^celery(\[[a-z,]*\])?([<>=~! ].*)?$/pgqueue/
/^flower/d
