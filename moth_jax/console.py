"""What the commands say, and keep libraries from saying, on the console."""

import logging
import sys
from typing import NoReturn

import absl.logging

EXIT_BAD_INPUT = 2


def fail(message: str, *, code: int = EXIT_BAD_INPUT) -> NoReturn:
    """Say one line and end the process."""
    print(f"moth_jax: {' '.join(message.split())}", file=sys.stderr)
    sys.exit(code)


def keep_libraries_quiet() -> None:
    """Keep what Orbax and TensorStore say about a fault off the console: we say it in one line."""
    absl.logging.set_verbosity(absl.logging.FATAL)
    logging.getLogger("asyncio").setLevel(logging.CRITICAL)
    report = sys.unraisablehook

    def report_others(fault) -> None:
        # Callbacks of TensorStore that come after a write has failed.
        if "Event loop is closed" not in str(fault.exc_value):
            report(fault)

    sys.unraisablehook = report_others
