"""How `progress` is shown: plain lines in a file, bars in a terminal or a notebook, or nothing.

A display is told when a task begins, changes and ends; all it reads is the task's public state.
"""

import time
from collections.abc import Callable
from typing import Any, Protocol, TextIO

from moth_jax.errors import printable
from moth_jax.progress.task import Task

_SECONDS_BETWEEN_LINES = 10.0
_SECONDS_BETWEEN_REDRAWS = 0.25


class Display(Protocol):
    """Where the state of tasks is shown."""

    def begin(self, task: Task) -> None:
        """A task begins."""

    def change(self, task: Task) -> None:
        """A task has advanced."""

    def end(self, task: Task) -> None:
        """A task is over, `task.failed` if by an exception."""

    def note(self, text: str) -> None:
        """Show a line that stays."""


class Nothing:
    """Shows nothing."""

    def begin(self, task: Task) -> None:
        """Show nothing."""

    change = end = begin

    def note(self, text: str) -> None:
        """Show nothing."""


class Lines:
    """Plain lines with the time of day, flushed: the first, the last, and one every ten seconds."""

    def __init__(self, stream: TextIO, *, clock: Callable[[], float] = time.monotonic):
        self._stream = stream
        self._clock = clock
        self._last = -float("inf")

    def begin(self, task: Task) -> None:
        """Print where the task starts from."""
        self._last = self._clock()
        of_total = f" of {task.total}" if task.total is not None else ""
        done = f"{task.completed}{of_total} {task.unit} done, continuing"
        self.note(f"{task.description}: {done if task.completed else _count(task)}")

    def change(self, task: Task) -> None:
        """Print the state, unless something was printed within the last ten seconds."""
        now = self._clock()
        if now - self._last >= _SECONDS_BETWEEN_LINES:
            self._last = now
            self.note(_with_figures(f"{task.description}: {_count(task)}, {_times(task)}", task))

    def end(self, task: Task) -> None:
        """Print the last state."""
        self.note(_last_line(task))

    def note(self, text: str) -> None:
        """Print `text`, whatever the encoding of the stream can carry of it."""
        line = f"{time.strftime('%H:%M:%S')} {printable(text)}\n"
        self._stream.write(_printable(line, getattr(self._stream, "encoding", None)))
        self._stream.flush()


class Bars:
    """One bar for each running task, redrawn by a screen; a finished task leaves one line."""

    def __init__(self, screen: "TerminalScreen | NotebookScreen"):
        self._screen = screen
        self._running: list[Task] = []

    def begin(self, task: Task) -> None:
        """Add a bar."""
        self._running = [*self._running, task]
        if len(self._running) == 1:
            self._screen.open(self._draw)

    def change(self, task: Task) -> None:
        """Redraw if it is time to."""
        self._screen.changed()

    def end(self, task: Task) -> None:
        """Replace the task's bar by its last line."""
        self._running = [other for other in self._running if other is not task]
        self._screen.note(_last_line(task))
        if not self._running:
            self._screen.close()

    def note(self, text: str) -> None:
        """Print `text` above the bars."""
        self._screen.note(text)

    def _draw(self):
        return _stack([_bar(task) for task in self._running])


class TerminalScreen:
    """A region at the bottom of a terminal; rich redraws it and lets prints pass above it."""

    def __init__(self, console):
        self._console = console

    def open(self, draw: Callable) -> None:
        """Begin to draw, four times a second."""
        from rich.live import Live

        self._live = Live(
            get_renderable=draw,
            console=self._console,
            refresh_per_second=1 / _SECONDS_BETWEEN_REDRAWS,
            transient=True,
        )
        self._live.start(refresh=True)

    def changed(self) -> None:
        """Do nothing: rich redraws from its own thread, so that the clock never stands still."""

    def note(self, text: str) -> None:
        """Print `text` above the region."""
        from rich.text import Text

        self._console.print(Text(printable(text)))

    def close(self) -> None:
        """Erase the region."""
        self._live.stop()


class NotebookScreen:
    """An output cell that is replaced in place; it stays in the saved notebook, unlike a widget."""

    def __init__(self):
        self._notes: list[str] = []
        self._handle: Any = None
        self._drawn = -float("inf")

    def open(self, draw: Callable) -> None:
        """Make an output."""
        from IPython.display import display  # pyright: ignore[reportMissingImports]

        self._draw = draw
        self._notes = []
        self._handle = display(self._content(), display_id=True)

    def changed(self) -> None:
        """Redraw, at most four times a second."""
        if time.monotonic() - self._drawn >= _SECONDS_BETWEEN_REDRAWS:
            self._drawn = time.monotonic()
            self._handle.update(self._content())

    def note(self, text: str) -> None:
        """Add a line above the bars."""
        text = printable(text)
        if self._handle is None:
            print(text)
            return
        self._notes.append(text)
        self._handle.update(self._content())

    def close(self) -> None:
        """Leave the notes and no bar."""
        self._handle.update(self._content())
        self._handle = None

    def _content(self):
        from rich.text import Text

        return _stack([*[Text(note) for note in self._notes], self._draw()])


def _bar(task: Task):
    from rich.progress_bar import ProgressBar
    from rich.table import Table
    from rich.text import Text

    row = Table.grid(padding=(0, 2, 0, 0), expand=True)
    row.add_column(no_wrap=True)
    row.add_column(ratio=1, min_width=4)
    row.add_column(no_wrap=True)
    row.add_column(no_wrap=True, style="dim")
    known = task.total is not None
    row.add_row(
        Text(task.description, style="bold"),
        ProgressBar(total=task.total, completed=task.completed, pulse=not known),
        Text(_count(task)),
        Text(_times(task)),
    )
    figures = _figures(task)
    return _stack([row, Text(f"  {figures}", style="cyan")] if figures else [row])


def _stack(renderables: list):
    """A column of renderables that a notebook can display too (rich's Group cannot be)."""
    from rich.table import Table
    from rich.text import Text

    if not renderables:
        return Text("")  # a table of nothing cannot expand
    column = Table.grid(expand=True)
    for renderable in renderables:
        column.add_row(renderable)
    return column


def _count(task: Task) -> str:
    if task.total is None:
        return f"{task.completed} {task.unit}"
    # Rounded down, so that 100 % means all of it.
    percent = f", {100 * task.completed // task.total} %" if task.total else ""
    return f"{task.completed}/{task.total} {task.unit}{percent}"


def _times(task: Task) -> str:
    remaining = task.remaining()
    left = "" if remaining is None else f", {_duration(remaining)} left"
    return f"{_duration(task.elapsed())} elapsed{left}"


def _last_line(task: Task) -> str:
    ending = "stopped at " if task.failed else ""
    count = f"{task.description}: {ending}{_count(task)}"
    return _with_figures(f"{count} in {_duration(task.elapsed())}", task)


def _with_figures(text: str, task: Task) -> str:
    figures = _figures(task)
    return f"{text} · {figures}" if figures else text


def _figures(task: Task) -> str:
    return " · ".join(f"{name.replace('_', ' ')} {_short(v)}" for name, v in task.figures.items())


def _short(value) -> str:
    """Four digits of a float, anything else as it is; also for the scalars of NumPy and JAX."""
    if hasattr(value, "item"):
        value = value.item()
    return f"{value:.4g}" if isinstance(value, float) else printable(str(value))


def _duration(seconds: float) -> str:
    """Hours, minutes and seconds.

    >>> _duration(3723.4)
    '1:02:03'
    """
    minutes, seconds = divmod(int(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{seconds:02d}"


def _printable(text: str, encoding: str | None) -> str:
    """`text` with what `encoding` cannot carry replaced: a class name must not end a long run."""
    encoding = encoding or "utf-8"
    return text.encode(encoding, "replace").decode(encoding)
