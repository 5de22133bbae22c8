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
from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

from moth_jax.errors import InputError

Value = TypeVar("Value")


class Range(NamedTuple):
    """The numbers that an option may be, and how a message calls them."""

    name: str
    contains: Callable[[float], bool]


AT_LEAST_1 = Range("at least 1", lambda value: value >= 1)
NOT_NEGATIVE = Range("0 or more", lambda value: 0 <= value < math.inf)
POSITIVE = Range("above 0", lambda value: 0 < value < math.inf)
ABOVE_1 = Range("above 1", lambda value: 1 < value < math.inf)
SHARE = Range("in [0, 1]", lambda value: 0 <= value <= 1)
POSITIVE_SHARE = Range("in (0, 1]", lambda value: 0 < value <= 1)
BELOW_1 = Range("in [0, 1)", lambda value: 0 <= value < 1)
SEED = Range("in [0, 2**31)", lambda value: 0 <= value < 2**31)


def option(default: Value, allowed: Range) -> Value:
    """Return the field of a dataclass with this default, whose value must be `allowed`."""
    return dataclasses.field(default=default, metadata={"allowed": allowed})


def check_options(options: Any, *, of: type | None = None, prefix: str = "") -> None:
    """Raise `InputError` at the first option that is out of its range.

    Args:
      options: a dataclass; or, with `of`, any object that has the fields of that dataclass.
      of: the dataclass that says the ranges.
      prefix: what stands before the name of an option in the message, such as "harden.".
    """
    for field in dataclasses.fields(of or options):
        value = getattr(options, field.name, None)
        nested = field.default if dataclasses.is_dataclass(field.default) else None
        if nested is not None:
            check_options(value, of=type(nested), prefix=f"{prefix}{field.name}.")
        allowed = field.metadata.get("allowed")
        if allowed is None or value is None:  # None: the default of whatever it belongs to
            continue
        if not isinstance(value, numbers.Real) or not allowed.contains(value):
            raise InputError(f"{prefix}{field.name} must be {allowed.name}, got {value}")
