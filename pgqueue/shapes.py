"""How a type annotation is carried in JSON: one `Shape` per annotation, both ways.

A shape takes a value apart into JSON values (`encode`) and puts it together again (`decode`). It is strict on
both sides: what comes back equals what was sent and has the annotated type, or the call fails. Nothing is
turned into a string because JSON has no better word for it, unless the annotation says how to read it back.

Two limits follow from `jsonb`, which stores numbers as `numeric`: -0.0 comes back as 0.0, and a float from
1e16 on comes back as a whole number where an int would fit too (no annotation, `int | float`).
"""

from __future__ import annotations

import base64
import enum
import math
import reprlib
import typing
from collections.abc import Callable, Iterable, Mapping
from datetime import date, datetime, time, timedelta
from decimal import Decimal
from typing import Any, Final
from uuid import UUID

import msgspec

MAX_DEPTH: Final = 64
"""Lists and objects inside each other, per argument."""

MAX_INT_BITS: Final = 2048
"""617 digits: readable under every setting of Python's limit on int conversion, whose minimum is 640."""

_QUALNAME: Final = type.__dict__["__qualname__"]

shorten = reprlib.Repr()
shorten.maxstring = shorten.maxother = shorten.maxlong = 80


class Misfit(Exception):
    """A value does not fit its shape.

    Attributes:
        problem: The rule and the value, to follow the argument's name.
        path: Where inside the argument; grows on the way out.
        other_type: The value is of another type, so another member of a union may take it.
    """

    def __init__(self, problem: str, *, other_type: bool = False) -> None:
        super().__init__(problem)
        self.problem = problem
        self.path = ""
        self.other_type = other_type


def describe(value: object) -> str:
    """`str 'abc'`: type and shortened repr, also when the repr raises."""
    try:
        shown = _one_line(str.__str__(shorten.repr(value)))
    except Exception:
        shown = "(its repr fails)"
    return shown if value is None else f"{class_name(type(value)).rpartition('.')[2]} {shown}"


def _one_line(text: str) -> str:
    text = text if text.isprintable() else repr(text)[1:-1]
    return text if len(text) <= 80 else f"{text[:79]}…"


def reason(error: BaseException) -> str:
    """The error's first line, also when its str raises."""
    name = class_name(type(error))
    try:
        text = str.__str__(str(error))  # a str of its own class may do anything
        line = (text[:10_000].splitlines() or [""])[0][:200] or name
        return line if line.isprintable() else repr(line)[1:-1]
    except BaseException:
        return name


def class_name(kind: type) -> str:
    """The qualified name, also of a class whose metaclass has other ideas."""
    name: str = _QUALNAME.__get__(kind)
    return name


class Shape:
    """One annotation's way through JSON.

    Attributes:
        name: The annotation, as messages print it.
        kinds: Python types of the JSON values it produces; a union tells its members apart by them.
    """

    kinds: frozenset[type] = frozenset({str})

    def __init__(self, name: str) -> None:
        self.name = name

    def encode(self, value: Any, room: int) -> Any:
        """`value` as JSON values; Misfit if it does not fit or needs more than `room` levels."""
        raise NotImplementedError

    def decode(self, value: Any) -> Any:
        """What `encode` was given, from JSON values; Misfit if it does not fit."""
        raise NotImplementedError

    def quick(self, value: Any) -> bool:
        """Whether `value` is its own JSON value, sparing `encode` (strings aside: see `check_text`).

        Of a value that is no float its type says so, but for the size of an int.
        """
        return False

    def refuse(self, value: object) -> Misfit:
        if value is None:
            return Misfit("is None; flush the session first", other_type=True)
        return Misfit(f"must be {self.name}, got {describe(value)}", other_type=True)

    def refuse_json(self, value: object) -> Misfit:
        return Misfit(f"must be {self.name}, got {describe(value)}")


def check_text(value: str) -> str:
    """A plain str that jsonb can hold; Misfit for NUL characters and lone surrogates."""
    if "\0" in value:
        raise Misfit("contains a NUL character, which Postgres cannot store; remove it")
    if not value.isascii():
        try:
            value.encode()
        except UnicodeEncodeError:
            raise Misfit(
                f"contains a lone surrogate, which is not text: {describe(value)}; decode its bytes properly"
            ) from None
    return value if type(value) is str else str.__str__(value)


def _check_int(value: int) -> int:
    if value.bit_length() > MAX_INT_BITS:
        raise Misfit(f"must have at most {MAX_INT_BITS} bits, got {value.bit_length()}; send it as text")
    return int(value)


def _check_float(value: float) -> float:
    if not math.isfinite(value):
        raise Misfit(f"must be a finite number, got {float(value)!r}; JSON has no NaN or Infinity")
    return float(value)


def descend(room: int) -> int:
    if room <= 0:
        raise Misfit(f"is nested deeper than {MAX_DEPTH} levels; store it and send its id")
    return room - 1


class Plain(Shape):
    """JSON values only: for parameters without annotation, `Any` and `object`."""

    kinds = frozenset({type(None), bool, int, float, str, list, dict})

    def encode(self, value: Any, room: int) -> Any:
        kind = type(value)
        if kind is str or (isinstance(value, str) and not isinstance(value, enum.Enum)):
            return check_text(value)
        if value is None or kind is bool:
            return value
        if kind is int:
            return _check_int(value)
        if isinstance(value, float) and not isinstance(value, enum.Enum):
            return _check_float(value)
        if kind is dict or isinstance(value, dict):
            return _encode_items(value, text_key, self, descend(room))
        if isinstance(value, (list, tuple)):
            return _encode_all(value, self, descend(room))
        return self.other(value)

    def other(self, value: Any) -> Any:
        raise Misfit(f"must be a JSON value, got {describe(value)}; annotate the parameter with its type")

    def decode(self, value: Any) -> Any:
        return value

    def quick(self, value: Any) -> bool:
        kind = type(value)
        if kind is int:
            return bool(-(2**63) <= value < 2**63)
        return kind is str or kind is bool or value is None or (kind is float and math.isfinite(value))


class PlainOrTime(Plain):
    """What `msgspec.to_builtins` leaves of a struct when it is told to keep datetimes."""

    def other(self, value: Any) -> Any:
        return DATETIME.encode(value, 0) if isinstance(value, datetime) else super().other(value)


def text_key(key: object) -> str:
    if not isinstance(key, str) or isinstance(key, enum.Enum):
        raise Misfit(f"has the key {describe(key)}; JSON objects have string keys, annotate the key type")
    return check_text(key)


def _encode_all(values: Iterable[Any], shape: Shape, room: int) -> list[Any]:
    out: list[Any] = []
    try:
        for value in values:
            out.append(shape.encode(value, room))
    except Misfit as misfit:
        misfit.path = f"[{len(out)}]{misfit.path}"
        raise
    return out


def _encode_items(
    values: Mapping[Any, Any], encode_key: Callable[[Any], str], shape: Shape, room: int
) -> dict[str, Any]:
    out: dict[str, Any] = {}
    for key, value in values.items():
        name = encode_key(key)
        try:
            out[name] = shape.encode(value, room)
        except Misfit as misfit:
            misfit.path = f"[{shorten.repr(name)}]{misfit.path}"
            raise
    if len(out) != len(values):
        raise Misfit("has two keys that are the same JSON text")
    return out


class NullShape(Shape):
    kinds = frozenset({type(None)})

    def encode(self, value: Any, room: int) -> Any:
        if value is not None:
            raise self.refuse(value)

    def decode(self, value: Any) -> Any:
        if value is not None:
            raise self.refuse_json(value)


class BoolShape(Shape):
    kinds = frozenset({bool})

    def encode(self, value: Any, room: int) -> Any:
        if type(value) is not bool:
            raise self.refuse(value)
        return value

    def decode(self, value: Any) -> Any:
        if type(value) is not bool:
            raise self.refuse_json(value)
        return value

    def quick(self, value: Any) -> bool:
        return type(value) is bool


class IntShape(Shape):
    kinds = frozenset({int})

    def encode(self, value: Any, room: int) -> Any:
        if not isinstance(value, int) or type(value) is bool:
            raise self.refuse(value)
        return _check_int(value)

    def decode(self, value: Any) -> Any:
        if type(value) is not int:
            raise self.refuse_json(value)
        return value

    def quick(self, value: Any) -> bool:
        return type(value) is int and -(2**63) <= value < 2**63


class FloatShape(Shape):
    kinds = frozenset({float, int})  # jsonb prints 1e16 as a whole number

    def encode(self, value: Any, room: int) -> Any:
        if isinstance(value, float):
            return _check_float(value)
        if not isinstance(value, int) or type(value) is bool:
            raise self.refuse(value)
        return _exact_float(value, self)

    def decode(self, value: Any) -> Any:
        if type(value) is float:
            return value
        if type(value) is not int:
            raise self.refuse_json(value)
        try:
            return float(value)
        except OverflowError:
            raise self.refuse_json(value) from None

    def quick(self, value: Any) -> bool:
        return type(value) is float and math.isfinite(value)


def _exact_float(value: int, shape: Shape) -> float:
    try:
        number = float(value)
    except OverflowError:
        raise shape.refuse(value) from None
    if number != value:
        raise Misfit(f"must be {shape.name}, got {describe(value)}, which no float equals")
    return number


class StrShape(Shape):
    def encode(self, value: Any, room: int) -> Any:
        if not isinstance(value, str):
            raise self.refuse(value)
        return check_text(value)

    def decode(self, value: Any) -> Any:
        if type(value) is not str:
            raise self.refuse_json(value)
        return value

    def quick(self, value: Any) -> bool:
        return type(value) is str


class TextShape(Shape):
    """A type with a text form that reads back exactly."""

    def __init__(
        self, kind: type, write: Callable[[Any], str], read: Callable[[str], Any], but: type | None = None
    ) -> None:
        super().__init__(kind.__name__)
        self._kind, self._write, self._read, self._but = kind, write, read, but

    def encode(self, value: Any, room: int) -> Any:
        if not isinstance(value, self._kind) or (self._but is not None and isinstance(value, self._but)):
            raise self.refuse(value)
        return self._write(value)

    def decode(self, value: Any) -> Any:
        if type(value) is not str:
            raise self.refuse_json(value)
        try:
            return self._read(value)
        except (ValueError, ArithmeticError):
            raise self.refuse_json(value) from None


def _write_datetime(value: datetime) -> str:
    if value.utcoffset() is None:
        raise Misfit(
            f"must be a datetime with a time zone, got {value.isoformat()}; use datetime.now(timezone.utc)"
        )
    return value.isoformat()


def _read_datetime(text: str) -> datetime:
    value = datetime.fromisoformat(text)
    if value.utcoffset() is None:
        raise Misfit(f"must be a datetime with a time zone, got {describe(text)}")
    return value


def _write_decimal(value: Decimal) -> str:
    if not value.is_finite():
        raise Misfit(f"must be a finite number, got {value!r}")
    return str(value)


def _read_decimal(text: str) -> Decimal:
    value = Decimal(text)
    if not value.is_finite():
        raise Misfit(f"must be a finite number, got {describe(text)}")
    return value


def _write_duration(value: timedelta) -> str:
    return typing.cast(str, msgspec.to_builtins(value))  # ISO 8601, exact to the microsecond


def _read_duration(text: str) -> timedelta:
    return msgspec.convert(text, timedelta)


def _read_bytes(text: str) -> bytes:
    return base64.b64decode(text, validate=True)


DATETIME: Final = TextShape(datetime, _write_datetime, _read_datetime)

SCALARS: Final[dict[object, Shape]] = {
    Any: Plain("JSON"),
    object: Plain("JSON"),
    None: NullShape("None"),
    type(None): NullShape("None"),
    bool: BoolShape("bool"),
    int: IntShape("int"),
    float: FloatShape("float"),
    str: StrShape("str"),
    datetime: DATETIME,
    date: TextShape(date, date.isoformat, date.fromisoformat, but=datetime),
    time: TextShape(time, time.isoformat, time.fromisoformat),
    timedelta: TextShape(timedelta, _write_duration, _read_duration),
    Decimal: TextShape(Decimal, _write_decimal, _read_decimal),
    UUID: TextShape(UUID, str, UUID),
    bytes: TextShape(bytes, lambda value: base64.b64encode(value).decode(), _read_bytes),
}
PLAIN: Final = SCALARS[Any]


class EnumShape(Shape):
    """By value if every value is an int or every value a str, else by the member's name."""

    def __init__(self, kind: type[enum.Enum]) -> None:
        super().__init__(kind.__name__)
        self._kind = kind
        values = {type(member.value) for member in kind}
        self._by_value = values in ({int}, {str})
        self.kinds = frozenset(values) if self._by_value else frozenset({str})

    def encode(self, value: Any, room: int) -> Any:
        if not isinstance(value, self._kind):
            raise self.refuse(value)
        written = value.value if self._by_value else value.name
        return check_text(written) if isinstance(written, str) else _check_int(written)

    def decode(self, value: Any) -> Any:
        if type(value) not in self.kinds:
            raise self.refuse_json(value)
        try:
            return self._kind(value) if self._by_value else self._kind[value]
        except Exception:
            raise self.refuse_json(value) from None


class LiteralShape(Shape):
    def __init__(self, name: str, values: tuple[Any, ...]) -> None:
        super().__init__(name)
        self._written = {(type(value), value): _literal(value) for value in values}
        self._read = {(type(written), written): key[1] for key, written in self._written.items()}
        if len(self._read) < len(self._written):
            raise TypeError("two of its values are the same JSON")
        self.kinds = frozenset(kind for kind, _ in self._read)
        self.plain = not any(isinstance(value, enum.Enum) for value in values)

    def encode(self, value: Any, room: int) -> Any:
        return self._find(self._written, value, self.refuse)

    def decode(self, value: Any) -> Any:
        return self._find(self._read, value, self.refuse_json)

    def _find(self, table: Mapping[Any, Any], value: Any, refuse: Callable[[object], Misfit]) -> Any:
        try:
            return table[(type(value), value)]
        except (KeyError, TypeError):
            raise refuse(value) from None


def _literal(value: Any) -> Any:
    if isinstance(value, enum.Enum):
        return EnumShape(type(value)).encode(value, 0)
    return PLAIN.encode(value, 0)


class ArrayShape(Shape):
    """Any number of values of one shape: list, set, frozenset, `tuple[X, ...]`."""

    kinds = frozenset({list})

    def __init__(self, name: str, item: Shape, accepts: Any, build: Callable[[list[Any]], Any]) -> None:
        super().__init__(name)
        self._item, self._accepts, self._build = item, accepts, build

    def encode(self, value: Any, room: int) -> Any:
        if not isinstance(value, self._accepts):
            raise self.refuse(value)
        return _encode_all(value, self._item, descend(room))

    def decode(self, value: Any) -> Any:
        if type(value) is not list:
            raise self.refuse_json(value)
        try:
            return self._build(_decode_all(value, self._item))
        except TypeError as error:  # a set of something unhashable
            raise Misfit(f"must be {self.name}: {reason(error)}") from error


def _decode_all(values: list[Any], shape: Shape) -> list[Any]:
    out: list[Any] = []
    try:
        for value in values:
            out.append(shape.decode(value))
    except Misfit as misfit:
        misfit.path = f"[{len(out)}]{misfit.path}"
        raise
    return out


class TupleShape(Shape):
    """A fixed number of values, each with a shape of its own."""

    kinds = frozenset({list})

    def __init__(self, name: str, items: tuple[Shape, ...]) -> None:
        super().__init__(name)
        self._items = items

    def encode(self, value: Any, room: int) -> Any:
        if not isinstance(value, tuple) or len(value) != len(self._items):
            raise self.refuse(value)
        room = descend(room)
        return self._each(value, lambda shape, item: shape.encode(item, room))

    def decode(self, value: Any) -> Any:
        if type(value) is not list or len(value) != len(self._items):
            raise self.refuse_json(value)
        return tuple(self._each(value, lambda shape, item: shape.decode(item)))

    def _each(self, value: Iterable[Any], step: Callable[[Shape, Any], Any]) -> list[Any]:
        out: list[Any] = []
        try:
            for shape, item in zip(self._items, value, strict=True):
                out.append(step(shape, item))
        except Misfit as misfit:
            misfit.path = f"[{len(out)}]{misfit.path}"
            raise
        return out


class DictShape(Shape):
    kinds = frozenset({dict})

    def __init__(self, name: str, key: Shape, item: Shape, accepts: Any = dict) -> None:
        super().__init__(name)
        if not key.kinds <= {str, int} and not isinstance(key, Plain):
            raise TypeError(f"{key.name} cannot be the key of a JSON object")
        self._key, self._item, self._accepts = key, item, accepts
        self._ints = int in key.kinds and not isinstance(key, Plain)

    def encode(self, value: Any, room: int) -> Any:
        if not isinstance(value, self._accepts):
            raise self.refuse(value)
        return _encode_items(value, self._encode_key, self._item, descend(room))

    def _encode_key(self, key: Any) -> str:
        if isinstance(self._key, Plain):
            return text_key(key)
        try:
            return str(self._key.encode(key, 0))
        except Misfit as misfit:
            raise Misfit(f"has the key {describe(key)}; a key {misfit.problem}") from None

    def decode(self, value: Any) -> Any:
        if type(value) is not dict:
            raise self.refuse_json(value)
        out: dict[Any, Any] = {}
        for text, item in value.items():
            try:
                out[self._decode_key(text)] = self._item.decode(item)
            except Misfit as misfit:
                misfit.path = f"[{shorten.repr(text)}]{misfit.path}"
                raise
        return out

    def _decode_key(self, text: str) -> Any:
        if self._ints:
            try:
                return self._key.decode(int(text))
            except ValueError:
                if str not in self._key.kinds:
                    raise self._key.refuse_json(text) from None
        return self._key.decode(text)


class UnionShape(Shape):
    """Members told apart by their JSON kind; two that share one are refused when the shape is made."""

    def __init__(self, name: str, members: list[Shape]) -> None:
        super().__init__(name)
        self._by_kind: dict[type, Shape] = {}
        last = (FloatShape, LiteralShape)  # an int is an int before it is a float
        members = sorted(members, key=lambda shape: isinstance(shape, last))
        for shape in members:
            for kind in shape.kinds:
                other = self._by_kind.setdefault(kind, shape)
                if other is not shape and not _same_reading(other, shape):
                    raise TypeError(f"{other.name} and {shape.name} cannot be told apart in JSON")
        self._members = members
        self._some = [shape for shape in members if not isinstance(shape, NullShape)]
        self._optional = len(self._some) < len(members)
        self.kinds = frozenset(self._by_kind)

    def encode(self, value: Any, room: int) -> Any:
        if value is None and self._optional:
            return None
        if len(self._some) == 1:
            return self._some[0].encode(value, room)
        for shape in self._some:
            try:
                return shape.encode(value, room)
            except Misfit as misfit:
                if misfit.path or not misfit.other_type:
                    raise
        raise self.refuse(value)

    def decode(self, value: Any) -> Any:
        shape = self._by_kind.get(type(value))
        if shape is None:
            raise self.refuse_json(value)
        return shape.decode(value)


def _same_reading(one: Shape, other: Shape) -> bool:
    if isinstance(other, LiteralShape):
        same = (StrShape, IntShape, BoolShape, FloatShape, NullShape, LiteralShape)
        return other.plain and isinstance(one, same) and getattr(one, "plain", True)
    return isinstance(one, IntShape) and isinstance(other, FloatShape)
