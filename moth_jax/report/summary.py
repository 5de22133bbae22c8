"""The figures of a run in one JSON file."""

import json
import os
from collections.abc import Mapping

from moth_jax.metrics import strict_json, write_atomically


def write_summary(path: str | os.PathLike, summary: Mapping) -> None:
    """Write `summary` as strict JSON, whole or not at all; NaN becomes null, infinity "inf".

    Raises:
      InputError: the file cannot be written.
    """
    text = json.dumps(strict_json(summary), indent=2, allow_nan=False, ensure_ascii=False)
    write_atomically(path, text.encode() + b"\n")
