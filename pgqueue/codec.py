"""Arguments, results and headers as JSON text, both ways.

`encode` runs in the process that enqueues and is the only check between a caller's mistake and a job that
can never run; `decode` runs in the executor and meets whatever text the database holds. Both end in
`PayloadError`, whose message names the argument. No pickle, ever. What each annotation accepts is in
`pgqueue.shapes` and `pgqueue.annotations`.
"""

from __future__ import annotations

import inspect
import re
import sys
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import Any, Final

import msgspec

from pgqueue.annotations import Builder
from pgqueue.errors import ConfigError, PayloadError
from pgqueue.job import OWN_HEADER
from pgqueue.shapes import MAX_DEPTH, PLAIN, Misfit, Shape, describe, reason

MAX_PAYLOAD_BYTES: Final = 1 << 20
"""args and kwargs together, as compact JSON in UTF-8."""

MAX_RESULT_BYTES: Final = 1 << 20

_MAX_PLANS = 256
_MOST_WITH_AN_INT = 600
"""Bytes: an int of more than `MAX_INT_BITS` has more digits than that."""
_MOST_WITHOUT_INTS = MAX_PAYLOAD_BYTES - len(b"{}")
_NUL = b"\\u0000"
_ONE_KIND = bytes.maketrans(b"{}", b"[]")
_NOT_BRACKETS = bytes(set(range(256)) - set(b"[]{}"))
_UNSTORABLE = re.compile("[\0\ud800-\udfff]")

_to_json = msgspec.json.Encoder().encode
_from_json = msgspec.json.Decoder().decode

_NamedShape = tuple[str, Shape]


class _Plan(typing.NamedTuple):
    """The shapes of one way to call the task: so many positional arguments, these keywords."""

    args: tuple[_NamedShape, ...]
    kwargs: dict[str, _NamedShape]
    quick: tuple[Callable[[Any], bool], ...]

    def are_own_json(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> bool:
        """Whether all are their own JSON values: `Shape.quick`."""
        for quick, value in zip(self.quick, args, strict=False):
            if not quick(value):
                return False
        return all(self.kwargs[key][1].quick(value) for key, value in kwargs.items())


class ArgumentCodec:
    """The arguments of one task, checked against its signature and annotations.

    Annotations are resolved on first use, when the module that defines the task is complete. One that cannot
    be resolved (a name imported under `TYPE_CHECKING`) counts as no annotation. Integers of up to 2,048 bits
    are kept exactly.

    Args:
        function: The task's function.
        task: Its name, for messages.
        bound: The function's first parameter is the task context, not an argument.

    Raises:
        ConfigError: The function is bound and has no parameter for the context.
    """

    def __init__(self, function: Callable[..., object], *, task: str, bound: bool) -> None:
        self._function = function
        self._task = task
        self._signature = _signature(function)
        if bound:
            self._signature = _without_context(self._signature, task)
        self._shapes: dict[str, Shape] = {}
        self._plans: dict[tuple[object, ...], _Plan] = {}
        # Types whose values are their own JSON, without looking at each, and how long it may be for that.
        self._own_json: dict[tuple[type, ...], int] = {}

    def encode(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> tuple[str, str]:
        """The arguments as a JSON array and a JSON object; defaults are not sent.

        Raises:
            TypeError: A call with these arguments would raise it.
            PayloadError: An argument does not fit its annotation, or the payload its limits.
        """
        kinds = tuple(map(type, args))
        if not kwargs and (most := self._own_json.get(kinds)) is not None:
            try:
                data: bytes = _to_json(args)
            except (ValueError, TypeError):
                data = _NUL
            if len(data) <= most and _NUL not in data:
                return data.decode(), "{}"
        plan = self._plans.get((len(args), *kwargs)) or self._plan(args, kwargs)
        if plan.are_own_json(args, kwargs) and (texts := _quick_json(args, kwargs)) is not None:
            if not kwargs and float not in kinds and len(self._own_json) < _MAX_PLANS:
                self._own_json[kinds] = _MOST_WITH_AN_INT if int in kinds else _MOST_WITHOUT_INTS
            return texts
        positional = [_encode(*named, value) for named, value in zip(plan.args, args, strict=True)]
        keywords = {key: _encode(*plan.kwargs[key], value) for key, value in kwargs.items()}
        names = [name for name, _ in plan.args]
        return _payload(positional, keywords, names)

    def encode_behind(self, ahead: int, args: Sequence[Any], kwargs: Mapping[str, Any]) -> tuple[str, str]:
        """As `encode`, for arguments that others, so many and not known yet, are put in front of."""
        check = (None,) * ahead
        plan = self._plans.get((ahead + len(args), *kwargs)) or self._plan((*check, *args), kwargs)
        positional = [_encode(*named, value) for named, value in zip(plan.args[ahead:], args, strict=True)]
        keywords = {key: _encode(*plan.kwargs[key], value) for key, value in kwargs.items()}
        return _payload(positional, keywords, [name for name, _ in plan.args[ahead:]])

    def decode(self, args: str, kwargs: str) -> tuple[list[Any], dict[str, Any]]:
        """The arguments `encode` was given, from any text.

        Raises:
            PayloadError: The text is not a JSON array and object, or does not fit the signature.
        """
        positional = [] if args == "[]" else _parse(args, "args", list)
        keywords = {} if kwargs == "{}" else _parse(kwargs, "kwargs", dict)
        try:
            plan = self._plans.get((len(positional), *keywords)) or self._plan(positional, keywords)
        except TypeError as error:
            raise PayloadError(str(error)) from None
        return (
            [_decode(*named, value) for named, value in zip(plan.args, positional, strict=True)],
            {key: _decode(*plan.kwargs[key], value) for key, value in keywords.items()},
        )

    def named(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
        """Arguments by the names of their parameters, however they are passed; not all need be there.

        Raises:
            TypeError: No call with these arguments is possible.
        """
        bound = self._signature.bind_partial(*args, **kwargs).arguments
        rest = [name for name, each in self._signature.parameters.items() if each.kind is each.VAR_KEYWORD]
        for name in rest:
            bound.update(bound.pop(name, {}))
        return dict(bound)

    def _plan(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> _Plan:
        """Find out how these arguments bind; whether they do depends on their number and names only."""
        if isinstance(args, (str, bytes)):
            raise TypeError(f"{self._task}: args must be a list or tuple, got {describe(args)}")
        try:
            self._signature.bind(*args, **kwargs)
        except TypeError as error:
            raise TypeError(f"{self._task}() {error}") from None
        if not self._shapes:
            self._shapes = _shapes_of(self._function, self._signature)
        positional = self._positional(len(args))
        plan = _Plan(
            args=positional,
            kwargs={key: self._keyword(key) for key in kwargs},
            quick=tuple(shape.quick for _, shape in positional),
        )
        if len(self._plans) >= _MAX_PLANS:  # *args or **kwargs: ever new ways to call
            self._plans.clear()
        self._plans[len(args), *kwargs] = plan
        return plan

    def _positional(self, count: int) -> tuple[_NamedShape, ...]:
        named: list[_NamedShape] = []
        for name, parameter in self._signature.parameters.items():
            if parameter.kind is parameter.VAR_POSITIONAL:
                named += [(f"{name}[{i}]", self._shapes[name]) for i in range(count - len(named))]
            elif parameter.kind in (parameter.POSITIONAL_ONLY, parameter.POSITIONAL_OR_KEYWORD):
                named.append((name, self._shapes[name]))
        return tuple(named[:count])

    def _keyword(self, key: str) -> _NamedShape:
        parameter = self._signature.parameters.get(key)
        if parameter and parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY):
            return key, self._shapes[key]
        rest = next(p for p in self._signature.parameters.values() if p.kind is p.VAR_KEYWORD)
        return _keyword_name(key), self._shapes[rest.name]


def encode_plain(args: Sequence[Any], kwargs: Mapping[str, Any]) -> tuple[str, str]:
    """Arguments for a task whose signature is not known here: JSON values only, else PayloadError."""
    if isinstance(args, (str, bytes)):
        raise TypeError(f"args must be a list or tuple, got {describe(args)}")
    names = [f"args[{i}]" for i in range(len(args))]
    positional = [_encode(name, PLAIN, value) for name, value in zip(names, args, strict=True)]
    return _payload(positional, _encode("kwargs", PLAIN, dict(kwargs), room=MAX_DEPTH + 1), names)


def encode_headers(headers: Mapping[str, Any]) -> str:
    """A JSON object; PayloadError if a header is not a JSON value."""
    text: str = _to_json(_encode("headers", PLAIN, dict(headers), room=MAX_DEPTH + 1)).decode()
    if len(text.encode()) > MAX_PAYLOAD_BYTES:
        raise PayloadError(f"headers must be at most {MAX_PAYLOAD_BYTES:,} bytes of JSON, got {len(text):,}")
    return text


def decode_headers(text: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """What the caller sent along, and what travels with the job for us; both empty if it cannot be read."""
    headers: dict[str, Any] = {}
    if text != "{}":
        with suppress(msgspec.DecodeError, RecursionError):
            headers = msgspec.json.decode(text, type=dict[str, Any])
    own = headers.pop(OWN_HEADER, None)
    return headers, own if isinstance(own, dict) else {}


def encode_result(value: object) -> tuple[str | None, str | None]:
    """A task's result as JSON text, or None and the reason why it cannot be stored. Never raises.

    Wider than arguments, because nobody decodes it by annotation: whatever msgspec or pydantic can write.
    """
    try:
        if value is None:
            return "null", None
        parts = msgspec.to_builtins(value, str_keys=True, enc_hook=_model_parts)
        data: bytes = _to_json(PLAIN.encode(parts, MAX_DEPTH))
    except Misfit as misfit:
        return None, clean_text(f"the result{misfit.path} {misfit.problem.partition(';')[0]}", 500)
    except BaseException as error:  # its class may do anything while it is taken apart
        return None, clean_text(f"the result cannot be written as JSON: {reason(error)}", 500)
    if len(data) > MAX_RESULT_BYTES:
        return None, f"the result must be at most {MAX_RESULT_BYTES:,} bytes of JSON, got {len(data):,}"
    return data.decode(), None


def decode_result(text: str) -> Any:
    """The stored result as JSON values; PayloadError if the text is not JSON."""
    return _parse(text, "the result", object)


def clean_text(text: str, limit_bytes: int) -> str:
    """Text that Postgres can store, at most `limit_bytes` long in UTF-8; a longer one loses its middle."""
    far = 0
    if len(text) > 2 * limit_bytes > 0:  # not all of it needs to be looked at
        far = len(text[limit_bytes:-limit_bytes].encode(errors="surrogatepass"))
        text = text[:limit_bytes] + text[-limit_bytes:]
    text = _UNSTORABLE.sub("\N{REPLACEMENT CHARACTER}", text)
    data = text.encode()
    if len(data) <= limit_bytes:
        return text
    keep = limit_bytes - len(_cut_marker(len(data) + far).encode())
    if keep <= 0:
        return data[: max(limit_bytes, 0)].decode(errors="ignore")
    head = data[: keep // 2].decode(errors="ignore")
    tail = data[len(data) - (keep - keep // 2) :].decode(errors="ignore")
    return head + _cut_marker(len(data) + far - len(head.encode()) - len(tail.encode())) + tail


def _cut_marker(count: int) -> str:
    return f"… {count} bytes cut …"


def _encode(name: str, shape: Shape, value: Any, room: int = MAX_DEPTH) -> Any:
    try:
        return shape.encode(value, room)
    except Misfit as misfit:
        raise PayloadError(f"{name}{misfit.path} {misfit.problem}") from misfit.__cause__
    except Exception as error:  # a property or conversion of the caller's own class
        raise PayloadError(f"{name} cannot be encoded as {shape.name}: {reason(error)}") from error


def _decode(name: str, shape: Shape, value: Any) -> Any:
    try:
        return shape.decode(value)
    except Misfit as misfit:
        raise PayloadError(f"{name}{misfit.path} {misfit.problem}") from misfit.__cause__
    except Exception as error:
        raise PayloadError(f"{name} cannot be decoded as {shape.name}: {reason(error)}") from error


def _quick_json(args: Sequence[Any], kwargs: Mapping[str, Any]) -> tuple[str, str] | None:
    """JSON of arguments that are their own JSON values, or None if the long way must write it or refuse."""
    try:
        data: bytes = _to_json(args)
        more: bytes = _to_json(kwargs) if kwargs else b"{}"
    except (ValueError, TypeError):  # of lone surrogates, of a sequence that is no list
        return None
    if len(data) + len(more) > MAX_PAYLOAD_BYTES or _NUL in data or _NUL in more:
        return None
    return data.decode(), more.decode()


def _payload(args: list[Any], kwargs: dict[str, Any], names: list[str]) -> tuple[str, str]:
    written_args, written_kwargs = _to_json(args), _to_json(kwargs)
    size = len(written_args) + len(written_kwargs)
    if size > MAX_PAYLOAD_BYTES:
        sizes = {name: len(_to_json(value)) for name, value in zip(names, args, strict=True)}
        sizes |= {key: len(_to_json(value)) for key, value in kwargs.items()}
        largest = max(sizes, key=sizes.__getitem__)
        raise PayloadError(
            f"arguments must be at most {MAX_PAYLOAD_BYTES:,} bytes of JSON, got {size:,}; the largest is "
            f"{largest} with {sizes[largest]:,}: store it and send its id"
        )
    return written_args.decode(), written_kwargs.decode()


def _parse(text: str, name: str, kind: type) -> Any:
    try:
        if _depth(text) > MAX_DEPTH + 1:
            raise PayloadError(f"{name} must be nested at most {MAX_DEPTH} levels deep")
        value = _from_json(text)
    except (ValueError, TypeError, RecursionError) as error:
        if isinstance(error, PayloadError):
            raise
        raise PayloadError(f"{name} must be JSON: {reason(error)}") from error
    if not isinstance(value, kind):
        expected = "array" if kind is list else "object"
        raise PayloadError(f"{name} must be a JSON {expected}, got {describe(value)}")
    return value


def _depth(text: str) -> int:
    """How deep the JSON is nested, at most; before it is parsed, since the parser recurses on the C stack.

    Beyond what is allowed it may be less than it is.
    """
    brackets = 0
    for bracket in "[{":  # not counted to the end: finding a few is forty times as fast
        at = -1
        while brackets <= MAX_DEPTH and (at := text.find(bracket, at + 1)) >= 0:
            brackets += 1
    if brackets <= MAX_DEPTH:
        return brackets
    # Every other part between quotes is in a string. Then the innermost pairs go, level by level.
    if "\\" in text:
        text = text.replace("\\\\", "").replace('\\"', "")
    outside = "".join(text.split('"')[::2])
    left = outside.encode(errors="replace").translate(_ONE_KIND, _NOT_BRACKETS)
    levels = 0
    while levels <= MAX_DEPTH + 1 and len(fewer := left.replace(b"[]", b"")) < len(left):
        left = fewer
        levels += 1
    return levels + left.count(b"[")


def _model_parts(value: object) -> Any:
    pydantic = sys.modules.get("pydantic")
    if pydantic is not None and isinstance(value, pydantic.BaseModel):
        return value.model_dump(mode="json")
    raise TypeError(f"{type(value).__name__} has no JSON form")


def _keyword_name(key: str) -> str:
    return key if key.isidentifier() else f"kwargs[{key!r:.60}]"


def _signature(function: Callable[..., object]) -> inspect.Signature:
    try:
        if sys.version_info >= (3, 14):
            import annotationlib

            return inspect.signature(function, annotation_format=annotationlib.Format.FORWARDREF)
        return inspect.signature(function)
    except ValueError:  # a function written in C that does not say
        return inspect.signature(lambda *args, **kwargs: None)


def _without_context(signature: inspect.Signature, task: str) -> inspect.Signature:
    parameters = list(signature.parameters.values())
    first = parameters[0] if parameters else None
    if first is None or first.kind not in (first.POSITIONAL_ONLY, first.POSITIONAL_OR_KEYWORD):
        raise ConfigError(
            f"a task with bind=True takes the task context first, {task} has no parameter for it"
        )
    return signature.replace(parameters=parameters[1:])


def _shapes_of(function: Callable[..., object], signature: inspect.Signature) -> dict[str, Shape]:
    hints = _hints_of(function, signature)
    build = Builder()
    return {name: build.shape(hints[name]) if name in hints else PLAIN for name in signature.parameters}


def _hints_of(function: Callable[..., object], signature: inspect.Signature) -> dict[str, Any]:
    try:
        return typing.get_type_hints(function, include_extras=True)
    except Exception:  # one of them cannot be resolved: take them one at a time
        scope = getattr(inspect.unwrap(function), "__globals__", {})
        found = ((p.name, _hint(p, scope)) for p in signature.parameters.values())
        return {name: hint for name, hint in found if hint is not inspect.Parameter.empty}


def _hint(parameter: inspect.Parameter, scope: dict[str, Any]) -> Any:
    if parameter.annotation is parameter.empty:
        return parameter.empty
    holder = types.SimpleNamespace(__annotations__={"it": parameter.annotation})
    try:
        return typing.get_type_hints(holder, scope, include_extras=True)["it"]
    except Exception:
        return inspect.Parameter.empty
