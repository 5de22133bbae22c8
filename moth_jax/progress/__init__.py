"""What a person sees while something long runs: a live bar, plain lines, or nothing.

    with console_progress().task("distances before", total=90, unit="directions") as task:
        for ...:
            task.advance(1, average=54.1, failures=0)

A terminal and a notebook get a bar that is redrawn; a file, a pipe or a CI log gets plain lines, at
most one every ten seconds. Library functions take `progress=True`, `False` or a `Progress`.
"""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TextIO

from moth_jax.errors import InputError
from moth_jax.progress.displays import Bars, Display, Lines, NotebookScreen, Nothing, TerminalScreen
from moth_jax.progress.task import Task

AfterAdvance = Callable[[], None]


def _go_on() -> None:
    """Do nothing."""


class Progress:
    """Shows tasks on a display. Made by `console_progress` or `silent_progress`.

    Args:
      display: where they are shown.
      clock: seconds.
      after_advance: called whenever a task has advanced, also where nothing is shown. It may end
        the work by raising; whoever advances a task has therefore saved, or reported, what is done.
    """

    def __init__(
        self,
        display: Display,
        *,
        clock: Callable[[], float] = time.monotonic,
        after_advance: AfterAdvance = _go_on,
    ):
        self._display = display
        self._clock = clock
        self._after_advance = after_advance

    @contextmanager
    def task(
        self, description: str, *, total: int | None = None, unit: str = "steps", completed: int = 0
    ) -> Iterator[Task]:
        """Show a task while the block runs; `completed` units of resumed work are already done."""
        task = Task(
            description,
            total=total,
            unit=unit,
            completed=completed,
            on_change=self._display.change,
            say=self._display.note,
            clock=self._clock,
            after_advance=self._after_advance,
        )
        self._display.begin(task)
        try:
            yield task
        except BaseException:
            task.failed = True
            raise
        finally:
            self._display.end(task)

    def note(self, text: str) -> None:
        """Print a line above the bar."""
        self._display.note(text)


def silent_progress(*, after_advance: AfterAdvance = _go_on) -> Progress:
    """Return a `Progress` that shows nothing; `after_advance` is called all the same.

    >>> with silent_progress().task("hardening", total=3) as task:
    ...     task.advance(2, loss=0.1)
    >>> task.completed
    2
    """
    return Progress(Nothing(), after_advance=after_advance)


def console_progress(
    stream: TextIO | None = None, *, after_advance: AfterAdvance = _go_on
) -> Progress:
    """Return a `Progress` for `stream` (default: standard error) or the notebook this runs in.

    `after_advance` is called whenever a task has advanced (`Progress`).
    """
    return Progress(_display(stream), after_advance=after_advance)


def _display(stream: TextIO | None) -> Display:
    if stream is None and _in_notebook():
        return Bars(NotebookScreen())
    stream = stream or sys.stderr
    if stream is None:  # a process may have none
        return Nothing()
    if stream.isatty():
        from rich.console import Console

        console = Console(file=stream, highlight=False)
        if not console.is_dumb_terminal and console.encoding.startswith("utf"):
            return Bars(TerminalScreen(console))
    return Lines(stream)


def as_progress(value: "bool | Progress | None") -> Progress:
    """Return the `Progress` meant by an argument `progress=`: True, False, None or one's own."""
    if isinstance(value, Progress):
        return value
    if value is None or isinstance(value, bool):
        return console_progress() if value else silent_progress()
    raise InputError(f"progress must be True, False or a moth_jax.progress.Progress, got {value!r}")


def _in_notebook() -> bool:
    """Whether this process serves a notebook (and not IPython in a terminal)."""
    if "IPython" not in sys.modules:
        return False
    shell = sys.modules["IPython"].get_ipython()
    return hasattr(shell, "kernel")
