"""Options of functions and methods: dataclasses whose fields say which values they may have.

@dataclasses.dataclass(frozen=True)
class Options:
    epochs: float = option(2.0, POSITIVE)

    def __post_init__(self):
        check_options(self)
"""

import dataclasses
import math
import numbers
import typing
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple, TypeVar

from moth_jax.errors import InputError
from moth_jax.typed import is_of, name_of, shown

Value = TypeVar("Value")

LARGEST = 2**31 - 1  # number of an option: JAX counts with 32 bits


class Range(NamedTuple):
    """The numbers that an option may be, and how a message calls them.

    None may be beyond ±`most`, of which a message speaks where it is passed.
    """

    name: str
    contains: Callable[[float], bool]
    most: int = LARGEST


AT_LEAST_1 = Range("at least 1", lambda value: value >= 1)
NOT_NEGATIVE = Range("0 or more", lambda value: 0 <= value < math.inf)
POSITIVE = Range("above 0", lambda value: 0 < value < math.inf)
ABOVE_1 = Range("above 1", lambda value: 1 < value < math.inf)
SHARE = Range("in [0, 1]", lambda value: 0 <= value <= 1)
POSITIVE_SHARE = Range("in (0, 1]", lambda value: 0 < value <= 1)
BELOW_1 = Range("in [0, 1)", lambda value: 0 <= value < 1)
SEED = Range("in [0, 2**31)", lambda value: 0 <= value < 2**31)
BYTES = Range("0 or more", lambda value: value >= 0, most=2**63 - 1)


def option(default: Value, allowed: Range) -> Value:
    """Return the field of a dataclass with this default, whose value must be `allowed`.

    Of a tuple every element must be; it may be empty if its default is.
    """
    return dataclasses.field(default=default, metadata={"allowed": allowed})


def check_options(options: Any, *, of: type | None = None, prefix: str = "") -> None:
    """Raise `InputError` at the first option that is not of its type, or out of its range.

    Args:
      options: a dataclass; or, with `of`, any object that has the fields of that dataclass.
      of: the dataclass that says the types and ranges.
      prefix: what stands before the name of an option in the message, such as "harden.".
    """
    of = of or type(options)
    hints = typing.get_type_hints(of)
    for field in dataclasses.fields(of):
        value = getattr(options, field.name, dataclasses.MISSING)
        if value is dataclasses.MISSING:  # an option that the whole run has in its place
            continue
        if dataclasses.is_dataclass(field.default):
            nested = type(field.default)
            if not any(hasattr(value, inner.name) for inner in dataclasses.fields(field.default)):
                raise InputError(
                    f"{prefix}{field.name} must be such as {field.default}, got {shown(value)}"
                )
            check_options(value, of=nested, prefix=f"{prefix}{field.name}.")
            continue
        allowed = field.metadata.get("allowed")
        check_option(f"{prefix}{field.name}", value, hints[field.name], allowed)
        if isinstance(field.default, tuple) and field.default and not value:
            raise InputError(
                f"{prefix}{field.name} must be {name_of(hints[field.name])} such as "
                f"{field.default}, got {value}"
            )


def check_option(name: str, value: object, hint: Any, allowed: Range | None = None) -> None:
    """Raise `InputError` unless an option is of its type and each of its numbers is `allowed`.

    `name` is what the message calls it.
    """
    if is_of(value, None) and is_of(value, hint):  # the default of whatever it belongs to
        return
    values: Any = value if isinstance(value, tuple | list) else [value]
    number = isinstance(value, numbers.Real) and not isinstance(value, bool)
    fraction = number and is_of(value, float) and not is_of(value, hint)
    kind = "" if number and allowed and not fraction else name_of(hint)
    wanted = ", ".join(filter(None, [kind, allowed and allowed.name]))
    if not (is_of(value, hint) and (allowed is None or all(map(allowed.contains, values)))):
        raise InputError(f"{name} must be {wanted}, got {shown(value)}")
    most = allowed.most if allowed else LARGEST
    if any(abs(item) > most for item in values if not isinstance(item, str | Mapping)):
        raise InputError(f"{name} must be at most {most:,}, got {shown(value)}")


def whole_numbers(name: str, given: Any) -> tuple[int, ...]:
    """Return a sequence of any kind, such as an array, as integers; else raise `InputError`.

    `name` is what the message calls it.

    >>> whole_numbers("classes", range(2)), whole_numbers("classes", [7])
    ((0, 1), (7,))
    """
    values = list(given) if isinstance(given, Iterable) and not isinstance(given, str) else given
    check_option(name, values, tuple[int, ...])
    return tuple(map(int, values))
