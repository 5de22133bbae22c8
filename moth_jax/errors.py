"""The one exception type that means "the input is wrong", as opposed to "the program is wrong"."""

_MAX_LISTED = 8


class InputError(ValueError):
    """Something the user gave cannot be used.

    The message says what is wrong, quotes the value, says what is allowed and what to do next. The
    command line prints it as one line without a traceback; any other exception is a bug and keeps
    its traceback.
    """


def require_choice(what: str, value, choices) -> None:
    """Raise `InputError` listing `choices` unless `value` is one of them."""
    if value not in choices:
        raise InputError(f"unknown {what} {value!r}; choose one of: {', '.join(sorted(choices))}")


def listed(values, form=repr) -> str:
    """The first few values, each as `form` gives it, and how many more there are."""
    shown = ", ".join(form(value) for value in values[:_MAX_LISTED])
    more = len(values) - _MAX_LISTED
    return f"{shown} and {more} more" if more > 0 else shown


def first_line(error: BaseException) -> str:
    """The first line of what an error says, or its kind if it says nothing."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)
