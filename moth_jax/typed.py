"""Whether a value is of a type, as annotations write types: an option, a field of a file."""

import dataclasses
import math
import numbers
import types
import typing
from collections.abc import Mapping, Sequence
from typing import Any

_MAX_SHOWN = 80
_NAMES = {int: "a whole number", float: "a number", str: "text", bool: "True or False"}
_PLURALS = {int: "whole numbers", float: "numbers", str: "texts", bool: "True or False each"}


def is_of(value: object, hint: Any) -> bool:
    """Return whether `value` is of a type: a number is finite, and a bool is no number.

    Tuples may be lists, because JSON has no tuples. A dataclass stands for a mapping with exactly
    its fields.

    >>> is_of([1, 2], tuple[int, ...]), is_of(True, int), is_of(float("nan"), float | None)
    (True, False, False)
    """
    origin, parts = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return any(is_of(value, part) for part in parts)
    if hint in (int, float):
        kind = numbers.Integral if hint is int else numbers.Real
        return isinstance(value, kind) and not isinstance(value, bool) and _is_finite(value)
    if origin in (tuple, list, Sequence):
        return isinstance(value, tuple | list) and all(is_of(item, parts[0]) for item in value)
    if origin in (dict, Mapping):
        return isinstance(value, Mapping) and all(
            is_of(key, parts[0]) and is_of(item, parts[1]) for key, item in value.items()
        )
    if dataclasses.is_dataclass(hint):
        return isinstance(value, Mapping) and fault_of(value, hint) is None
    return hint is Any or isinstance(value, type(None) if hint is None else hint)


def _is_finite(value: Any) -> bool:
    try:
        return math.isfinite(value)
    except OverflowError:  # an integer that is no float
        return False


def fault_of(fields: object, schema: Any = None) -> str | None:
    """Return what is wrong with `fields` as those of a dataclass, None if nothing is.

    A field that has a default may be absent. Without a dataclass they may be any named fields.
    """
    if not isinstance(fields, Mapping):
        return f"it holds {shown(fields)} instead of named fields"
    if schema is None:
        return None
    hints, known = typing.get_type_hints(schema), dataclasses.fields(schema)
    surplus = sorted(map(str, fields.keys() - hints.keys()))
    if surplus:
        return f"unknown field {shown(surplus[0])}"
    for field in known:
        if field.name not in fields:
            if field.default is dataclasses.MISSING:
                return f"no field {field.name}"
        elif not is_of(fields[field.name], hints[field.name]):
            return f"{field.name} is {shown(fields[field.name])}"
    return None


def name_of(hint: Any) -> str:
    """Return what a message calls a type.

    >>> name_of(tuple[float, ...]), name_of(int | None)
    ('numbers', 'a whole number')
    """
    parts = [part for part in typing.get_args(hint) if part not in (type(None), Ellipsis)]
    if typing.get_origin(hint) in (tuple, list, Sequence):
        return _PLURALS.get(parts[0], "names")
    if parts:
        return name_of(parts[0])
    return _NAMES.get(hint, getattr(hint, "__name__", str(hint)))


def shown(value: object) -> str:
    """Return a value as a message quotes it: short, and in one line.

    >>> shown(10**9999), shown("a" * 999)[-5:]
    ('a number of 33216 bits', "a...'")
    """
    if isinstance(value, int) and value.bit_length() > 256:  # Python refuses to write many digits
        return f"a number of {value.bit_length()} bits"
    try:
        text = str(value) if isinstance(value, numbers.Number) else repr(value)
    except ValueError:
        return f"{type(value).__name__} of numbers with too many digits"
    return text if len(text) <= _MAX_SHOWN else f"{text[: _MAX_SHOWN - 4]}...{text[-1]}"
