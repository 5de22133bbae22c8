"""Signals that ask a process to end: SIGTERM, as schedulers send it, and SIGUSR1, as SLURM can.

    with preemption.watch(grace_seconds=20):
        progress = console_progress(after_advance=preemption.stop_here)
        ...

A safe point is a place where all that is done is saved or can be. A run passes one whenever a task
advances, and whenever a state is offered (`checkpoints.Saver`). A thread of its own reads the
signals, because Python's handlers wait while XLA compiles or computes. If no safe point comes
within the grace period, the thread saves the last state that was offered and ends the process. A
second signal ends it at once.
"""

import itertools
import os
import select
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from moth_jax.errors import InputError
from moth_jax.run.console import EXIT_BAD_INPUT, EXIT_INTERRUPTED, EXIT_PREEMPTED, end_at_once

GRACE_SECONDS = 20.0  # Kubernetes, SLURM and the clouds' spot machines give 30 before they kill
_SAME_SECONDS = 1.0  # `timeout` and `srun` send a signal to a process and to its group
_SIGNALS = tuple(getattr(signal, name) for name in ("SIGTERM", "SIGUSR1") if hasattr(signal, name))

SaveNow = Callable[[], Path | None]


class Preempted(BaseException):
    """The process ends because a signal asked it to; what it has done is on disk.

    Like `KeyboardInterrupt` it is not an `Exception`: nothing is at fault.

    Attributes:
      saved: where it is; None if there was nothing to save since the last result.
    """

    def __init__(self, saved: Path | None = None):
        super().__init__(saved)
        self.saved = saved

    def __str__(self) -> str:
        """Return what is said to the user."""
        return _said(self.saved)


def _said(saved: Path | None) -> str:
    done = f"saved in {saved}; the same command goes on from there"
    return f"ended by a signal; {done if saved else 'the same command goes on'}"


def requested() -> bool:
    """Return whether the process is to end here. It must be asked once at each safe point.

    Several processes pass the same safe points, and all get the same answer.
    """
    if _on_several_hosts():
        from jax.experimental import multihost_utils

        return multihost_utils.reached_preemption_sync_point(next(_safe_points))
    return _watch is not None and _watch.asked


def stop_here(saved: Path | None = None) -> None:
    """Raise `Preempted` if the process is to end; what is done is `saved`."""
    if requested():
        raise Preempted(saved)


@contextmanager
def saved_in(folder: Path) -> Iterator[None]:
    """Let a `Preempted` that leaves the block say that what is done is in `folder`."""
    try:
        yield
    except Preempted as end:
        end.saved = end.saved or folder
        raise


def save_before_giving_up(save: SaveNow | None) -> None:
    """Have `save` called if no safe point is reached within the grace period; None for nothing.

    It is called in another thread, and returns where it saved the last state.
    """
    if _watch is not None:
        _watch.save = save


@contextmanager
def watch(*, grace_seconds: float = GRACE_SECONDS) -> Iterator[None]:
    """Watch for the signals while the block runs. Only the main thread may call it.

    With several processes SIGTERM is left to JAX, which tells the other processes.
    """
    global _watch
    while _until_watched:
        signal.signal(*_until_watched.popitem())
    taken = [s for s in _SIGNALS if s != signal.SIGTERM or not _on_several_hosts()]
    _watch = _Watch(grace_seconds)
    before = {number: signal.signal(number, lambda *_: None) for number in taken}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        _watch.close()
        _watch = None


def end_until_watched() -> None:
    """Have the signals end the process, with the same exit code, until `watch` begins.

    Importing modules and reading the configuration takes seconds, in which nothing is done yet.
    """

    def end(number: int, frame) -> None:
        del frame
        code = EXIT_INTERRUPTED if number == signal.SIGINT else EXIT_PREEMPTED
        end_at_once("ended by a signal before it began; the same command begins", code=code)

    for number in (*_SIGNALS, signal.SIGINT):
        if signal.getsignal(number) != signal.SIG_IGN:  # a job in the background ignores some
            _until_watched[number] = signal.signal(number, end)


class _Watch:
    """Reads signals in a thread, from a socket that Python writes their numbers to at once."""

    def __init__(self, grace_seconds: float):
        self.asked = False
        self.save: SaveNow | None = None
        self._grace_seconds = grace_seconds
        self._deadline: float | None = None
        self._first: tuple[int, float] | None = None
        self._reader, self._writer = socket.socketpair()
        self._writer.setblocking(False)
        self._before = signal.set_wakeup_fd(self._writer.fileno(), warn_on_full_buffer=False)
        self._thread = threading.Thread(target=self._read, name="signals", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """End the thread."""
        signal.set_wakeup_fd(self._before)
        self._writer.close()
        self._thread.join()
        self._reader.close()

    def _read(self) -> None:
        while True:
            left = None
            if self._deadline is not None:
                left = max(self._deadline - time.monotonic(), 0.0)
            if not select.select([self._reader], [], [], left)[0]:
                self._give_up()
            numbers = self._reader.recv(64)
            if not numbers:
                return
            for number in numbers:
                self._receive(number, time.monotonic())

    def _receive(self, number: int, now: float) -> None:
        if number not in (*_SIGNALS, signal.SIGINT):
            return
        if self._first is None:
            self._first = number, now
            if number in _SIGNALS:  # the first Ctrl-C is Python's KeyboardInterrupt
                self._ask(number)
        elif now - self._first[1] > _SAME_SECONDS:
            code = EXIT_INTERRUPTED if number == signal.SIGINT else EXIT_PREEMPTED
            message = "ended at once; the same command goes on from the last checkpoint"
            end_at_once(message, code=code)

    def _ask(self, number: int) -> None:
        if _on_several_hosts() and number != signal.SIGTERM:
            os.kill(os.getpid(), signal.SIGTERM)  # JAX tells the other processes
            return
        self._deadline = time.monotonic() + self._grace_seconds
        self.asked = True

    def _give_up(self) -> None:
        """End the process, which has not passed a safe point in time."""
        try:
            saved = self.save() if self.save is not None else None
        except InputError as error:
            end_at_once(str(error), code=EXIT_BAD_INPUT)
        end_at_once(_said(saved), code=EXIT_PREEMPTED)


_watch: _Watch | None = None
_until_watched: dict[int, Any] = {}  # the handlers before `end_until_watched`
_safe_points = itertools.count()


def _on_several_hosts() -> bool:
    import jax

    return jax.distributed.is_initialized()
