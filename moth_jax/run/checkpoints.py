"""Checkpoints (Orbax): models that can be used alone, and runs that can be killed and resumed.

A model's checkpoint is a folder with its variables, what it takes to rebuild it (`ModelSpec`:
architecture, classes, normalisation) and, once they are measured, its class distances. A run's
checkpoint is a tree of arrays and a JSON dict. Orbax writes a folder whole or not at all.
"""

import shutil
from concurrent import futures
from pathlib import Path

import jax
import numpy as np

from moth_jax.parallel.processes import broadcast_from_main, is_main, on_main
from moth_jax.storage.trees import load_tree, save_tree


class RunCheckpoints:
    """The latest states of one phase of a run, in a folder; only the newest is kept.

    They are written in the background, one at a time. What went wrong with one is raised by the
    next call, whichever it is, as `InputError`.
    """

    def __init__(self, folder: str | Path):
        self._folder = Path(folder)
        # Not Orbax's own saving in the background, which leaves a third of the time, and the
        # checksum, to the caller.
        self._background = futures.ThreadPoolExecutor(1, thread_name_prefix="checkpoints")
        self._writing: futures.Future | None = None

    def save(self, step: int, arrays: dict, metadata: dict) -> None:
        """Keep a state; earlier ones are removed once it is on disk.

        Returns when there is a copy of the arrays, whose memory may then be used again.
        """
        if not is_main():
            return
        self.wait()
        arrays = jax.tree.map(np.array, jax.device_get(arrays))
        self._writing = self._background.submit(self._write, step, arrays, metadata)

    def _write(self, step: int, arrays: dict, metadata: dict) -> None:
        newest = self._folder / f"{step:08d}"
        save_tree(newest, arrays, metadata)
        # Also what a kill or a full disk has left half-written.
        for other in self._folder.iterdir():
            if other != newest:
                shutil.rmtree(other)

    def wait(self) -> None:
        """Return once the last state is on disk."""
        writing = self._writing
        if writing is not None:
            futures.wait([writing])  # Ctrl-C may come here, and it is to be waited for again
            self._writing = None
            writing.result()

    def latest(self) -> tuple[dict, dict] | None:
        """Return (arrays, metadata) of the newest state; None if there is none."""
        self.wait()
        return broadcast_from_main(self._load_newest)

    def _load_newest(self) -> tuple[dict, dict] | None:
        newest = self.newest()
        return None if newest is None else load_tree(newest)

    def newest(self) -> Path | None:
        """Return where the newest state is on disk; None if there is none."""
        steps = (path for path in self._folder.glob("*") if path.name.isdigit())
        return max(steps, default=None)

    def clear(self) -> None:
        """Remove all states: the phase is done."""
        self.wait()
        on_main(shutil.rmtree, self._folder, True)
