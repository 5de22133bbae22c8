"""Finished parts of a measurement in a folder, so that an interrupted one goes on from there."""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np

from moth_jax.matrix import load_npz, save_npz
from moth_jax.triggers import Trigger

Directions = Sequence[tuple[int, int]]


class Chunk(NamedTuple):
    """The results of some directions.

    Attributes:
      directions: [D, 2] victim, target.
      sizes, rates: [D, S] per seed.
      trigger: [D, ...], the smallest over the seeds.
      seconds: wall time.
    """

    directions: np.ndarray
    sizes: np.ndarray
    rates: np.ndarray
    trigger: Trigger
    seconds: float


class ChunkStore:
    """Chunks in a folder, each a file that is there whole or not at all.

    A file's name is a digest of all that its numbers depend on. One that was written with other
    settings or inputs has another name, and is not found.

    Args:
      folder: where the files are; None keeps nothing.
      settings: what the measurement was asked for, as JSON can carry it.
      inputs: any tree of arrays: images, labels, and the model's variables or its logits.
    """

    def __init__(self, folder: str | Path | None, settings: dict, inputs):
        self._folder = None if folder is None else Path(folder)
        if self._folder is not None:
            self._folder.mkdir(parents=True, exist_ok=True)
            digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode())
            for leaf in jax.tree.leaves(inputs):
                digest.update(np.ascontiguousarray(leaf).data)
            self._digest = digest.hexdigest()

    def load(self, directions: Directions) -> Chunk | None:
        """Return the chunk of these directions, measured with the same inputs; None if absent."""
        if self._folder is None or not self._path(directions).exists():
            return None
        arrays = load_npz(self._path(directions))
        return Chunk(
            directions=arrays["directions"],
            sizes=arrays["sizes"],
            rates=arrays["rates"],
            trigger=Trigger(arrays["mask"], arrays["pattern"]),
            seconds=float(arrays["seconds"]),
        )

    def save(self, chunk: Chunk) -> None:
        """Keep a finished chunk."""
        if self._folder is not None:
            fields = chunk._asdict()
            trigger = fields.pop("trigger")
            save_npz(
                self._path(chunk.directions),
                {**fields, "mask": trigger.mask, "pattern": trigger.pattern},
            )

    def _path(self, directions: Directions | np.ndarray) -> Path:
        named = hashlib.sha256(f"{self._digest} {np.asarray(directions).tolist()}".encode())
        return self._folder / f"{named.hexdigest()[:24]}.npz"
