"""A piece of long work, as it advances."""

from collections.abc import Callable


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
        after_advance: Callable[[], None],
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
        self._after_advance = after_advance
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
        self._after_advance()

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
