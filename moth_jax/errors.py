"""The one exception type that means "the input is wrong", as opposed to "the program is wrong"."""

import unicodedata
from collections.abc import Hashable

_MAX_LISTED = 8
# Control characters and separators of lines, what is half a character, and marks that turn the
# order of the text around: a console obeys them, and shows something else than there is.
_UNPRINTABLE = ("Cc", "Cs", "Zl", "Zp")
_TURNING = frozenset("\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")


class InputError(ValueError):
    """Something the user gave cannot be used.

    The message says what is wrong, quotes the value, says what is allowed and what to do next. The
    command line prints it as one line without a traceback; any other exception is a bug and keeps
    its traceback.
    """


def require_choice(what: str, value, choices) -> None:
    """Raise `InputError` listing `choices` unless `value` is one of them."""
    if not isinstance(value, Hashable) or value not in choices:
        raise InputError(f"unknown {what} {value!r}; choose one of: {', '.join(sorted(choices))}")


def listed(values, form=repr) -> str:
    """The first few values, each as `form` gives it, and how many more there are."""
    shown = ", ".join(form(value) for value in values[:_MAX_LISTED])
    more = len(values) - _MAX_LISTED
    return f"{shown} and {more} more" if more > 0 else shown


def first_line(error: BaseException) -> str:
    """The first line of what an error says, or its kind if it says nothing."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def printable(text: str) -> str:
    """Return the text with what a console obeys, or cannot show, written as an escape.

    >>> printable("red\\x1b[2J")
    'red\\\\x1b[2J'
    """
    if text.isprintable():
        return text
    return "".join(_escaped(c) if _is_unprintable(c) else c for c in text)


def _is_unprintable(character: str) -> bool:
    return unicodedata.category(character) in _UNPRINTABLE or character in _TURNING


def _escaped(character: str) -> str:
    return character.encode("unicode_escape").decode()
