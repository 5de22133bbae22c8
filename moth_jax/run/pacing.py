"""When a phase saves a checkpoint, and how long it took in all the processes it needed."""

import contextlib
import threading
import time
from collections.abc import Callable
from pathlib import Path

from moth_jax.errors import InputError
from moth_jax.parallel.processes import is_main
from moth_jax.run import preemption
from moth_jax.run.checkpoints import RunCheckpoints

State = Callable[[], tuple[dict, dict]]


class Pacer:
    """Says when a checkpoint is due, and counts the seconds of a phase.

    `earlier` is what `spent` gave the process that this one goes on from: seconds by the clock, and
    of all processor cores together, which do not depend on what else a machine does.
    """

    def __init__(self, interval: float, earlier: dict | None = None):
        self._interval = interval
        self._earlier = earlier or {"seconds": 0.0, "cpu_seconds": 0.0}
        self._started = self._last = time.perf_counter()
        self._cpu_started = time.process_time()

    def due(self) -> bool:
        """Return whether a checkpoint is due, and if so, count the time to the next one anew."""
        if time.perf_counter() - self._last < self._interval:
            return False
        self._last = time.perf_counter()
        return True

    def spent(self) -> dict[str, float]:
        """Return the seconds of all processes so far."""
        return {
            "seconds": self._earlier["seconds"] + time.perf_counter() - self._started,
            "cpu_seconds": self._earlier["cpu_seconds"] + time.process_time() - self._cpu_started,
        }


class Saver:
    """Saves the states of a phase when that is due, and when the process is to end.

        with Saver(checkpoints, pacer) as saver:
            for ...:
                saver.offer(step, lambda: (arrays, metadata))

    After the block all that was saved is on disk. The metadata get "spent", of the pacer.
    """

    def __init__(self, checkpoints: RunCheckpoints, pacer: Pacer):
        self._checkpoints, self._pacer = checkpoints, pacer
        self._unsaved: tuple[int, State] | None = None
        self._lock = threading.Lock()

    def offer(self, step: int, state: State) -> None:
        """Take note of a state at a safe point; `state()` stays what it is until the next one.

        Raises:
          Preempted: the process is to end; the state is on disk.
          InputError: a state before it could not be written.
        """
        ends = preemption.requested()
        with self._lock:
            self._unsaved = step, state
        if ends:
            raise preemption.Preempted(self._save_now())
        if self._pacer.due():
            self._save()

    def _save(self) -> None:
        with self._lock:
            self._save_unsaved()

    def _save_unsaved(self) -> None:
        if self._unsaved is not None and is_main():
            step, state = self._unsaved
            arrays, metadata = state()
            metadata = {**metadata, "spent": self._pacer.spent()}
            self._checkpoints.save(step, arrays, metadata)
            self._unsaved = None

    def _save_now(self) -> Path | None:
        # The thread of the signals comes here, too: all that asks the checkpoints holds the lock,
        # and what writes them in the background never does.
        with self._lock:
            self._save_unsaved()
            self._checkpoints.wait()
            return self._checkpoints.newest()

    def __enter__(self) -> "Saver":
        preemption.save_before_giving_up(self._save_now)
        return self

    def __exit__(self, fault, *_) -> None:
        preemption.save_before_giving_up(None)
        # Where the block has failed, that is what is told.
        with self._lock, contextlib.suppress(InputError) if fault else contextlib.nullcontext():
            self._checkpoints.wait()
