"""How much a file may say that it holds: a few bytes can name an array that fills the memory."""

import os
from collections.abc import Iterable
from pathlib import Path

from moth_jax.errors import InputError

# Compressed numbers are rarely a tenth of what they hold; small files may hold this much anyway.
_TIMES, _ANYWAY = 16, 128 * 2**20
VARIABLE = "MOTH_JAX_MAX_BYTES"


def check_expansion(path: Path, sizes: Iterable[int], what: str = "arrays") -> None:
    """Raise `InputError` if `sizes`, in bytes, sum to far more than the file at `path` can hold.

    16 times the file and 128 MiB are allowed. The environment variable MOTH_JAX_MAX_BYTES allows
    more.
    """
    claimed, held = sum(sizes), path.stat().st_size
    allowed = max(_TIMES * held, _ANYWAY, _allowed_by_user())
    if claimed > allowed:
        raise InputError(
            f"{path} says that its {what} take {claimed:,} bytes, but has {held:,}; if that is "
            f"right, allow it with {VARIABLE}={claimed}"
        )


def _allowed_by_user() -> int:
    given = os.environ.get(VARIABLE, "0")
    if not given.isascii() or not given.isdigit():
        raise InputError(f"{VARIABLE} must be a number of bytes, got {given!r}")
    return int(given)
