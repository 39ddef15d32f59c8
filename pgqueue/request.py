"""From a call with options to a checked, encoded request for a job. Pure values, no I/O."""

from __future__ import annotations

import json
from collections.abc import Mapping
from datetime import datetime
from typing import Any, get_args

from pgqueue.codec import encode_headers
from pgqueue.errors import shown
from pgqueue.job import (
    CANVAS,
    CORRELATION_ID,
    OWN_HEADER,
    TAGS,
    JobRequest,
    check_id,
    check_priority,
    check_queue,
    current_request,
    new_id,
)
from pgqueue.options import (
    MAX_LABEL,
    OnConflict,
    UniqueUntil,
    check_choice,
    check_correlation_id,
    check_limit,
    check_limits,
    check_max_retries,
    check_seconds,
    check_tags,
    check_time,
    check_unique_key,
)


def of_this_run(options: Mapping[str, Any]) -> Mapping[str, Any]:
    """The options of an enqueue that is made now, with the correlation id of the run that makes it.

    What jobs are found by is in the headers then, where hooks see it.
    """
    run = current_request.get()
    if run is not None and CORRELATION_ID not in options:
        inherited, headers = run.correlation_id, options.get("headers")
        given = isinstance(headers, Mapping) and CORRELATION_ID in headers
        if inherited and len(inherited) <= MAX_LABEL and not given:
            options = {**options, CORRELATION_ID: inherited}
    return _labelled(options) if options else options


def _labelled(options: Mapping[str, Any]) -> Mapping[str, Any]:
    """`correlation_id` and `tags` moved into the headers."""
    if CORRELATION_ID not in options and TAGS not in options:
        return options
    rest = dict(options)
    labels = {
        CORRELATION_ID: check_correlation_id(rest.pop(CORRELATION_ID, None)),
        TAGS: check_tags(rest.pop(TAGS, None)),
    }
    labels = {name: value for name, value in labels.items() if value}
    headers = rest.get("headers")
    if headers is not None and not isinstance(headers, Mapping):
        return rest  # refused further on
    if twice := [name for name in labels if name in (headers or ())]:
        raise ValueError(f"{twice[0]} is given twice, as an option and in headers: give one of them")
    return {**rest, "headers": {**(headers or {}), **labels}} if labels else rest


def build_request(
    task: str,
    args: str,
    kwargs: str,
    options: Mapping[str, Any],
    *,
    queue: str,
    priority: int,
    expires: float | None,
    unique_until: str | None = None,
    limits: tuple[float | None, float | None] = (None, None),
    history: bool = True,
    canvas_id: str | None = None,
) -> JobRequest:
    """A checked request.

    Args:
        task: The task's name.
        args: Encoded.
        kwargs: Encoded.
        options: As in `JobOptions`; names are checked already.
        queue: Unless the options say otherwise.
        priority: Unless the options say otherwise.
        expires: Seconds, unless the options say otherwise.
        unique_until: Unless the options say otherwise.
        limits: The task's soft and hard time limits, which those of the options have to fit.
        history: See `JobRequest`. A job of a canvas always has it.
        canvas_id: Of the canvas that the job belongs to.

    Raises:
        ValueError: An option's value is out of its range, or two exclude each other.
        TypeError: An option's value is of a wrong type.
        PayloadError: `headers` are not JSON values.
    """
    history = history or canvas_id is not None
    if not options:
        own = "{}" if canvas_id is None else f'{{"{OWN_HEADER}": {{"{CANVAS}": "{canvas_id}"}}}}'
        return JobRequest(
            new_id(), task, args, kwargs, queue, priority, expires_in=expires, headers=own, history=history
        )
    options = _labelled(options)
    get = options.get
    countdown, eta, until = get("countdown"), get("eta"), get("expires")
    if countdown is not None and eta is not None:
        raise ValueError("countdown and eta exclude each other: give one of them")
    job_id = get("job_id")
    wanted_queue, wanted_priority = get("queue"), get("priority")
    at = isinstance(until, datetime)
    unique_key = check_unique_key(get("unique_key"))
    on_conflict = get("on_conflict") or "return"
    check_choice("on_conflict", on_conflict, get_args(OnConflict))
    return JobRequest(
        id=new_id() if job_id is None else check_id(job_id),
        task=task,
        args=args,
        kwargs=kwargs,
        queue=queue if wanted_queue is None else check_queue(wanted_queue),
        priority=priority if wanted_priority is None else check_priority(wanted_priority),
        eta=None if eta is None else check_time("eta", eta),
        countdown=None if countdown is None else check_seconds("countdown", countdown),
        expires_at=check_time("expires", until) if at else None,
        expires_in=None if at else expires if until is None else check_seconds("expires", until),
        max_retries=check_max_retries(get("max_retries")),
        headers=_headers(options, unique_key, unique_until, limits, canvas_id),
        unique_key=unique_key,
        on_conflict=on_conflict,
        history=history,
        given_id=job_id is not None,
    )


def _headers(
    options: Mapping[str, Any],
    unique_key: str | None,
    unique_until: str | None,
    limits: tuple[float | None, float | None],
    canvas_id: str | None,
) -> str:
    """The caller's headers, and under a key of ours what else travels with the job."""
    own: dict[str, Any] = {}
    soft = check_limit("soft_time_limit", options.get("soft_time_limit"))
    hard = check_limit("time_limit", options.get("time_limit"))
    if soft is not None:
        own["soft_time_limit"] = soft
    if hard is not None:
        own["time_limit"] = hard
    if own:
        check_limits(limits[0] if soft is None else soft, limits[1] if hard is None else hard)
    until = options.get("unique_until")
    if until is not None:
        check_choice("unique_until", until, get_args(UniqueUntil))
    if unique_key is not None and (until or unique_until) == "start":
        own["unique_until"] = "start"
    if canvas_id is not None:
        own[CANVAS] = canvas_id
    headers = options.get("headers")
    if headers is None:
        return json.dumps({OWN_HEADER: own}) if own else "{}"
    if not isinstance(headers, Mapping):
        raise TypeError(f"headers must be a mapping, got {shown(headers)}")
    if OWN_HEADER in headers:
        raise ValueError(f"headers: {OWN_HEADER!r} is a name of ours, choose another")
    return encode_headers({**headers, OWN_HEADER: own} if own else headers)
