"""Arguments, results and headers through JSON: what survives, what is refused, and in which words."""

import contextlib
import dataclasses
import enum
import json
import math
import sys
import types
import typing
import uuid
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, date, datetime, time, timedelta, timezone
from decimal import Decimal
from typing import TYPE_CHECKING, Annotated, Any, Literal, NewType, TypedDict

import msgspec
import pydantic
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pgqueue.codec import (
    MAX_DEPTH,
    MAX_PAYLOAD_BYTES,
    MAX_RESULT_BYTES,
    ArgumentCodec,
    clean_text,
    decode_result,
    encode_headers,
    encode_plain,
    encode_result,
)
from pgqueue.errors import ConfigError, PayloadError

if TYPE_CHECKING:
    from nowhere import Missing  # type: ignore[import-not-found]


class Colour(enum.Enum):
    RED = "red"
    BLUE = "blue"


class Level(enum.IntEnum):
    LOW = 1
    HIGH = 2


class Mixed(enum.Enum):
    NUMBER = 1
    TEXT = "1"
    PAIR = (1, 2)


class Right(enum.Flag):
    READ = 1
    WRITE = 2


class Shade(enum.StrEnum):
    DARK = "dark"


@dataclasses.dataclass
class Line:
    sku: str
    price: Decimal
    at: datetime | None = None
    children: "list[Line]" = dataclasses.field(default_factory=list)


@dataclasses.dataclass
class Doubling:
    n: int

    def __post_init__(self) -> None:
        self.n *= 2


class Address(msgspec.Struct, rename="camel"):
    street_name: str
    valid_from: datetime | None = None
    extra: Any = None


class Circle(msgspec.Struct, tag=True):
    radius: float


class Square(msgspec.Struct, tag=True):
    side: Annotated[float, msgspec.Meta(gt=0)]


class Order(pydantic.BaseModel):
    order_id: int = pydantic.Field(alias="orderId")
    paid_at: datetime | None = None
    total: Decimal = Decimal(0)


class Loose(pydantic.BaseModel):
    value: Any = None


class Options(TypedDict):
    retries: int
    note: typing.NotRequired[str]


class Custom:
    pass


UserId = NewType("UserId", int)
Positive = Annotated[int, msgspec.Meta(gt=0)]


def codec_for(annotation: object) -> ArgumentCodec:
    def task(x):  # type: ignore[no-untyped-def]
        pass

    task.__annotations__["x"] = annotation
    return ArgumentCodec(task, task="shop.task", bound=False)


def as_jsonb(text: str) -> str:
    """What Postgres gives back: numbers as `numeric` prints them, keys without their order."""

    def number(written: str) -> str:
        value = Decimal(written)
        return f"{abs(value) if value == 0 else value:f}"

    def write(value: object) -> str:
        if isinstance(value, dict):
            return "{" + ", ".join(f"{write(k)}: {write(value[k])}" for k in sorted(value)) + "}"
        if isinstance(value, list):
            return "[" + ", ".join(map(write, value)) + "]"
        return value.text if isinstance(value, Number) else msgspec.json.encode(value).decode()

    class Number:
        def __init__(self, written: str) -> None:
            self.text = number(written)

    import json

    return write(json.loads(text, parse_float=Number, parse_int=Number))


def through(annotation: object, value: object) -> Any:
    codec = codec_for(annotation)
    (positional,), _ = codec.decode(*map(as_jsonb, codec.encode((value,), {})))
    _, keywords = codec.decode(*map(as_jsonb, codec.encode((), {"x": value})))
    assert positional == keywords["x"]
    return positional


def refused(annotation: object, value: object) -> str:
    with pytest.raises(PayloadError) as caught:
        codec_for(annotation).encode((value,), {})
    return str(caught.value)


# What survives

OFFSETS = st.integers(-86_399, 86_399).map(lambda seconds: timezone(timedelta(seconds=seconds)))
TEXT = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=12)
FINITE = st.floats(allow_nan=False, allow_infinity=False)
BIG = st.integers(-(2**2047), 2**2047) | st.integers(-(2**70), 2**70) | st.integers(-5, 5)
SCALARS: list[tuple[Any, st.SearchStrategy[Any]]] = [
    (int, BIG),
    (float, FINITE),
    (bool, st.booleans()),
    (str, TEXT),
    (bytes, st.binary(max_size=12)),
    (datetime, st.datetimes(timezones=OFFSETS)),
    (date, st.dates()),
    (time, st.times()),
    (timedelta, st.timedeltas()),
    (Decimal, st.decimals(allow_nan=False, allow_infinity=False)),
    (uuid.UUID, st.uuids()),
    (Colour, st.sampled_from(Colour)),
    (Level, st.sampled_from(Level)),
    (Mixed, st.sampled_from(Mixed)),
    (Right, st.sampled_from([Right.READ, Right.READ | Right.WRITE, Right(0)])),
    (Literal["a", 1, True, None], st.sampled_from(["a", 1, True, None])),
    (Literal[Colour.RED, 7], st.sampled_from([Colour.RED, 7])),
    (Line, st.builds(Line, TEXT, st.just(Decimal("1.10")), st.none() | st.datetimes(timezones=OFFSETS))),
    (Address, st.builds(Address, TEXT, st.none() | st.datetimes(timezones=st.just(UTC)), BIG)),
    (Circle | Square, st.builds(Circle, FINITE) | st.builds(Square, st.floats(0.5, 1e9))),
    (Order, st.builds(Order, orderId=st.integers(), total=st.just(Decimal("2.50")))),
    (Options, st.fixed_dictionaries({"retries": BIG}, optional={"note": TEXT})),
    (int | str | None, BIG | TEXT | st.none()),
    (Decimal | bool, st.decimals(allow_nan=False, allow_infinity=False) | st.booleans()),
    (Literal["auto"] | float, st.just("auto") | FINITE),
]


def containers(inner: tuple[Any, st.SearchStrategy[Any]]) -> st.SearchStrategy[Any]:
    kind, values = inner
    few = st.lists(values, max_size=3)
    return st.sampled_from(
        [
            (list[kind], few),
            (tuple[kind, ...], few.map(tuple)),
            (tuple[int, kind], st.tuples(BIG, values)),
            (dict[str, kind], st.dictionaries(TEXT, values, max_size=3)),
            (dict[int, kind], st.dictionaries(BIG, values, max_size=3)),
            (dict[uuid.UUID, kind], st.dictionaries(st.uuids(), values, max_size=3)),
            (kind | None, values | st.none()),
            (Mapping[Colour, Sequence[kind]], st.dictionaries(st.sampled_from(Colour), few)),
        ]
    )


NESTED = st.recursive(st.sampled_from(SCALARS), lambda inner: inner.flatmap(containers), max_leaves=4)


@pytest.mark.parametrize(("annotation", "values"), SCALARS, ids=lambda each: str(each)[:40])
def test_values_come_back_as_they_were(annotation: object, values: st.SearchStrategy[Any]) -> None:
    @settings(max_examples=60, deadline=None)
    @given(values)
    def check(value: object) -> None:
        back = through(annotation, value)
        assert back == value
        assert type(back) is type(value)

    check()


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_nested_values_come_back_as_they_were(data: st.DataObject) -> None:
    annotation, values = data.draw(NESTED)
    value = data.draw(values)
    back = through(annotation, value)
    assert back == value
    assert type(back) is type(value)


@given(st.sets(st.integers()), st.frozensets(st.dates()))
def test_sets_come_back_as_sets(some: set[int], days: frozenset[date]) -> None:
    assert through(set[int], some) == some
    assert through(frozenset[date], days) == days
    assert type(through(frozenset[date], days)) is frozenset


JSON = st.recursive(
    st.none() | st.booleans() | BIG | st.floats(-1e15, 1e15) | TEXT,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3),
)


@given(JSON)
def test_json_values_need_no_annotation(value: object) -> None:
    for annotation in (Any, object, dict[str, Any], list):
        if annotation in (Any, object):
            assert through(annotation, value) == value
    assert through(dict[str, Any], {"x": value}) == {"x": value}
    assert through(list, [value]) == [value]


def test_aliases_and_new_types_are_seen_through() -> None:
    assert through(UserId, 5) == 5
    assert through(Annotated[datetime, "when"], datetime(2026, 1, 1, tzinfo=UTC)).year == 2026
    assert through(typing.Optional[list["int"]], [1]) == [1]  # noqa: UP045
    assert refused(UserId, "5") == "x must be int, got str '5'"


def test_a_tree_of_dataclasses_comes_back() -> None:
    tree = Line("a", Decimal("1.0"), None, [Line("b", Decimal(2), datetime.now(UTC))])
    assert through(Line, tree) == tree


def test_subclasses_of_str_and_int_travel_as_their_value() -> None:
    assert through(str, Shade.DARK) == "dark"
    assert through(int, Level.HIGH) == 2
    assert type(through(int, Level.HIGH)) is int


def test_a_whole_number_is_fine_for_a_float_and_comes_back_as_one() -> None:
    assert type(through(float, 5)) is float
    assert codec_for(float).decode("[100]", "{}") == ([100.0], {})
    assert "which no float equals" in refused(float, 2**60 + 1)
    assert "must be float" in refused(float, 10**400)


def test_tuples_without_annotation_become_lists() -> None:
    assert through(Any, (1, (2,))) == [1, [2]]


# What is refused, and how

NAIVE = datetime(2026, 1, 1)


@pytest.mark.parametrize(
    "annotation", [int, str, list[int], Line, Colour, datetime, int | str, Address, Order]
)
def test_none_points_at_the_flush(annotation: object) -> None:
    assert refused(annotation, None) == "x is None; flush the session first"


def test_none_deep_inside_points_at_the_flush_too() -> None:
    assert refused(list[int], [1, None]) == "x[1] is None; flush the session first"
    assert refused(Line, Line("a", None)) == "x.price is None; flush the session first"  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("annotation", "value", "message"),
    [
        (int, "5", "x must be int, got str '5'"),
        (int, True, "x must be int, got bool True"),
        (int, 1.0, "x must be int, got float 1.0"),
        (bool, 1, "x must be bool, got int 1"),
        (float, True, "x must be float, got bool True"),
        (float, Decimal(1), "x must be float, got Decimal Decimal('1')"),
        (str, 5, "x must be str, got int 5"),
        (str, b"a", "x must be str, got bytes b'a'"),
        (bytes, "a", "x must be bytes, got str 'a'"),
        (Decimal, 1, "x must be Decimal, got int 1"),
        (uuid.UUID, "a", "x must be UUID, got str 'a'"),
        (date, datetime.max, "x must be date, got datetime datetime.datetime(9999,"),
        (datetime, date.max, "x must be datetime, got date datetime.date(9999,"),
        (Colour, "red", "x must be Colour, got str 'red'"),
        (Literal["a", 1], True, "x must be Literal['a', 1], got bool True"),
        (Literal["a", 1], [], "x must be Literal['a', 1], got list []"),
        (list[int], (1,), "x must be list[int], got tuple (1,)"),
        (list[int], ["a"], "x[0] must be int, got str 'a'"),
        (tuple[int, str], (1,), "x must be tuple[int, str], got tuple (1,)"),
        (tuple[int, str], (1, 2), "x[1] must be str, got int 2"),
        (set[int], [1], "x must be set[int], got list [1]"),
        (dict[str, list[int]], {"a": [1, "b"]}, "x['a'][1] must be int, got str 'b'"),
        (dict[int, int], {"1": 1}, "x has the key str '1'; a key must be int, got str '1'"),
        (int | str, 1.5, "x must be int | str, got float 1.5"),
        (int | list[int], [None], "x[0] is None; flush the session first"),
        (datetime | int, NAIVE, "x must be a datetime with a time zone"),
        (Options, {"note": "a"}, "x lacks the key 'retries' of Options"),
        (Options, {"retries": 1, "or": 2}, "x has the key 'or', which Options has not"),
        (Positive, 0, "x must be int, got int 0: Expected `int` >= 1"),
        (Square | Circle, Square(-1.0), "x is not a valid Square | Circle: Expected `float` > 0.0"),
        (Address, Address(5), "x is not a valid Address: Expected `str`, got `int`"),  # type: ignore[arg-type]
        (Order, Order.model_construct(order_id="y"), "x is not a valid Order"),
        (Line, Line("a", 1.5), "x.price must be Decimal, got float 1.5"),  # type: ignore[arg-type]
        (
            Doubling,
            Doubling(2),
            "x must be a Doubling that its fields make again, got Doubling Doubling(n=4)",
        ),
    ],
)
def test_a_value_of_another_type_is_refused(annotation: object, value: object, message: str) -> None:
    assert refused(annotation, value).startswith(message)


NOT_JSON = [
    datetime.now(UTC),
    date.max,
    timedelta(1),
    Decimal(1),
    uuid.UUID(int=1),
    Colour.RED,
    Level.LOW,
    Shade.DARK,
    b"a",
    {1},
    Line("a", Decimal(1)),
    Address("a"),
    Order(orderId=1),
    Custom(),
    object,
]


@pytest.mark.parametrize("value", NOT_JSON, ids=lambda value: type(value).__name__)
def test_nothing_becomes_a_string_without_an_annotation(value: object) -> None:
    for annotation in (Any, object):
        assert refused(annotation, value).startswith("x must be a JSON value, got ")
        assert "annotate the parameter" in refused(annotation, value)
    assert refused(list, [value]).startswith("x[0] must be a JSON value")
    assert refused(dict[str, Any], {"a": (value,)}).startswith("x['a'][0] must be a JSON value")
    if not isinstance(value, str):
        assert refused(str, value).startswith("x must be str, got ")
    with pytest.raises(PayloadError, match=r"args\[0\] must be a JSON value"):
        encode_plain((value,), {})
    with pytest.raises(PayloadError, match=r"kwargs\['k'\] must be a JSON value"):
        encode_plain((), {"k": value})
    with pytest.raises(PayloadError, match=r"headers\['k'\] must be a JSON value"):
        encode_headers({"k": value})


def test_an_untyped_field_of_a_struct_or_model_may_not_hide_a_time() -> None:
    assert "reads back as the same" in refused(Address, Address("a", None, datetime.now(UTC)))
    assert "reads back as the same" in refused(Loose, Loose(value=datetime.now(UTC)))
    assert "time zone" in refused(Address, Address("a", NAIVE))
    assert "finite" in refused(Address, Address("a", None, math.nan))


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_nan_and_infinity_are_refused(bad: float) -> None:
    for annotation, value in (
        (float, bad),
        (Any, bad),
        (Any, [bad]),
        (list[float], [bad]),
        (float | str, bad),
    ):
        assert "must be a finite number" in refused(annotation, value)
    assert "must be a finite number" in refused(Decimal, Decimal(bad))
    assert "must be a finite number" in refused(Decimal, Decimal("sNaN"))


@pytest.mark.parametrize(("bad", "word"), [("a\0", "NUL"), ("\ud800", "lone surrogate"), ("é\udfff", "lone")])
def test_text_that_postgres_cannot_store_is_refused(bad: str, word: str) -> None:
    cases: list[tuple[Any, Any]] = [
        (str, bad),
        (Any, bad),
        (Any, {bad: 1}),
        (list[str], [bad]),
        (dict[str, int], {bad: 1}),
        (Line, Line(bad, Decimal(1))),
        (Address, Address(bad)),
        (str | None, bad),
    ]
    for annotation, value in cases:
        message = refused(annotation, value)
        assert message.startswith("x")
        assert word in message or annotation is Address
        message.encode()
    with pytest.raises(PayloadError):
        encode_plain((), {bad: 1})


def test_a_backslash_before_u0000_is_only_text() -> None:
    assert through(str, "\\u0000") == "\\u0000"
    assert through(Any, "\\\\u0000") == "\\\\u0000"


def test_depth_has_a_limit_and_cycles_end() -> None:
    deep: list[Any] = []
    for _ in range(MAX_DEPTH - 1):
        deep = [deep]
    assert through(Any, deep) == deep
    assert encode_plain((deep,), {"k": deep})
    assert "x" + "[0]" * MAX_DEPTH + " is nested deeper than 64 levels" in refused(Any, [deep])
    with pytest.raises(PayloadError, match="deeper than 64"):
        encode_plain((), {"k": [deep]})
    loop: list[Any] = []
    loop.append(loop)
    line = Line("a", Decimal(1))
    line.children.append(line)
    address = Address("a")
    address.extra = address
    assert "deeper than 64" in refused(Any, loop)
    assert "deeper than 64" in refused(Line, line)
    assert "Address" in refused(Address, address)


def test_integers_are_exact_up_to_2048_bits() -> None:
    for value in (2**53 + 1, 2**63 - 1, 2**63, 2**64, -(2**64) - 1, 2**2048 - 1, -(2**2048) + 1):
        assert through(int, value) == value
        assert through(Any, value) == value
    for value in (2**2048, -(2**2048), 10**5000):
        for annotation in (int, Any):
            assert "x must have at most 2048 bits" in refused(annotation, value)


@pytest.mark.parametrize(
    ("good", "bad"),
    [(1, 2**2048), ("a", "a\0"), ("a", "\ud800"), ("a", "x" * (1 << 20)), (1.5, math.nan)],
)
def test_a_value_is_checked_however_many_of_its_type_have_passed(good: Any, bad: Any) -> None:
    for annotation in (type(good), Any):
        codec = codec_for(annotation)
        for args, kwargs in (((good,), {}), ((), {"x": good})):
            assert codec.encode(args, kwargs) == codec.encode(args, kwargs)
        for args, kwargs in (((bad,), {}), ((), {"x": bad})):
            with pytest.raises(PayloadError, match="x "):
                codec.encode(args, kwargs)
        if annotation is not Any:
            with pytest.raises(PayloadError, match="x must be"):
                codec.encode(([good],), {})


def test_long_text_is_limited_however_much_of_it_has_passed() -> None:
    codec = codec_for(str)
    room = MAX_PAYLOAD_BYTES - len('[""]{}')
    for _ in range(3):
        (text,) = json.loads(codec.encode(("x" * room,), {})[0])
        assert len(text) == room
        with pytest.raises(PayloadError, match="at most 1,048,576 bytes"):
            codec.encode(("x" * (room + 1),), {})


def test_long_text_hides_no_int_that_is_too_large() -> None:
    def task(a: str, b: int) -> None: ...

    codec = ArgumentCodec(task, task="t", bound=False)
    for a in ("x", "x" * 10_000):
        for _ in range(3):
            assert codec.encode((a, 1), {}) == (f'["{a}",1]', "{}")
            with pytest.raises(PayloadError, match="b must have at most 2048 bits"):
                codec.encode((a, 2**2048), {})


def test_arguments_may_be_any_sequence_and_mapping() -> None:
    codec = codec_for(int)
    assert codec.encode(range(3, 4), {}) == ("[3]", "{}")
    assert codec.encode((), types.MappingProxyType({"x": 3})) == ("[]", '{"x":3}')


def test_keys_are_strings_unless_annotated() -> None:
    assert refused(Any, {1: 2}) == "x has the key int 1; JSON objects have string keys, annotate the key type"
    assert refused(dict, {None: 2}).startswith("x has the key None; ")
    assert refused(dict[Any, int], {Shade.DARK: 2}).startswith("x has the key Shade ")
    assert "cannot be the key of a JSON object" in refused(dict[tuple[int, int], int], {})
    assert "two keys that are the same JSON text" in refused(dict[int | str, int], {1: 1, "1": 2})


def test_a_payload_over_a_mebibyte_names_the_largest_argument() -> None:
    def task(a: int, b: str, c: str = "") -> None: ...

    codec = ArgumentCodec(task, task="t", bound=False)
    overhead = len('[1,""]{}')
    codec.encode((1, "x" * (MAX_PAYLOAD_BYTES - overhead)), {})
    for args, kwargs in (((1, "x" * (MAX_PAYLOAD_BYTES - overhead + 1)), {}), ((1, "é" * (1 << 19)), {})):
        with pytest.raises(
            PayloadError, match=r"arguments must be at most 1,048,576 bytes.*the largest is b"
        ):
            codec.encode(args, kwargs)
    with pytest.raises(PayloadError, match="the largest is c with"):
        codec.encode((1, "x"), {"c": "x" * MAX_PAYLOAD_BYTES})
    with pytest.raises(PayloadError, match=r"the largest is args\[1\]"):
        encode_plain((1, "x" * MAX_PAYLOAD_BYTES), {})
    with pytest.raises(PayloadError, match="headers must be at most"):
        encode_headers({"a": "x" * MAX_PAYLOAD_BYTES})


@pytest.mark.parametrize(
    "annotation",
    [
        str | datetime,
        uuid.UUID | str,
        date | datetime,
        list[int] | set[int],
        Line | Address,
        Colour | str,
        dict[str, int] | Line,
        Literal[Colour.RED] | str,
        Literal[Colour.RED, "red"],
    ],
)
def test_a_union_that_json_cannot_tell_apart_is_refused(annotation: object) -> None:
    message = refused(annotation, "a")
    assert message.startswith("x is annotated ")
    assert "cannot be told apart in JSON" in message or "the same JSON" in message


@pytest.mark.parametrize(
    "annotation", [Custom, type, Callable[[int], int], complex, typing.IO, Circle | Address, range]
)
def test_an_annotation_json_cannot_carry_is_refused_whatever_the_value(annotation: object) -> None:
    for value in (Custom(), 1, "a", {}):
        assert "which JSON cannot carry" in refused(annotation, value)
    with pytest.raises(PayloadError, match="which JSON cannot carry"):
        codec_for(annotation).decode("[1]", "{}")
    assert through(list[annotation] | None, None) is None  # type: ignore[valid-type]


def test_a_repr_that_raises_or_rambles_does_no_harm() -> None:
    class Rude:
        def __repr__(self) -> str:
            raise ValueError("no")

    class Long:
        def __repr__(self) -> str:
            return "\ud800\n" * 1000

    for value in (Rude(), Long(), 10**5000, "y" * 500, ["y" * 500] * 50):
        message = refused(bytes, value)
        assert message.isprintable()
        assert len(message) < 160


def test_an_attribute_that_raises_is_a_payload_error() -> None:
    line = Line("a", Decimal(1))
    del line.sku
    assert "x cannot be encoded as Line" in refused(Line, line)


# How a call binds


def every_kind(a: int, /, b: str, *more: int, c: date = date.max, d: bool, **rest: Decimal) -> None: ...


def test_every_kind_of_parameter() -> None:
    codec = ArgumentCodec(every_kind, task="t", bound=False)
    args, kwargs = (1, "b", 3, 4), {"d": True, "e": Decimal("1.5"), "a": Decimal(2)}
    assert codec.decode(*codec.encode(args, kwargs)) == ([1, "b", 3, 4], kwargs)
    text = codec.encode((1,), {"b": "x", "d": False})
    assert text == ("[1]", '{"b":"x","d":false}')  # defaults are not sent
    assert codec.decode(*text) == ([1], {"b": "x", "d": False})
    for bad, message in (
        (((1, "b", 3, "4"), {"d": True}), r"^more\[1\] must be int, got str '4'"),
        (((1, "b"), {"d": True, "e": 1.5}), "^e must be Decimal, got float"),
        (((1, "b"), {"d": None}), "^d is None; flush"),
        (((1, "b"), {"d": True, "c": datetime.now(UTC)}), "^c must be date, got datetime"),
    ):
        with pytest.raises(PayloadError, match=message):
            codec.encode(*bad)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("args", "kwargs", "message"),
    [
        ((1,), {}, "missing a required argument: 'email'"),
        ((), {"email": "a"}, "missing a required argument: 'order_id'"),
        ((1, "a", 3), {}, "too many positional arguments"),
        ((1, "a"), {"to": 1}, "got an unexpected keyword argument 'to'"),
        ((1, "a"), {"email": "b"}, "multiple values for argument 'email'"),
    ],
)
def test_a_call_that_does_not_bind_is_a_type_error_naming_the_task(
    args: tuple[Any, ...], kwargs: dict[str, Any], message: str
) -> None:
    def send(self: object, order_id: int, email: str) -> None: ...

    codec = ArgumentCodec(send, task="shop.send", bound=True)
    codec.encode((1, "a"), {})
    for _ in range(2):
        with pytest.raises(TypeError, match=rf"^shop\.send\(\) .*{message}"):
            codec.encode(args, kwargs)
    with pytest.raises(PayloadError, match=message):
        codec.decode(msgspec.json.encode(args).decode(), msgspec.json.encode(kwargs).decode())


def test_a_string_is_not_a_list_of_arguments() -> None:
    def task(a: str, b: str) -> None: ...

    with pytest.raises(TypeError, match="args must be a list or tuple, got str 'ab'"):
        ArgumentCodec(task, task="t", bound=False).encode("ab", {})
    with pytest.raises(TypeError, match="args must be a list or tuple"):
        encode_plain("ab", {})


def test_a_bound_task_needs_a_place_for_its_context() -> None:
    def nothing() -> None: ...
    def keyword(*, self: object) -> None: ...

    for function in (nothing, keyword):
        with pytest.raises(ConfigError, match="bind=True"):
            ArgumentCodec(function, task="t", bound=True)


def test_annotations_that_cannot_be_resolved_count_as_none() -> None:
    def task(self: "Missing", a: "Missing", b: "int", c: "list[Missing]") -> None: ...

    codec = ArgumentCodec(task, task="t", bound=True)
    assert codec.decode(*codec.encode((1, 2, "c"), {})) == ([1, 2, "c"], {})
    with pytest.raises(PayloadError, match="b must be int"):
        codec.encode((1, "2", 3), {})
    with pytest.raises(PayloadError, match="a must be a JSON value"):
        codec.encode((date.max, 2, 3), {})


def test_annotations_are_resolved_on_first_use() -> None:
    def task(a: "LaterDefined") -> None: ...  # type: ignore[name-defined]  # noqa: F821

    codec = ArgumentCodec(task, task="t", bound=False)
    globals()["LaterDefined"] = int
    try:
        with pytest.raises(PayloadError, match="a must be int"):
            codec.encode(("1",), {})
    finally:
        del globals()["LaterDefined"]


def test_ever_new_keywords_do_not_fill_the_memory() -> None:
    def task(**rest: int) -> None: ...

    codec = ArgumentCodec(task, task="t", bound=False)
    for n in range(2000):
        codec.encode((), {f"k{n}": n})
    assert len(codec._plans) <= 256


# Whatever the database holds

NESTED_20_000 = "[" * 20_000 + "]" * 20_000
BAD_ARRAYS = [
    "",
    "nope",
    "[1",
    "{}",
    "null",
    "5",
    '"[1]"',
    "[1]]",
    "[NaN]",
    "[1e999]",
    f"[{'9' * 5000}]",
    NESTED_20_000,
    "[" * 20_000,
    '[{"a":' * 20_000,
    '["\\ud800"]',
    '["\ud800"]',
    "[" * 66 + "]" * 66,
    "]" * 200 + "[" * 200,
    '["' + "[" * 100,
]


@pytest.mark.parametrize("text", BAD_ARRAYS, ids=lambda text: text[:12].encode(errors="replace").decode())
@pytest.mark.parametrize("annotation", [int, Any, list[Any], Line, Address, Order], ids=str)
def test_bad_text_ends_in_a_payload_error(annotation: object, text: str) -> None:
    codec = codec_for(annotation)
    cases = [(text, "{}"), ("[1]", f'{{"x":{text}' + "}")]
    if text != "{}":
        cases.append(("[1]", text))
    for args, kwargs in cases:
        with pytest.raises(PayloadError) as caught:
            codec.decode(args, kwargs)
        assert len(str(caught.value)) < 500


def test_deep_text_is_refused_before_it_is_parsed_whatever_the_recursion_limit() -> None:
    before = sys.getrecursionlimit()
    sys.setrecursionlimit(10**6)
    try:
        closed = "[" * 500_000 + "]" * 500_000
        for text in ("[" * 1_000_000, '{"a":' * 200_000, closed, "[" + "[]," * 500 + closed + "]"):
            with pytest.raises(PayloadError, match="at most 64 levels"):
                codec_for(Any).decode(text, "{}")
    finally:
        sys.setrecursionlimit(before)


def test_brackets_in_strings_are_not_depth() -> None:
    assert codec_for(str).decode('["' + "[{" * 500 + '"]', "{}") == (["[{" * 500], {})
    assert codec_for(str).decode('["\\"' + "[" * 500 + '"]', "{}") == (['"' + "[" * 500], {})
    assert codec_for(Any).decode("[[" + "[]," * 500 + "[]]]", "{}") == ([[[]] * 501], {})
    escaped = "\\" * 3 + '"' + "]" * 500
    assert codec_for(str).decode(json.dumps([escaped]), "{}") == ([escaped], {})


@pytest.mark.parametrize("inside", [{}, {'a"]': "]}"}, ["\\", "]", '"[']])
def test_the_deepest_place_counts_wherever_it_is(inside: object) -> None:
    def text(levels: int) -> str:
        deep = inside
        for _ in range(levels):
            deep = [deep]
        return json.dumps([[inside] * 30 + [deep] + [inside] * 30])

    codec_for(Any).decode(text(MAX_DEPTH - 2), "{}")
    with pytest.raises(PayloadError, match="at most 64 levels"):
        codec_for(Any).decode(text(MAX_DEPTH - 1), "{}")


@settings(max_examples=300)
@given(st.text(alphabet='[]{}",:0123456789.eE+-nulltrefasx\\\0\ud800 ') | st.text(), st.data())
def test_decode_never_raises_anything_else(text: str, data: st.DataObject) -> None:
    annotation, _ = data.draw(st.sampled_from(SCALARS))
    for args, kwargs in ((text, "{}"), (f"[{text}]", "{}"), ("[]", text), ("[]", f'{{"x":{text}}}')):
        with contextlib.suppress(PayloadError):
            codec_for(annotation).decode(args, kwargs)


@settings(max_examples=200, deadline=None)
@given(JSON, st.sampled_from([annotation for annotation, _ in SCALARS]))
def test_json_of_another_shape_is_a_payload_error_or_fits(value: object, annotation: object) -> None:
    codec = codec_for(annotation)
    with contextlib.suppress(PayloadError):
        (found,), _ = codec.decode(msgspec.json.encode([value]).decode(), "{}")
        codec.encode((found,), {})


@pytest.mark.parametrize(
    ("annotation", "text"),
    [
        (datetime, '["2026-01-01T00:00:00"]'),
        (datetime, '["nope"]'),
        (datetime, "[1700000000]"),
        (Decimal, '["NaN"]'),
        (Decimal, '["1e9999999999999999999999"]'),
        (Decimal, "[1.5]"),
        (uuid.UUID, '["x"]'),
        (bytes, '["a"]'),
        (bytes, '["é==="]'),
        (bytes, '["Y!Q=="]'),
        (timedelta, '["1 day"]'),
        (Colour, '["green"]'),
        (Level, "[true]"),
        (Mixed, '["NONE"]'),
        (int, "[1.0]"),
        (int, "[null]"),
        (int, "[true]"),
        (float, f"[{'9' * 400}]"),
        (set[Any], "[[[]]]"),
        (dict[int, int], '[{"a":1}]'),
        (tuple[int, str], "[[1]]"),
        (Line, '[{"sku":"a"}]'),
        (Line, '[{"sku":"a","price":"x"}]'),
        (Options, "[{}]"),
        (Address, "[{}]"),
        (Order, "[{}]"),
    ],
)
def test_text_that_does_not_fit_the_annotation_is_refused(annotation: object, text: str) -> None:
    with pytest.raises(PayloadError, match=r"^x[^ ]* (must be|is not a valid|lacks) "):
        codec_for(annotation).decode(text, "{}")


def test_arguments_are_an_array_and_an_object() -> None:
    with pytest.raises(PayloadError, match=r"^args must be a JSON array, got int 5$"):
        codec_for(int).decode("5", "{}")
    with pytest.raises(PayloadError, match=r"^kwargs must be a JSON object, got list \[\]$"):
        codec_for(int).decode("[1]", "[]")


def test_advice_to_flush_is_for_callers_only() -> None:
    with pytest.raises(PayloadError, match=r"^x must be int, got None$"):
        codec_for(int).decode("[null]", "{}")


def test_fields_can_be_added_while_old_workers_run() -> None:
    (line,), _ = codec_for(Line).decode('[{"sku":"a","price":"1","colour":"red"}]', "{}")
    assert line == Line("a", Decimal(1))


# Results, headers, plain


@pytest.mark.parametrize(
    ("value", "back"),
    [
        (None, None),
        (1.5, 1.5),
        ((1, "é"), [1, "é"]),
        ({1: {2}}, {"1": [2]}),
        (datetime(2026, 1, 1, tzinfo=UTC), "2026-01-01T00:00:00Z"),
        (Decimal("1.10"), "1.10"),
        (uuid.UUID(int=0), "00000000-0000-0000-0000-000000000000"),
        (Line("a", Decimal(1)), {"sku": "a", "price": "1", "at": None, "children": []}),
        (Address("a"), {"streetName": "a", "validFrom": None, "extra": None}),
        (Order(orderId=1), {"order_id": 1, "paid_at": None, "total": "0"}),
        ([Order(orderId=1)], [{"order_id": 1, "paid_at": None, "total": "0"}]),
        (Colour.RED, "red"),
        (b"a", "YQ=="),
        (2**100, 2**100),
    ],
)
def test_results_are_written_as_json(value: object, back: object) -> None:
    text, why = encode_result(value)
    assert why is None
    assert text is not None
    assert decode_result(as_jsonb(text)) == back


class Liar:
    def __repr__(self) -> str:
        raise RuntimeError("no repr")

    __str__ = __repr__


class Bomb(Exception):
    def __str__(self) -> str:
        raise RuntimeError("no str")


@dataclasses.dataclass
class Trap:
    def __getattribute__(self, name: str) -> Any:
        raise Bomb("a\0b")


LOOP: list[Any] = []
LOOP.append(LOOP)


@pytest.mark.parametrize(
    ("value", "why"),
    [
        (math.nan, "finite"),
        ({"a": [math.inf]}, r"the result\['a'\]\[0\] must be a finite number"),
        ("a\0", "NUL"),
        ({"a\0": 1}, "NUL"),
        ("\ud800", "surrogate"),
        (Liar(), "Liar"),
        (Liar, "type"),
        (Trap(), ""),
        (LOOP, "deeper|recursion"),
        (10**5000, "2048 bits"),
        ("x" * MAX_RESULT_BYTES, "at most 1,048,576 bytes"),
        (lambda: 1, "function"),
        ({(1, 2): 3}, "keys"),
    ],
    ids=lambda each: type(each).__name__,
)
def test_a_result_that_cannot_be_stored_says_why_and_never_raises(value: object, why: str) -> None:
    text, reason = encode_result(value)
    assert text is None
    assert reason is not None
    assert "\0" not in reason
    assert len(reason.encode()) < 600
    with pytest.raises(AssertionError, match=why) if why else pytest.raises(AssertionError):
        raise AssertionError(reason)


def test_a_result_of_exactly_the_limit_is_stored() -> None:
    assert encode_result("x" * (MAX_RESULT_BYTES - 2))[1] is None
    assert encode_result("x" * (MAX_RESULT_BYTES - 1))[0] is None


@given(
    st.recursive(
        JSON | st.binary() | st.floats() | st.text(),
        lambda x: st.lists(x) | st.dictionaries(st.text() | st.integers(), x),
    )
)
@settings(max_examples=100)
def test_encode_result_gives_text_or_a_reason(value: object) -> None:
    text, why = encode_result(value)
    assert (text is None) is (why is not None)
    if text is not None:
        assert "\\u0000" not in text.replace("\\\\", "")
        decode_result(text)


def test_a_stored_result_that_is_no_json_is_a_payload_error() -> None:
    for text in ("", "nope", NESTED_20_000):
        with pytest.raises(PayloadError, match="the result must be"):
            decode_result(text)


def test_plain_arguments_and_headers() -> None:
    assert encode_plain((1, "é", (None,)), {"a": {"b": 1.5}}) == ('[1,"é",[null]]', '{"a":{"b":1.5}}')
    assert encode_headers({"trace": "00-ab", "tags": ["a"]}) == '{"trace":"00-ab","tags":["a"]}'
    for bad in ({1: 2}, {"a\0": 1}):
        with pytest.raises(PayloadError, match=r"^headers"):
            encode_headers(bad)  # type: ignore[arg-type]


# Error text


def test_clean_text_leaves_good_text_alone() -> None:
    assert clean_text("é", 2) == "é"
    assert clean_text("a\0b\ud800c", 100) == "a\ufffdb\ufffdc"


def test_a_long_text_keeps_its_head_and_tail() -> None:
    cut = clean_text("h" * 500 + "t" * 500, 100)
    assert cut.startswith("hhhhhhhh")
    assert cut.endswith("tttttttt")
    assert 98 <= len(cut.encode()) <= 100
    kept = cut.count("h") + cut.count("t") - 2  # the marker has two
    assert f"… {1000 - kept} bytes cut …" in cut


@given(st.text(st.characters(), max_size=300), st.integers(-3, 200))
def test_clean_text_always_fits_and_can_be_stored(text: str, limit: int) -> None:
    cleaned = clean_text(text, limit)
    assert len(cleaned.encode()) <= max(limit, 0)
    assert "\0" not in cleaned
