"""The exception tree is what the module's docstring draws."""

from __future__ import annotations

import inspect
import pickle
import re

import pytest

from pgqueue import errors

_LINE = re.compile(r"^(?P<indent>[ │├└─]*)(?P<name>[A-Z]\w+)(?: \((?P<also>\w+)\))?(?:\s|$)")


def _drawn() -> dict[str, tuple[str | None, str | None]]:
    """Each drawn class with its parent in the drawing and the base in brackets."""
    assert errors.__doc__ is not None
    drawing = errors.__doc__.split("::\n", 1)[1].split("\n\n`Signal`", 1)[0]
    found: dict[str, tuple[str | None, str | None]] = {}
    path: list[tuple[int, str]] = []
    for line in drawing.splitlines():
        if match := _LINE.match(line):
            depth = len(match["indent"])
            path = [entry for entry in path if entry[0] < depth]
            found[match["name"]] = (path[-1][1] if path else None, match["also"])
            path.append((depth, match["name"]))
    return found


def _classes() -> dict[str, type]:
    members = inspect.getmembers(errors, inspect.isclass)
    return {name: kind for name, kind in members if kind.__module__ == errors.__name__}


def test_the_docstring_draws_every_class_and_no_other() -> None:
    assert _drawn().keys() == _classes().keys()
    assert len(_drawn()) > 15


@pytest.mark.parametrize("name", sorted(_classes()))
def test_the_drawn_bases_are_the_real_ones(name: str) -> None:
    parent, also = _drawn()[name]
    bases = [base.__name__ for base in _classes()[name].__bases__]
    root = {"PgQueueError": "Exception"}.get(name)
    assert bases == [base for base in (parent or root, also) if base]


def test_a_signal_passes_an_except_exception() -> None:
    assert not issubclass(errors.Signal, Exception)


def test_errors_carry_their_facts() -> None:
    assert errors.EnqueueUncertain("lost", job_id="x").job_id == "x"
    failed = errors.JobFailed("it died", job_id="x", reason="crashed", error_class="a.B")
    assert (failed.job_id, failed.reason, failed.error_class, failed.error_message) == (
        "x",
        "crashed",
        "a.B",
        None,
    )
    retry = errors.Retry(delay=3.0, max_retries=1)
    assert (retry.delay, retry.max_retries, retry.cause, str(retry)) == (3.0, 1, None, "retry in 3.0 s")
    assert str(errors.Retry()) == "retry"
    assert isinstance(pickle.loads(pickle.dumps(errors.PayloadError("x"))), ValueError)  # noqa: S301
