"""Checks of the work: workers, queues, tasks, schedules, and what has died lately."""

from __future__ import annotations

import shlex
from datetime import datetime
from typing import Final

from pgqueue.database.doctor.report import Finding, Level, number, some, span
from pgqueue.database.doctor.visit import Seen, Visit
from pgqueue.database.queues import Pause
from pgqueue.database.schedules import ScheduleStatus, list_schedules
from pgqueue.database.stats import QueueStats, WorkerStats, list_queues, list_worker_facts, number_or_none

LEFT_AFTER: Final = 60.0
"""Seconds after which a live worker should have rescued a job, or fired a tick."""
WAITS: Final = 60.0
"""Seconds a queue may have jobs and nobody to run them, as during a deploy."""
LONG_PAUSE: Final = 86_400.0
HELD: Final = 10
"""Ticks that wait for the job before them."""
COUNTED: Final = 10_000
SAMPLE: Final = 500
"""Jobs looked at in each lane, from both ends."""
LATELY: Final = 3600.0


def check_workers(visit: Visit) -> Seen:
    """Whether workers beat and claim, and whether the jobs of lost ones are taken back."""
    live = visit.live
    findings = [
        finding for each, state in visit.workers if (finding := _judge_worker(visit, each, state)) is not None
    ]
    if not live:
        findings.append(
            Finding(
                "warning",
                "no live worker is there" if visit.workers else "no worker is registered",
                "nothing runs, nothing is retried, and no schedule fires",
                visit.worker_command,
                "none",
            )
        )
    for row in visit.read("find_lost_jobs", by_index=True, most=COUNTED):
        if live and (row["oldest"] or 0.0) < LEFT_AFTER:
            continue
        whose = "is fenced" if row["fenced"] else "has no row any more"
        findings.append(
            Finding(
                "error",
                f"{number(row['jobs'], 'job')} of worker {row['worker'] or '(none)'}, which {whose}, still "
                "count as running",
                "no live worker is there to take them back"
                if not live
                else "live workers should have taken them back",
                visit.worker_command if not live else visit.command("inspect", "reserved"),
                f"lost {row['worker']}",
                facts=dict(row),
            )
        )
    return f"{len(live)} live", findings


def _judge_worker(visit: Visit, worker: WorkerStats, state: str) -> Finding | None:
    who = f"worker {worker.id}"
    at = f"process {worker.pid} on {worker.host}"
    facts = {
        "worker": worker.id,
        "state": state,
        "host": worker.host,
        "pid": worker.pid,
        "running": worker.running,
        "beat_ago": round(worker.beat_ago, 1),
    }
    if state == "silent":
        alone = not visit.live
        return Finding(
            "error" if alone else "warning",
            f"{who} ({at}) has been silent for {span(worker.beat_ago)}, with {number(worker.running, 'job')} "
            "running",
            "it is dead, frozen or cut off, and no live worker is there to take its jobs back"
            if alone
            else "it is dead, frozen or cut off; others take its jobs back once the lease has run out",
            f"ssh {worker.host} ps -o stat,etime,args -p {worker.pid}   # if it is gone or frozen (T): "
            f"{visit.worker_command}",
            worker.id,
            facts,
        )
    if state == "stuck":
        due = number_or_none(worker.stats.get("claim_due_for")) or 0.0
        return Finding(
            "error",
            f"{who} ({at}) beats, but a claim has been due for {span(due)}",
            "it runs nothing new; what it runs goes on",
            f"ssh {worker.host} kill -9 {worker.pid}   # then: {visit.worker_command}",
            worker.id,
            facts,
        )
    if state == "no executors":
        return Finding(
            "warning",
            f"{who} ({at}) has no executor",
            "they die, or do not get ready; it runs nothing",
            "look for executor_died in its log",
            worker.id,
            facts,
        )
    return None


def check_queues(visit: Visit) -> Seen:
    """Whether somebody serves each queue that has jobs, and which are paused."""
    queues = list_queues(visit.session)
    now = _now(visit)
    findings = [finding for each in queues if (finding := _judge_queue(visit, each, now)) is not None]
    ready = sum(each.ready for each in queues)
    least = "at least " if any("ready" in each.at_least for each in queues) else ""
    return f"{number(len(queues), 'queue')}, {least}{number(ready, 'ready job')}", findings


def _judge_queue(visit: Visit, queue: QueueStats, now: datetime) -> Finding | None:
    if queue.pause is not None:
        return _judge_pause(visit, queue, queue.pause, now)
    if queue.served:
        return None
    waited = queue.oldest_ready_seconds or 0.0
    least = "at least " if "ready" in queue.at_least else ""
    return Finding(
        "error" if waited > WAITS else "warning",
        f"nobody serves queue {queue.queue}: {least}{number(queue.ready, 'ready job')}, the oldest waits for "
        f"{span(waited)}",
        "they wait until a worker serves it",
        f"{visit.worker_command} -Q {shlex.quote(queue.queue)}",
        queue.queue,
        facts={"queue": queue.queue, "ready": queue.ready, "oldest_ready_seconds": waited},
    )


def _judge_pause(visit: Visit, queue: QueueStats, pause: Pause, now: datetime) -> Finding:
    lasts = (now - pause.since).total_seconds()
    until = f" until {pause.resume_at.isoformat(sep=' ', timespec='seconds')}" if pause.resume_at else ""
    why = f" ({pause.reason})" if pause.reason else ""
    who = pause.by or pause.actor
    least = "at least " if "ready" in queue.at_least else ""
    return Finding(
        "warning" if lasts > LONG_PAUSE and pause.resume_at is None else "hint",
        f"queue {queue.queue} has been paused for {span(max(lasts, 0.0))}{until} by {who}{why}: "
        f"{least}{number(queue.ready, 'ready job')}",
        "no worker claims from it",
        visit.command("queue", "resume", queue.queue),
        queue.queue,
        facts={
            "queue": queue.queue,
            "since": pause.since,
            "by": who,
            "reason": pause.reason,
            "ready": queue.ready,
        },
    )


def _now(visit: Visit) -> datetime:
    (row,) = visit.read("read_clock", schema=visit.schema)
    return datetime.fromtimestamp(row["now"]).astimezone()


def check_tasks(visit: Visit) -> Seen:
    """Whether the workers of each queue know the tasks that wait in it."""
    known = {facts.id: set(facts.tasks) for facts in list_worker_facts(visit.session) if facts.tasks}
    live = [worker for worker in visit.live if worker.id in known and not worker.stats.get("draining")]
    findings = []
    rows = visit.read("survey_tasks", by_index=True, most=SAMPLE)
    for row in rows:
        queue, task = row["queue"], row["task"]
        serving = [worker for worker in live if not worker.queues or queue in worker.queues]
        ignorant = [worker.id for worker in serving if task not in known[worker.id]]
        if not ignorant:
            continue
        if len(ignorant) < len(serving):
            who = f"{len(ignorant)} of its {len(serving)} workers do not know it"
            level: Level = "warning"
        else:
            who, level = "no live worker of that queue knows it", "error"
        findings.append(
            Finding(
                level,
                f"task {task} waits in queue {queue}, and {who}",
                "whoever claims such a job and does not know its task buries it as unknown_task",
                f"{visit.command('queue', 'pause', queue)}   # deploy workers that know it; then "
                f"{visit.command('queue', 'resume', queue)}, and "
                f"{visit.command('dead', 'requeue', '--reason', 'unknown_task', '--yes')}",
                f"{queue} {task}",
                facts={"queue": queue, "task": task, "workers": ignorant},
            )
        )
    if not live:
        return "no live worker says which tasks it knows", findings
    return f"workers know the {number(len({row['task'] for row in rows}), 'task')} that wait", findings


def check_schedules(visit: Visit) -> Seen:
    """Whether ticks come when they should."""
    schedules = list_schedules(visit.session)
    findings = [finding for each in schedules if (finding := _judge_schedule(visit, each)) is not None]
    return number(len(schedules), "schedule"), findings


def _judge_schedule(visit: Visit, schedule: ScheduleStatus) -> Finding | None:
    remove = visit.command("schedule", "remove", schedule.name)
    facts = {
        "schedule": schedule.name,
        "state": schedule.state,
        "next_tick": schedule.next_tick,
        "held": len(schedule.held),
        "workers": schedule.workers,
    }

    def finding(level: Level, what: str, means: str, mend: str) -> Finding:
        return Finding(level, f"schedule {schedule.name} {what}", means, mend, schedule.name, facts)

    if schedule.state == "not in code":
        if not visit.live:
            return None
        return finding(
            "warning",
            "is from code, and no live worker has it there",
            "it does not fire; it was taken out of the code, or workers of the release that has it are gone",
            f"{remove}   # or start a worker that has it",
        )
    if schedule.state == "broken":
        return finding(
            "error",
            "makes no sense here: no next tick can be worked out",
            "it does not fire; its cron expression or its timezone is not known on this machine",
            f"{remove}   # then add it again",
        )
    late = -(schedule.seconds or 0.0)
    if schedule.state == "active" and late > LEFT_AFTER and visit.live:
        return finding(
            "error",
            f"is stuck: its tick of {schedule.next_tick} is {span(late)} overdue, though workers are alive",
            "no job is made for its ticks; the workers cannot make it, or the database refuses it",
            f"{visit.command('schedule', 'run-now', schedule.name)}   # and look for schedule_broken in logs",
        )
    if len(schedule.held) >= HELD:
        way = visit.command("job", "show", schedule.last_job) if schedule.last_job else remove
        return finding(
            "warning",
            f"holds {number(len(schedule.held), 'tick')} that wait for the end of its job",
            "the job takes longer than the time between ticks, or hangs; overlap=skip would leave them out",
            way,
        )
    return None


def check_dead_letters(visit: Visit) -> Seen:
    """Whether jobs have died lately."""
    rows = visit.read("survey_deaths", seconds=LATELY, most=COUNTED)
    total = sum(row["jobs"] for row in rows)
    if not total:
        return f"none in the last {span(LATELY)}", []
    least = "at least " if total >= COUNTED else ""
    causes = [f"{row['jobs']:,} of {row['task']} ({row['error_class'] or row['reason']})" for row in rows]
    finding = Finding(
        "hint",
        f"{least}{number(total, 'job')} died in the last {span(LATELY)}: {some(causes, 3)}",
        "they do not run again by themselves",
        visit.command("dead", "list", "--since", "1h"),
        facts={"jobs": total, "causes": [dict(row) for row in rows[:20]]},
    )
    return f"{least}{total:,} in the last {span(LATELY)}", [finding]
