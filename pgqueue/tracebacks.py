"""What a failure looks like once it is stored: class, message and traceback of an exception, as text."""

from __future__ import annotations

import traceback
from contextlib import suppress

from pgqueue.codec import clean_text
from pgqueue.shapes import class_name

TRACEBACK_LIMIT = 64 << 10
MESSAGE_LIMIT = 8 << 10
CHAIN_LIMIT = 1_000


def describe(error: BaseException) -> tuple[str, str, str]:
    """Class, message and traceback of an exception, storable whatever its `__str__` does."""
    kind = type(error)
    name = class_name(kind)
    try:
        message = str.__str__(str(error))  # a str of its own class may do anything
    except BaseException as broken:
        message = f"({name}.__str__ raised {class_name(type(broken))})"
    try:
        text = (
            _steps(error) + f"{name}: {message}\n(more than {CHAIN_LIMIT} errors led to this one)\n"
            if _has_long_chain(error)
            else "".join(traceback.format_exception(error))
        )
    except BaseException as broken:
        text = _steps(error) + f"(formatting the error raised {class_name(type(broken))})"
    with suppress(BaseException):
        if kind.__module__ != "builtins":
            name = f"{kind.__module__}.{name}"
    return clean_text(name, 512), clean_text(message, MESSAGE_LIMIT), clean_text(text, TRACEBACK_LIMIT)


def _has_long_chain(error: BaseException) -> bool:
    """Whether so many errors led to this one that formatting them all would take minutes: each exception
    raised inside walks along the contexts of the one being handled.
    """
    link = error
    for _ in range(CHAIN_LIMIT):
        before = link.__cause__ or link.__context__
        if before is None or before is error:
            return False
        link = before
    return True


def _steps(error: BaseException) -> str:
    """Where it was raised, without what it says."""
    try:
        return "Traceback (most recent call last):\n" + "".join(traceback.format_tb(error.__traceback__))
    except BaseException:
        return ""
