"""Helpers for the tests of applications that use pgqueue, on a real Postgres; see docs/testing.md.

With pytest there is the fixture `pgqueue_app`, a `QueueTester`; elsewhere `queue_tester(app)` makes one.
"""

from pgqueue.testing.enqueued import EnqueuedJob, JobMatch
from pgqueue.testing.runs import Drained, End, Run
from pgqueue.testing.server import QueueDatabase, open_database
from pgqueue.testing.tester import QueueTester, Workbench, open_workbench, queue_tester

__all__ = [
    "Drained",
    "End",
    "EnqueuedJob",
    "JobMatch",
    "QueueDatabase",
    "QueueTester",
    "Run",
    "Workbench",
    "open_database",
    "open_workbench",
    "queue_tester",
]
