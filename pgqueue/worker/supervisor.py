"""One worker: a supervisor process with an asyncio loop, three connections, and executors that run the user's
code.

The supervisor never runs user code, so an import error, a segfault, an endless loop or a leak in a task
cannot stop claiming, heartbeats or acks. Its connections: listen; claim and ack; heartbeat and maintenance.

What a crash costs. An executor: the job it was running, acked as crashed at once. The fork server: all
running jobs. The supervisor: its children die with it, and its jobs run again after another worker has seen
its heartbeat stand still for a whole lease. The database: nothing; running jobs go on and their outcomes are
kept until it is back.

Asked to stop, it claims nothing more, gives back what has not started, lets running jobs finish for
`shutdown_timeout`, then kills them and gives them back too. Asked to stop at once, it does not wait. Which
signals ask for what is in `run`.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import socket
from collections.abc import Coroutine, Mapping, Sequence
from random import Random
from typing import Any, Literal, TypeVar

from pgqueue.config import Config
from pgqueue.database.link import Call, GroupFailed, Link
from pgqueue.database.listener import Listener
from pgqueue.database.migrate import require_revision
from pgqueue.errors import ConfigError, DatabaseUnavailable, PgQueueError, SchemaMismatch
from pgqueue.worker.claimer import EVERY_QUEUE, Claimer, TaskFilter
from pgqueue.worker.crew import RESTART_FIRST, Crew
from pgqueue.worker.dispatcher import STALL, Dispatcher, Executor
from pgqueue.worker.health import Health, HealthService
from pgqueue.worker.identity import Identity
from pgqueue.worker.lanes import Lanes
from pgqueue.worker.maintenance import Maintenance
from pgqueue.worker.payloads import Payloads
from pgqueue.worker.pools import Pool, Pools, filters
from pgqueue.worker.processes import Processes
from pgqueue.worker.scheduler import Scheduler
from pgqueue.worker.wire import Ended, FromExecutor, Loaded, Ready, Skipped, Tired, clock

T = TypeVar("T")

log = logging.getLogger("pgqueue.worker")

START_PATIENCE = 60.0
"""Seconds a starting worker waits for the database."""
TOLD_OF_QUEUES_SINCE = "0013"
"""The revision from which on the first job in a new queue is notified."""
DESCRIBED_SINCE = "0008"
"""The revision from which on a worker's row says what it knows."""
KILL_PATIENCE = 5.0
"""Seconds until a killed executor counts as gone although its fork server, which may be stuck, does not say
so."""
AFTER_THE_CLAIM = 0.01
"""Seconds from a notification to the look for due jobs. Mostly it tells of a job that is ready, whose claim
comes first."""
LOOK_INTERVAL = 0.2
"""Seconds between looks at jobs that run."""
IDLE_LOOK_INTERVAL = 1.0
"""Seconds between looks at a worker without jobs; the first job ends the pause."""
LEAVE_PATIENCE = 3.0
"""Seconds a leaving worker at least tries to reach the database, however little time is left."""


async def unless_set(event: asyncio.Event, work: Coroutine[Any, Any, T]) -> T | None:
    """What `work` returns; None, the work cancelled, as soon as the event is set."""
    task, asked = asyncio.ensure_future(work), asyncio.ensure_future(event.wait())
    try:
        await asyncio.wait([task, asked], return_when=asyncio.FIRST_COMPLETED)
        return None if asked.done() else task.result()
    finally:
        for each in (task, asked):
            each.cancel()
        await asyncio.gather(task, asked, return_exceptions=True)


class Supervisor:
    """One worker for one application.

    Args:
        processes: Its fork server, started; it has imported the application, the supervisor never does.
        loaded: What the fork server said of the application.
        queues: What to serve; empty for every queue there is.
        weights: None to serve `queues` strictly in their order.
    """

    def __init__(
        self,
        processes: Processes,
        loaded: Loaded,
        config: Config,
        *,
        version: str,
        queues: Sequence[str] = (),
        weights: Mapping[str, float] | None = None,
        random: Random | None = None,
    ) -> None:
        dsn = config.dsn
        if dsn is None:
            raise ConfigError(
                "a worker needs a database; set PGQUEUE_DSN, pass --dsn, or give the application its dsn="
            )
        self._processes = processes
        self._config = config
        self._version = version
        self._everything = not queues
        self._behind = list(queues[1:]) if weights is None else []
        self._random = random or Random()
        self._queues, self._weights = queues, weights
        self._identity = Identity()
        self._dsn = dsn
        self._claim_link = Link(dsn, schema=config.schema, name="claim")
        self._maintenance_link = Link(dsn, schema=config.schema, name="maintenance", statement_timeout=30)
        self._busy = asyncio.Event()
        self._at_once = False
        self._stop_event = asyncio.Event()
        self._leaving: asyncio.Timeout | None = None
        self._killed = False
        self._complete = True
        self._draining = False
        self._told_ready = False
        self._revision = ""
        self._tasks: set[asyncio.Task[None]] = set()
        self._failure: BaseException | None = None
        self._pools = Pools(
            [self._pool(name, tasks) for name, tasks in filters(config.pool, loaded.tasks).items()]
        )
        self._pools.tasks = loaded.tasks
        self._maintenance = Maintenance(
            self._maintenance_link,
            self._identity,
            self._pools,
            config,
            registration=self._registration,
            queues=lambda: self._pools.own.lanes.queues,
            discover=self._serve if self._everything else None,
            asleep=lambda: self._pools.asleep,
            wake=self._pools.wake,
            health=lambda: self._health.published(),
            proven=processes.prove,
            cancel=self._cancel,
            told_of_queues=lambda: self._revision >= TOLD_OF_QUEUES_SINCE,
            random=self._random,
        )
        self._scheduler = Scheduler(
            self._maintenance_link,
            self._identity,
            loaded.schedules,
            ready=self._maintenance.became_ready,
            random=self._random,
            hears=lambda: self._pools.own.claimer.hears,
        )
        self._health = Health(
            self._identity,
            self._pools,
            self._pools,
            self._maintenance,
            concurrency=self._pools.concurrency,
            lease=config.lease,
        )
        self._health_service = HealthService(self._health.report)
        processes.owner = self

    def _pool(self, name: str, tasks: TaskFilter) -> Pool:
        config, size = self._config, self._config.size(name)
        lanes = Lanes(self._queues, self._weights if self._queues else {}, self._random)
        dispatcher = Dispatcher(
            max_crashes=config.max_crashes,
            max_tasks=config.max_tasks_per_child,
            limited=config.limited,
            random=self._random,
        )
        claimer = Claimer(
            self._claim_link,
            lanes,
            dispatcher,
            self._identity,
            dispatch=self._send_out,
            next_eta=lambda: self._maintenance.next_eta(),
            share=lambda queues: self._maintenance.share(queues),
            retried=lambda seconds: self._maintenance.look_for_due_jobs(seconds),
            poll_interval=config.poll_every(hears=False),
            random=self._random,
            tasks=tasks,
            everything=self._everything,
        )
        payloads = Payloads(
            self._maintenance_link, dispatcher, send=self._processes.send, freed=lambda: self._freed(claimer)
        )
        crew = Crew(self._processes, dispatcher, name, size)
        return Pool(name, size, dispatcher, crew, lanes, claimer, payloads)

    async def run(self) -> bool:
        """Serve until `stop` is called; returns whether every running job could finish and was acked.

        Raises:
            SchemaMismatch: The database is not migrated, or at a revision this release does not work with.
            WorkerError: The worker cannot go on.
            DatabaseUnavailable: The database could not be reached in the first minute.
        """
        try:
            if self._config.health_port is not None:
                await self._health_service.start(self._config.health_host, self._config.health_port)
            if not await self._register():
                return True
            for pool in self._pools:
                pool.crew.fill()
            config, queues = self._config, self._pools.own.lanes.queues
            log.info(
                "worker_started id=%s queues=%s pool=%s concurrency=%d tasks=%d",
                self._identity.id,
                ",".join(queues) or "(all)",
                self._pools.name,
                self._pools.concurrency,
                len(self._pools.tasks),
            )
            if self._behind:
                log.info("queues_may_starve queues=%s behind=%s", ",".join(self._behind), queues[0])
            listener = Listener(
                config.listen_dsn or self._dsn,
                config.schema,
                notify_dsn=self._dsn,
                on_notify=self._on_notify,
                on_control=self._on_control,
                on_listen=lambda: self._hear(True),
                on_deaf=lambda: self._hear(False),
                random=self._random,
            )
            claiming = [self._spawn(pool.claimer.run()) for pool in self._pools]
            loops = [
                self._spawn(self._maintenance.run()),
                self._spawn(self._scheduler.run()),
                *([self._spawn(listener.run())] if config.listen else []),
                self._spawn(self._tick()),
            ]
            await self._stop_event.wait()
            deadline = clock() + config.shutdown_timeout
            told = self._spawn(self._tell_stopping())
            if self._failure is None:
                await self._drain(deadline)
            for pool in self._pools:
                pool.claimer.finish()
            for each in loops:
                each.cancel()
            await asyncio.wait([*loops, *claiming], timeout=1)
            for each in claiming:
                each.cancel()  # a database that is away keeps it busy
            await asyncio.gather(*loops, *claiming, return_exceptions=True)
            if self._failure is not None:
                raise self._failure
            await self._leave(deadline)
            if not self._at_once:
                await asyncio.wait([told], timeout=max(deadline - clock(), 0.0))
            return self._complete
        finally:
            for task in list(self._tasks):
                task.cancel()
            await self._processes.stop()
            await self._claim_link.close()
            await self._maintenance_link.close()
            self._health_service.close()

    async def _tell_stopping(self) -> None:
        if self._told_ready:
            await self._processes.run_hook("worker_stopping", self._identity.id)

    def stop(self, at_once: bool = False) -> None:
        """Ask to stop; `at_once`, also later: without waiting for what runs, or for the database."""
        self._stop_event.set()
        if at_once and not self._at_once:
            self._at_once = True
            if self._leaving is not None and not self._leaving.expired():
                self._leaving.reschedule(asyncio.get_running_loop().time() + LEAVE_PATIENCE)

    async def _register(self) -> bool:
        """Put this worker on the list as soon as there is a database; False when asked to stop before."""
        try:
            if await unless_set(self._stop_event, self._wait_for_database()) is None:
                if self._maintenance_link.opened:  # it may have been put on the list at the last moment
                    with contextlib.suppress(PgQueueError, TimeoutError):
                        async with asyncio.timeout(LEAVE_PATIENCE):
                            await self._maintenance.deregister()
                return False
        except DatabaseUnavailable:
            if self._stop_event.is_set():
                return False
            raise
        return True

    def _registration(self, worker: str) -> list[Call]:
        registered = Call(
            "register_worker",
            {
                "worker": worker,
                "host": socket.gethostname(),
                "pid": os.getpid(),
                # None: every queue there is, also one that will be.
                "queues": [] if self._everything else self._pools.own.lanes.queues,
                "pool": self._pools.name,
                "concurrency": self._pools.concurrency,
                "version": self._version,
            },
        )
        if self._revision < DESCRIBED_SINCE:
            return [registered]
        facts = {"tasks": sorted(self._pools.tasks), "conf": json.dumps(self._config.shown())}
        return [registered, Call("describe_worker", {"worker": worker, **facts})]

    async def _wait_for_database(self) -> Literal[True]:
        """Check the schema's revision and register, waiting a minute for a database that is starting."""
        deadline = clock() + START_PATIENCE
        told = False
        while True:
            try:
                rows = await self._maintenance_link.call("read_revision_table")
                found = await self._maintenance_link.call("read_revision") if rows[0][0] else []
                require_revision(*(found[0] if found else (None, None)), schema=self._config.schema)
                self._revision = found[0][0]
                await self._maintenance.register()
                return True
            except SchemaMismatch:
                raise
            except (DatabaseUnavailable, GroupFailed) as error:
                if clock() >= deadline or _is_hopeless(error):
                    raise
                if not told:
                    log.warning("database_unavailable connection=start error=%s", error)
                    told = True
                await asyncio.sleep(0.5 * self._random.uniform(0.5, 1.0))

    def _spawn(self, coroutine: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task = asyncio.get_running_loop().create_task(coroutine)
        self._tasks.add(task)
        task.add_done_callback(self._task_done)
        return task

    def _task_done(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and task.exception() is not None and self._failure is None:
            self._failure = task.exception()
            self._stop_event.set()

    def _hear(self, hears: bool) -> None:
        """Notifications reach this worker from now on, or do not."""
        for pool in self._pools:
            pool.claimer.hear(hears, self._config.poll_every(hears=hears))
        self._maintenance.look_for_due_jobs()
        self._scheduler.wake()  # what was notified meanwhile is missed

    def _serve(self, queue: str) -> None:
        """There is one more queue."""
        for pool in self._pools:
            pool.claimer.serve(queue)

    def _on_notify(self, queue: str) -> None:
        if self._everything and queue not in self._pools.own.lanes:
            self._maintenance.look_for_queues()
        self._pools.wake(queue if queue != EVERY_QUEUE else None)
        self._maintenance.look_for_due_jobs(AFTER_THE_CLAIM)

    def _on_control(self, what: str) -> None:
        """Somebody has changed a schedule, or wants the job of this id cancelled."""
        if what == "schedules":
            self._scheduler.wake()
        else:
            self._maintenance.look_for_cancellations()

    def _cancel(self, ids: list[str]) -> None:
        """Somebody wants these jobs cancelled; what does not end by itself is killed by `_tick`."""
        for pool in self._pools:
            for executor in pool.dispatcher.cancel(set(ids), clock()):
                log.info("job_cancelling pid=%d", executor.pid)
                self._processes.tell_cancelled(executor)
        self._pools.poke()

    def _send_out(self) -> None:
        for pool in self._pools:
            pool.crew.renew()
            if self._draining:
                continue
            if pool.dispatcher.waiting:
                self._busy.set()
            for slot, jobs in pool.dispatcher.assign(clock()):
                if jobs[0].args:
                    self._processes.send(slot, jobs)
                else:
                    self._spawn(pool.payloads.load(slot, jobs))

    def _freed(self, claimer: Claimer) -> None:
        """A slot has got nothing of what it was to get."""
        self._send_out()
        claimer.poke()

    def on_message(self, executor: Executor, messages: list[FromExecutor]) -> None:
        """An executor reports what became of its jobs."""
        pool = self._pools.of(executor)
        dispatcher = pool.dispatcher
        for message in messages:
            if isinstance(message, Ended):
                stale = dispatcher.finished(executor.slots[message.slot], message)
                if stale is not None:
                    log.warning(
                        "ack_stale count=1 verb=finish attempt=%d worker=%s jobs=%s",
                        stale.attempt,
                        stale.worker,
                        stale.id,
                    )
            elif isinstance(message, Skipped):
                dispatcher.skipped(executor.slots[message.slot], message)
            elif isinstance(message, Ready):
                executor.pid = message.pid
                executor.ready = True
                pool.crew.ready(executor)
                if not self._told_ready:
                    self._told_ready = True
                    self._spawn(self._processes.run_hook("worker_ready", self._identity.id))
            elif isinstance(message, Tired):
                log.info("executor_full pid=%d memory_kib=%d", executor.pid, message.memory)
                dispatcher.retire(executor)
        self._send_out()
        pool.claimer.poke()

    def on_exit(self, executor: Executor, how: str, *, unproven: bool) -> None:
        """An executor is gone: end its running jobs, put another in its place."""
        self._health.executor_gone(clock())
        ours = self._killed or unproven
        backends = [slot.board.backend for slot in executor.slots if slot.board.backend]
        if backends:
            self._spawn(self._end_transactions(backends))
        pool = self._pools.of(executor)
        crashed = pool.dispatcher.gone(executor, how, by_us=ours)
        for slot, job in crashed:
            if unproven:
                log.error("exclusive_job_killed job=%s pid=%d", job.id, executor.pid)
            if slot.cancelling:
                log.warning("job_cancel_killed job=%s task=%s pid=%d", job.id, job.task, executor.pid)
            elif slot.overdue:
                log.error(
                    "job_overdue job=%s task=%s attempt=%d limit=%g",
                    job.id,
                    job.task,
                    job.attempt,
                    pool.dispatcher.time_limit(job) or 0.0,
                )
            elif not ours and executor.ends_at is None:
                log.error("job_crashed job=%s task=%s attempt=%d how=%s", job.id, job.task, job.attempt, how)
        if not crashed and not self._draining and not executor.retiring and executor.ends_at is None:
            log.error("executor_died how=%s", how)
        pool.crew.gone(executor)
        self._send_out()
        pool.claimer.poke()

    async def _end_transactions(self, backends: list[int]) -> None:
        """What a killed executor had begun need not wait for the server to notice."""
        with contextlib.suppress(PgQueueError):
            await self._maintenance_link.call("end_transactions", backends=backends)

    def on_lost_fork_server(self) -> None:
        """Start another fork server; its children have been reported one by one."""
        if not self._draining:
            log.error("fork_server_lost")
            self._spawn(self._restart_fork_server())

    async def _restart_fork_server(self) -> None:
        self._pools.tasks = (await self._processes.start()).tasks
        for pool in self._pools:
            pool.crew.fill()

    async def _tick(self) -> None:
        """Look after what no event announces: stalled chunks, and jobs stranded here without a slot."""
        while True:
            idle = all(pool.dispatcher.is_idle for pool in self._pools)
            if idle:
                self._busy.clear()
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(IDLE_LOOK_INTERVAL):
                        await self._busy.wait()
            if not idle or self._busy.is_set():
                crowded = any(pool.dispatcher.is_crowded for pool in self._pools)
                await asyncio.sleep(STALL if crowded else LOOK_INTERVAL)
            now = clock()
            self._health.watch(now)
            self._processes.collect()
            for pool in self._pools:
                pool.dispatcher.take_back_stalled(now)
                for executor in pool.dispatcher.kill_overdue(now):
                    self._processes.kill(executor)
            self._send_out()
            for pool in self._pools:
                pool.crew.scale(now)
                if pool.dispatcher.release_stranded(now):
                    pool.claimer.poke()

    async def _drain(self, deadline: float) -> None:
        """Finish or give back everything in hand."""
        pools = self._pools
        self._draining = True
        for pool in pools:
            pool.claimer.draining = True
            pool.crew.dismiss()
        log.info("worker_stopping running=%d", pools.in_flight)
        for pool in pools:
            pool.dispatcher.take_back_all()
        killed_at = float("inf")
        while True:
            for pool in pools:
                pool.dispatcher.release_waiting()
            pools.poke()
            if not pools.in_flight:
                break
            now = clock()
            if now >= deadline or self._at_once:
                self._killed = True
                self._complete = False
                killed_at = min(killed_at, now)
                for executor in pools.executors:
                    if executor.busy:
                        self._processes.kill(executor)
                        if now - killed_at >= KILL_PATIENCE:
                            pools.of(executor).dispatcher.gone(executor, "was killed", by_us=True)
            await asyncio.sleep(0.01)
        for executor in pools.executors:
            self._processes.retire(executor)

    async def _sign_off(self) -> None:
        """Leave the list of workers, however often it takes: who stays on it is taken for silent later."""
        while True:
            try:
                await self._maintenance.wake_others()  # for what was given back
                await self._maintenance.deregister()
                return
            except (DatabaseUnavailable, GroupFailed):
                await asyncio.sleep(RESTART_FIRST)

    async def _leave(self, deadline: float) -> None:
        """Ack what is left and sign off; a database that is away now finds it all by itself later."""
        try:
            patience = 0.0 if self._at_once else deadline - clock()
            async with asyncio.timeout(max(LEAVE_PATIENCE, patience)) as self._leaving:
                for pool in self._pools:
                    pool.dispatcher.release_waiting()
                    await pool.claimer.flush()
                await self._sign_off()
        except (PgQueueError, TimeoutError) as error:
            self._complete = False
            log.warning("worker_left_jobs unacked=%d error=%s", self._pools.unacked, error)
        finally:
            self._leaving = None
        counts = self._pools.counts()
        log.info(
            "worker_stopped succeeded=%d failed=%d crashed=%d stale_acks=%d",
            counts["succeeded"],
            counts["failed"],
            counts["crashed"],
            counts["stale_acks"],
        )


def _is_hopeless(error: DatabaseUnavailable | GroupFailed) -> bool:
    """Waiting does not mend a wrong password, role, database or host name, nor a missing right (42)."""
    if isinstance(error, GroupFailed):
        return error.sqlstate is not None and error.sqlstate[:2] in ("22", "23", "42", "54", "P0")
    text = str(error).lower()
    return any(
        words in text
        for words in (
            "password authentication failed",
            "does not exist",
            "no password supplied",
            "resolve",
            "pg_hba.conf",
        )
    )
