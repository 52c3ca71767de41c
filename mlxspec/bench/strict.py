"""Frozen dataclasses from JSON, each value held against its annotation. No MLX."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import MISSING, Field, fields, is_dataclass
from functools import cache
from math import isfinite
from types import NoneType, UnionType
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

Kind = TypeVar("Kind")


class WrongValue(Exception):
    """A value that its annotation does not allow; the message names its place and both."""


def decoded(kind: type[Kind], value: object) -> Kind:
    """A dataclass from the plain values of its fields; those with a default may be absent.

    Args:
        kind: a dataclass whose fields are str, int, float, bool, None, Literal, Any, tuples of one
            type, mappings from str, dataclasses like it, or unions of them.

    Raises:
        WrongValue: a field is missing, unknown, or of another type.
    """
    made: Kind = _dataclass(kind, value, "")
    return made


def _dataclass(kind: Any, value: object, place: str) -> Any:
    if not isinstance(value, Mapping):
        raise _wrong(place, "an object", value)
    hints, known = _hints(kind), {field.name: field for field in fields(kind)}
    for name in value:
        if name not in known:
            raise WrongValue(f"{_within(place, name)} is not known")
    for name, field in known.items():
        if name not in value and _required(field):
            raise WrongValue(f"{_within(place, name)} is missing")
    return kind(**{name: _value(hints[name], value[name], _within(place, name)) for name in value})


def _value(kind: Any, value: object, place: str) -> Any:
    if kind is Any:
        return value
    if is_dataclass(kind):
        return _dataclass(kind, value, place)
    origin, inner = get_origin(kind), get_args(kind)
    if origin in (Union, UnionType):
        return _union(inner, value, place)
    if origin is Literal:
        if not any(type(value) is type(one) and value == one for one in inner):
            raise _wrong(place, "one of " + ", ".join(map(str, inner)), value)
        return value
    if origin is tuple:
        if not isinstance(value, list):
            raise _wrong(place, "a list", value)
        return tuple(_value(inner[0], one, f"{place}[{at}]") for at, one in enumerate(value))
    if origin is not None:  # a mapping from str
        if not isinstance(value, Mapping):
            raise _wrong(place, "an object", value)
        return {key: _value(inner[1], one, _within(place, key)) for key, one in value.items()}
    return _plain(kind, value, place)


def _plain(kind: Any, value: object, place: str) -> Any:
    """A string, a number, a truth value or None; a whole number is a number too."""
    if kind is float and type(value) is int:
        return float(value)
    if type(value) is not kind or (isinstance(value, float) and not isfinite(value)):
        raise _wrong(place, _NAMES[kind], value)
    return value


_NAMES = {str: "a text", int: "a whole number", float: "a number", bool: "true or false"}
_NAMES |= {NoneType: "null"}


def _union(kinds: tuple[Any, ...], value: object, place: str) -> Any:
    """The value as the first kind that takes it; else the error of the one that is no null."""
    wrong = None
    for kind in kinds:
        try:
            return _value(kind, value, place)
        except WrongValue as error:
            wrong = wrong or error
    assert wrong is not None
    raise wrong


def _required(field: Field[Any]) -> bool:
    return field.default is MISSING and field.default_factory is MISSING


def _wrong(place: str, expected: str, value: object) -> WrongValue:
    found = repr(value) if isinstance(value, str | int | float | None) else "something else"
    return WrongValue(f"{place or 'the file'} must be {expected}, and is {found[:60]}")


def _within(place: str, name: object) -> str:
    return f"{place}.{name}" if place else str(name)


@cache
def _hints(kind: Any) -> dict[str, Any]:
    return get_type_hints(kind)
