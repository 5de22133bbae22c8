"""Checkpoints within a phase of a run, which let it go on after it was interrupted or killed.

`RunCheckpoints` keeps the newest state on disk: a tree of arrays and a JSON dict. `Timer` says when
the next one is due. `Saver` saves the states that a phase offers.
"""

import contextlib
import dataclasses
import shutil
import textwrap
import threading
import time
from collections.abc import Callable, Mapping
from concurrent import futures
from pathlib import Path
from typing import Any

import jax
import numpy as np

from moth_jax.errors import InputError
from moth_jax.models.classifier import describe_mismatch, flat
from moth_jax.parallel.processes import broadcast_from_main, is_main, on_main
from moth_jax.run import preemption
from moth_jax.storage.files import cannot_write
from moth_jax.storage.trees import load_tree, save_tree
from moth_jax.typed import fault_of

State = Callable[[], tuple[dict, dict]]
_OF = "of"


class RunCheckpoints:
    """The latest states of one phase of a run, in a folder; only the newest is kept.

    They are written in the background, one at a time. The next call of any method raises as
    `InputError` what went wrong with one.

    Args:
      folder: the folder, in one that is there.
      schema: a dataclass with the fields that the JSON dict must have; any fields if None.
      of: what the states are of, as JSON can carry it. States of something else are refused, but
        for None.
    """

    def __init__(
        self, folder: str | Path, schema: type | None = None, *, of: Mapping | None = None
    ):
        self._folder = Path(folder)
        self._schema, self._of = schema, of
        # Orbax could save in the background itself, but leaves a third of the time, and the
        # checksum, to the caller.
        self._background = futures.ThreadPoolExecutor(1, thread_name_prefix="checkpoints")
        self._writing: futures.Future | None = None

    def save(self, step: int, arrays: dict, metadata: dict) -> None:
        """Keep a state; earlier ones are removed once it is on disk.

        It returns once the arrays are copied. Their memory may then be used again.
        """
        if not is_main():
            return
        self.wait()
        arrays = jax.tree.map(np.array, jax.device_get(arrays))
        self._writing = self._background.submit(self._write, step, arrays, metadata)

    def _write(self, step: int, arrays: dict, metadata: dict) -> None:
        newest = self._folder / f"{step:08d}"
        try:
            # Not its parents: a work folder that was removed must not come back half.
            self._folder.mkdir(exist_ok=True)
        except OSError as error:
            raise cannot_write(self._folder, error) from error
        save_tree(newest, arrays, {**metadata, _OF: self._of})
        # Among the others may be what a kill or a full disk has left half-written.
        for other in self._folder.iterdir():
            if other != newest:
                shutil.rmtree(other)

    def wait(self) -> None:
        """Return once the last state is on disk."""
        writing = self._writing
        if writing is not None:
            futures.wait([writing])  # Ctrl-C may interrupt this; the next call waits again
            self._writing = None
            writing.result()

    def latest(self) -> tuple[dict, dict] | None:
        """Return (arrays, metadata) of the newest state; None if there is none."""
        self.wait()
        return broadcast_from_main(self._load_newest)

    def _load_newest(self) -> tuple[dict, dict] | None:
        newest = self.newest()
        if newest is None:
            return None
        arrays, metadata = load_tree(newest)
        of, fault = metadata.pop(_OF, None), fault_of(metadata, self._schema)
        if self._of is not None and of != self._of:
            raise InputError(
                f"{newest} is not of this run; move it away, and the same command begins this "
                "part anew"
            )
        if fault is not None:
            raise self.unusable(fault)
        return arrays, metadata

    def check_like(self, arrays: object, like: object) -> None:
        """Raise `InputError` unless all of `like` is in the newest state, in shape and dtype."""
        expected, given = ({n: _kind(leaf) for n, leaf in flat(t).items()} for t in (like, arrays))
        known = {name: kind for name, kind in given.items() if name in expected}
        mismatch = describe_mismatch(expected, known)
        if mismatch:
            raise self.unusable(mismatch)

    def unusable(self, fault: object) -> InputError:
        """Return the fault that says that the newest state cannot be gone on from."""
        reason = textwrap.shorten(str(fault), 200)
        return InputError(
            f"{self.newest()} cannot be gone on from ({reason}); move it away, and the same "
            "command begins this part anew"
        )

    def newest(self) -> Path | None:
        """Return where the newest state is on disk; None if there is none."""
        steps = (path for path in self._folder.glob("*") if path.name.isdigit())
        return max(steps, default=None)

    def clear(self) -> None:
        """Remove all states: the phase is done."""
        self.wait()
        on_main(shutil.rmtree, self._folder, True)


def _kind(leaf: Any) -> tuple:
    return (str(leaf.dtype), *leaf.shape)


@dataclasses.dataclass(frozen=True)
class Spent:
    """What `Timer.spent` returns."""

    seconds: float
    cpu_seconds: float


class Timer:
    """Says when a checkpoint is due, and counts the seconds of a phase.

    They are seconds by the clock, and those of all processor cores together, which do not depend on
    what else a machine does.

    Args:
      interval: seconds between two checkpoints.
      earlier: what `spent` returned in the process before this one, None if this is the first.
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
    """Saves the states of a phase when one is due, and the last one when the process is to end.

        with Saver(checkpoints, timer) as saver:
            for ...:
                saver.offer(step, lambda: (arrays, metadata))

    After the block all that was saved is on disk. "spent" of the metadata is the timer's.
    """

    def __init__(self, checkpoints: RunCheckpoints, timer: Timer):
        self._checkpoints, self._timer = checkpoints, timer
        self._unsaved: tuple[int, State] | None = None
        self._lock = threading.Lock()

    def offer(self, step: int, state: State) -> None:
        """Take note of a state at a safe point. `state()` must return it until the next offer.

        Raises:
          Preempted: the process is to end; the state is saved when the block ends.
          InputError: a state before it could not be written.
        """
        ends = preemption.requested()
        with self._lock:
            self._unsaved = step, state
        if ends:
            raise preemption.Preempted
        if self._timer.due():
            self._save()

    def _save(self) -> None:
        with self._lock:
            self._save_unsaved()

    def _save_unsaved(self) -> None:
        if self._unsaved is not None and is_main():
            step, state = self._unsaved
            arrays, metadata = state()
            metadata = {**metadata, "spent": self._timer.spent()}
            self._checkpoints.save(step, arrays, metadata)
            self._unsaved = None

    def _save_now(self) -> Path | None:
        # The thread of the signals calls this, too. Whoever uses the checkpoints holds the lock;
        # the thread that writes them never does.
        with self._lock:
            self._save_unsaved()
            self._checkpoints.wait()
            return self._checkpoints.newest()

    def __enter__(self) -> "Saver":
        preemption.save_before_giving_up(self._save_now)
        return self

    def __exit__(self, kind: object, fault: BaseException | None, *_: object) -> None:
        preemption.save_before_giving_up(None)
        if isinstance(fault, preemption.Preempted):
            fault.saved = self._save_now()
            return
        # Where the block has failed, its fault is told and not that of a checkpoint.
        with self._lock, contextlib.suppress(InputError) if fault else contextlib.nullcontext():
            self._checkpoints.wait()
