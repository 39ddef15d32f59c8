"""From a type annotation to its `Shape`: dataclasses, msgspec Structs and pydantic models, and the builder.

pydantic is never imported here: a model's class can only exist where somebody else has imported it.
"""

from __future__ import annotations

import collections.abc as abc
import dataclasses
import enum
import functools
import operator
import sys
import types
import typing
from collections.abc import Callable, Mapping
from datetime import datetime
from typing import Any, Final, Literal, TypeVar, Union, get_args, get_origin

import msgspec

from pgqueue.shapes import (
    PLAIN,
    SCALARS,
    ArrayShape,
    DictShape,
    EnumShape,
    LiteralShape,
    Misfit,
    Plain,
    PlainOrTime,
    Shape,
    TupleShape,
    UnionShape,
    descend,
    describe,
    reason,
    shorten,
)


class FieldsShape(Shape):
    """A dataclass or a TypedDict, field by field.

    As with msgspec and pydantic, a missing field takes its default and an unknown one is ignored, so that a
    field can be added while old and new workers run side by side.
    """

    kinds = frozenset({dict})

    def __init__(self, kind: type, build: Builder) -> None:
        super().__init__(kind.__name__)
        hints = typing.get_type_hints(kind, include_extras=True)
        self._kind = kind
        self._typed_dict: bool = bool(typing.is_typeddict(kind))
        self._compares = not self._typed_dict and kind.__dict__.get("__eq__") is not None
        names = hints if self._typed_dict else [f.name for f in dataclasses.fields(kind) if f.init]
        if any(isinstance(hint, dataclasses.InitVar) for hint in hints.values()):
            raise TypeError(f"{kind.__name__} has an InitVar, whose value is not kept")
        self._required: frozenset[str] = getattr(kind, "__required_keys__", frozenset())
        build.cache[kind] = self  # before its fields: a type may contain itself
        self._fields = {name: build.shape(hints.get(name, Any)) for name in names}

    def encode(self, value: Any, room: int) -> Any:
        if type(value) is not (dict if self._typed_dict else self._kind):
            raise self.refuse(value)
        room = descend(room)
        given = self._given(value)
        if unknown := [name for name in given if name not in self._fields]:
            raise Misfit(f"has the key {shorten.repr(unknown[0])}, which {self.name} has not")
        self._check_required(given)
        written = self._each(given, lambda shape, item: shape.encode(item, room))
        if self._compares and self._make(given) != value:
            raise Misfit(f"must be a {self.name} that its fields make again, got {describe(value)}")
        return written

    def decode(self, value: Any) -> Any:
        if type(value) is not dict:
            raise self.refuse_json(value)
        self._check_required(value)
        known = {name: item for name, item in value.items() if name in self._fields}
        return self._make(self._each(known, lambda shape, item: shape.decode(item)))

    def _make(self, fields: dict[str, Any]) -> Any:
        try:
            return self._kind(**fields)
        except Exception as error:
            raise Misfit(f"is not a valid {self.name}: {reason(error)}") from error

    def _given(self, value: Any) -> dict[str, Any]:
        return value if self._typed_dict else {name: getattr(value, name) for name in self._fields}

    def _check_required(self, given: Mapping[str, Any]) -> None:
        if missing := sorted(self._required - given.keys()):
            raise Misfit(f"lacks the key {missing[0]!r} of {self.name}")

    def _each(self, values: Mapping[str, Any], step: Callable[[Shape, Any], Any]) -> dict[str, Any]:
        out = {}
        for name, item in values.items():
            try:
                out[name] = step(self._fields[name], item)
            except Misfit as misfit:
                misfit.path = f".{name}{misfit.path}"
                raise
        return out


class StructShape(Shape):
    """msgspec Structs, by msgspec: renaming, tags, constraints and tagged unions are its own."""

    kinds = frozenset({dict})

    def __init__(self, name: str, annotation: Any, classes: tuple[type, ...]) -> None:
        super().__init__(name)
        self._annotation, self._classes = annotation, classes
        msgspec.json.Decoder(annotation)  # TypeError if msgspec does not support a field
        if any(kind.__struct_config__.array_like for kind in classes):  # type: ignore[attr-defined]
            self.kinds = frozenset({list, dict})

    def encode(self, value: Any, room: int) -> Any:
        if type(value) not in self._classes:
            raise self.refuse(value)
        try:
            parts = msgspec.to_builtins(value, builtin_types=(datetime,), str_keys=True)
            written = PlainOrTime(self.name).encode(parts, room)
            back = self._convert(written)
        except Misfit:
            raise
        except Exception as error:
            raise Misfit(f"is not a valid {self.name}: {reason(error)}") from error
        if type(value).__struct_config__.eq and back != value:
            raise Misfit(f"must be a {self.name} whose JSON reads back as the same, got {describe(value)}")
        return written

    def decode(self, value: Any) -> Any:
        try:
            return self._convert(value)
        except Exception as error:
            raise Misfit(f"is not a valid {self.name}: {reason(error)}") from error

    def _convert(self, value: Any) -> Any:
        return msgspec.convert(value, self._annotation, str_keys=True)


class ModelShape(Shape):
    """A pydantic model, by pydantic."""

    kinds = frozenset({dict, list, str, int, float, bool, type(None)})

    def __init__(self, kind: Any) -> None:
        super().__init__(kind.__name__)
        self._kind = kind
        if not issubclass(kind, sys.modules["pydantic"].RootModel):
            self.kinds = frozenset({dict})

    def encode(self, value: Any, room: int) -> Any:
        if type(value) is not self._kind:
            raise self.refuse(value)
        try:
            parts = value.model_dump(mode="json", by_alias=True, round_trip=True, warnings="error")
            written = PLAIN.encode(parts, room)
            same = self._read(written).model_dump() == value.model_dump()
        except Misfit:
            raise
        except Exception as error:
            raise Misfit(f"is not a valid {self.name}: {_model_reason(error)}") from error
        if not same:
            raise Misfit(f"must be a {self.name} whose JSON reads back as the same, got {describe(value)}")
        return written

    def decode(self, value: Any) -> Any:
        try:
            return self._read(value)
        except Exception as error:
            raise Misfit(f"is not a valid {self.name}: {_model_reason(error)}") from error

    def _read(self, value: Any) -> Any:
        return self._kind.model_validate_json(msgspec.json.encode(value))


def _model_reason(error: Exception) -> str:
    try:
        first: Any = error.errors()[0]  # type: ignore[attr-defined]
        return f"{'.'.join(str(part) for part in first['loc'])}: {first['msg']}"
    except Exception:
        return reason(error)


class ConstrainedShape(Shape):
    """`Annotated[..., msgspec.Meta(...)]`: the inner shape, then msgspec's constraints."""

    def __init__(self, inner: Shape, annotation: Any) -> None:
        super().__init__(inner.name)
        self._inner, self._annotation = inner, annotation
        self.kinds = inner.kinds
        msgspec.json.Decoder(annotation)

    def encode(self, value: Any, room: int) -> Any:
        written = self._inner.encode(value, room)
        self._check(written)
        return written

    def decode(self, value: Any) -> Any:
        self._check(value)
        return self._inner.decode(value)

    def _check(self, written: Any) -> None:
        try:
            msgspec.convert(written, self._annotation, str_keys=True)
        except msgspec.ValidationError as error:
            raise Misfit(f"must be {self.name}, got {describe(written)}: {reason(error)}") from None


class Unsupported(Shape):
    """An annotation that JSON cannot carry: every value is refused, whatever it is."""

    kinds = frozenset()

    def __init__(self, name: str, why: str = "") -> None:
        super().__init__(name)
        self._problem = f"is annotated {name}, which JSON cannot carry" + (f": {why}" if why else "")

    def encode(self, value: Any, room: int) -> Any:
        raise Misfit(f"{self._problem}; pass an id or plain values")

    def decode(self, value: Any) -> Any:
        raise Misfit(self._problem)


_LISTS: Final = (list, abc.Sequence, abc.MutableSequence, abc.Collection, abc.Iterable)
_SETS: Final = (set, abc.Set, abc.MutableSet)
_DICTS: Final = (dict, abc.Mapping, abc.MutableMapping)


def annotation_name(annotation: object) -> str:
    """`int`, `list[UUID]`, `str | None`: without module names."""
    if annotation is None or annotation is type(None):
        return "None"
    if annotation is Ellipsis:
        return "..."
    origin, args = get_origin(annotation), get_args(annotation)
    if origin is typing.Annotated:
        return annotation_name(args[0])
    if origin in (Union, types.UnionType):
        return " | ".join(annotation_name(arg) for arg in args)
    if origin is Literal:
        return f"Literal[{', '.join(repr(arg) for arg in args)}]"
    name = getattr(origin or annotation, "__name__", None) or repr(annotation)
    return f"{name}[{', '.join(annotation_name(arg) for arg in args)}]" if args else str(name)


class Builder:
    """Shapes of annotations; one builder per signature, so a type that occurs twice is taken apart once."""

    def __init__(self) -> None:
        self.cache: dict[object, Shape] = {}

    def shape(self, annotation: Any) -> Shape:
        """The annotation's shape; never raises, see `Unsupported`."""
        try:
            if found := SCALARS.get(annotation) or self.cache.get(annotation):
                return found
        except TypeError:  # an unhashable annotation, such as Annotated[int, []]
            pass
        name = annotation_name(annotation)
        try:
            return self._build(annotation, name)
        except RecursionError:
            return Unsupported(name)
        except Exception as error:
            return Unsupported(name, reason(error))

    def _build(self, annotation: Any, name: str) -> Shape:
        if hasattr(annotation, "__supertype__"):
            return self.shape(annotation.__supertype__)
        if type(annotation).__name__ == "TypeAliasType":
            return self.shape(annotation.__value__)
        if isinstance(annotation, TypeVar):
            return self.shape(annotation.__bound__ or Any)
        origin, args = get_origin(annotation), get_args(annotation)
        if origin in (typing.Annotated, typing.Required, typing.NotRequired):
            inner = self.shape(args[0])
            return ConstrainedShape(inner, annotation) if _has_meta(args[1:]) else inner
        if origin in (Union, types.UnionType):
            return self._union(name, args)
        if origin is Literal:
            return LiteralShape(name, args)
        kind = origin or annotation
        return self._container(kind, args, name) or self._class(kind, annotation)

    def _union(self, name: str, args: tuple[Any, ...]) -> Shape:
        structs = tuple(arg for arg in args if _is_struct(arg))
        shapes = [self.shape(arg) for arg in args if arg not in structs]
        if structs:
            together = functools.reduce(operator.or_, structs)
            shapes.append(StructShape(annotation_name(together), together, structs))
        if any(isinstance(shape, Plain) for shape in shapes):
            return PLAIN
        return UnionShape(name, shapes)

    def _container(self, origin: Any, args: tuple[Any, ...], name: str) -> Shape | None:
        first = self.shape(args[0]) if args and origin is not tuple else PLAIN
        if origin in _LISTS:
            return ArrayShape(name, first, (list,) if origin is list else (list, tuple), list)
        if origin in _SETS:
            return ArrayShape(name, first, (set, frozenset) if origin is abc.Set else (set,), set)
        if origin is frozenset:
            return ArrayShape(name, first, (frozenset,), frozenset)
        if origin in _DICTS:
            item = self.shape(args[1]) if args else PLAIN
            return DictShape(name, first, item)
        if origin is tuple:
            if not args and name == "tuple":
                return ArrayShape(name, PLAIN, (tuple,), tuple)
            if len(args) == 2 and args[1] is Ellipsis:
                return ArrayShape(name, self.shape(args[0]), (tuple,), tuple)
            return TupleShape(name, tuple(self.shape(arg) for arg in args))
        return None

    def _class(self, kind: Any, annotation: Any) -> Shape:
        if not isinstance(kind, type):
            return Unsupported(annotation_name(annotation))
        if issubclass(kind, enum.Enum):
            return EnumShape(kind)
        if issubclass(kind, msgspec.Struct):
            return StructShape(annotation_name(annotation), annotation, (kind,))
        pydantic = sys.modules.get("pydantic")
        if pydantic is not None and issubclass(kind, pydantic.BaseModel):
            return ModelShape(kind)
        if dataclasses.is_dataclass(kind) or typing.is_typeddict(kind):
            return FieldsShape(kind, self)
        return Unsupported(annotation_name(annotation))


def _is_struct(annotation: Any) -> bool:
    kind = get_origin(annotation) or annotation
    return isinstance(kind, type) and issubclass(kind, msgspec.Struct)


def _has_meta(extras: tuple[Any, ...]) -> bool:
    return any(isinstance(extra, msgspec.Meta) for extra in extras)
