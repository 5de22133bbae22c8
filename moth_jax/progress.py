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

from moth_jax.displays import Bars, Display, Lines, NotebookScreen, Nothing, TerminalScreen
from moth_jax.errors import InputError


class Task:
    """One piece of long work, of `total` units (None: unknown) with `completed` of them done."""

    def __init__(
        self,
        description: str,
        *,
        total: int | None,
        unit: str,
        completed: int,
        on_change: Callable[["Task"], None],
        say: Callable[[str], None],
        clock: Callable[[], float],
    ):
        self.description = description
        self.total = total
        self.unit = unit
        self.completed = completed
        self.figures: dict = {}
        self.failed = False
        self._on_change = on_change
        self._say = say
        self._clock = clock
        self._start = clock()
        self._done_here = 0
        self._last_n = 0
        self._advances: list[tuple[float, int]] = []  # (time, done here): the first and the last

    def advance(self, n: int = 1, /, **figures) -> None:
        """Record that `n` more units are done (0 is allowed) and the latest `figures` to show.

        A figure stays until it is given again; floats are shown with four digits.
        """
        self.figures = {**self.figures, **figures}
        if n:
            self.completed += n
            self._done_here += n
            self._last_n = n
            self._advances = [*self._advances[:1], (self._clock(), self._done_here)]
        if self.completed != self.total:  # else the last line says it
            self._on_change(self)

    def skip(self, n: int, /, **figures) -> None:
        """Like `advance` for work of an earlier run that was only loaded: says nothing of pace."""
        self.completed += n
        self.advance(0, **figures)

    def resume(self, n: int, /, **figures) -> None:
        """Like `skip`, and say in a line that `n` units were done before, unless those are all."""
        self.skip(n, **figures)
        if n and self.completed != self.total:
            of_total = "" if self.total is None else f" of {self.total}"
            done = f"{self.completed}{of_total} {self.unit} done, continuing"
            self._say(f"{self.description}: {done}")

    def elapsed(self) -> float:
        """Seconds since this process began the task."""
        return self._clock() - self._start

    def remaining(self) -> float | None:
        """Seconds left at the pace of this process, or None before anything can be said.

        Work that was already done when the task began says nothing about the pace. Neither does the
        first advance once there is a second: it contains the compilation.
        """
        if self.total is None or not self._advances:
            return None
        left = max(self.total - self.completed, 0)
        last, done = self._advances[-1]
        if len(self._advances) == 1:
            pace = (last - self._start) / self._last_n
        else:
            first, done_first = self._advances[0]
            pace = (last - first) / (done - done_first)
        # Between two advances the estimate counts down, but only as far as the unit in progress.
        return max(left * pace - (self._clock() - last), max(left - self._last_n, 0) * pace)


class Progress:
    """Shows tasks on a display. Made by `console_progress` or `silent_progress`."""

    def __init__(self, display: Display, *, clock: Callable[[], float] = time.monotonic):
        self._display = display
        self._clock = clock

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


def silent_progress() -> Progress:
    """Return a `Progress` that shows nothing.

    >>> with silent_progress().task("hardening", total=3) as task:
    ...     task.advance(2, loss=0.1)
    >>> task.completed
    2
    """
    return Progress(Nothing())


def console_progress(stream: TextIO | None = None) -> Progress:
    """Return a `Progress` for `stream` (default: standard error) or the notebook this runs in."""
    if stream is None and _in_notebook():
        return Progress(Bars(NotebookScreen()))
    stream = stream or sys.stderr
    if stream.isatty():
        from rich.console import Console

        console = Console(file=stream, highlight=False)
        if not console.is_dumb_terminal and console.encoding.startswith("utf"):
            return Progress(Bars(TerminalScreen(console)))
    return Progress(Lines(stream))


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
