"""What both commands do before they work: the console, exit codes, compiled programs on disk.

JAX is not imported here: the command must be able to take a signal before JAX is loaded.
"""

import _thread
import hashlib
import logging
import os
import platform
import sys
import threading
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

import absl.logging

from moth_jax.errors import printable

EXIT_BAD_INPUT, EXIT_INTERRUPTED = 2, 130
# EX_TEMPFAIL of sysexits.h, "try again later". A kill gives other codes (137, 143).
EXIT_PREEMPTED = 75
_SHOW_CURSOR = "\x1b[?25h"
_PACKAGE = Path(__file__).parents[1]
_CPUINFO = Path("/proc/cpuinfo")
_leave: list[Callable[[int], object]] = []


def fail(message: str, *, code: int = EXIT_BAD_INPUT) -> NoReturn:
    """Say one line and end the process."""
    _say(message)
    for leave in _leave:
        leave(code)
    sys.exit(code)


def at_failure(leave: Callable[[int], object]) -> None:
    """Have `leave(exit code)` called when `fail` ends the process."""
    _leave.append(leave)


def end_at_once(message: str, *, code: int) -> NoReturn:
    """Say one line and end the process from any thread, whatever the others are doing."""
    cursor = _SHOW_CURSOR if sys.stderr.isatty() else ""  # a bar may have hidden it
    # Not through sys.stderr, whose lock the main thread may hold.
    os.write(2, f"{_line(message)}{cursor}\n".encode())
    os._exit(code)


def _say(message: str) -> None:
    print(_line(message), file=sys.stderr)


def _line(message: str) -> str:
    return f"moth_jax: {printable(' '.join(message.split()))}"


def prepare_console() -> None:
    """Show warnings of this package in one line, and keep libraries quiet about faults."""
    _say_warnings()
    _keep_libraries_quiet()


def _say_warnings() -> None:
    """Show a warning of this package without the line of code that it comes from."""
    show = warnings.showwarning

    def show_ours(message, category, filename, *rest, **options) -> None:
        if category is UserWarning and Path(filename).is_relative_to(_PACKAGE):
            _say(f"warning: {message}")
        else:
            show(message, category, filename, *rest, **options)

    warnings.showwarning = show_ours


def _keep_libraries_quiet() -> None:
    """Keep what libraries say about a fault off the console: `fail` says it."""
    warnings.filterwarnings("ignore", module=r"PIL\.")  # of damaged and of enormous images
    absl.logging.set_verbosity(absl.logging.FATAL)
    logging.getLogger("asyncio").setLevel(logging.CRITICAL)
    report = sys.unraisablehook

    def report_others(fault) -> None:
        if fault.exc_type is KeyboardInterrupt:
            # Ctrl-C hit a callback whose errors Python ignores, such as JAX's for the garbage
            # collector. It is sent again, to arrive outside of the callback.
            threading.Timer(0.05, _thread.interrupt_main).start()
        # After a failed write, callbacks of TensorStore find their event loop closed.
        elif "Event loop is closed" not in str(fault.exc_value):
            report(fault)

    sys.unraisablehook = report_others


def keep_compilations() -> None:
    """Keep compiled programs in the user's cache folder, unless JAX was told where or not to.

    JAX_COMPILATION_CACHE_DIR names another folder; JAX_ENABLE_COMPILATION_CACHE=false keeps none.
    JAX finds by itself which programs fit (model, budgets, devices, versions). A command decides
    this, not the library: a notebook sets JAX's own options.
    """
    import jax

    if not jax.config.jax_compilation_cache_dir:  # pyright: ignore[reportAttributeAccessIssue]
        jax.config.update("jax_compilation_cache_dir", str(default_folder()))


def default_folder(cpuinfo: Path = _CPUINFO) -> Path:
    """Return the folder moth_jax/PROCESSOR in XDG_CACHE_HOME, which is ~/.cache if not set.

    One folder for each kind of processor: where machines share a home, code for instructions that
    one of them lacks would end the process there.
    """
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(home) / "moth_jax" / f"{platform.machine()}-{_instructions(cpuinfo)}"


def _instructions(cpuinfo: Path) -> str:
    """Return a short name of the processor's instruction set."""
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else [platform.processor()]
    flags = next((line for line in lines if line.startswith(("flags", "Features"))), lines[0])
    return hashlib.sha256(flags.encode()).hexdigest()[:8]
