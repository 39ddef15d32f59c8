"""The names that Celery has, read from Celery itself: signatures, classes, commands, signals and settings."""

from __future__ import annotations

import inspect
import re
import warnings
from collections.abc import Callable, Iterable
from typing import Any

import click
from celery import Celery, canvas, signals
from celery.app import autoretry, defaults
from celery.app.amqp import AMQP
from celery.app.control import Control, Inspect
from celery.app.task import Context, Task, extract_exec_options
from celery.bin.celery import celery as command_line
from celery.result import AsyncResult, GroupResult
from celery.worker.control import Panel
from kombu import Producer

del click.NoSuchOption.show  # Celery's commands have put it there, and it is of no use to others

OTHER_COMMANDS = ("beat", "call", "control", "events", "inspect", "purge", "result", "status")
"""Those whose flags are looked at, beside the worker's."""


def names() -> dict[str, list[str]]:
    """The sections of docs/celery-table.txt, and what Celery has for each."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of names that it will not have for ever
        return _names()


def _names() -> dict[str, list[str]]:
    root = click.Context(command_line)
    found = {
        "Options of a task": task_options(),
        "Members of a task": members(Task) - task_options(),
        "Arguments of apply_async and send_task": call_options(),
        "Arguments of self.retry": parameters(Task.retry),
        "Members of self.request": members(Context),
        "Members of AsyncResult": members(AsyncResult),
        "Arguments of get": parameters(AsyncResult.get),
        "Members of GroupResult": members(GroupResult),
        "Canvas": set(canvas.__all__),
        "Members of Signature, chain, group and chord": signature_members(),
        "Members of the application": members(Celery),
        "Flags of every command": flags(command_line),
        "Flags of the worker": flags(command_line.get_command(root, "worker")),
        "Commands": set(command_line.list_commands(root)),
        "Flags of the other commands": {
            f"{name} {flag}"
            for name in OTHER_COMMANDS
            for flag in flags(command_line.get_command(root, name))
        },
        "inspect": members(Inspect) | panel("inspect"),
        "control": members(Control) | panel("control"),
        "Signals": set(signals.__all__),
        "Settings": {name for name, _ in defaults.flatten(defaults.NAMESPACES)},
    }
    return {section: sorted(those) for section, those in found.items()}


def members(kind: type) -> set[str]:
    return {name for name in dir(kind) if not name.startswith("_")}


def parameters(*functions: Callable[..., Any]) -> set[str]:
    """Of these functions, without `self` and the `**options` that go on to another one."""
    return {
        parameter.name
        for function in functions
        for parameter in inspect.signature(function).parameters.values()
        if parameter.kind is not parameter.VAR_KEYWORD and parameter.name != "self"
    }


def sent_options() -> set[str]:
    """What an attribute of a task, or an option of a call, says about its message."""
    seen: set[str] = set()

    class Sender:
        def __getattr__(self, name: str) -> None:
            seen.add(name)

    extract_exec_options(Sender())
    return seen


def task_options() -> set[str]:
    """Attributes of a task that are values, and what the decorator takes beside them."""
    internals = {
        "app",
        "backend",
        "request",
        "request_stack",
        "abstract",
        "Strategy",
        "Request",
        "from_config",
    }
    attributes = {name for name in members(Task) if not callable(getattr(Task, name, None))} - internals
    retries = re.findall(r"options\.get\(\s*'(\w+)'", inspect.getsource(autoretry))
    decorator = parameters(Celery._task_from_fun) - {"fun"}
    configured = {name for name, _ in Task.from_config}
    return attributes | set(retries) | decorator | configured | sent_options()


def call_options() -> set[str]:
    """What `apply_async` and `send_task` take, down to the message and its delivery."""
    app = Celery(broker="memory://", set_as_current=False)
    sender = AMQP(app)._create_task_sender()
    found = parameters(Task.apply_async, Celery.send_task, sender, AMQP(app).as_task_v2, Producer.publish)
    return (found | sent_options()) - {"name", "message", "body", "event_dispatcher", "create_sent_event"}


def signature_members() -> set[str]:
    kinds = (canvas.Signature, canvas._chain, canvas.group, canvas._chord, canvas.chunks)
    return set().union(*(members(kind) for kind in kinds)) - members(dict)


def panel(kind: str) -> set[str]:
    """What a worker answers."""
    return {name for name, meta in Panel.meta.items() if meta.type == kind and meta.visible}


def flags(command: click.Command | None) -> set[str]:
    """One name for each option: the longest; arguments as they are called."""
    assert command is not None
    return {spelling(each.opts) for each in command.params if each.name != "help"}


def spelling(flags: Iterable[str]) -> str:
    return max(flags, key=lambda flag: (flag.startswith("--"), len(flag)))
